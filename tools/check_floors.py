#!/usr/bin/env python3
"""Checks that a header of ours keeps its floors apart:  check_floors.py [HEADER...] | --self-test

A header is a manual (the comment it begins with), a public part and, after `#if... TPRPC_IMPLEMENTATION`, sections:

    // >>shm ----------------------------------------------------------------------
    // What it owns.
    //
    // Uses: os, base.            names of sections above, or `nothing.`
    // Invariant: what always holds.

An internal name begins with its section's: tpr_shm_map, TPR_SHM_LIMIT. (A macro TPR_X of no section is anybody's.) In
tprpc_cuda.h, which may stand in one file with tprpc.h and uses only what is public of that, with tpr_cuda_ and
TPR_CUDA_ instead of tpr_ and TPR_: tpr_cuda_wire_read of section wire.
The checks below, one function each, give (line, message) for each violation.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FUNCTION_LINES = 70
MAX_COLUMNS = 120
MAX_MANUAL_LINES = 600

BANNER = re.compile(r'// >>([a-z0-9]+) -{3,}')
LISTED = re.compile(r'\s*(?://|/?\*+)?\s*>>([a-z0-9]+)\b(?! ?-{3})')
IMPLEMENTATION = re.compile(r'\s*#\s*if.*\bTPRPC_(\w+_)?IMPLEMENTATION\b')
DIRECTIVE = re.compile(r'\s*#')
INCLUDE = re.compile(r'\s*#\s*include\s*<([^>]*)>')
PLATFORM = re.compile(r'\b(__linux__|__linux|__gnu_linux__|_WIN32|_WIN64|__APPLE__|__unix__|__FreeBSD__|__ANDROID__|'
                      r'__x86_64__|__i386__|__aarch64__|__arm__|_M_X64|_M_ARM64|_M_IX86)\b')
FOREIGN = re.compile(r'\b(?:tpr|TPR)_\w+')
FUNCTION_NAME = re.compile(r'\b(tpr(?:pc)?_\w+)\s*\(')
# Comments and literals. A quote within a comment, or `//` within a string, is none, so they are found together.
COMMENT_OR_LITERAL = re.compile(r'//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)

PUBLIC_INCLUDES = {'stddef.h', 'stdint.h', 'stdbool.h'}
# What the system may refuse, in `os`: there a test's hook stands before it.
SYSTEM_CALL = re.compile(r'(?<![\w.>])(read|write|readv|writev|pread|pwrite|send|sendmsg|recv|recvmsg|socket|bind|listen|'
                         r'accept4?|connect|getsockopt|setsockopt|getsockname|getpeername|open|fcntl|fstat|fstatfs|'
                         r'ftruncate|mmap|madvise|memfd_create|eventfd|epoll_create1|epoll_ctl|epoll_wait|poll|ioctl|'
                         r'getaddrinfo|getifaddrs|getrandom|pthread_create|syscall)\s*\(')
# Cannot fail but by a mistake of ours, and leave nothing to be done about it.
UNHOOKED = {'tpr_os_futex_wake', 'tpr_os_poller_remove', 'tpr_os_tcp_close'}
# What may name platforms. A public part needs one, for what the compiler calls an export.
PLATFORM_SECTIONS = {'os', 'atomic'}
PUBLIC_PLATFORM = '_WIN32'


def blank(match):
    """Spaces in place of a comment or literal, so that lines and columns stay."""
    text = re.sub(r'[^\n]', ' ', match.group())
    return text if match.group()[0] == '/' else match.group()[0] + text[1:-1] + match.group()[0]


class Section:
    def __init__(self, name, line):
        self.name, self.line, self.end = name, line, None
        self.uses, self.invariant = None, False


class Header:
    """A header cut into lines and sections. Lines count from 0 here, from 1 in what is printed. Its internal names begin
    with `prefix`, the section, and another underscore."""

    def __init__(self, text, prefix='tpr_'):
        self.text = text
        self.prefix = prefix
        self.internal = re.compile(rf'\b(?:{prefix}|{prefix.upper()})([A-Za-z0-9]+)')
        self.raw = text.split('\n')
        self.code = COMMENT_OR_LITERAL.sub(blank, text).split('\n')
        starts = [i for i, line in enumerate(self.code) if IMPLEMENTATION.match(line)]
        first = starts[-1] if starts else len(self.raw)
        self.sections = []
        self.banners = [(i, m.group(1)) for i, m in ((i, BANNER.match(line)) for i, line in enumerate(self.raw)) if m]
        for i, name in self.banners:
            if i < first:
                continue
            if self.sections:
                self.sections[-1].end = i
            self.sections.append(Section(name, i))
        if self.sections:
            self.sections[-1].end = len(self.raw)
        self.public_end = self.sections[0].line if self.sections else len(self.raw)
        self.floor = {section.name: n for n, section in enumerate(self.sections)}
        self.where = [None] * self.public_end
        for section in self.sections:
            self.where += [section] * (section.end - section.line)
            self.read_comment(section)

    def read_comment(self, section):
        lines = []
        for line in self.raw[section.line + 1:section.end]:
            if not line.startswith('//'):
                break
            lines.append(line[2:].strip())
        comment = ' '.join(lines)
        uses = re.search(r'\bUses:\s*([^.]*)\.', comment)
        if uses:
            names = re.split(r'\s*,\s*(?:and\s+)?|\s+and\s+|\s+', uses.group(1).strip())
            section.uses = [] if names == ['nothing'] else [name for name in names if name]
        section.invariant = bool(re.search(r'\bInvariant:\s*\S', comment))

    def name(self, line):
        return self.where[line].name if self.where[line] else 'the public part'

    def functions(self):
        """(first line, last line, name) of each function definition. A `}` that begins a line ends whatever is open, so
        that one that #if has opened twice costs no more than itself."""
        depth, head, first, function, directive = 0, '', 0, False, False
        for i, line in enumerate(self.code):
            directive, was = line.rstrip().endswith('\\') and (directive or bool(DIRECTIVE.match(line))), directive
            if was or DIRECTIVE.match(line):
                continue
            if line.startswith('}'):
                depth = min(depth, 1)
            for c in line + ' ':
                if depth == 0 and c not in '{};':
                    first, head = (first, head + c) if head.strip() else (i, c)
                elif depth == 0 and c == ';':
                    head = ''
                elif c == '{' and head.split()[:1] == ['extern'] and '(' not in head:
                    head = ''                                # extern "C" {
                elif c == '{':
                    function = function if depth else head.rstrip().endswith(')')
                    depth += 1
                elif c == '}' and depth:
                    depth -= 1
                    if depth == 0 and function:
                        name = FUNCTION_NAME.search(head) or re.search(r'(\w+)\s*\(', head)
                        yield first, i, name.group(1)
                        head = ''


