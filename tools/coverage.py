#!/usr/bin/env python3
"""Line coverage of tprpc.h by section:  tools/coverage.py PROGRAM...

Runs the tests' programs, built for coverage, and the fuzz targets over their corpora, takes together what they ran of
tprpc.h, and shows a table. Fails where a section, or the whole, is below its bound, or a program fails.

A program that lies in a folder named fuzz is given tests/fuzz/corpus/NAME, each input of which it runs once. Profiles
are mapped files (%c), so that what a process ran counts however it ended.

    --lines SECTION    beside the table, lists the lines of a section that nothing ran ("all": of every section)
    --jobs N           so many programs side by side (default: one per processor)
    --self-test        tries the reading and the judging on made-up profiles

What is left out: the lines between an #if or #elif that asks for another machine than this one by its name and the next
#elif, #else or #endif. Nothing else: what no test reaches counts, whatever the reason.
"""
import argparse
import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEADER = os.path.join(ROOT, "tprpc.h")
LEAST = {"wire": 98.0}
LEAST_SECTION, LEAST_ALL = 85.0, 90.0


def sections(text):
    """[(name, first line, last line)] of the header's text, by its banners."""
    found = [(m.group(1), number) for number, line in enumerate(text.split("\n"), 1)
             if (m := re.match(r"// >>(\w+) -", line))]
    ends = [line - 1 for _, line in found[1:]] + [text.count("\n") + 1]
    return [(name, first, last) for (name, first), last in zip(found, ends)]


def elsewhere(text, machine):
    """The lines that only another machine compiles, the directives about them included."""
    lines, out = set(), False
    for number, line in enumerate(text.split("\n"), 1):
        if re.match(r"\s*#\s*(if|elif|else|endif)", line):
            named = re.fullmatch(r"\s*#\s*(?:el)?if defined\(__(x86_64|aarch64)__\)\s*", line)
            if out:
                lines.add(number)
            out = bool(named) and named.group(1) != machine
        if out:
            lines.add(number)
    return lines


def tool(name):
    """The LLVM tool that belongs to the compiler, else any."""
    compiler = shutil.which("clang")
    if compiler:
        said = subprocess.run([compiler, "-print-prog-name=" + name], capture_output=True, text=True).stdout.strip()
        if os.path.isabs(said) and os.access(said, os.X_OK):
            return said
    found = shutil.which(name)
    if not found:
        sys.exit("tools/coverage.py: %s is missing; tools/setup.sh coverage installs it" % name)
    return found


def read_lcov(text):
    """{line: times run} of tprpc.h in what llvm-cov exported."""
    lines, ours = {}, False
    for line in text.split("\n"):
        if line.startswith("SF:"):
            ours = os.path.basename(line[3:]) == "tprpc.h"
        elif ours and line.startswith("DA:"):
            number, count = line[3:].split(",")[:2]
            lines[int(number)] = lines.get(int(number), 0) + int(count)
    return lines


