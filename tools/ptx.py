#!/usr/bin/env python3
"""Keeps the PTX in tprpc_cuda.h the one of tools/gather.cu:  ptx.py [--write]

Without an argument it compares: the SHA-256 that stands beside the bytes with that of the source, and, where nvcc is, the
bytes with what nvcc makes of it. --write puts both in. The PTX is of the oldest version that knows its target.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / 'tools' / 'gather.cu'
HEADER = ROOT / 'tprpc_cuda.h'
TARGET, VERSION = '75', '6.3'
SUM = re.compile(r'(SHA-256 of tools/gather\.cu:\n// )([0-9a-f]{64})')
BYTES = re.compile(r'(static const unsigned char tpr_cuda_kernels_ptx\[\] = \{\n)(.*?)(\n\};)', re.S)


def compile_ptx():
    """The PTX without comments and empty lines, with a zero at its end; None where there is no nvcc."""
    nvcc = shutil.which('nvcc') or shutil.which('/usr/local/cuda/bin/nvcc')
    if not nvcc:
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'gather.ptx'
        subprocess.run([nvcc, f'-arch=compute_{TARGET}', '-ptx', '-O3', str(SOURCE), '-o', str(out)], check=True)
        lines = [line.strip() for line in out.read_text().split('\n')]
        lines = [f'.version {VERSION}' if line.startswith('.version') else line
                 for line in lines if line and not line.startswith('//')]
        text = '\n'.join(lines) + '\n'
        out.write_text(text)
        assembler = Path(nvcc).with_name('ptxas')
        subprocess.run([str(assembler), f'-arch=sm_{TARGET}', str(out), '-o', str(out) + '.o'], check=True)
    return text.encode() + b'\0'


def lay_out(data):
    rows, row = [], '   '
    for byte in data:
        word = f' {byte},'
        if len(row) + len(word) > 120:
            rows.append(row)
            row = '   '
        row += word
    return '\n'.join(rows + [row])


def main(args):
    text = HEADER.read_text()
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    data = compile_ptx()
    if args == ['--write']:
        text = SUM.sub(lambda m: m.group(1) + digest, text)
        text = BYTES.sub(lambda m: m.group(1) + lay_out(data) + m.group(3), text)
        HEADER.write_text(text)
        return 0
    failed = 0
    for name, held in (('the sum is that of the source', SUM.search(text).group(2) == digest),
                       ('the bytes are what nvcc makes', data is None or BYTES.search(text).group(2) == lay_out(data))):
        if name.startswith('the bytes') and data is None:
            print(f'SKIP {name.replace(" ", "_")}: there is no nvcc')
            continue
        print(('ok ' if held else 'FAIL ') + name)
        failed += not held
    skipped = data is None
    print(f'{2 - skipped - failed} passed, {failed} failed' + (', 1 skipped' if skipped else ''))
    return failed != 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
