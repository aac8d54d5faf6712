"""The demo with damaged videos: with the usual threshold it must stop before training and list them; with a raised one it must finish without them.

python tests/robustness/damaged_demo.py OUT.json [--share 0.05] [-p NAME VALUE ...]

The videos are the demo's. Every twentieth is damaged in one of three ways: replaced by a text, cut off, or 200 of its bits turned. Parameters after -p are those of run_pretrain.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from vicc.engine.io import find_project, write_text
from vicc.manifests import read_manifest
from vicc.synthetic import make_moving_shapes

from real_videos import reason

DAMAGES = ('replaced by a text', 'cut off', 'bits turned')

def damage(path: Path, how: str, rng: np.random.Generator) -> None:
    "Damage a file for good."
    content = bytearray(path.read_bytes())
    if how == 'replaced by a text': content = bytearray(b'404 not found')
    if how == 'cut off': content = content[:int(len(content)*rng.uniform(.1, .9))]
    if how == 'bits turned':
        for place in rng.integers(len(content), size=200): content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)

def pretrain(made: dict, output: Path, parameters: list[str]) -> tuple[int, str, float]:
    "Run the notebook: exit code, the last line it said, seconds."
    start = time.monotonic()
    command = [sys.executable, '-m', 'papermill', str(find_project(__file__)/'nbs'/'run_pretrain.ipynb'), str(output.with_suffix('.ipynb')), '--log-output', '-p', 'output', str(output),
               '-p', 'manifest', str(made['train']), '-p', 'videos', str(made['videos']), '-p', 'test_manifest', str(made['test']), *parameters]
    ended = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in ended.stderr.splitlines() + ended.stdout.splitlines() if line.strip()]
    return ended.returncode, '\n'.join(said), time.monotonic() - start

def damaged_demo(folder: Path, share: float, counts: tuple[int, int], parameters: list[str]) -> dict:
    "Both runs."
    made, rng = make_moving_shapes(folder/'shapes', *counts, seed=0), np.random.default_rng(0)
    rows = pd.concat([read_manifest(made[part]) for part in ('train', 'test')], ignore_index=True)
    chosen = {rows.video[number]: DAMAGES[place % 3] for place, number in enumerate(rng.choice(len(rows), round(share*len(rows)), replace=False))}
    for video, how in chosen.items(): damage(Path(made['videos'])/video, how, rng)
    code, said, seconds = pretrain(made, folder/'run', parameters)
    refused = next((line for line in said.splitlines()[::-1] if 'cannot be used' in line), 'no message')
    first = pd.read_csv(folder/'run'/'store'/'problems.csv')
    result = dict(videos=len(rows), damaged=len(chosen), damages=pd.Series(chosen).value_counts().to_dict(),
                  usual=dict(exit_code=code, said=refused.replace(str(folder), '…')[:400], listed=len(first), listed_but_sound=int((~first.video.isin(chosen)).sum()),
                             trained=len(list((folder/'run').glob('stages/0*'))), seconds=round(seconds)))
    code, said, seconds = pretrain(made, folder/'run', [*parameters, '-p', 'max_failed', '0.1'])
    problems, kept = pd.read_csv(folder/'run'/'store'/'problems.csv'), read_manifest(folder/'run'/'store'/'manifest.csv')
    named = next((line.strip() for line in said.splitlines() if 'these were set aside' in line), 'no line')
    log = pd.read_csv(folder/'run'/'log.csv') if (folder/'run'/'log.csv').is_file() else pd.DataFrame(dict(stage=[], loss=[]))
    noted = kept[kept.note != ''].video if 'note' in kept else []
    return result | dict(raised=dict(exit_code=code, said=named.replace(str(folder), '…')[:400], listed=len(problems), listed_but_sound=int((~problems.video.isin(chosen)).sum()), videos_used=len(kept),
                                     damaged_but_used_with_a_note=len(noted), damaged_but_used_without=sum(video in set(kept.video) - set(noted) for video in chosen), epochs=len(log),
                                     losses_finite=bool(np.isfinite(log.loss).all()), reasons=problems.problem.map(reason).value_counts().to_dict(),
                                     seconds=round(seconds)))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='JSON file for the result')
    parser.add_argument('--share', type=float, default=.05, help='of the videos to damage')
    parser.add_argument('--videos', type=int, nargs=2, default=(800, 200), help='training and test videos')
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), help='parameter of run_pretrain')
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = damaged_demo(Path(name), values.share, tuple(values.videos), [word for pair in values.p for word in ('-p', *pair)])
    result['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}'
    write_text(values.out, json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
