"""Kill a training at random moments, start it again each time, and compare the end with an unbroken run, bit for bit.

python tests/robustness/kill_training.py OUT.csv [--kills 10] [--seed 0]

The run is a tiny recipe with six stages, started by the command line `python -m vicc.alternation`. Each kill is a SIGKILL at a random step (seeded), in any stage, or at the end of one.
"""
import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file

from vicc.engine.checkpoint import rank_files
from vicc.engine.io import find_project
from vicc.synthetic import make_moving_shapes
from vicc.engine.fit import TIMING

TINY = dict(single_epochs_rgb=3, single_epochs_flow=3, cross_epochs=3, cycles=2, cross_freeze_prototypes=0, single_batch_size=4, cross_batch_size=4, num_prototypes=6, projection_dim=8, queue_length=16,
            backbone_options={'width': 4}, save_every_steps=1, cache_gib=1.0)

def prepare_run(folder: Path, **changes: object) -> list[str]:
    "Videos and a recipe in a folder; the command, to which --output has to be added."
    made = make_moving_shapes(folder/'shapes', 16, 8, threads=1)
    recipe = {**yaml.safe_load((find_project(__file__)/'nbs'/'recipes'/'demo.yaml').read_text()), **TINY, **changes}
    (folder/'recipe.yaml').write_text(yaml.safe_dump(recipe))
    return [sys.executable, '-m', 'vicc.alternation', '--recipe', str(folder/'recipe.yaml'), '--manifest', str(made['train']), '--videos', str(made['videos']), '--store', str(folder/'store')]

def start(command: list[str], output: Path) -> subprocess.Popen:
    "Start a training in the background; what it says goes to a file."
    output.mkdir(parents=True, exist_ok=True)
    with (output/'said.txt').open('a') as said:
        return subprocess.Popen([*command, '--output', str(output)], stdout=said, stderr=said, env=dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))

def steps_seen(output: Path) -> int:
    "How many checkpoints and finished stages there are: grows with every step."
    try: steps = [int(path.name[5:]) for path in output.glob('stages/*/checkpoints/step-*') if rank_files(path)]
    except FileNotFoundError: return steps_seen(output)  # the training has just removed one
    return 1000*len(list(output.glob('stages/0*/stream'))) + max(steps, default=0)

def kill_at(process: subprocess.Popen, done: Callable[[], int], goal: int, rest: float, patience: float = 120) -> bool:
    "Kill as soon as so much is done, and a moment later; False if the run was over before."
    deadline = time.monotonic() + patience
    while process.poll() is None and done() < goal and time.monotonic() < deadline: time.sleep(.002)
    time.sleep(rest)
    if process.poll() is not None: return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True

def differences(one: Path, two: Path) -> list[str]:
    "Names of weights and columns of the log that are not the same, bit for bit."
    found = []
    for path in sorted(one.glob('stages/*/stream/model.safetensors')):
        ours, theirs = load_file(path), load_file(two/path.relative_to(one))
        found += [f'{path.parent.parent.name}: {name}' for name in ours if ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()]
    logs = [pd.read_csv(folder/'log.csv', dtype=str).drop(columns=list(TIMING)) for folder in (one, two)]
    if logs[0].shape != logs[1].shape: return found + ['log.csv: number of rows']
    return found + [f'log.csv: {name}' for name in logs[0] if not logs[0][name].equals(logs[1][name])]

def kill_training(folder: Path, kills: int, seed: int = 0, **changes: object) -> pd.DataFrame:
    "One row a kill; the last column tells of the end of the run that was killed so often."
    command, rng = prepare_run(folder, **changes), np.random.default_rng(seed)
    assert start(command, folder/'unbroken').wait() == 0, (folder/'unbroken'/'said.txt').read_text()
    log = pd.read_csv(folder/'unbroken'/'log.csv')
    steps = {number: 4*int((log.stage == title).sum()) for number, title in enumerate(log.stage.unique())}
    stages = rng.integers(len(steps), size=kills).tolist()
    goals = sorted(1000*number + int(rng.integers(1, steps[number] + 1)) for number in stages)
    rows, broken = [], folder/'broken'
    for number, goal in enumerate(goals):
        process = start(command, broken)
        killed = kill_at(process, lambda: steps_seen(broken), max(goal, steps_seen(broken) + (number > 0)), float(rng.uniform(0, .05)))
        rows.append(dict(kill=number + 1, stage=log.stage.unique()[min(goal//1000, len(steps) - 1)], wanted_step=goal % 1000, checkpoint_after=steps_seen(broken) % 1000, stages_done=steps_seen(broken)//1000,
                         unfinished_checkpoints=len([path for path in broken.glob('stages/*/checkpoints/step-*') if not rank_files(path)]), killed=killed))
    assert start(command, broken).wait() == 0, (broken/'said.txt').read_text()
    different = differences(folder/'unbroken', broken)
    return pd.DataFrame(rows).assign(weights_and_log_identical=not different, different='; '.join(different)[:200])

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: table = kill_training(Path(folder), values.kills, values.seed)
    table['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}'
    table.to_csv(values.output, index=False)
    print(table.to_string())