def run(program, folder):
    """Runs one program; returns (what it said when it failed, CPU seconds, its lines)."""
    name = os.path.basename(program)
    fuzz = os.path.basename(os.path.dirname(program)) == "fuzz"
    command = [program]
    if fuzz:
        command += ["-runs=0", os.path.join(ROOT, "tests", "fuzz", "corpus", name)]
    place = tempfile.mkdtemp(prefix=name + ".", dir=folder)
    environment = dict(os.environ, LLVM_PROFILE_FILE=os.path.join(place, "%p%c.profraw"))
    begin = time.time()
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, errors="replace")
    seconds = time.time() - begin
    raw = [os.path.join(place, entry) for entry in os.listdir(place)]
    raw = [path for path in raw if os.path.getsize(path)]   # of a program that ended before it began
    if ran.returncode or not raw:
        return "%s: exit status %d\n%s" % (program, ran.returncode, ran.stdout[-4000:]), seconds, {}
    merged = os.path.join(place, "merged")
    subprocess.run([tool("llvm-profdata"), "merge", "-sparse", "-o", merged] + raw, check=True)
    lcov = subprocess.run([tool("llvm-cov"), "export", "-format=lcov", "-instr-profile=" + merged, program, HEADER],
                          check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    shutil.rmtree(place)
    return "", seconds, read_lcov(lcov)


def judge(parts, lines):
    """The table, and what is below its bound: ([(name, lines, run, percent, least)], [name])."""
    rows, below = [], []
    for name, first, last in parts + [("all", 1, 1 << 60)]:
        of = [count for line, count in lines.items() if first <= line <= last]
        least = LEAST_ALL if name == "all" else LEAST.get(name, LEAST_SECTION)
        ran = sum(1 for count in of if count)
        percent = 100.0 * ran / len(of) if of else 100.0
        rows.append((name, len(of), ran, percent, least))
        if percent < least:
            below.append(name)
    return rows, below


def self_test():
    text = "x\n// >>one ----\na\nb\n// >>two ----\nc\n"
    assert sections(text) == [("one", 2, 4), ("two", 5, 7)], sections(text)
    other = "#if defined(__x86_64__)\na\n#elif defined(__aarch64__)\nb\n#endif\nc\n"
    assert elsewhere(other, "x86_64") == {3, 4, 5}, elsewhere(other, "x86_64")
    assert elsewhere(other, "aarch64") == {1, 2, 3}, elsewhere(other, "aarch64")
    lcov = "SF:/a/tprpc.h\nDA:3,0\nDA:3,2\nDA:6,0\nend_of_record\nSF:/a/other.h\nDA:4,1\n"
    lines = read_lcov(lcov)
    assert lines == {3: 2, 6: 0}, lines
    rows, below = judge(sections(text), lines)
    assert below == ["two", "all"], below
    assert rows[0][1:4] == (1, 1, 100.0) and rows[1][1:4] == (1, 0, 0.0), rows
    assert judge([("wire", 1, 100)], {i: int(i > 2) for i in range(1, 101)})[1] == []
    assert judge([("wire", 1, 100)], {i: int(i > 3) for i in range(1, 101)})[1] == ["wire"]
    print("1 passed, 0 failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", nargs="*")
    parser.add_argument("--lines", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--self-test", action="store_true")
    given = parser.parse_args()
    if given.self_test:
        return self_test()
    with open(HEADER, encoding="ascii") as file:
        text = file.read()
    parts, lines, failed = sections(text), {}, []
    folder = tempfile.mkdtemp(prefix="tprpc-coverage.")
    begin = time.time()
    try:
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            programs = [os.path.abspath(program) for program in given.programs]
            for program, (failure, seconds, ran) in zip(programs, pool.map(lambda p: run(p, folder), programs)):
                print("%-28s %6.1f s  %s" % (os.path.relpath(program, ROOT).split("/", 2)[-1], seconds,
                                             "FAILED" if failure else "%d lines" % sum(1 for n in ran.values() if n)))
                sys.stdout.flush()
                if failure:
                    failed.append(failure)
                for line, count in ran.items():
                    lines[line] = lines.get(line, 0) + count
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for failure in failed:
        print("\n" + failure)
    left_out = elsewhere(text, platform.machine())
    lines = {line: count for line, count in lines.items() if line not in left_out}
    rows, below = judge(parts, lines)
    print("\n%-10s %7s %7s %7s %8s" % ("section", "lines", "run", "%", "at least"))
    for name, count, ran, percent, least in rows:
        print("%-10s %7d %7d %7.2f %8.0f%s" % (name, count, ran, percent, least, "  BELOW" if name in below else ""))
    source = text.split("\n")
    for name, first, last in parts:
        if name in given.lines or "all" in given.lines:
            print("\n%s: not run" % name)
            for line in sorted(n for n, count in lines.items() if not count and first <= n <= last):
                print("%6d  %s" % (line, source[line - 1]))
    print("\n%.0f s; %s" % (time.time() - begin, "FAILED" if failed or below else "passed"))
    return 1 if failed or below else 0


if __name__ == "__main__":
    sys.exit(main())