def check_sections(header):
    """Sections say what they use, of what stands above them, and what always holds."""
    if not header.sections:
        yield 0, 'no section: a line "// >>name ---" after "#ifdef TPRPC_IMPLEMENTATION"'
    seen = {}
    for section in header.sections:
        if section.name in seen:
            yield section.line, f'a second section {section.name}'
        seen[section.name] = section
        if section.uses is None:
            yield section.line, f'{section.name} has no "Uses: ....", or no full stop behind it'
        for name in section.uses or []:
            if name not in header.floor:
                yield section.line, f'{section.name} uses {name}, and there is no such section'
            elif name not in seen or name == section.name:
                yield section.line, f'{section.name} uses {name}, which does not stand above it'
        if not section.invariant:
            yield section.line, f'{section.name} has no "Invariant: ..."'


def check_contents(header):
    """The manual lists every section, and no other."""
    begin, end = manual(header)
    listed = {}
    for i in range(begin, end):
        line = header.raw[i]
        if LISTED.match(line):
            for name in re.findall(r'>>([a-z0-9]+)', line):
                listed[name] = i
    for section in header.sections:
        if section.name not in listed:
            yield section.line, f'{section.name} is not in the contents list of the manual'
    there = {name for _, name in header.banners}
    for name, i in listed.items():
        if name not in there:
            yield i, f'the contents list has {name}, and there is no such section'


