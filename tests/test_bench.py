"The benchmark's arithmetic, order and messages. Nothing here measures time: the clock is ours."
import json
import shlex
import subprocess
import sys
import tarfile
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from vicc import alternation, bench, prepare
from vicc.recipe import Recipe
from vicc.engine.io import find_project
from vicc.prepare import Store
from vicc.video import write_video


NOTEBOOK = find_project(__file__)/'nbs'/'run_profile.ipynb'
RESULTS = find_project(__file__)/'nbs'/'results'
RECIPES = sorted((find_project(__file__)/'nbs'/'recipes').glob('*.yaml'))
SCRIPT = find_project(__file__)/'.ci'/'gpu'
SMALL = dict(batch_size=2, clip_length=8, repeats=2)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return bench.small_store(tmp_path_factory.mktemp('bench'), videos=2, height=48, width=64, num_frames=24)


@pytest.fixture
def one_second(monkeypatch):
    "Every call takes one second, says the clock."
    ticks = count()
    monkeypatch.setattr(bench, 'time', SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_the_clock_waits_for_the_device(monkeypatch):
    events = []
    monkeypatch.setattr(bench, 'time', SimpleNamespace(perf_counter=lambda: events.append('clock') or float(len(events))))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: events.append(f'wait {device}'))
    seconds = bench.measure(lambda: events.append('work'), repeats=2, warm_up=1, device='cuda')
    assert events == ['wait cuda', 'clock', 'work', 'wait cuda', 'clock']*3
    assert seconds == [3.0, 3.0]  # clock, work, wait, clock: three events later


def test_rows_hold_the_median_and_what_it_depends_on():
    row = bench.result('loader', 'x', 12, 'clips/s', [3, 1, 30], batch_size=4)
    assert row == dict(part='loader', name='x', value=4.0, unit='clips/s', settings=dict(threads=torch.get_num_threads(), batch_size=4, repeats=3, spread=9.67))
    assert bench.result('flow', 'x', 1, 'pairs/s', [3.0], threads=7)['settings']['threads'] == 7


def test_all_parts_with_seconds_of_one(one_second):
    table = bench.run(quick=True)
    timed = table[table.unit.str.endswith('/s')]
    values = {f'{row.part} {row.name}': row.value for row in timed[timed.part != 'epoch'].itertuples()}
    clips = [values.pop(f'evaluation small {way}') for way in ('in batches', 'one video at a time', 'one clip at a time')]
    assert values == {**{f'flow {name}': 2 for name in bench.available_methods()}, 'loader decode rgb': 2, 'loader decode flow': 2, 'loader workers 0': 4, 'loader workers 1': 4,
                      **{f'step small {name}': 2 for name in ('single with views', 'single', 'cross with views', 'cross')}}
    assert clips == [4*2, 4*2, 4*2]  # 4 videos of 32 frames: clips start at 0 and 15
    assert all({'threads', 'repeats', 'spread'} <= set(settings) and settings['spread'] == 0 for settings in timed.settings)
    assert timed[timed.part == 'epoch'].name.tolist() == ['small single', 'small cross'] and table.set_index('name').value['small largest difference'] < 1e-3
    assert set(table.unit) == {'pairs/s', 'clips/s', 'samples/s', 'px', '%', 'of length 1', 'times as fast'} and table.set_index('name').value['small in batches, compared with one video at a time'] == 1 and table.attrs['machine']['cores'] >= 1


def test_parts_alone(one_second, store):
    assert [row['value'] for row in bench.bench_flow(['dis', 'farneback'], 48, 64, pairs=3, repeats=1)] == [3, 3]
    rows = [*bench.bench_loader(store, workers=(0,), streams=('rgb',), **SMALL)]
    assert [(row['name'], row['value']) for row in rows] == [('decode rgb', 2), ('workers 0', 4)] and rows[1]['settings']['streams'] == 'rgb'
    rows = [*bench.bench_step(store, ['small'], ['cross'], view_size=16, num_prototypes=4, warm_up=0, **SMALL)]
    assert [(row['name'], row['settings']['clip'], row['settings']['precision'], row['settings']['views']) for row in rows] == [('small cross with views', '8×16×16', 'no', 'in every step'), ('small cross', '8×16×16', 'no', 'made before')]
    batched, videos, clips, times, difference = bench.bench_evaluation(store, ['small'], view_size=16, few=1, **SMALL)
    assert (batched['value'], videos['value'], clips['value'], times['value']) == (2*videos['value'], videos['value'], videos['value'], 2) and difference['value'] < 1e-3
    assert batched['settings']['batch_size'] == 2


