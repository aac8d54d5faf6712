"The commands of nbs/engine/cluster: run with stand-ins for the programs, which write down what they are given."
import os
import re
import shlex
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from vicc import commands, prepare
from vicc.manifests import UCF101_COUNTS
from vicc.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = nbformat.read(ROOT/'nbs'/'engine'/'cluster.ipynb', 4)
LINES = [line for cell in PAGE.cells for block in re.findall(r'```bash\n(.*?)```', cell.source, re.DOTALL) for line in re.sub(r'\\\n *', '', block).splitlines() if line and line[0] != '#']
RECORD = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" END >> calls\n'
STAND_INS = dict(torchrun=RECORD, vicc=RECORD, papermill=RECORD, rsync=RECORD, python=f'{RECORD}echo --preset ultrafast\n', srun='#!/bin/bash\n"$@"\n',
                 scontrol='#!/bin/bash\n[ "$1 $2 $3" = "show hostnames node[1-4]" ] && printf "node1\\nnode2\\n"\n')

def calls_of(line: str, folder: Path, **environment: str) -> list[list[str]]:
    "Run a command of the page in a folder, as Slurm would: what was called."
    words, slurm = shlex.split(line), {}
    if words[0] == 'sbatch':
        number = next(number for number, word in enumerate(words) if word.endswith('.sbatch'))
        options = dict(zip(words[1:number:2], words[2:number:2]))
        slurm = dict(SLURM_JOB_ID='77', SLURM_JOB_NODELIST='node[1-4]', SLURM_NNODES=options.pop('--nodes', '1'), SLURM_GPUS_ON_NODE=options.pop('--gpus-per-node', '0'))
        if array := options.pop('--array', ''):
            first, last = map(int, array.split('-'))
            slurm |= dict(SLURM_ARRAY_TASK_ID=str(last), SLURM_ARRAY_TASK_MIN=str(first), SLURM_ARRAY_TASK_COUNT=str(last - first + 1))
        assert not options, options
        words = ['bash', *words[number:]]
    plain = {name: value for name, value in os.environ.items() if not name.startswith('SLURM')}
    subprocess.run(words, cwd=folder, env=plain | slurm | environment | dict(PATH=f'{folder/"bin"}:{os.environ["PATH"]}'), check=True, capture_output=True)
    recorded = (folder/'calls').read_text().split("\0END\0")[:-1]
    (folder/'calls').unlink()
    return [call.split('\0') for call in recorded]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A place with stand-ins and finished runs."
    folder = tmp_path_factory.mktemp('cluster')
    (folder/'nbs').symlink_to(ROOT/'nbs')
    (folder/'bin').mkdir()
    for name, text in STAND_INS.items():
        (folder/'bin'/name).write_text(text)
        (folder/'bin'/name).chmod(0o755)
    for run in ('ucf101', 'k400'):
        for stage in ('00-rgb-1', '01-flow-1', '04-rgb-2-cycle-2', '05-flow-2-cycle-2', 'random'): (folder/'runs'/run/'stages'/stage/'stream').mkdir(parents=True)
    return folder

def test_the_page_has_all_commands():
    assert len(LINES) == 15 and sum('train.sbatch' in line for line in LINES) == 5 and sum(line.startswith('torchrun') for line in LINES) == 1