def check_names(header):
    """A name is used in its own section and in those that stand below it and say so; it is defined in its own."""
    for i, line in enumerate(header.code):
        if re.match(r'\s*#\s*undef\b', line):
            continue                                         # all are undefined at the end
        section = header.where[i]
        for match in FOREIGN.finditer(line) if header.prefix != 'tpr_' else ():
            if not match.group().startswith((header.prefix, header.prefix.upper())):
                yield i, f'{match.group()} is internal to another header'
        for match in header.internal.finditer(line):
            owner, name = match.group(1).lower(), re.match(r'\w+', line[match.start():]).group()
            if owner not in header.floor:
                if name.startswith(header.prefix):
                    yield i, f'{name}: there is no section {owner}'
            elif not section:
                yield i, f'{name} of {owner} in the public part'
            elif owner != section.name and header.floor[owner] > header.floor[section.name]:
                yield i, f'{name} in {section.name}, which stands above {owner}'
            elif owner != section.name and owner not in (section.uses or []):
                yield i, f'{name} in {section.name}, whose "Uses:" lacks {owner}'
    for start, _, name in header.functions():
        match = header.internal.match(name)
        if match and match.group(1) in header.floor and match.group(1) != header.name(start):
            yield start, f'{name} is defined in {header.name(start)}'


def check_public_last(header):
    """In a section the public functions stand last."""
    seen = {}
    for start, _, name in header.functions():
        section = header.where[start]
        if not section:
            continue
        if name.startswith('tprpc_'):
            seen.setdefault(section.name, name)
        elif name.startswith(header.prefix) and section.name in seen:
            yield start, f'{name} stands below {seen[section.name]}, a public function'


def check_includes(header):
    """System headers are included in `os`, but the public part's three."""
    for i, line in enumerate(header.raw):
        match = INCLUDE.match(line)
        if not match or not DIRECTIVE.match(header.code[i]) or header.name(i) == 'os':
            continue
        if header.where[i] or match.group(1) not in PUBLIC_INCLUDES:
            yield i, f'<{match.group(1)}> in {header.name(i)}'


def check_platforms(header):
    """Platforms are told apart in `os` and `atomic`."""
    for i, line in enumerate(header.code):
        for match in PLATFORM.finditer(line):
            if header.where[i] and header.where[i].name in PLATFORM_SECTIONS:
                continue
            if header.where[i] or match.group() != PUBLIC_PLATFORM:
                yield i, f'{match.group()} in {header.name(i)}'


def check_hooks(header):
    """In `os` a function that makes a system call asks a test's hook first."""
    for start, end, name in header.functions():
        if header.name(start) != 'os' or 'tpr_' + name[len(header.prefix):] in UNHOOKED:
            continue
        body = header.code[start:end + 1]
        made = [match.group(1) for line in body for match in SYSTEM_CALL.finditer(line)]
        hook = f'{header.prefix.upper()}OS_HOOKED'
        if made and not any(f'{hook}(' in line for line in body):
            yield start, f'{name} calls {made[0]} without {hook}'


def check_function_length(header):
    """A function fits on a screen."""
    for start, end, name in header.functions():
        if end - start + 1 > MAX_FUNCTION_LINES:
            yield start, f'{name} has {end - start + 1} lines; {MAX_FUNCTION_LINES} are allowed'


def check_ascii(header):
    for i, line in enumerate(header.raw):
        if not line.isascii():
            yield i, 'not ASCII: ' + ascii(''.join(c for c in line if ord(c) > 127))


def check_columns(header):
    for i, line in enumerate(header.raw):
        if len(line) > MAX_COLUMNS:
            yield i, f'{len(line)} columns; {MAX_COLUMNS} are allowed'