def test_a_step_trains_the_stream_and_leaves_the_other(one_second, store, monkeypatch):
    stages = []
    class Spy(bench.Stage):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            stages.append((self, {name: value.clone() for name, value in self.stream.state_dict().items()}, {name: value.clone() for name, value in self.other.state_dict().items()}))
    monkeypatch.setattr(bench, 'Stage', Spy)
    list(bench.bench_step(store, ['small'], ['cross'], view_size=16, num_prototypes=4, **SMALL))
    stage, own, other = stages[0]
    assert any((stage.stream.state_dict()[name] != value).any() for name, value in own.items() if name.endswith('weight'))
    assert all(torch.equal(stage.other.state_dict()[name], value) for name, value in other.items())


def test_an_epoch_is_fed_from_the_store(one_second, store):
    rows = [*bench.bench_epoch(store, ['small'], batch_size=2, clip_length=8, view_size=16, num_prototypes=4, workers=1, seconds=6)]
    assert [(row['name'], row['unit']) for row in rows[::2]] == [('small single', 'samples/s'), ('small cross', 'samples/s')]
    assert all(row['settings']['steps'] == 3 and row['settings']['workers'] == 1 and row['value'] > 0 for row in rows)  # two epochs, and a step takes a second, says the clock
    assert all(row['unit'] == '%' and 0 < row['value'] <= 100 for row in rows[1::2])


def test_views_are_made_once_or_in_every_step(one_second, store, monkeypatch):
    made = []
    monkeypatch.setattr(bench.Stage, 'views', lambda stage, batch, name, views=bench.Stage.views: made.append(name) or views(stage, batch, name))
    rows, counts = bench.bench_step(store, ['small'], ['cross'], view_size=16, num_prototypes=4, warm_up=1, **SMALL), []
    for _ in rows: counts.append(len(made))
    assert counts == [2*3, 2*3 + 2]  # two streams in three steps; then once more for all steps to come


def test_every_sample_of_an_epoch_is_checked(one_second, store, monkeypatch):
    epochs = []
    monkeypatch.setattr(bench, 'train_epoch', lambda stage, loader, epoch: epochs.append((stage.dataset, loader.dataset)) or dict(samples_per_second=1., wait=0.))
    list(bench.bench_epoch(store, ['small'], ['cross'], batch_size=1, clip_length=8, view_size=16, num_prototypes=4, seconds=8))
    dataset, same = epochs[0]
    assert dataset is same and len(dataset) == 4 and set(dataset.frames.checksums) == {(video, stream) for video in store.manifest.video for stream in ('rgb', 'flow')}


def test_rows_are_written_as_they_come(store, tmp_path, monkeypatch):
    def rows(*_, **__):
        yield bench.result('loader', 'first', 1, 'clips/s', [1.0])
        yield bench.result('loader', 'second', 1, 'clips/s', [1.0])
        raise KeyboardInterrupt
    monkeypatch.setattr(bench, 'bench_loader', rows)
    with pytest.raises(KeyboardInterrupt): bench.run(['loader'], store, output=tmp_path/'rows.json')
    written = json.loads((tmp_path/'rows.json').read_text())
    assert [row['name'] for row in written['rows']] == ['first', 'second'] and written['machine']['cores'] >= 1


def measured(part, value, name='', **settings):
    return dict(part=part, name=name, value=value, unit='samples/s', settings=settings)


