"The commands train and evaluate: files in, a table out, one line for every error."
import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from vicc.alternation import main as train
from vicc.augment import IMAGENET_MEAN, IMAGENET_STD
from vicc.backbones import BACKBONES, create_backbone
from vicc.commands import check_precision, evaluate_command, evaluate_files, evaluation_remarks, trained_on_remarks
from vicc.engine.io import find_project
from vicc.prepare import STREAMS, prepare
from vicc.recipe import Recipe
from vicc.streams import Stream, export_released, load_stream, save_stream
from vicc.synthetic import make_moving_shapes


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 32, 16)


@pytest.fixture(scope='module')
def store(shapes, tmp_path_factory):
    rows = pd.concat([pd.read_csv(shapes[name]) for name in ('train', 'test')])
    shutil.copy(shapes['videos']/rows.video.iloc[0], shapes['videos']/'copy.mp4')
    rows = pd.concat([rows, rows.head(1).assign(video='copy.mp4', group='copy')])
    return prepare(rows, shapes['videos'], tmp_path_factory.mktemp('store')/'store', Recipe.read('demo').prepare_settings(),
                   workers=0, log=lambda line: None)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    torch.manual_seed(1)
    return {name: save_stream(Stream('small', 8, 16, {'width': 8}, Recipe.read('demo').trained_on(name)), tmp_path_factory.mktemp('streams')/name) for name in STREAMS}


@pytest.fixture(scope='module')
def words(store, shapes, paths):
    "Words of a command line that works: streams, then flags."
    files = dict(recipe='demo', store=store.path, gallery=shapes['train'], queries=shapes['test'])
    return [f'{name}={path}' for name, path in paths.items()], {f'--{name}': str(path) for name, path in files.items()}


def test_command_line(words, tmp_path, capsys):
    streams, flags = words
    flags = flags | {'--output': str(tmp_path/'new'/'folder'/'table.csv'), '--cache': str(tmp_path/'features')}
    for _ in range(2): evaluate_command([*streams, *(word for pair in flags.items() for word in pair)])  # the second time from the cache
    table = pd.read_csv(tmp_path/'new'/'folder'/'table.csv', index_col=0)
    assert list(table.index) == ['chance', 'random rgb', 'random flow', 'random rgb + flow', 'rgb', 'flow', 'rgb + flow'] and table['R@1'].between(0, 1).all()
    assert table['quick probe']['chance'] == table['R@1']['chance'] == .125 and (table.loc['random rgb'] != table.loc['rgb']).any()
    leads = table.dropna(subset='lead')
    assert list(leads.index) == ['rgb', 'flow', 'rgb + flow'] and leads['lead'].between(leads['lead low'], leads['lead high']).all()
    for name, row in leads.iterrows(): assert np.isclose(row['lead'], row['R@1'] - table['R@1'][f'random {name}'])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:len(printed)//2] == printed[len(printed)//2:]
    notes = [line.removeprefix('note: ') for line in printed if line.startswith('note: ')]
    assert notes == 2*['8 of 8 classes have fewer than 5 test videos: one video moves their share by 20 points or more',
                       'there are only 32 training videos: R@50 count all of them']
    assert set(table.remarks) == {'; '.join(notes[:2])}
    evaluate_command([*streams, '--before', streams[0], *(word for pair in flags.items() for word in pair)])
    again = pd.read_csv(tmp_path/'new'/'folder'/'table.csv', index_col=0)
    assert list(again.index[again.lead.notna()]) == ['rgb'] and again.lead['rgb'] == 0 and again['R@1']['before rgb'] == table['R@1']['rgb']


