"""Kill an evaluation at random moments, start it again each time, and compare the end with an unbroken one.

python tests/robustness/kill_evaluation.py OUT.csv [KILLS] [--seed 0]

The evaluation calls what nbs/run_evaluate.ipynb calls: features of both streams with retrieval and the quick probe, then
a linear probe and fine-tuning with ten crops. Each kill is a SIGKILL in one of these parts (seeded), a random moment
after a piece of it was saved. `python tests/robustness/kill_evaluation.py evaluate FOLDER OUTPUT` is the evaluation.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file, save_file

from kill_training import kill_at
from vicc.recipe import Recipe
from vicc.engine.fit import RunConfig, TIMING
from vicc.engine.io import find_project
from vicc.alternation import new_streams
from vicc.compare.finetune import FINE_TUNING, LINEAR_PROBE, TRAINING_VIEWS, accuracy, train_and_test_classifier
from vicc.evaluation import evaluate_stream, retrieval_scores
from vicc.engine.io import write_text, atomic_write
from vicc.manifests import read_manifest
from vicc.prepare import Store, prepare
from vicc.synthetic import make_moving_shapes

TINY = dict(num_prototypes=6, projection_dim=8, backbone_options={'width': 4}, test_step=2, cache_gib=0.0)
EPOCHS = 6  # of each classifier
PARTS = ('features rgb', 'features flow', 'linear probe', 'fine-tuning')

def prepare_evaluation(folder: Path) -> list[str]:
    "Videos, a store and a recipe in a folder; the command, to which the output has to be added."
    shapes = make_moving_shapes(folder/'shapes', 16, 8, threads=1)
    demo = yaml.safe_load((find_project(__file__)/'nbs'/'recipes'/'demo.yaml').read_text())
    recipe = Recipe.create({**demo, **TINY})
    recipe.write(folder/'recipe.yaml')
    for name in ('train', 'test'):
        prepare(shapes[name], shapes['videos'], folder/'store', recipe.prepare_settings(), log=lambda line: None)
    return [sys.executable, __file__, 'evaluate', str(folder)]

def evaluate(folder: Path, output: Path) -> None:
    "Everything that run_evaluate computes, of random streams, in small pieces."
    torch.set_num_threads(1)
    recipe, store = Recipe.read(folder/'recipe.yaml'), Store(folder/'store')
    rows = {name: store.select(read_manifest(folder/'shapes'/f'{name}.csv')) for name in ('train', 'test')}
    streams, numbers, features, tensors = new_streams(recipe), {}, {}, {}
    for name, stream in streams.items():
        sets = [recipe.test_clips(store, rows[part], name) for part in ('train', 'test')]
        row, features[name] = evaluate_stream(stream, name, *sets, recipe.view_size, None,
                                              cache=output/f'features {name}', chunk_clips=10)
        numbers[f'features {name}'] = row
        tensors |= {f'{name} {what}': value for what, value in features[name].items()}
    train_labels, test_labels = (torch.tensor(clips.kept_rows().label.to_numpy()) for clips in sets)
    numbers['both'] = retrieval_scores(features, test_labels, train_labels)
    views, classes = replace(TRAINING_VIEWS, size=recipe.view_size), int(train_labels.max()) + 1
    test_clips = recipe.test_clips(store, rows['test'], 'rgb')
    protocols = {'linear probe': LINEAR_PROBE, 'fine-tuning': replace(FINE_TUNING, dropout=.2)}
    for title, protocol in protocols.items():
        config = replace(protocol.shortened(EPOCHS), batch_size=4, validation_fraction=.3)
        tensors[title], history = train_and_test_classifier(
            title, streams['rgb'], store, rows['train'], test_clips, classes, config, output/title,
            recipe.clip_length, recipe.clip_stride, views, 'ten', 56, recipe.min_frames, cache_gib=0,
            run_config=RunConfig(save_every_steps=1))
        history = history.drop(columns=list(TIMING)).to_dict('list')
        numbers[title] = dict(right=accuracy(tensors[title], test_labels), history=history)
    with atomic_write(output/'tensors.safetensors') as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    write_text(output/'numbers.json', json.dumps(numbers))

def start(command: list[str], output: Path) -> subprocess.Popen:
    "Start an evaluation in the background; what it says goes to a file."
    output.mkdir(parents=True, exist_ok=True)
    with (output/'said.txt').open('a') as said:
        environment = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
        return subprocess.Popen([*command, str(output)], stdout=said, stderr=said, env=environment)

def pieces(output: Path) -> dict[str, int]:
    "Count the pieces that each part has saved: files of features; steps, then probabilities of classifiers."
    counts = {part: len(list(output.glob(f'{part}/*/clips-*.safetensors'))) for part in PARTS[:2]}
    for part in PARTS[2:]:
        checkpoints = output.glob(f'{part}/checkpoints/step-*/rank-0-of-1.pt')
        steps = max((int(path.parent.name[5:]) for path in checkpoints), default=0)
        counts[part] = steps + len(list(output.glob(f'{part}/probabilities/*/*.safetensors')))
    return counts

def differences(one: Path, two: Path) -> list[str]:
    "What is not the same, bit for bit: features, probabilities, numbers, histories."
    ours, theirs = (load_file(folder/'tensors.safetensors') for folder in (one, two))
    different = [name for name in ours if ours[name].numpy().tobytes() != theirs[name].numpy().tobytes()]
    ours, theirs = (json.loads((folder/'numbers.json').read_text()) for folder in (one, two))
    return different + [f'numbers: {name}' for name in ours if json.dumps(ours[name]) != json.dumps(theirs[name])]

def kill_evaluation(folder: Path, kills: int, seed: int = 0) -> pd.DataFrame:
    "One row a kill; the last columns tell of the end of the evaluation that was killed so often."
    command, rng = prepare_evaluation(folder), np.random.default_rng(seed)
    assert start(command, folder/'unbroken').wait() == 0, (folder/'unbroken'/'said.txt').read_text()
    every, broken, rows = pieces(folder/'unbroken'), folder/'broken', []
    first = dict(zip(PARTS, np.cumsum([0, *every.values()]).tolist()))
    chosen = rng.permutation(list(PARTS)*-(-kills//len(PARTS)))[:kills]  # as many in each part
    goals = sorted(first[part] + int(rng.integers(every[part])) for part in chosen)
    for number, goal in enumerate(goals, 1):
        before = sum(pieces(broken).values())
        goal = max(goal, before + (number > 1))
        process, rest = start(command, broken), float(rng.uniform(0, .3))
        killed = kill_at(process, lambda: sum(pieces(broken).values()), goal, rest)
        counts = pieces(broken)
        part = next((part for part in PARTS if counts[part] < every[part]), 'the end')
        rows.append(dict(kill=number, part=part, pieces_before=before, pieces_after=sum(counts.values()),
                         pieces_in_all=sum(every.values()), half_written=len(list(broken.rglob('.*.part*'))),
                         killed=killed))
    assert start(command, broken).wait() == 0, (broken/'said.txt').read_text()
    different = differences(folder/'unbroken', broken)
    return pd.DataFrame(rows).assign(numbers_and_features_identical=not different,
                                     different='; '.join(different)[:200])

if __name__ == '__main__' and sys.argv[1:2] == ['evaluate']: evaluate(*map(Path, sys.argv[2:4]))
elif __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('kills', type=int, nargs='?', default=10)
    parser.add_argument('--seed', type=int, default=0)
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = kill_evaluation(Path(folder), values.kills, values.seed)
    table['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}'
    table.to_csv(values.output, index=False)
    print(table.to_string())