def test_beside_the_released_code(capsys):
    shape = dict(backbone='s3d', clip='32×128×128')
    rows = [measured('step', 460., 's3d cross', kind='cross', **shape), measured('step', 900., 's3d single', kind='single', **shape), measured('step', 5., 'tiny', kind='cross', backbone='small', clip='8×32×32'),
            measured('epoch', 195., 's3d cross', kind='cross', **shape), measured('epoch', 390., 's3d single', kind='single', **shape), measured('loader', 78., 'workers 16', streams='rgb,flow', clip_length=32, workers=16, size='240×320')]
    table = pd.DataFrame(rows)
    table.attrs['machine'] = dict(gpu='a GPU', cores=16)
    beside = bench.beside_released(table, bench.released_speeds(RESULTS/'released_speed.csv')).set_index(['part', 'what'])
    assert beside['samples/s'][[('step', 'released code'), ('loader', 'released code'), ('epoch', 'released code')]].tolist() == ['115', '39', '39']
    own = beside[beside.machine == 'here: a GPU, 16 cores']
    assert own['times the released code'].to_dict() == {('loader', 'vicc, workers 16'): '2', ('step', 'vicc, s3d cross'): '4', ('epoch', 'vicc, s3d cross'): '5'}
    bench.show_report(table)
    printed = capsys.readouterr().out
    assert 'Beside the released code' in printed and 'vicc, workers 16' in printed and 'python -m vicc.bench epoch --recipe nbs/recipes/ucf101_s3d.yaml' in printed and 'Hours' not in printed
    bench.show_report(table.iloc[[5]])
    assert 'Hours' not in capsys.readouterr().out  # a loader alone
    bench.show_report(table.iloc[[2]])
    assert 'Beside' not in (printed := capsys.readouterr().out) and 'Hours' not in printed and all(path.stem in printed.split('Not measured as they train: ')[1] for path in RECIPES)


def test_every_released_speed_says_where_it_comes_from():
    released = pd.read_csv(RESULTS/'released_speed.csv')
    assert released.source.str.startswith('measured by us').all() and (released.machine == 'one H100, 16 cores').all() and (released.low <= released.high).all()


def as_trained(path, **speeds):
    "Rows of steps as a recipe makes them."
    recipe = Recipe.read(path)
    shape = dict(backbone=recipe.backbone, clip=f'{recipe.clip_length}×{recipe.view_size}×{recipe.view_size}', precision=recipe.mixed_precision, compiled=recipe.compile, size=f'{recipe.short_side}×{recipe.short_side*4//3}',
                 **(dict(options=recipe.backbone_options) if recipe.backbone_options else {}))
    return [measured('step', speed, kind=kind, batch_size=getattr(recipe, f'{kind}_batch_size'), **shape) for kind, speed in speeds.items()]


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_hours_of_recipes(path):
    steps = pd.DataFrame(as_trained(path, single=100., cross=50.))
    hours = bench.recipe_hours(steps, path).iloc[0]
    recipe, (data, videos) = Recipe.read(path), bench.DATA_SETS[path.stem.split('_')[0]]
    assert (hours.recipe, hours['data'], hours['from'], hours.processes) == (path.stem, data, 'step', 1)
    assert np.isclose(hours['whole recipe [h]'], bench.hours_needed(recipe, videos, dict(single=100, cross=50)))
    one = bench.recipe_hours(steps.head(1), path).iloc[0]  # no cross-stream speed
    assert np.isnan(one['whole recipe [h]']) and one['epoch of single [h]'] == hours['epoch of single [h]'] and f'--recipe nbs/recipes/{path.name}' in one['from']
    assert bench.recipe_hours(pd.DataFrame(as_trained(path, single=1., cross=1.)).assign(part='epoch'), path)['from'][0] == 'epoch'


@pytest.mark.parametrize('change', [dict(batch_size=1), dict(precision='fp16'), dict(compiled=False), dict(clip='16×112×112'), dict(views='made before'), dict(options=dict(width=4))], ids=str)
def test_no_hours_from_other_speeds(change):
    path = RECIPES[0].with_name('ucf101_s3d.yaml')
    rows = [{**row, 'settings': {**row['settings'], **change}} for row in as_trained(path, single=100., cross=50.)]
    assert bench.recipe_hours(pd.DataFrame(rows), path)['from'][0].startswith('not measured: python')


def test_measuring_for_a_recipe(store, capsys, tmp_path):
    recipe = Recipe.read(RECIPES[0].with_name('demo.yaml'), backbone_options=dict(width=4), single_batch_size=2, cross_batch_size=1, num_prototypes=6)
    recipe.write(tmp_path/'demo_tiny.yaml')
    bench.main(['step', '--recipe', str(tmp_path/'demo_tiny.yaml'), '--repeats', '1', '--store', str(store.path), '--device', 'cpu', '--output', str(tmp_path/'rows.json'), '--processes', '2'])
    rows = json.loads((tmp_path/'rows.json').read_text())['rows']
    assert [(row['settings']['batch_size'], row['settings']['options']) for row in rows] == [(2, dict(width=4))]*2 + [(1, dict(width=4))]*2
    hours = bench.recipe_hours(pd.DataFrame(rows), tmp_path/'demo_tiny.yaml', 2)
    assert hours['whole recipe [h]'][0] > 0 and hours.batch[0] == '2 and 1'
    assert 'on 2 such processes' in (printed := capsys.readouterr().out) and 'demo_tiny' in printed and 'ucf101' not in printed and 'Not measured' not in printed


