"""What the habits of the released code change on the demo: R@1 of its streams with and without each, one seed, one thread.

python tests/system/measure_deviations.py RUN OUT.csv

RUN: the folder of a finished demo run (nbs/run_pretrain.ipynb). Stages are kept beside OUT.csv: a run that was stopped goes on. nbs/compare/deviations shows the table.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from vicc.data import TwoStreamDataset
from vicc.engine.io import write_text
from vicc.evaluation import evaluate_stream
from vicc.manifests import read_manifest
from vicc.prepare import Store
from vicc.recipe import Recipe
from vicc.streams import load_stream
from vicc.trainer import train_stage

FOLDERS = {'flow-1': '01-flow-1', 'rgb-2 cycle 1': '02-rgb-2-cycle-1'}

class Demo:
    "A finished run: its streams are evaluated, and its stages trained again with other values."
    def __init__(self, run: Path, folder: Path):
        self.run, self.folder, self.recipe, self.store = run, folder, Recipe.read(run/'recipe.yaml'), Store(run/'store')
        self.train_rows, self.test_rows = (self.store.select(read_manifest(run/'moving_shapes'/f'{name}.csv')) for name in ('train', 'test'))

    def r1(self, stream: torch.nn.Module, name: str, recipe: Recipe, habits: tuple = (), seed: int = 0) -> float:
        sets = [recipe.test_clips(self.store, rows, name) for rows in (self.train_rows, self.test_rows)]
        return evaluate_stream(stream, name, *sets, recipe.view_size, None, (1,), probe_epochs=1, released=habits, seed=seed, cache=self.folder/'features')[0]['R@1']

    def train(self, title: str, what: str, recipe: Recipe, teacher: torch.nn.Module | None = None) -> torch.nn.Module:
        "A stage with other values, from the weights that the run's stage began with."
        plan = {stage.title: (number, stage) for number, stage in enumerate(recipe.plan())}
        number, stage = plan[title]
        start = {'rgb-2 cycle 1': 'stages/00-rgb-1/stream', 'flow-1': 'stages/random/flow'}[title]
        stream = load_stream(self.run/start).requires_grad_(True)
        streams = (stage.name,) if teacher is None else ('rgb', 'flow')
        dataset = TwoStreamDataset(self.store, self.train_rows, streams, recipe.clip_length, recipe.clip_stride, recipe.view_settings(), recipe.seed*1000 + number, recipe.cache_gib)
        train_stage(title, stage.name, stream, dataset, stage.settings, self.folder/f'{title} {what}', teacher, log_every=5)
        return stream

def measurements(demo: Demo) -> Iterator[tuple[str, str, float, float]]:
    "Habit, what was measured, R@1 without it and with it. Each is computed when it is asked for."
    def evaluated(title: str) -> Iterator[tuple[str, str, float, float]]:
        stream, name = load_stream(demo.run/'stages'/FOLDERS[title]/'stream'), title.split('-')[0]
        plain = demo.r1(stream, name, demo.recipe)
        for seed in range(3): yield 'one_clip_gallery', f'{title}, draw {seed + 1}', plain, demo.r1(stream, name, demo.recipe, ('one_clip_gallery',), seed)
        yield 'test_jitter', title, plain, demo.r1(stream, name, demo.recipe, ('test_jitter',))
    yield from evaluated('rgb-2 cycle 1')
    teacher, plain = load_stream(demo.run/'stages'/FOLDERS['flow-1']/'stream'), 0.
    for change in ('plain', 'whole_frame_crops', 'grey_per_frame', 'gradient_views', 'teacher_trains_first_epoch'):
        values = dict(released_habits=[change])
        if change == 'plain': values = {}
        if change == 'gradient_views': values = dict(gradient_views=1)
        recipe = demo.recipe.replace(**values)
        recall = demo.r1(demo.train('rgb-2 cycle 1', change, recipe, teacher), 'rgb', recipe)
        if change == 'plain': plain = recall
        else: yield change, 'rgb-2 cycle 1', plain, recall
    yield from evaluated('flow-1')
    recipes = [demo.recipe.replace(flow_as_image=value) for value in (False, True)]
    yield 'flow_as_image', 'flow-1', *(demo.r1(demo.train('flow-1', str(recipe.flow_as_image), recipe), 'flow', recipe) for recipe in recipes)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path)
    parser.add_argument('output', type=Path)
    values = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in measurements(Demo(values.run, values.output.with_suffix('.parts'))):
        rows.append(dict(zip(('habit', 'measured', 'without', 'with'), (*row[:2], *(round(value, 4) for value in row[2:])))))
        print(rows[-1], flush=True)
        write_text(values.output, pd.DataFrame(rows).to_csv(index=False))

if __name__ == '__main__': main()
