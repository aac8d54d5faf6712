"""Thousands of damaged and hostile files: how many are used, how many are refused in words, and that none does harm.

python tests/robustness/fuzz.py OUT.csv [--videos 2000] [--texts 2000] [--seed 0]
"""
import argparse
import csv
import platform
import sys
import time
from pathlib import Path

import av
from fuzz_texts import fuzz_texts
from fuzz_videos import COLUMNS, PROBLEMS, fuzz_videos

from vicc.engine.io import atomic_write

def main(arguments: list[str] | None = None) -> int:
    "Run both kinds, write one row a kind of file and mutation. Returns 1 if there is any problem."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='CSV file to write')
    parser.add_argument('--videos', type=int, default=2000)
    parser.add_argument('--texts', type=int, default=2000, help='manifests, recipes, settings and checkpoints')
    parser.add_argument('--seed', type=int, default=0)
    asked = parser.parse_args(arguments)
    start, rows = time.monotonic(), []
    for name, fuzz, count in (('video', fuzz_videos, asked.videos), ('text', fuzz_texts, asked.texts)):
        if count: rows += [dict(input=name) | dict.fromkeys(COLUMNS, 0) | row for row in fuzz(count, asked.seed, lambda line: print(line, flush=True))]
    facts = dict(seed=asked.seed, machine=f'{platform.machine()}, Python {platform.python_version()}', pyav=av.__version__,
                 ffmpeg=' '.join(f'{name} {".".join(map(str, number))}' for name, number in av.library_versions.items() if name in ('libavcodec', 'libavformat')))
    with atomic_write(asked.out) as part, part.open('w', newline='', encoding='utf-8') as file:
        table = csv.DictWriter(file, ['input', *COLUMNS, *facts], lineterminator='\n')
        table.writeheader()
        table.writerows(row | facts for row in rows)
    problems = {name: sum(row[name] for row in rows) for name in PROBLEMS}
    print(f'{sum(row["tried"] for row in rows)} files in {time.monotonic() - start:.0f} s: {sum(row["accepted"] for row in rows)} used, {sum(row["refused"] for row in rows)} refused, '
          f'{sum(row[name] for row in rows for name in COLUMNS if name.startswith("contained"))} ended a worker; ' + ', '.join(f'{name} {number}' for name, number in problems.items()))
    return int(any(problems.values()))

if __name__ == '__main__': sys.exit(main())