def test_one_worker_more_reads_the_same_number_of_rounds(one_second, store):
    rows = [*bench.bench_loader(store, workers=(2,), streams=('rgb',), batch_size=1, clip_length=4, repeats=1)]
    assert rows[-1]['value'] == 4  # two rounds of two workers


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_hours(path):
    recipe = Recipe.read(path)
    videos, single, cross = 9537, 50.0, 20.0
    expected = 0.0
    for epochs, batch, speed in ((recipe.single_epochs_rgb, recipe.single_batch_size, single), (recipe.single_epochs_flow, recipe.single_batch_size, single),
                                 (2*recipe.cycles*recipe.cross_epochs, recipe.cross_batch_size, cross)):
        expected += epochs*(videos - videos % batch)/speed
    assert np.isclose(bench.hours_needed(recipe, videos, dict(single=single, cross=cross)), expected/3600)
    assert np.isclose(bench.hours_needed(recipe, videos, 2.0), 2*bench.hours_needed(recipe, videos, 4.0))


def test_hours_refuse_what_cannot_be():
    recipe = Recipe.read(RECIPES[-1])
    for speed in (0, -1, float('nan'), dict(cross=3), {}):
        with pytest.raises(ValueError, match='give a number above 0'): bench.hours_needed(recipe, 9537, speed)
    with pytest.raises(ValueError, match='100 videos do not fill one batch of 192'): bench.hours_needed(recipe, 100, 5, processes=4)


