"The commands of nbs/engine/cluster: run with stand-ins for the programs, which write down what they are given."
import os
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from vicc import commands, manifests, prepare
from vicc.augment import normalize
from vicc.backbones import BACKBONES
from vicc.manifests import HMDB51_CLASSES, read_manifest, UCF101_COUNTS
from vicc.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = nbformat.read(ROOT/'nbs'/'engine'/'cluster.ipynb', 4)
def command_lines(page):
    "Command lines of a page."
    blocks = [block for cell in page.cells for block in re.findall(r'```bash\n(.*?)```', cell.source, re.DOTALL)]
    return [line for block in blocks for line in re.sub(r'\\\n *', '', block).splitlines() if line and line[0] != '#']

TYPED = command_lines(PAGE)
LINES = [re.sub(r'^\w+=\$\((.*)\)$', r'\1', line) for line in TYPED]  # store=$(sbatch …)
RECORD = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" END >> calls\n'
STAND_INS = dict(torchrun=RECORD, vicc=RECORD, papermill=RECORD, rsync=RECORD, python=f'{RECORD}echo --preset ultrafast\n', srun='#!/bin/bash\n"$@"\n',
                 scontrol='#!/bin/bash\n[ "$1 $2 $3" = "show hostnames node[1-4]" ] && printf "node1\\nnode2\\n"\n')

def calls_of(line: str, folder: Path, **environment: str) -> list[list[str]]:
    "Run a command of the page in a folder, as Slurm would: what was called."
    words, slurm = shlex.split(line), {}
    if words[0] == 'sbatch':
        number = next(number for number, word in enumerate(words) if word.endswith('.sbatch'))
        options = [word for word in words[1:number] if word != '--parsable']
        options = dict(zip(options[::2], options[1::2]))
        options.pop('--dependency', '')
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
    assert len(LINES) == 17 and sum('train.sbatch' in line for line in LINES) == 5 and sum(line.startswith('torchrun') for line in LINES) == 2

def test_jobs_wait_for_what_they_read():
    "afterok names the jobs that make the store and the run of a line."
    made, waiting = {}, [line for line in TYPED if '=$(' in line or '--dependency' in line]
    for line in waiting:
        name, words = line.split('=$(')[0], shlex.split(line.rstrip(')'))
        script, *_ = [word for word in words if word.endswith('.sbatch')]
        after = re.findall(r'\$(\w+)', words[words.index('--dependency') + 1]) if '--dependency' in words else []
        finished = set().union(*(made[each] for each in after))
        places = words[words.index(script) + 1:]
        read = {'train': places[2:3], 'evaluate': places[:2]}.get(Path(script).stem, [])
        assert finished >= set(read), line
        if '=$(' in line: made[name] = finished | {places[3]}
    assert len(waiting) == 9

def test_the_manifests(tmp_path, monkeypatch):
    "The page's program on two empty files of each data set: it refuses what is not complete, else it writes what the commands read."
    [code] = [block for cell in PAGE.cells for block in re.findall(r'```python\n(.*?)```', cell.source, re.DOTALL)]
    assert code.count("Path('/data')") == 1
    data, code = tmp_path/'data', code.replace("Path('/data')", "Path('data')")
    names = ['UCF-101/v_Archery_g01_c01.avi', 'UCF-101/v_Archery_g08_c01.avi', 'hmdb51/wave/film_0.avi', 'hmdb51/wave/film_1.avi',
             'k400/train/clip-train-00_000000_000010.mp4', 'k400/val/clip-val-00_000000_000010.mp4', *(f'splits/{name}_test_split1.txt' for name in HMDB51_CLASSES)]
    for name in names:
        (data/name).parent.mkdir(parents=True, exist_ok=True)
        (data/name).write_text('film_2.avi 0')  # a list: 0 is in no split
    (data/'splits'/'wave_test_split1.txt').write_text('film_0.avi 2\nfilm_1.avi 1')  # 1: train, 2: test
    (data/'k400.csv').write_text('label,youtube_id,time_start,time_end,split\narchery,clip-train-00,0,10,train\narchery,clip-val-00,0,10,val')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='check_counts'): exec(code, {})
    for name in ('ucf101_manifest', 'hmdb51_manifest'): monkeypatch.setattr(manifests, name, partial(getattr(manifests, name), check_counts=False))
    exec(code, {})
    found = {file.name: [Path(name).stem for name in read_manifest(file).video] for file in tmp_path.glob('*.csv')}
    assert found['hmdb51_train.csv'] == ['film_1'] and found['hmdb51_test.csv'] == ['film_0'] and found['ucf101_test.csv'] == ['v_Archery_g01_c01']
    assert all(len(videos) == (2 if name.endswith('_all.csv') else 1) for name, videos in found.items()) and len(found) == 9
    assert {word for line in LINES for word in line.split() if word.endswith('.csv')} <= set(found)

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
    if launcher.standalone and processes == 8: assert Recipe.read(values.recipe, *values.set).workers*processes == 64  # cores
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

def test_tables(folder):
    "The evaluations of the page go into the paper's tables."
    [line] = [line for line in LINES if 'run_claims' in line]
    [[name, notebook, report, flag, text]] = calls_of(line, folder)
    values = yaml.safe_load(text)
    cell = next(cell.source for cell in nbformat.read(ROOT/notebook, 4).cells if 'parameters' in cell.metadata.get('tags', []))
    assert (name, flag, set(values)) == ('papermill', '-y', {'runs'}) and 'runs: dict' in cell
    evaluated = {shlex.split(line)[-1] for line in LINES if 'evaluate.sbatch' in line}
    assert set(values['runs'].values()) <= evaluated and set(values['runs']) == {'UCF101', 'HMDB51'}
    assert all(path.endswith(f'on_{data.lower()}') for data, path in values['runs'].items())

