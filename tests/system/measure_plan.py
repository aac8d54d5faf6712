"""Write nbs/results/plan_demo.csv: what `vicc plan` says of the demo, and what it then takes. On a quiet machine:

    vicc bench prepare loader step epoch evaluation --recipe demo --store RUN/store --cached --repeats 10 \
        --output nbs/results/cpu_training.json
    python tests/system/measure_plan.py RUN         RUN: the output of a run_pretrain of this machine, at its defaults

Training and preparing were timed by the run itself. Its evaluation, and a second training for the files that lie on the
disk at any moment, are measured here.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from vicc.alternation import stage_folder
from vicc.commands import evaluate_command
from vicc.engine.io import data_folder, read_json, write_text
from vicc.manifests import read_manifest
from vicc.plan import (
    checkpoint_gb, describe_videos, Job, plan_evaluation, plan_stages, prepare_hours, read_rows, store_gb,
)
from vicc.prepare import Store, STREAMS
from vicc.recipe import Recipe


def files_gb(*folders):
    "What lies in these folders now, in GB."
    sizes = []
    for file in (file for folder in folders for file in folder.rglob('*')):
        try: sizes.append(file.stat().st_size*file.is_file())
        except FileNotFoundError: continue  # removed meanwhile
    return sum(sizes)/1e9


def largest_gb(run, tables, folder):
    "Train once more; the largest that its stages ever were."
    words = ['--recipe', 'demo', '--manifest', str(tables['train']), '--prepared', '--store', str(run/'store'), '--output', str(folder)]
    largest, training = 0, subprocess.Popen([sys.executable, '-m', 'vicc.alternation', *words], stdout=subprocess.DEVNULL)
    while training.poll() is None:
        largest = max(largest, files_gb(folder/'stages'))
        time.sleep(.1)
    if training.returncode: raise SystemExit(f'the training ended with {training.returncode}')
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    run, recipe = parser.parse_args().run, Recipe.read('demo')
    metrics, tables = read_json(run/'metrics.json'), {name: run/'moving_shapes'/f'{name}.csv' for name in ('train', 'test')}
    rows = read_rows([data_folder('results')/'cpu_training.json'])
    job = Job(recipe, describe_videos(recipe, *map(read_manifest, tables.values())), rows)
    last = {stage.name: stage_folder(run, number, stage)/'stream' for number, stage in enumerate(recipe.plan())}
    words = [f'{name}={last[name]}' for name in STREAMS] + ['--recipe', 'demo', '--store', str(run/'store'),
             '--gallery', str(tables['train']), '--queries', str(tables['test']), '--device', 'cpu']
    start = time.monotonic()
    evaluate_command(words)
    seconds = metrics['seconds'] | dict(evaluate=time.monotonic() - start)
    with tempfile.TemporaryDirectory() as folder: largest = largest_gb(run, tables, Path(folder)/'run')
    hours = [('training', plan_stages(job).hours.sum(), seconds['train']), ('preparing the store', prepare_hours(job)[0], seconds['prepare store']),
             ('evaluating two streams, and two of random weights', 2*plan_evaluation(job).hours[0], seconds['evaluate'])]
    lines = [(what, 'hours', planned, measured/3600) for what, planned, measured in hours]
    lines += [('store', 'GB', store_gb(job)[0], files_gb(*(Store(run/'store').path/stream for stream in STREAMS))),
              ('checkpoints and streams, at most', 'GB', checkpoint_gb(recipe), largest)]
    table = pd.DataFrame(lines, columns=['what', 'unit', 'planned', 'measured'])
    table[['planned', 'measured']] = table[['planned', 'measured']].map('{:.4g}'.format)
    machine = f'{rows[0]["source"].split(", ", 1)[1]}, {metrics["threads"]} threads, load {os.getloadavg()[0]:.1f}'
    write_text(data_folder('results')/'plan_demo.csv', table.assign(machine=machine).to_csv(index=False))
    print(table.to_string(index=False))


if __name__ == '__main__': main()