@pytest.mark.parametrize('values, message', [
    (dict(parts=['steps']), "unknown part 'steps': choose flow, loader, step, epoch, evaluation"),
    (dict(parts=[]), 'at least one'),
    (dict(backbones=['s4d']), "unknown backbone 's4d': choose s3d"),
    (dict(device='gpu'), "device 'gpu'"),
    pytest.param(dict(device='cuda'), "there is no GPU: use 'cpu'", marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_refused_before_any_work(monkeypatch, values, message):
    monkeypatch.setattr(bench, 'small_store', lambda *_, **__: pytest.fail('it has begun'))
    monkeypatch.setattr(bench, 'measure', lambda *_, **__: pytest.fail('it has begun'))
    with pytest.raises(ValueError, match=message): bench.run(**values)


def test_command(one_second, store, tmp_path, capsys):
    bench.main(['loader', 'flow', '--quick', '--device', 'cpu', '--store', str(store.path), '--output', str(tmp_path/'bench.json')])
    written, printed = json.loads((tmp_path/'bench.json').read_text()), capsys.readouterr().out
    assert [row['name'] for row in written['rows']] == [*2*bench.available_methods(), 'tvl1 (torch) to OpenCV, mean', 'tvl1 (torch) to OpenCV, median', 'decode rgb', 'decode flow', 'workers 0', 'workers 1']
    assert [written['rows'][place]['settings']['size'] for place in (0, 4, 10)] == ['48×64', '24×32', '48×64'] and written['machine'].pop('load_at_start') >= 0 and written['machine'] == json.loads(json.dumps(bench.machine()))
    assert all(row['name'] in printed for row in written['rows']) and 'torch:' in printed
    assert [path.name for path in tmp_path.iterdir()] == ['bench.json']


@pytest.mark.parametrize('words, message', [(['disk'], "unknown part 'disk'"), (['--store', 'nowhere'], 'not a finished store'), (['--backbones', 'big', '--device', 'cpu'], "unknown backbone 'big'")])
def test_command_refuses(words, message, capsys):
    with pytest.raises(SystemExit) as ended: bench.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ended: bench.main(['--help'])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f'--{name}' in text for name in ('videos', 'true-flow', 'output', 'quick', 'device', 'precision', 'backbones', 'batch-size', 'view-size', 'workers', 'store', 'threads', 'seconds', 'steps', 'recipe', 'processes', 'pairs', 'no-compiled'))


def test_small_store_is_a_store(store):
    again = Store(store.path)
    assert len(again.manifest) == 2 and again.settings.short_side == 48
    for row in again.manifest.itertuples():
        for stream, channels in (('rgb', 3), ('flow', 2)): assert again.read(row.video, stream).shape == (24, 48, 64, channels)


def test_profile_notebook(tmp_path):
    values = dict(recipe_file=str(tmp_path/'tiny.yaml'), num_videos=8, epochs=1, workers=[0], output=str(tmp_path/'out'), results_file=str(tmp_path/'copy.csv'))
    Recipe.read(find_project(__file__)/'nbs'/'recipes'/'demo.yaml', backbone_options=dict(width=4), single_batch_size=4, cross_batch_size=4, num_prototypes=6, projection_dim=8).write(tmp_path/'tiny.yaml')
    papermill.execute_notebook(NOTEBOOK, tmp_path/'out.ipynb', values, progress_bar=False, cwd=NOTEBOOK.parent)
    table = pd.read_csv(tmp_path/'copy.csv')
    assert np.allclose(table.groupby('step').share.sum(), 1, atol=1e-2) and set(table.step) == {'single', 'cross'} and (table.samples_per_second > 0).all()
    parts = table.set_index(['step', 'part']).ms_per_step
    assert parts['single', 'frozen stream'] == 0 and all(parts['cross', name] > 0 for name in ('read clips', 'pack batch', 'views', 'frozen stream', 'forward', 'backward', 'optimiser', 'Sinkhorn and loss'))
    assert {path.name for path in (tmp_path/'out').iterdir()} == {'profile.png', 'operators.csv', 'loading.csv'}


def measure_gpu(folder, *words):
    "Call the script in tiny shapes on the CPU. It lives in the repository alone."
    if not SCRIPT.is_file(): pytest.skip('no script')
    command = [sys.executable, SCRIPT, folder/'out', '--data', folder/'data', '--work', folder/'work', '--device', 'cpu', *words]
    return subprocess.run(list(map(str, command)), cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=200)


def test_commands_of_the_gpu_script(tmp_path, capsys):
    printed = measure_gpu(tmp_path, '--dry').stdout.splitlines()
    parts = {name: shlex.split(command) for name, command in (line.split(': ', 1) for line in printed)}
    assert not list(tmp_path.iterdir()) and {'compile_1', 'tests', 'step', 'step_no_graphs', 'epoch_240', 'epoch_160', 'flow', 'prepare', 'evaluation', 'train'} <= set(parts)
    helped = {}
    for module in (alternation, prepare):
        with pytest.raises(SystemExit): module.main(['--help'])
        helped[module.__name__] = capsys.readouterr().out
    for name, words in parts.items():
        words = words[3:] if words[0] == 'nice' else words
        if words[1:3] == ['-m', 'vicc.bench']:
            values = vars(bench.words(words[3:]))
            bench.BenchSettings(**{field: values[field] for field in bench.BenchSettings.__dataclass_fields__ if field in values})
            assert set(values['parts']) <= set(bench.PARTS) and values['output'].name == f'{name}.json'
        elif words[1] == '-m' and words[2] in helped: assert all(word in helped[words[2]] for word in words if word.startswith('--')), name


def test_the_gpu_script_goes_on_after_a_failure(tmp_path):
    (tmp_path/'data'/'videos').mkdir(parents=True)
    write_video(tmp_path/'data'/'videos'/'one.mp4', np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8))
    first = measure_gpu(tmp_path, '--quick', '--phases', 'flow')
    assert '== flow: 2' in first.stdout and 'holds no .flo files' in first.stdout and '== prepare: 0' in first.stdout, first.stdout + first.stderr
    with tarfile.open(tmp_path/'out'/'gpu.tar.gz') as kept: names = {name.removeprefix('./') for name in kept.getnames()}
    assert {'flow.txt', 'copies.done', 'prepare.done', 'prepare_report.json'} <= names and 'flow.done' not in names
    again = measure_gpu(tmp_path, '--quick', '--phases', 'flow', '--seconds', '5').stdout
    assert 'prepare' not in again and 'no time left for flow: call again' in again