@pytest.mark.parametrize('environment', [{}, dict(SLURM_JOB_ID='77')], ids=['bash', 'Slurm'])
def test_an_evaluation_whose_time_is_over_is_put_back_into_the_queue(folder, tmp_path, environment):
    for name, text in dict(papermill='touch begun; exec sleep 60', scontrol='echo "$@" > queued').items():
        (tmp_path/name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path/name).chmod(0o755)
    (tmp_path/'runs').symlink_to(folder/'runs')
    words = ['bash', ROOT/'nbs'/'recipes'/'evaluate.sbatch', 'runs/ucf101', 'store', 'train.csv', 'test.csv', 'out']
    plain = {name: value for name, value in os.environ.items() if not name.startswith('SLURM')}
    with subprocess.Popen(words, cwd=tmp_path, env=plain | environment | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')) as job:
        while not (tmp_path/'begun').exists() and job.poll() is None: time.sleep(.02)
        job.terminate()
        assert job.wait(20) == 143
    assert [file.read_text() for file in tmp_path.glob('queued')] == (['requeue 77\n'] if environment else [])

def test_other_encoders(monkeypatch, tmp_path):
    "The lines of two pages are read as they stand; mine.py loads a checkpoint of an r3d_18 without its classifier, also as a stream."
    from torchvision.models.video import R3D_18_Weights, r3d_18
    from torchvision.transforms.functional import normalize as reference
    pages, read = [nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4) for name in ('engine/encoders', 'howto/own_features')], []
    monkeypatch.setattr(commands, 'evaluate_files', lambda values: read.append(values) or pd.DataFrame(dict(share=[1.])))
    monkeypatch.setattr(commands, 'write_text', lambda path, text: None)
    for page in pages:
        name, command, *words = shlex.split(command_lines(page)[0])
        commands.evaluate_command(words)
        assert (name, command) == ('vicc', 'evaluate') and [name for name, _ in commands.parse_streams(read[-1].streams)] == ['rgb', 'flow']
    [code] = [block for cell in pages[0].cells for block in re.findall(r'```python\n(.*?)```', cell.source, re.DOTALL)]
    assert all(f'def {text.removeprefix("mine:")}()' in code for values in read for text in values.encoder) and len(read[0].encoder) == 3
    mine, saved = ModuleType('mine'), []
    exec(code, vars(mine))
    monkeypatch.setitem(sys.modules, 'mine', mine)
    monkeypatch.setitem(BACKBONES, 'mine:R3D', mine.R3D)  # is forgotten after this test
    monkeypatch.chdir(tmp_path)
    mine.save_stream = lambda stream, path: saved.append(stream) or Path(path).mkdir(parents=True)
    with torch.device('meta'):  # names and shapes alone
        weights = r3d_18().state_dict()
        monkeypatch.setattr(torch, 'load', lambda path: weights)
        assert mine.r3d().clip_length == 16
        mine.save_r3d()
        del weights['stem.0.weight']
        for function in (mine.r3d, mine.save_r3d):
            with pytest.raises(RuntimeError, match='Missing key.*stem.0.weight'): function()
    [_, _, call], [papermill, notebook, _, *words] = [shlex.split(line) for line in command_lines(pages[0])[1:]]
    values = dict(zip(words[1::3], words[2::3]))
    recipe, clips, backbone = Recipe.read(values['recipe']), torch.rand(1, 3, 2, 2, 2), saved[0].backbone
    assert (call, Path(values['rgb']).is_dir(), recipe.backbone) == ('import mine; mine.save_r3d()', True, 'mine:R3D')
    assert (recipe.clip_length, recipe.clip_stride, recipe.view_size) == (16, 2, 112) and saved[0].trained_on.clip_length == 16
    cell = next(cell.source for cell in nbformat.read(ROOT/notebook, 4).cells if 'parameters' in cell.metadata.get('tags', []))
    assert set(words[::3]) == {'-p'} and set(values) <= set(re.findall(r'^(\w+): ', cell, re.MULTILINE))
    backbone.network, backbone.tap = torch.nn.Identity(), None  # what does it see?
    kinetics = R3D_18_Weights.DEFAULT.transforms()
    expected = reference(clips[0].transpose(0, 1), kinetics.mean, kinetics.std).transpose(0, 1)
    assert torch.allclose(backbone(normalize(clips))[0], expected.flatten(), atol=1e-5)

def test_a_store_can_be_copied_to_every_node(folder):
    line = next(line for line in LINES if 'train.sbatch' in line)
    copy, (_, *words) = calls_of(line, folder, LOCAL='/fast')
    assert copy == ['rsync', '--archive', '/scratch/ucf101/', '/fast/store/'] and '--store /fast/store ' in ' '.join(words)

def test_what_two_nodes_did():
    table = pd.read_csv(ROOT/'nbs'/'results'/'two_nodes.csv')
    assert table.weights_and_log_identical.all() and list(table.starts) == [1, 1, 2, 2] and list(table.said.str.len() > 0) == [True]*4
