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


def small(**values) -> bench.BenchSettings:
    "Two samples of eight frames, two calls."
    return bench.BenchSettings(**dict(backbones=['small'], batch_size=2, clip_length=8, view_size=16,
                                      num_prototypes=4, repeats=2) | values)


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
    monkeypatch.setattr(bench, 'time',
                        SimpleNamespace(perf_counter=lambda: events.append('clock') or float(len(events))))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'synchronize', lambda device: events.append(f'wait {device}'))
    seconds = bench.measure(lambda: events.append('work'), repeats=2, warm_up=1, device='cuda')
    assert events == ['wait cuda', 'clock', 'work', 'wait cuda', 'clock']*3
    assert seconds == [3.0, 3.0]  # clock, work, wait, clock: three events later


def test_rows_hold_the_median_and_what_it_depends_on():
    row = bench.speed_row('loader', 'x', 12, 'clips/s', [3, 1, 30], batch_size=4)
    assert row == dict(part='loader', name='x', value=4.0, unit='clips/s',
                       settings=dict(threads=torch.get_num_threads(), batch_size=4, repeats=3, spread=9.67))
    assert bench.speed_row('flow', 'x', 1, 'pairs/s', [3.0], threads=7)['settings']['threads'] == 7


def test_all_parts_with_seconds_of_one(one_second):
    table = bench.run(quick=True)
    timed = table[table.unit.str.endswith('/s')]
    values = {f'{row.part} {row.name}': row.value for row in timed[timed.part != 'epoch'].itertuples()}
    clips = [values.pop(f'evaluation small {way}') for way in ('in batches', 'one video at a time')]
    assert values == {**{f'flow {name}': 2 for name in bench.available_methods()}, 'loader decode rgb': 2,
                      'loader decode flow': 2, 'loader workers 0': 4, 'loader workers 1': 4,
                      **{f'step small {name}': 2
                         for name in ('single with views', 'single', 'cross with views', 'cross')}}
    assert clips == [4*2, 4*2]  # 4 videos of 32 frames: clips start at 0 and 15
    assert all({'threads', 'repeats', 'spread'} <= set(settings) and settings['spread'] == 0
               for settings in timed.settings)
    assert timed[timed.part == 'epoch'].name.tolist() == ['small single', 'small cross']
    assert table.set_index('name').value['small largest difference'] < 1e-3
    assert set(table.unit) == {'pairs/s', 'clips/s', 'samples/s', 'px', '%', 'of length 1', 'times as fast'}
    assert table.set_index('name').value['small in batches, compared with one video at a time'] == 1
    assert table.attrs['machine']['cores'] >= 1


def test_parts_alone(one_second, store):
    clips = bench.grey_clips(None, 48, 64, 4)
    assert {row['value'] for row in bench.flow_speeds(clips, small(pairs=3, repeats=1))} == {3}
    rows = [*bench.bench_loader(store, small(workers=(0,)))]
    assert [(row['name'], row['value']) for row in rows] == [('decode rgb', 2), ('decode flow', 2),
                                                             ('workers 0', 4)]
    assert rows[2]['settings']['streams'] == 'rgb,flow'
    rows = [*bench.bench_step(store, small(steps=['cross']), warm_up=0)]
    assert [row['name'] for row in rows] == ['small cross with views', 'small cross']
    assert [row['settings']['views'] for row in rows] == ['in every step', 'made before']
    assert all((row['settings']['clip'], row['settings']['precision']) == ('8×16×16', 'no') for row in rows)
    batched, videos, times, difference = bench.bench_evaluation(store, small(workers=(0,)), few=1)
    assert (batched['value'], times['value']) == (2*videos['value'], 2) and difference['value'] < 1e-3
    assert batched['settings']['batch_size'] == 2


