"""How fast the demo's recipe trains with another version of the code, and with this one, in turns on one machine.

python tests/system/compare_training.py OLD_CHECKOUT OUT.csv [--rounds 3]

OLD_CHECKOUT: a folder with another commit (git worktree add FOLDER COMMIT). Both train on one store, made by this version. Keep the machine quiet.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
INSIDE = '''
import json, sys
from vicc.alternation import alternate, Recipe  # every version has it there
from vicc.prepare import Store
store, folder, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
known = Recipe.names() if hasattr(Recipe, 'names') else Recipe.model_fields
if 'optimizer' not in known: values['optimiser'] = values.pop('optimizer')
recipe = Recipe.create({name: value for name, value in values.items() if name in known})
alternate(recipe, Store(store), folder).to_csv(f'{folder}/speeds.csv', index=False)
'''

def commit(checkout: Path) -> str:
    "Its short hash."
    return subprocess.run(['git', '-C', checkout, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()

def speeds(checkout: Path, store: Path, folder: Path, values: dict) -> dict[str, float]:
    "Samples a second of each kind of stage: the median epoch, the first of each stage left out."
    subprocess.run([sys.executable, '-c', INSIDE, store, folder, json.dumps(values)], cwd=checkout, env=os.environ | dict(PYTHONPATH=str(checkout)), check=True)
    log = pd.read_csv(folder/'speeds.csv')
    later = log[log.epoch > 1]
    return {kind: statistics.median(later.samples_per_second[later.stage.str.startswith(kind)]) for kind in ('rgb-1', 'flow-1', 'rgb-2', 'flow-2')}

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('old', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    values = parser.parse_args()
    from vicc.recipe import Recipe
    from vicc.prepare import prepare
    from vicc.synthetic import make_moving_shapes
    recipe = Recipe.read(ROOT/'nbs'/'recipes'/'demo.yaml', single_epochs_rgb=5, single_epochs_flow=5, cross_epochs=5, cycles=1, cross_freeze_prototypes=0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = make_moving_shapes(Path(folder)/'shapes', 400, 8)
        store = prepare(made['train'], made['videos'], Path(folder)/'store', recipe.prepare_settings())
        for turn in range(values.rounds):
            for which, checkout in (('before', values.old.resolve()), ('now', ROOT)):
                found = speeds(checkout, store.path, Path(folder)/f'{which}-{turn}', recipe.model_dump())
                rows += [dict(which=which, commit=commit(checkout), turn=turn + 1, stage=stage, samples_per_second=speed) for stage, speed in found.items()]
    table = pd.DataFrame(rows).assign(machine=f'{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}')
    table.to_csv(values.output, index=False)
    print(table.pivot_table('samples_per_second', 'stage', 'which', 'median').round(1).to_string())

if __name__ == '__main__': main()
