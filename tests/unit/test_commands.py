"The commands train and evaluate: files in, a table out, one line for every error."
import re

import pandas as pd
import pytest
import torch

from vicc.alternation import main as train
from vicc.commands import evaluate_command
from vicc.prepare import STREAMS, prepare
from vicc.recipe import Recipe
from vicc.streams import Stream, save_stream
from vicc.synthetic import make_moving_shapes


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 32, 16)


@pytest.fixture(scope='module')
def store(shapes, tmp_path_factory):
    rows = pd.concat([pd.read_csv(shapes[name]) for name in ('train', 'test')])
    return prepare(rows, shapes['videos'], tmp_path_factory.mktemp('store')/'store', Recipe.read('demo').prepare_settings(),
                   workers=0, log=lambda line: None)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    torch.manual_seed(0)
    return {name: save_stream(Stream('small', 8, 16, {'width': 8}), tmp_path_factory.mktemp('streams')/name) for name in STREAMS}


@pytest.fixture(scope='module')
def words(store, shapes, paths):
    "Words of a command line that works: streams, then flags."
    files = dict(recipe='demo', store=store.path, gallery=shapes['train'], queries=shapes['test'])
    return [f'{name}={path}' for name, path in paths.items()], {f'--{name}': str(path) for name, path in files.items()}


def test_command_line(words, tmp_path, capsys):
    streams, flags = words
    flags = flags | {'--output': str(tmp_path/'table.csv'), '--cache': str(tmp_path/'features')}
    for _ in range(2): evaluate_command([*streams, *(word for pair in flags.items() for word in pair)])  # the second time from the cache
    table = pd.read_csv(tmp_path/'table.csv', index_col=0)
    assert list(table.index) == ['rgb', 'flow', 'rgb + flow'] and 'quick probe' in table and table['R@1'].between(0, 1).all()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:len(printed)//2] == printed[len(printed)//2:]


@pytest.mark.parametrize('contains, streams, change', [
    ('each at most once', ['rgb=a', 'rgb=b'], {}), ('write rgb=PATH and flow=PATH', ['depth=a'], {}),
    ('nothing', ['rgb=nothing'], {}), ('flow_bound is 5.0, not 20.0', None, dict(flow_bound=20.)),
    ('a crop of 100 does not fit', None, dict(test_crop=100)), ('videos are in both manifests', None, {'--queries': 'train'}),
    ('32 videos of the gallery have no label', None, {'--gallery': 'unlabelled'})], ids=lambda value: value if isinstance(value, str) else '')
def test_what_does_not_fit_is_refused_in_one_line(words, shapes, tmp_path, capsys, contains, streams, change):
    flags = dict(words[1])
    if '--queries' in change: flags['--queries'] = str(shapes['train'])
    elif '--gallery' in change:
        flags['--gallery'] = str(tmp_path/'unlabelled.csv')
        pd.read_csv(shapes['train']).drop(columns=['label', 'class_name']).to_csv(flags['--gallery'], index=False)
    else:
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