@pytest.mark.parametrize('remark, change', [
    ('', lambda train, test: (pd.concat([train, train.assign(video=train.video)]), test)),
    ('all test videos are of one class', lambda train, test: (train, test.assign(label=3))),
    ('2 of 16 test videos are of a class that no training video has: they always', lambda train, test: (train[train.label != 3], test)),
    ('16 of 16 test videos are of a class', lambda train, test: (train.assign(label=9), test)),
    ('1 of 2 classes have fewer than 5 test videos', lambda train, test: (train, test.assign(label=[0]*4 + [1]*12))),
    ('there are only 12 training videos: R@20, R@50 count', lambda train, test: (train.head(12), test)),
    ('1 training videos are smaller than test_crop and left out, such as slide_x/train_00000.mp4', lambda train, test: (train.assign(width=[40] + 31*[64]), test)),
    ('2 test videos are shorter than min_frames and left out, such as ', lambda train, test: (train, test.assign(num_frames=[5, 5] + 14*[16]))),
    ('1 test videos have the same pixels as a training video: copy.mp4 = slide_x/train_00000.mp4', lambda train, test: (train, test.assign(video=['copy.mp4', *test.video[1:]]))),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_the_numbers_cannot_show_is_said(store, shapes, remark, change):
    recipe = Recipe.read('demo', test_crop=48)
    tables = change(*(store.select(pd.read_csv(shapes[name])) for name in ('train', 'test')))
    remarks = evaluation_remarks(*(recipe.test_clips(store, rows, 'rgb') for rows in tables))
    assert any(each.startswith(remark) for each in remarks), remarks
    if remark: assert sum('same pixels' in each or 'of a class' in each or 'one class' in each or 'left out' in each for each in remarks) <= 1
    else: assert len(remarks) == 1 and 'fewer than 5' in remarks[0]


def test_other_clips_than_the_stream_was_trained_on_are_noted(words, capsys):
    streams, flags = words
    flags = flags | {'--recipe': 'demo'}
    values = argparse.Namespace(streams=streams[:1], output=None, device='cpu', cache=None, released=None, modality=None, encoder=[], before=[], set=['test_step=8'], **{name[2:]: value for name, value in flags.items()})
    values.recipe = os.path.join(os.path.dirname(values.store), 'longer.yaml')
    Recipe.read('demo', clip_length=6).write(values.recipe)
    assert 'rgb was trained on other clips' in evaluate_files(values).remarks.iloc[0]
    assert re.search(r'note: rgb was trained on other clips .*clip_length=8.*than the recipe has .*clip_length=6', capsys.readouterr().out)


def test_videos_that_the_store_lacks_are_counted(words, shapes, tmp_path, capsys):
    flags, test = dict(words[1]), pd.read_csv(shapes['test'])
    flags['--queries'] = str(tmp_path/'test.csv')
    pd.concat([test, test.head(1).assign(video='gone.mp4')]).to_csv(flags['--queries'], index=False)
    arguments = [words[0][0], *(word for pair in flags.items() for word in pair)]
    with pytest.raises(SystemExit): evaluate_command(arguments)
    assert re.search(r'1 of 17 videos of the manifest are not in the store .*, such as gone.mp4: prepare them first', capsys.readouterr().err)


def test_labels_of_another_numbering_are_noted(words, shapes, tmp_path, capsys):
    flags = dict(words[1])
    for flag, name, shift in (('--gallery', 'train', 1), ('--queries', 'test', 1)):
        flags[flag] = str(tmp_path/f'{name}.csv')
        table = pd.read_csv(shapes[name])
        table.assign(label=(table.label + shift) % 8).drop(columns='class_name').to_csv(flags[flag], index=False)
    flags['--output'] = str(tmp_path/'table.csv')
    evaluate_command([words[0][0], *(word for pair in flags.items() for word in pair)])
    remark = r'16 of 16 videos have another label than in the manifest of the store: slide_x/test_00000.mp4 has 1 \(1\), and not 0 \(slide_x\)'
    assert re.search(f'note: {remark}', capsys.readouterr().out) and re.search(remark, pd.read_csv(tmp_path/'table.csv').remarks[0])


def test_recordings_on_both_sides_are_noted_once(words, shapes, tmp_path, capsys, recwarn):
    flags = dict(words[1])
    for flag, name in (('--gallery', 'train'), ('--queries', 'test')):
        flags[flag] = str(tmp_path/f'{name}.csv')
        pd.read_csv(shapes[name]).assign(group='g1').to_csv(flags[flag], index=False)
    evaluate_command([words[0][0], *(word for pair in flags.items() for word in pair)])
    assert capsys.readouterr().out.count('1 groups have videos in both manifests, such as g1') == 1
    assert not [warning for warning in recwarn if 'groups' in str(warning.message)]


THEIRS = """
from torch import nn
from vicc.encoders import VideoEncoder
def colour(): return nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())  # clips of the recipe
def own(): return VideoEncoder(lambda clips: clips.mean((2, 3, 4)), 4, 2, size=12, resize=16, mean=(0, 0, 0), std=(1, 1, 1))
def frames(): return nn.Flatten(2)
"""


def test_any_encoder_beside_the_streams(words, tmp_path, capsys, monkeypatch):
    streams, flags = words
    (tmp_path/'their_nets.py').write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    flags = [word for pair in (flags | {'--output': str(tmp_path/'table.csv')}).items() for word in pair]
    evaluate_command([streams[0], '--encoder', 'their_nets:colour', '--encoder', 'their_nets:own', *flags])
    table = pd.read_csv(tmp_path/'table.csv', index_col=0)
    assert list(table.index) == ['chance', 'random rgb', 'rgb', 'their_nets:colour', 'their_nets:own'] and table[['R@1', 'R@50', 'quick probe']].notna().all().all()
    assert 'their_nets:own' in capsys.readouterr().out
    refused = {('their_nets:frames',): r'--encoder their_nets:frames: the encoder returns \[2, 3, 12800\] for 2 clips, 8 frames of 40×40 pixels: features must be',
               ('their_nets:own', '--cache', 'kept'): r'--encoder their_nets:own: a function that is no module needs a name for the cache',
               ('their_nets:nothing',): r"--encoder their_nets:nothing: .*nothing", ('nowhere:net',): 'No module named'}
    for (name, *more), text in refused.items():
        with pytest.raises(SystemExit) as stopped: evaluate_command([streams[0], '--encoder', name, *more, *flags])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and re.search(text, printed.err) and len(printed.err.splitlines()) == 1 and not printed.out
    with pytest.raises(SystemExit): evaluate_command(flags)
    assert 'or --encoder module:function, or --released FILE' in capsys.readouterr().err


def test_a_released_file_is_audited(words, shapes, tmp_path, capsys):
    torch.manual_seed(0)
    file = export_released(Stream('r21d', 4, 8, trained_on=dict(modality='flow')), tmp_path/'flow.pth.tar')
    flags = words[1] | {'--released': str(file), '--modality': 'flow', '--output': str(tmp_path/'audit.csv')}
    for flag, name in (('--gallery', 'train'), ('--queries', 'test')):
        flags[flag] = str(tmp_path/f'{name}.csv')
        pd.read_csv(shapes[name]).head(4).to_csv(flags[flag], index=False)
    arguments = [word for pair in flags.items() for word in pair]
    evaluate_command(arguments)
    printed, table = capsys.readouterr().out, pd.read_csv(tmp_path/'audit.csv', index_col=[0, 1])
    assert 'r21d, ViCC, single-stream, K = 4; RGB or flow: a file does not say' in printed
    assert set(table.index.get_level_values(0)) == {'flow'} and {'as here', 'test jitter', 'both: the released protocol',
        'not centred', 'channels not translated', 'published: ViCC-Flow-2'} <= set(table.loc['flow'].index)
    with pytest.raises(SystemExit): evaluate_command(['rgb=x', *arguments])
    assert 'or --released FILE' in capsys.readouterr().err


def test_the_precision_is_named():
    for device, precision, name in (('cpu', 'no', 'float32'), ('cuda', 'fp16', 'fp16')):
        assert check_precision(SimpleNamespace(device=torch.device(device), mixed_precision=precision)) == name


@pytest.mark.parametrize('precision, port, message', [('no', True, 'port {port} is in use: set MASTER_PORT'), ('fp16', False, 'this cpu cannot compute gradients in fp16')], ids=['port in use', 'fp16 on a CPU'])
def test_training_that_cannot_start_ends_in_one_line(tmp_path, precision, port, message):
    environment = dict(os.environ, ACCELERATE_USE_CPU='true')
    with socket.create_server(('', 0)) as server:
        number = str(server.getsockname()[1])
        if port: environment |= dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=number)
        command = [sys.executable, '-m', 'vicc.alternation', '--recipe', 'demo', '--manifest', 'm.csv', '--prepared', '--output', tmp_path/'run',
                   '--set', f"mixed_precision='{precision}'"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and message.format(port=number) in run.stderr, run.stderr
    assert len(run.stderr.splitlines()) == 1 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('contains, streams, change', [
    ('each at most once', ['rgb=a', 'rgb=b'], {}), ('depth=a: write rgb=PATH or flow=PATH', ['depth=a'], {}), ('flow=: write', ['flow='], {}),
    ('nothing', ['rgb=nothing'], {}), ('flow_bound is 5.0, not 20.0', None, dict(flow_bound=20.)),
    ('or a side below 100 pixels (test_crop)', None, dict(test_crop=100)), ('videos are in both manifests', None, {'--queries': 'train'}),
    ('--device cuda:7: PyTorch cannot use it', None, {'--device': 'cuda:7'}), ('--device gpu: PyTorch', None, {'--device': 'gpu'}),
    ('is a folder: name a CSV file', None, {'--output': '.'}), ('flow was trained on flow, not on rgb', ['rgb={flow}'], {'--output': 'new/table.csv'}),
    ('32 of 48 videos have no label', None, {'--gallery': 'unlabelled'})], ids=lambda value: value if isinstance(value, str) else '')
def test_what_does_not_fit_is_refused_in_one_line(words, shapes, tmp_path, capsys, contains, streams, change):
    flags = words[1] | {name: value if name == '--device' else str(tmp_path/value) for name, value in change.items() if name in ('--device', '--output')}
    if streams: streams = [each.format(flow=words[0][1].partition('=')[2]) for each in streams]
    if '--queries' in change: flags['--queries'] = str(shapes['train'])
    elif '--gallery' in change:
        flags['--gallery'] = str(tmp_path/'unlabelled.csv')
        pd.read_csv(shapes['train']).drop(columns=['label', 'class_name']).to_csv(flags['--gallery'], index=False)
    elif not change.keys() & {'--device', '--output'}:
        flags['--recipe'] = str(tmp_path/'recipe.yaml')
        Recipe.read('demo', **change).write(flags['--recipe'])
    with pytest.raises(SystemExit) as ended: evaluate_command([*(streams or words[0]), *(word for pair in flags.items() for word in pair)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and contains in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize('words, message', [
    (['--recipe', 'none.yaml', '--videos', 'v'], 'none.yaml does not exist'),
    (['--recipe', 'demo'], 'give --videos FOLDER, or --prepared'),
    (['--recipe', 'demo', '--prepared', '--set', 'seed'], '--set seed: write name=value'),
    (['--recipe', 'demo', '--prepared', '--set', 'sed=1'], r'unknown key .sed. \(did you mean seed\?\)')])
def test_a_wrong_command_line_ends_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended: train(['--manifest', 'm.csv', '--output', 'o', *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, error) and len(error.splitlines()) == 1, error


DEMO = find_project(__file__)/'nbs'/'recipes'/'demo.yaml'
OWN_CODE = '''
from torch import nn
from vicc.trainer import Trainer

class Mean(nn.Module):
    "Mean colour of a clip."
    def __init__(self, width):
        super().__init__()
        self.num_features, self.layer = width, nn.Conv3d(3, width, 1)
    def forward(self, clips): return self.layer(clips).mean((2, 3, 4))

class Counting(Trainer):
    calls = 0
    def assign(self, scores, queue):
        Counting.calls += 1
        return super().assign(scores, queue)

def unmarked(width): return Mean(width)

def marked(width) -> nn.Module: return Mean(width)
'''


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    "A module of the user's in the current folder, which is forgotten afterwards."
    (tmp_path/'own_code.py').write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    yield
    sys.modules.pop('own_code', None)
    for name in ('own_code:Mean', 'own_code:marked'): BACKBONES.pop(name, None)


def test_a_backbone_and_a_trainer_of_the_users_need_no_script(own_code, store, shapes, tmp_path, capsys):
    "Train, go on with it, load; without the module's name in a recipe, no stream imports it."
    tiny = ['single_epochs_rgb=1', 'single_epochs_flow=1', 'cross_epochs=1', 'cross_freeze_prototypes=0', 'single_batch_size=16', 'cross_batch_size=16', 'num_prototypes=4']
    command = ['--recipe', str(DEMO), '--manifest', str(shapes['train']), '--prepared', '--store', str(store.path), '--output', 'run']
    for cycles, steps in ((0, 4), (1, 8)):  # 32 videos are two batches, for each of two streams
        train([*command, '--trainer', 'own_code:Counting', '--accept-changes', '--set', 'backbone=own_code:Mean', 'backbone_options={width: 3}', f'cycles={cycles}', *tiny])
        assert sys.modules['own_code'].Counting.calls == steps
    saved = tmp_path/'run'/'stages'/'02-rgb-2-cycle-1'/'stream'
    assert load_stream(saved).num_features == 3
    with pytest.raises(SystemExit): train([*command, '--set', 'backbone=own_code:Mean', 'backbone_options={width: 3}', 'cycles=1', *tiny])
    assert "method.yaml is ['name: own_code:Counting'], not ['name: vicc']" in capsys.readouterr().err
    sys.modules.pop('own_code')
    BACKBONES.pop('own_code:Mean')
    for load in (load_stream, Stream.from_pretrained):
        with pytest.raises(ValueError, match="'own_code:Mean'.*register_backbone"): load(saved)
    assert 'own_code' not in sys.modules
    Recipe.read(tmp_path/'run'/'recipe.yaml')
    assert type(load_stream(saved).backbone) is sys.modules['own_code'].Mean


@pytest.mark.parametrize('name, message', [
    ('own_code:Nothing', "has no attribute 'Nothing'. Start the command in the folder of the module"), ('own_code:unmarked', r'def unmarked\(…\) -> nn.Module'),
    ('os:system', 'must be a class of torch.nn.Module'), ('own_cod:Mean', "No module named 'own_cod'")])
def test_a_backbone_that_cannot_be_one_is_refused_before_any_work(own_code, name, message):
    with pytest.raises(ValueError, match=message): Recipe.read(DEMO, backbone=name)
    assert create_backbone(Recipe.read(DEMO, backbone='own_code:marked').backbone, width=5).num_features == 5


def test_a_stream_that_does_not_say_what_it_saw_is_doubted_by_its_batch_norm():
    torch.manual_seed(0)
    stream, still = Stream('small', 4, 8), (128/255 - torch.tensor(IMAGENET_MEAN))/torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        for _ in range(50): stream.train().features(still[:, None, None, None] + .1*torch.randn(2, 3, 2, 32, 32))
    as_rgb, as_flow = (trained_on_remarks(stream, name, 'old', Recipe.read(DEMO)) for name in STREAMS)
    assert as_flow == ['old does not say whether it saw RGB or flow: it is given flow']
    assert as_rgb[0].startswith('old does not say whether it saw RGB or flow: it is given rgb, but looks like flow, by the mean colour')