def manual(header):
    """The lines of the comment that the header begins with; an include guard may stand before it."""
    is_code = [bool(line.strip()) for line in header.code]
    begin = next((i for i, line in enumerate(header.raw) if line.strip() and not is_code[i]), 0)
    return begin, next((i for i in range(begin, len(is_code)) if is_code[i]), len(is_code))


def check_manual(header):
    """The manual stays a manual."""
    begin, end = manual(header)
    if end - begin > MAX_MANUAL_LINES:
        yield begin, f'the manual has {end - begin} lines; {MAX_MANUAL_LINES} are allowed'


def check_api_comments(header):
    """A public function has its contract above it, or behind it on its own lines."""
    for i in range(header.public_end):
        if not header.code[i].startswith('TPRPC_API') or '(' not in ' '.join(header.code[i:i + 2]):
            continue
        end = i
        while end + 1 < header.public_end and ';' not in header.code[end]:
            end += 1
        above = i > 0 and header.raw[i - 1].strip() and not header.code[i - 1].strip()
        behind = any(header.raw[n].rstrip() != header.code[n].rstrip() for n in range(i, end + 1))
        if not above and not behind:
            name = FUNCTION_NAME.search(' '.join(header.code[i:end + 1]))
            yield i, f'{name.group(1) if name else "a function"} is declared without a comment'


def check_defaults(header):
    """Every field of a _desc struct has a comment with its default: behind it (and further in on the lines that follow)
    or above it. A comment above a line of fields, or behind it, is that line's."""
    lines = range(header.public_end)
    for open_line in lines:
        match = re.match(r'typedef struct (tprpc_\w+_desc) \{', header.code[open_line])
        if not match:
            continue
        comments, statement, fields = '', '', []             # fields: [line, code, comments]
        for i in range(open_line, header.public_end):
            code = header.code[i].strip()
            indent = len(header.raw[i]) - len(header.raw[i].lstrip())
            if i == open_line:
                code = code[match.end():].strip()
            closed = re.search(r'\}\s*\w+\s*;', code)
            if closed:
                code = code[:closed.start()].strip()
            comment = uncommented(header.raw[i], header.code[i])
            if code:
                statement = f'{statement} {code}'.strip()
                comments += comment
                if ';' in code:
                    for part in statement.split(';')[:-1]:
                        fields.append([i, part.strip(), comments])
                    field_indent, comments, statement = indent, '', ''
            elif comment and fields and not statement and not comments and indent > field_indent:
                fields[-1][2] += comment                     # the comment behind the field goes on
            elif comment:
                comments += comment
            if closed:
                break
        for i, code, comment in fields:
            if '(default' not in comment:
                yield i, f'{match.group(1)}: "{code}" has no comment with "(default: ...)"'


def uncommented(raw, code):
    """What stands in a line beside its code."""
    return ''.join(r for r, c in zip(raw, code.ljust(len(raw))) if c == ' ' and r != c)


CHECKS = {name[len('check_'):]: check for name, check in list(globals().items()) if name.startswith('check_')}


def run(path):
    """Prints a line per check, and its violations; gives the number of checks that passed and failed."""
    text = path.read_text(encoding='utf-8', errors='surrogateescape')
    header, passed = Header(text, path.stem.replace('tprpc', 'tpr') + '_'), 0
    for name, check in CHECKS.items():
        violations = sorted(set(check(header)))
        print(f'FAIL {path.name} {name}' if violations else f'ok {path.name} {name}')
        for line, message in violations:
            print(f'    {path.name}:{line + 1}: {message}')
        passed += not violations
    return passed, len(CHECKS) - passed


# ---- the self-test: a good header, and for each check what it must find when something is changed ----