def test_a_step_trains_the_stream_and_leaves_the_other(one_second, store, monkeypatch):
    trainers = []
    class Spy(bench.BenchTrainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append((self,
                             *({name: value.clone() for name, value in stream.state_dict().items()}
                               for stream in (self.stream, self.teacher))))
    monkeypatch.setattr(bench, 'BenchTrainer', Spy)
    list(bench.bench_step(store, small(steps=['cross'])))
    trainer, own, teacher = trainers[0]
    assert any((trainer.stream.state_dict()[name] != value).any() for name, value in own.items()
               if name.endswith('weight'))
    assert all(torch.equal(trainer.teacher.state_dict()[name], value) for name, value in teacher.items())


def test_an_epoch_is_fed_from_the_store(one_second, store):
    rows = [*bench.bench_epoch(store, small(workers=(1,), seconds=6))]
    assert [(row['name'], row['unit']) for row in rows[::2]] == [('small single', 'samples/s'),
            ('small cross', 'samples/s')]
    # two epochs, and a step takes a second, says the clock
    assert all(row['settings']['steps'] == 3 and row['settings']['workers'] == 1 and row['value'] > 0
               for row in rows)
    assert all(row['unit'] == '%' and 0 < row['value'] <= 100 for row in rows[1::2])


def test_views_are_made_once_or_in_every_step(one_second, store, monkeypatch):
    made, views = [], bench.Trainer.views
    monkeypatch.setattr(bench.Trainer, 'views', lambda trainer, batch, name: made.append(name)
                        or views(trainer, batch, name))
    counts = []
    for _ in bench.bench_step(store, small(steps=['cross']), warm_up=1): counts.append(len(made))
    assert counts == [2*3, 2*3 + 2]  # two streams in three steps; then once more for all steps to come


def test_every_sample_of_an_epoch_is_checked(one_second, store, monkeypatch):
    epochs = []
    monkeypatch.setattr(bench, 'fit_epoch', lambda trainer, loader,
                        epoch: epochs.append((trainer.dataset, loader.dataset))
                        or dict(samples_per_second=1., wait=0.))
    list(bench.bench_epoch(store, small(steps=['cross'], batch_size=1, seconds=8)))
    dataset, same = epochs[0]
    assert dataset is same and len(dataset) == 4
    assert set(dataset.frames.digests) == {(video, stream) for video in store.manifest.video
                                           for stream in ('rgb', 'flow')}


def test_rows_are_written_as_they_come(store, tmp_path, monkeypatch):
    def rows(*_):
        yield bench.speed_row('loader', 'first', 1, 'clips/s', [1.0])
        yield bench.speed_row('loader', 'second', 1, 'clips/s', [1.0])
        raise KeyboardInterrupt
    monkeypatch.setattr(bench, 'bench_loader', rows)
    with pytest.raises(KeyboardInterrupt): bench.run(['loader'], store, output=tmp_path/'rows.json')
    written = json.loads((tmp_path/'rows.json').read_text())
    assert [row['name'] for row in written['rows']] == ['first', 'second'] and written['machine']['cores'] >= 1


def measured(part, value, name='', **settings):
    return dict(part=part, name=name, value=value, unit='samples/s', settings=settings)


def as_trained(path, **speeds):
    "Rows of steps as a recipe makes them."
    recipe = Recipe.read(path)
    shape = dict(backbone=recipe.backbone, clip=f'{recipe.clip_length}×{recipe.view_size}×{recipe.view_size}',
                 precision=recipe.mixed_precision, compiled=recipe.compile,
                 size=f'{recipe.short_side}×{recipe.short_side*4//3}',
                 **(dict(options=recipe.backbone_options) if recipe.backbone_options else {}))
    return [measured('step', speed, kind=kind, batch_size=getattr(recipe, f'{kind}_batch_size'), **shape)
            for kind, speed in speeds.items()]


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_hours_of_recipes(path, capsys):
    steps, recipe = pd.DataFrame(as_trained(path, single=100., cross=50.)), Recipe.read(path)
    steps.attrs['machine'] = dict(cores=2)
    assert bench.recipe_speeds(steps, recipe) == dict(single=100, cross=50)
    data, videos = bench.DATA_SETS[path.stem.split('_')[0]]
    bench.show_report(steps, path)
    hours = bench.hours_needed(recipe, videos, dict(single=100, cross=50))
    printed = capsys.readouterr().out
    assert f'{path.stem} on {data}, {videos:,} videos: {hours:.1f} hours of training on 1 such process' in printed
    assert bench.recipe_speeds(steps.head(1), recipe) == dict(single=100)  # no cross-stream speed
    one = steps.head(1)
    one.attrs['machine'] = {}
    bench.show_report(one, path)
    command = f'python -m vicc.bench epoch --recipe {path}'
    assert f'{path.stem} was not measured as it trains: {command}' in capsys.readouterr().out
    epochs = pd.DataFrame(as_trained(path, single=1., cross=1.)).assign(part='epoch')
    assert bench.recipe_speeds(pd.concat([steps, epochs]), recipe) == dict(single=1, cross=1)


@pytest.mark.parametrize('change',
                         [dict(batch_size=1), dict(precision='fp16'), dict(compiled=False),
                          dict(clip='16×112×112'), dict(views='made before'), dict(options=dict(width=4))],
                          ids=str)
def test_no_hours_from_other_speeds(change):
    path = RECIPES[0].with_name('ucf101_s3d.yaml')
    rows = [{**row, 'settings': {**row['settings'], **change}}
            for row in as_trained(path, single=100., cross=50.)]
    assert bench.recipe_speeds(pd.DataFrame(rows), Recipe.read(path)) == {}


def test_measuring_for_a_recipe(store, capsys, tmp_path):
    recipe = Recipe.read(RECIPES[0].with_name('demo.yaml'), backbone_options=dict(width=4), single_batch_size=2,
                         cross_batch_size=1, num_prototypes=6)
    recipe.write(tmp_path/'demo_tiny.yaml')
    bench.main(['step', '--recipe', str(tmp_path/'demo_tiny.yaml'), '--repeats', '1', '--store',
                str(store.path), '--device', 'cpu', '--output', str(tmp_path/'rows.json'), '--processes', '2'])
    rows = json.loads((tmp_path/'rows.json').read_text())['rows']
    assert [(row['settings']['batch_size'], row['settings']['options'])
            for row in rows] == [(2, dict(width=4))]*2 + [(1, dict(width=4))]*2
    assert set(bench.recipe_speeds(pd.DataFrame(rows), recipe, 2)) == {'single', 'cross'}
    printed = capsys.readouterr().out
    assert 'demo_tiny on moving shapes, 800 videos' in printed and 'on 2 such processes' in printed
    assert 'ucf101' not in printed


def test_one_worker_more_reads_the_same_number_of_rounds(one_second, store):
    rows = [*bench.bench_loader(store, small(workers=(2,), batch_size=1, clip_length=4, repeats=1))]
    assert rows[-1]['value'] == 4  # two rounds of two workers


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_hours(path):
    recipe = Recipe.read(path)
    videos, single, cross = 9537, 50.0, 20.0
    expected = 0.0
    for epochs, batch, speed in ((recipe.single_epochs_rgb, recipe.single_batch_size, single),
                                 (recipe.single_epochs_flow, recipe.single_batch_size, single),
                                 (2*recipe.cycles*recipe.cross_epochs, recipe.cross_batch_size, cross)):
        expected += epochs*(videos - videos % batch)/speed
    assert np.isclose(bench.hours_needed(recipe, videos, dict(single=single, cross=cross)), expected/3600)
    assert np.isclose(bench.hours_needed(recipe, videos, 2.0), 2*bench.hours_needed(recipe, videos, 4.0))


def test_hours_refuse_what_cannot_be():
    recipe = Recipe.read(RECIPES[-1])
    for speed in (0, -1, float('nan'), dict(cross=3), {}):
        with pytest.raises(ValueError, match='give a number above 0'): bench.hours_needed(recipe, 9537, speed)
    with pytest.raises(ValueError, match='100 videos do not fill one batch of 192'):
        bench.hours_needed(recipe, 100, 5, processes=4)


@pytest.mark.parametrize('values, message', [
    (dict(parts=['steps']), "unknown part 'steps': choose flow, loader, step, epoch, evaluation"),
    (dict(parts=[]), 'at least one'),
    (dict(backbones=['s4d']), "unknown backbone 's4d': choose s3d"),
    (dict(device='gpu'), "device 'gpu'"),
    pytest.param(dict(device='cuda'), "there is no GPU: use 'cpu'",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_refused_before_any_work(monkeypatch, values, message):
    monkeypatch.setattr(bench, 'small_store', lambda *_, **__: pytest.fail('it has begun'))
    monkeypatch.setattr(bench, 'measure', lambda *_, **__: pytest.fail('it has begun'))
    with pytest.raises(ValueError, match=message): bench.run(**values)


def test_command(one_second, store, tmp_path, capsys):
    bench.main(['loader', 'flow', '--quick', '--device', 'cpu', '--store', str(store.path), '--output',
                str(tmp_path/'bench.json')])
    written, printed = json.loads((tmp_path/'bench.json').read_text()), capsys.readouterr().out
    assert [row['name'] for row in written['rows']] == [*2*bench.available_methods(),
                                                        'tvl1 (torch) to OpenCV, mean',
                                                        'tvl1 (torch) to OpenCV, median', 'decode rgb',
                                                        'decode flow', 'workers 0', 'workers 1']
    assert [written['rows'][place]['settings']['size'] for place in (0, 4, 10)] == ['48×64', '24×32', '48×64']
    assert written['machine'].pop('load_at_start') >= 0
    assert written['machine'] == json.loads(json.dumps(bench.machine()))
    assert all(row['name'] in printed for row in written['rows']) and 'torch:' in printed
    assert [path.name for path in tmp_path.iterdir()] == ['bench.json']


@pytest.mark.parametrize('words, message',
                         [(['disk'], "unknown part 'disk'"), (['--store', 'nowhere'], 'not a finished store'),
                          (['--backbones', 'big', '--device', 'cpu'], "unknown backbone 'big'")])
def test_command_refuses(words, message, capsys):
    with pytest.raises(SystemExit) as ended: bench.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ended: bench.main(['--help'])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f'--{name}' in text
               for name in ('videos', 'true-flow', 'output', 'quick', 'device', 'precision', 'backbones',
                            'batch-size', 'view-size', 'workers', 'store', 'threads', 'seconds', 'steps',
                            'recipe', 'processes', 'pairs', 'no-compiled'))


def test_small_store_is_a_store(store):
    again = Store(store.path)
    assert len(again.manifest) == 2 and again.settings.short_side == 48
    for row in again.manifest.itertuples():
        for stream, channels in (('rgb', 3), ('flow', 2)):
            assert again.read(row.video, stream).shape == (24, 48, 64, channels)


def test_profile_notebook(tmp_path):
    values = dict(recipe_file=str(tmp_path/'tiny.yaml'), num_videos=8, epochs=1, workers=[0],
                  output=str(tmp_path/'out'), results_file=str(tmp_path/'copy.csv'))
    Recipe.read(find_project(__file__)/'nbs'/'recipes'/'demo.yaml', backbone_options=dict(width=4),
                single_batch_size=4, cross_batch_size=4, num_prototypes=6,
                projection_dim=8).write(tmp_path/'tiny.yaml')
    papermill.execute_notebook(NOTEBOOK, tmp_path/'out.ipynb', values, progress_bar=False, cwd=NOTEBOOK.parent)
    table = pd.read_csv(tmp_path/'copy.csv')
    assert np.allclose(table.groupby('step').share.sum(), 1, atol=1e-2)
    assert set(table.step) == {'single', 'cross'} and (table.samples_per_second > 0).all()
    parts = table.set_index(['step', 'part']).ms_per_step
    assert parts['single', 'frozen stream'] == 0
    assert all(parts['cross', name] > 0
               for name in ('read clips', 'pack batch', 'views', 'frozen stream', 'forward', 'backward',
                            'optimizer', 'Sinkhorn and loss'))
    assert {path.name for path in (tmp_path/'out').iterdir()} == {'profile.png', 'operators.csv', 'loading.csv'}


def measure_gpu(folder, *words):
    "Call the script in tiny shapes on the CPU. It lives in the repository alone."
    if not SCRIPT.is_file(): pytest.skip('no script')
    command = [sys.executable, SCRIPT, folder/'out', '--data', folder/'data', '--work', folder/'work',
               '--device', 'cpu', *words]
    return subprocess.run(list(map(str, command)), cwd=SCRIPT.parents[1], capture_output=True, text=True,
                          timeout=200)


def test_commands_of_the_gpu_script(tmp_path, capsys):
    printed = measure_gpu(tmp_path, '--dry').stdout.splitlines()
    parts = {name: shlex.split(command) for name, command in (line.split(': ', 1) for line in printed)}
    assert not list(tmp_path.iterdir())
    assert {'compile_1', 'tests', 'step', 'step_no_graphs', 'epoch_240', 'epoch_160', 'flow', 'prepare',
            'evaluation', 'train'} <= set(parts)
    helped = {}
    for module in (alternation, prepare):
        with pytest.raises(SystemExit): module.main(['--help'])
        helped[module.__name__] = capsys.readouterr().out
    for name, words in parts.items():
        words = words[3:] if words[0] == 'nice' else words
        if words[1:3] == ['-m', 'vicc.bench']:
            values = vars(bench.parse_args(words[3:]))
            bench.BenchSettings(**{field: values[field] for field in bench.BenchSettings.__dataclass_fields__
                                   if field in values})
            assert set(values['parts']) <= set(bench.PARTS) and values['output'].name == f'{name}.json'
        elif words[1] == '-m' and words[2] in helped: assert all(word in helped[words[2]] for word in words
                if word.startswith('--')), name


def test_the_gpu_script_goes_on_after_a_failure(tmp_path):
    (tmp_path/'data'/'videos').mkdir(parents=True)
    write_video(tmp_path/'data'/'videos'/'one.mp4',
                np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8))
    first = measure_gpu(tmp_path, '--quick', '--phases', 'flow')
    for words in ('== flow: 2', 'holds no .flo files', '== prepare: 0'): assert words in first.stdout, first
    with tarfile.open(tmp_path/'out'/'gpu.tar.gz') as kept:
        names = {name.removeprefix('./') for name in kept.getnames()}
    assert {'flow.txt', 'copies.done', 'prepare.done', 'prepare_report.json'} <= names
    assert 'flow.done' not in names
    again = measure_gpu(tmp_path, '--quick', '--phases', 'flow', '--seconds', '5').stdout
    assert 'prepare' not in again and 'no time left for flow: call again' in again