@pytest.mark.parametrize('line', [line for line in LINES if 'train.sbatch' in line or line.startswith('torchrun')])
def test_training(line, folder, monkeypatch):
    "torchrun and `vicc train` understand their words, and the GPUs divide the batches."
    from torch.distributed.run import get_args_parser
    [[name, *words]] = calls_of(line, folder)
    launcher, read = get_args_parser().parse_args(words), []
    assert name == 'torchrun' and launcher.module and launcher.training_script == 'vicc.alternation'
    monkeypatch.setattr(commands, 'train_from_files', lambda train, values: read.append(values))
    commands.train_command(None, launcher.training_script_args)
    values, processes = read[0], int(launcher.nnodes.split(':')[-1])*int(launcher.nproc_per_node)
    plan = Recipe.read(values.recipe, *values.set).plan()
    assert values.prepared and values.manifest.endswith('_train.csv') and not values.accept_changes
    seen = [stage.settings.batch_size//processes//stage.settings.accumulate for stage in plan]
    assert seen == ([12]*2 + [6]*4 if processes == 16 else [24]*2 + [12]*4 if processes == 8 else [48]*2 + [24]*4)
    if 'sbatch' in line:
        assert (launcher.rdzv_backend, launcher.rdzv_endpoint, launcher.rdzv_id, launcher.max_restarts) == ('c10d', 'node1:10077', '77', 3)
        assert f'--nodes {launcher.nnodes} --gpus-per-node {launcher.nproc_per_node} ' in line
    if 'runs/ucf101' in line and values.recipe == 'ucf101_s3d':  # the paper's steps
        batches = [stage.settings.batch_size for stage in plan]
        assert batches == [192]*2 + [96]*4 and UCF101_COUNTS[1]['train'] > 192 and Recipe.read(values.recipe).online_every == 0

@pytest.mark.parametrize('line', [line for line in LINES if 'prepare.sbatch' in line])
def test_preparation(line, folder, monkeypatch, capsys):
    "The settings are the recipe's, and each task of an array is a shard."
    (_, *asked), (name, command, *words) = calls_of(line, folder)
    recipe = line.split('prepare.sbatch ')[1].split()[0]
    exec(asked[1], {})
    assert capsys.readouterr().out.split() == Recipe.read(recipe).prepare_settings().flags.split()
    read = []
    def record(**values):
        "Takes its place."
        read.append(values)
    monkeypatch.setattr(prepare, 'prepare', record)
    prepare.main(words)
    count = int(re.search(r'--array 0-(\d+)', line)[1]) + 1 if 'array' in line else 1
    assert (name, command) == ('vicc', 'prepare') and (read[0]['num_shards'], read[0]['shard']) == (count, count - 1)
    assert read[0]['manifest'].endswith('_all.csv') and read[0]['settings'].preset == 'ultrafast'

@pytest.mark.parametrize('line', [line for line in LINES if 'evaluate.sbatch' in line])
def test_evaluation(line, folder):
    "The newest streams, both manifests and the paper's lengths go to parameters that the notebook has."
    [[name, notebook, report, *words]] = calls_of(line, folder)
    values = dict(zip(words[1::3], words[2::3]))
    cell = next(cell.source for cell in nbformat.read(ROOT/notebook, 4).cells if 'parameters' in cell.metadata.get('tags', []))
    known = dict(re.findall(r"^(\w+): \w+ = (\S+)", cell, re.MULTILINE))
    assert name == 'papermill' and set(words[::3]) == {'-p'} and set(values) <= set(known)
    assert values['rgb'].endswith('04-rgb-2-cycle-2/stream') and values['flow'].endswith('05-flow-2-cycle-2/stream')
    assert (values['linear_epochs'], values['tuning_epochs'], values['batch_size'], values['dropout']) == ('100', '500', '128', '0.9')
    assert values['manifest'].endswith('_train.csv') and values['test_manifest'].endswith('_test.csv') and report.startswith(values['output'])
    assert all(known[part] == 'True' for part in ('retrieval', 'linear_probe', 'fine_tuning'))

def test_a_store_can_be_copied_to_every_node(folder):
    line = next(line for line in LINES if 'train.sbatch' in line)
    copy, (_, *words) = calls_of(line, folder, LOCAL='/fast')
    assert copy == ['rsync', '--archive', '/scratch/ucf101/', '/fast/store/'] and '--store /fast/store ' in ' '.join(words)

def test_what_two_nodes_did():
    table = pd.read_csv(ROOT/'nbs'/'results'/'two_nodes.csv')
    assert table.weights_and_log_identical.all() and list(table.starts) == [1, 1, 2, 2] and list(table.said.str.len() > 0) == [True]*4