GOOD = r'''/* A header.

   Contents, to be searched for:
     >>os     what the system gives
     >>base   memory and "such
     >>wire   frames
*/
#ifndef TPRPC_H
#define TPRPC_H
#include <stdbool.h>
#include <stdint.h>

typedef struct tprpc_x_desc {
    // Above (default: 1)
    int32_t a, b;
    const char *name;   /* behind
                           (default: none) */
    void (*call)(int a, /* within (default: NULL) */
                 int b);
    int c;              // goes on
                        // (default: 0)
} tprpc_x_desc;
typedef struct tprpc_y_desc { int x; } tprpc_y_desc;   // (default: 0)

// Its contract. tpr_nothing_here, <stdio.h>, __linux__
TPRPC_API int32_t tprpc_add(int32_t a,
                            int32_t b);
TPRPC_API int32_t tprpc_sub(int32_t a);   // behind

#endif
#ifdef TPRPC_IMPLEMENTATION
// >>os ----------------------------------------------------------------------------
// The system.
//
// Uses: nothing.
// Invariant: "none" is kept.
#include <unistd.h>
#define TPR_ASSERT(x) do { \
    (void)(x); } while (0)
#ifdef __cplusplus
extern "C" {
#endif
#if defined(__linux__)
#define TPR_OS_LINUX 1
#endif
static int tpr_os_read(void) { return TPR_OS_LINUX; }
static int tpr_os_open(int fd) {
    if (TPR_OS_HOOKED("fcntl", 0)) return -1;
    return fcntl(fd, 0);
}
static void tpr_os_futex_wake(int *word) { syscall(1, word); }

// >>base --------------------------------------------------------------------------
// Memory.
//
// Uses: os.
// Invariant: a list ends, and
// more.
typedef struct tpr_base_list {
    struct tpr_base_list *next;
} tpr_base_list;

static int tpr_base_declared(int a,
                             int b);
enum {
    TPR_BASE_A = sizeof(int)
};
static int tpr_base_more(
    int x) {
    TPR_ASSERT(x);
    return tpr_os_read();
}

// >>wire --------------------------------------------------------------------------
// Frames.
//
// Uses: os,
// base.
// Invariant: all is read.
static const char *const tpr_wire_names[] = {
    "// tpr_pipe_x",
};
static int tpr_wire_long(tpr_base_list *list) {
    tpr_base_more(list != 0);
LONG
    return tpr_os_read();
}

TPRPC_API int32_t tprpc_add(int32_t a, int32_t b) {
    return a + b + tpr_wire_long(0) + tpr_wire_names[0][0];
}
#ifdef __cplusplus
}
#endif
#undef TPR_OS_LINUX
#endif
'''.replace('LONG\n', '    ;\n' * 66)

BAD = [     # (check, what is replaced, by what, the line at fault or what stands in it)
    ('ascii', 'Frames.', 'Fr\u00e4mes.', 'Fr\u00e4mes'),
    ('columns', '// Frames.', '// Frames.' + 111 * 'x', '// Frames'),
    ('hooks', '    if (TPR_OS_HOOKED("fcntl", 0)) return -1;\n', '', 'static int tpr_os_open'),
    ('hooks', 'return TPR_OS_LINUX;', 'return (int)read(0, 0, 0);', 'static int tpr_os_read'),
    ('function_length', '    ;\n', '    ;\n    ;\n', 'static int tpr_wire_long'),
    ('includes', '// Its contract', '#include <stdio.h>\n// Its contract', '#include <stdio.h>'),
    ('includes', 'typedef struct tpr_base_list {', '#include <stdint.h>\ntypedef struct tpr_base_list {',
     '#include <stdint.h>'),
    ('platforms', '    TPR_ASSERT(x);\n', '#ifdef _WIN32\n#endif\n', '#ifdef _WIN32'),
    ('platforms', '#include <stdbool.h>', '#include <stdbool.h>\n#if defined(__x86_64__)\n#endif', '#if defined(__x86'),
    ('names', 'Uses: os,\n// base.', 'Uses: os.', 'static int tpr_wire_long'),
    ('names', 'TPR_ASSERT(x);', 'tpr_wire_long(0);', 'tpr_wire_long(0);'),
    ('names', 'TPR_ASSERT(x);', 'x = TPR_WIRE_LIMIT;', 'TPR_WIRE_LIMIT'),
    ('names', 'TPR_ASSERT(x);', 'tpr_pipe_open();', 'tpr_pipe_open'),
    ('names', 'static int tpr_base_more(', 'static int tpr_os_more(', 'static int tpr_os_more('),
    ('names', 'int32_t a, b;', 'struct tpr_base_list *a;', 'tpr_base_list *a'),
    ('sections', 'Uses: nothing.', 'Needs nothing.', '>>os -'),
    ('sections', 'Uses: nothing.', 'Uses: nothing', '>>os -'),
    ('sections', 'Uses: nothing.', 'Uses: base.', '>>os -'),
    ('sections', 'Uses: nothing.', 'Uses: pipe.', '>>os -'),
    ('sections', 'Invariant: all is read', 'Always: all is read', '>>wire -'),
    ('contents', '     >>base', '     base', '>>base -'),
    ('contents', '     >>wire', '     >>pipe  pipes\n     >>wire', '>>pipe'),
    ('manual', '/* A header.', '/* A header.' + 600 * '\n', '/* A header'),
    ('api_comments', '// Its contract. tpr_nothing_here, <stdio.h>, __linux__\n', '\n', 'TPRPC_API int32_t tprpc_add'),
    ('api_comments', '   // behind', '', 'tprpc_sub'),
    ('defaults', '(default: 1)', '', 'int32_t a, b'),
    ('defaults', '(default: none)', '', '(behind|const char .name|\\*/)'),
    ('defaults', 'within (default: NULL)', '', 'int b);'),
    ('defaults', '// (default: 0)\n}', '// nothing\n}', 'int c;'),
    ('defaults', '   // (default: 0)\n\n', '\n\n', 'tprpc_y_desc'),
    ('public_last', '#undef TPR_OS', 'static int tpr_wire_z(void) {\n}\n#undef TPR_OS', 'static int tpr_wire_z'),
]


def self_test():
    """A bad header must fail the check it is made for, at the line at fault, and no other check."""
    passed = failed = 0

    def result(held, what):
        nonlocal passed, failed
        passed, failed = passed + held, failed + (not held)
        print(('ok ' if held else 'FAIL ') + what)

    def violations(text):
        header = Header(text)
        return {name: found for name, found in ((name, list(check(header))) for name, check in CHECKS.items()) if found}

    found = violations(GOOD)
    result(not found, f'good {found or ""}')
    for n, (check, old, new, line) in enumerate(BAD):
        text = GOOD.replace(old, new, 1)
        found = violations(text)
        hit = [(i + 1, message) for i, message in found.get(check, [])
               if line in text.split('\n')[i] or re.search(line, text.split('\n')[i])] if old in GOOD else []
        result(bool(hit) and set(found) == {check}, f'bad {n} {check}: {hit[0] if hit else found or "not found"}')
    other = GOOD.replace('tpr_', 'tpr_y_').replace('TPR_', 'TPR_Y_')
    for n, (old, new) in enumerate([('', ''), ('return tpr_y_os_read();', 'return tpr_os_read();'),
                                    ('Uses: os,\n// base.', 'Uses: os.')]):
        header = Header(other.replace(old, new, 1), 'tpr_y_')
        found = {name for name, check in CHECKS.items() if list(check(header))}
        result(found == ({'names'} if n else set()), f'other prefix {n}: {found or ""}')
    tested = {check for check, *_ in BAD}
    result(tested == set(CHECKS), f'every check is tested {set(CHECKS) - tested or ""}')
    return passed, failed


def main(args):
    if args == ['--self-test']:
        passed, failed = self_test()
    else:
        paths = [Path(arg) for arg in args] or [p for p in (ROOT / 'tprpc.h', ROOT / 'tprpc_cuda.h') if p.exists()]
        results = [run(path) for path in paths] or [(0, 1)]
        passed, failed = (sum(column) for column in zip(*results))
    print(f'{passed} passed, {failed} failed')
    return failed != 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
