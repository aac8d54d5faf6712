"The benchmark's arithmetic, order and messages. Nothing here measures time: the clock is ours."
import json
import shlex
import subprocess
import sys
import tarfile
from itertools import count
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image

from system.flow_errors import flow_errors, main as flow_errors_main
from vicc import alternation, bench, prepare
from vicc.recipe import Recipe
from vicc.engine.io import find_project
from vicc.prepare import Store
from vicc.video import write_video


NOTEBOOK = find_project(__file__)/'nbs'/'run_profile.ipynb'
SCRIPT = find_project(__file__)/'.ci'/'gpu'
TINY = dict(clip_length=8, view_size=16, single_batch_size=2, cross_batch_size=2, num_prototypes=4)
METHODS = list(bench.available_flow_methods('cpu'))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return bench.small_store(tmp_path_factory.mktemp('bench'), videos=2, height=48, width=64, num_frames=24)


@pytest.fixture
def config(store):
    "Two samples of eight frames, two calls."
    def create(changes={}, **values):
        recipe = Recipe.read('demo', **TINY | changes)
        return bench.BenchConfig(recipe, store, **dict(repeats=2) | values)
    return create


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
    seconds, about = bench.measure(lambda: events.append('work'), repeats=2, warm_up=1, device='cuda')
    assert events == ['wait cuda', 'clock', 'work', 'wait cuda', 'clock']*3
    assert (seconds, about) == (3.0, dict(repeats=2, spread=0.0))  # clock, work, wait, clock: three events later


def test_the_median_counts_and_rows_hold_what_it_depends_on(monkeypatch):
    ticks = iter([0, 9, 10, 13, 14, 15, 16, 46])
    monkeypatch.setattr(bench, 'time', SimpleNamespace(perf_counter=lambda: next(ticks)))
    seconds, about = bench.measure(lambda: None, repeats=3)  # 9 does not count; 3, 1, 30
    assert (seconds, about) == (3, dict(repeats=3, spread=9.67))
    assert bench.bench_row('loader', 'x', 12/seconds, 'clips/s', batch_size=4, **about) == dict(
        part='loader', name='x', value=4.0, unit='clips/s',
        settings=dict(threads=torch.get_num_threads(), batch_size=4, repeats=3, spread=9.67))
    assert bench.bench_row('flow', 'x', 1, 'pairs/s', threads=7)['settings']['threads'] == 7


def test_all_parts_with_seconds_of_one(one_second, config):
    table = bench.run(config(pairs=3, workers=(0, 2), seconds=6))
    timed = table[table.unit.str.endswith('/s')]
    prepared, size = timed[timed.part == 'prepare'].iloc[0], table[table.part == 'store'].iloc[0]
    timed = timed.drop(prepared.name)
    assert (prepared['name'], prepared.value) == ('farneback', 16*4) and size.unit == 'bytes/frame'  # three pairs, four frames
    assert 100 < size.value < 48*64*5 and size.settings == prepared.settings and size.settings['frames'] == 16*4
    values = [(f'{row.part} {row.name}', row.value) for row in timed[timed.part != 'epoch'].itertuples()]
    assert values == [*2*[(f'flow {name}', 3) for name in METHODS],
                      ('loader workers 0', 4), ('loader workers 2', 8),  # two rounds of all workers
                      *((f'step small {name}', 2) for name in ('single with views', 'single', 'cross with views', 'cross')),
                      ('evaluation small in batches', 2*5)]  # 2 videos of 24 frames: clips start at 0, 4, … 16
    assert all({'threads', 'repeats', 'spread'} <= set(settings) and settings['spread'] == 0
               for settings in timed.settings[timed.part != 'epoch'])
    assert [settings['size'] for settings in timed.settings] == ['48×64']*len(METHODS) + ['24×32']*len(METHODS) + ['48×64']*9
    epochs, steps = table[table.part == 'epoch'], table[table.part == 'step']
    assert list(zip(epochs.name, epochs.unit)) == [('small single', 'samples/s'), ('small single, waiting for data', '%'),
                                                   ('small cross', 'samples/s'), ('small cross, waiting for data', '%')]
    assert all(settings['steps'] == 3 and settings['workers'] == 2 for settings in epochs.settings)  # a step takes a second
    assert (epochs.value[::2] > 0).all() and epochs.value[1::2].between(0, 100).all()
    assert [settings['views'] for settings in steps.settings] == ['in every step', 'made before']*2
    assert {(settings['clip'], settings['precision']) for settings in steps.settings} == {('8×16×16', 'no')}


def test_a_step_trains_the_stream_and_leaves_the_other(one_second, config, monkeypatch):
    trainers, create = [], bench.new_trainer
    def spy(*arguments):
        trainer, batch = create(*arguments)
        before = [{name: value.clone() for name, value in stream.state_dict().items()} for stream in (trainer.stream, trainer.teacher)]
        trainers.append((trainer, *before))
        return trainer, batch
    monkeypatch.setattr(bench, 'new_trainer', spy)
    list(bench.bench_step(config(steps=['cross'])))
    trainer, own, teacher = trainers[0]
    assert any((trainer.stream.state_dict()[name] != value).any() for name, value in own.items() if name.endswith('weight'))
    assert all(torch.equal(trainer.teacher.state_dict()[name], value) for name, value in teacher.items())


def test_views_are_made_once_or_in_every_step(one_second, config, monkeypatch):
    made, views = [], bench.Trainer.views
    monkeypatch.setattr(bench.Trainer, 'views', lambda trainer, batch, name: made.append(name) or views(trainer, batch, name))
    counts = []
    for _ in bench.bench_step(config(steps=['cross'])): counts.append(len(made))
    assert counts == [2*4, 2*4 + 2]  # two streams in four steps; then once more for all steps to come


def test_every_sample_of_an_epoch_is_checked(one_second, config, store, monkeypatch):
    epochs = []
    monkeypatch.setattr(bench, 'fit_epoch', lambda trainer, loader, epoch: epochs.append((trainer.dataset, loader.dataset))
                        or dict(samples_per_second=1., wait=0.))
    list(bench.bench_epoch(config(dict(cross_batch_size=1), steps=['cross'], seconds=8)))
    dataset, same = epochs[0]
    assert dataset is same and len(dataset) == 4
    assert set(dataset.frames.digests) == {(video, stream) for video in store.manifest.video for stream in ('rgb', 'flow')}


def test_rows_are_written_as_they_come(config, tmp_path, monkeypatch):
    def rows(_):
        yield bench.bench_row('loader', 'first', 1, 'clips/s')
        yield bench.bench_row('loader', 'second', 1, 'clips/s')
        raise KeyboardInterrupt
    monkeypatch.setitem(bench.PARTS, 'loader', rows)
    with pytest.raises(KeyboardInterrupt): bench.run(config(), ['loader'], output=tmp_path/'rows.json')
    written = json.loads((tmp_path/'rows.json').read_text())
    assert [row['name'] for row in written['rows']] == ['first', 'second'] and written['machine']['cores'] >= 1


@pytest.mark.parametrize('words, message', [
    (['steps', '--recipe', 'demo'], "no part 'steps' (there are flow, prepare, loader, step, epoch, evaluation)"),
    (['flow'], '--recipe'), (['--recipe', 'nothing'], 'nothing.yaml does not exist'),
    (['--recipe', 'demo', '--store', 'nowhere'], 'not a finished store'),
    (['--recipe', 'demo', '--set', 'backbone=big'], "'big'"), (['--recipe', 'demo', '--set', 'bakbone=s3d'], 'did you mean backbone?'),
    (['--recipe', 'demo', '--set', 'workers'], 'workers'), (['--recipe', 'demo', '--set', 'cycles=0'], 'give --steps single'),
    (['--recipe', 'demo', '--repeats', '0'], '--repeats'), (['--recipe', 'demo', '--device', 'gpu'], '--device'),
    pytest.param(['--recipe', 'demo', '--device', 'cuda'], '--device', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_refused_before_any_work(monkeypatch, words, message, capsys):
    monkeypatch.setattr(bench, 'small_store', lambda *_, **__: pytest.fail('it has begun'))
    with pytest.raises(SystemExit) as ended: bench.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_command(one_second, store, tmp_path, capsys):
    "A recipe with changes; all parts that its hours need, and one more."
    recipe = Recipe.read('demo', **TINY, backbone_options=dict(width=4))
    recipe.write(tmp_path/'tiny.yaml')
    bench.main(['step', 'flow', '--recipe', str(tmp_path/'tiny.yaml'), '--set', 'cross_batch_size=1', '--device', 'cpu', '--pairs', '2',
                '--repeats', '1', '--store', str(store.path), '--output', str(tmp_path/'bench.json')])
    written, printed = json.loads((tmp_path/'bench.json').read_text()), capsys.readouterr().out
    steps = written['rows'][:4]
    assert [(row['settings']['batch_size'], row['settings']['options']) for row in steps] == [(2, dict(width=4))]*2 + [(1, dict(width=4))]*2
    assert [row['name'] for row in written['rows'][4:]] == 2*METHODS
    assert written['machine'] == json.loads(json.dumps(bench.describe_machine()))
    assert all(row['name'] in printed for row in written['rows'])
    assert f'vicc plan {tmp_path/"tiny.yaml"} --manifest CSV --speeds {tmp_path/"bench.json"}' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bench.json', 'tiny.yaml']


def test_errors_on_true_flow_are_added_to_the_speeds(tmp_path):
    "Two equal pictures: nothing moves. A cut file and a missing picture are refused."
    folder, output = tmp_path/'true', tmp_path/'flow.json'
    folder.mkdir()
    with pytest.raises(ValueError, match='holds no .flo files'): next(flow_errors(folder))
    picture = np.random.default_rng(0).integers(0, 256, (64, 80), np.uint8)
    for number in (0, 1): Image.fromarray(picture).save(folder/f'frame{number}.png')
    cv2.writeOpticalFlow(str(folder/'flow.flo'), np.zeros((64, 80, 2), np.float32))
    output.write_text(json.dumps(dict(machine=dict(cores=2), rows=[bench.bench_row('flow', 'x', 1, 'pairs/s')])))
    flow_errors_main([str(folder), str(output)])
    written = json.loads(output.read_text())
    assert written['machine'] == dict(cores=2)
    assert [row['name'] for row in written['rows']] == ['x', *(f'{name}, flow' for name in METHODS)]
    assert max(row['value'] for row in written['rows'][1:]) < .01
    (folder/'other.flo').write_bytes((folder/'flow.flo').read_bytes()[:-8])
    with pytest.raises(ValueError, match='or a cut one'): list(flow_errors(folder))
    (folder/'other.flo').unlink()
    (folder/'frame1.png').unlink()
    with pytest.raises(ValueError, match='needs two pictures beside it, and there are 1'): next(flow_errors(folder))


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


def test_commands_of_the_gpu_script(tmp_path, capsys, store):
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
            values = bench.command_parser().parse_args(words[3:])
            values.store = str(store.path)  # the machine's own
            bench.create_config(values, tmp_path)
            assert values.output.name == f'{name}.json'
        elif words[1] == '-m' and words[2] in helped: assert all(word in helped[words[2]] for word in words
                if word.startswith('--')), name


def test_the_gpu_script_goes_on_after_a_failure(tmp_path):
    (tmp_path/'data'/'videos').mkdir(parents=True)
    write_video(tmp_path/'data'/'videos'/'one.mp4',
                np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8))
    first = measure_gpu(tmp_path, '--quick', '--phases', 'flow')
    for words in ('== flow: 2', 'not a finished store', '== prepare: 0'): assert words in first.stdout, first
    with tarfile.open(tmp_path/'out'/'gpu.tar.gz') as kept:
        names = {name.removeprefix('./') for name in kept.getnames()}
    assert {'flow.txt', 'copies.done', 'prepare.done', 'prepare_report.json'} <= names
    assert 'flow.done' not in names
    again = measure_gpu(tmp_path, '--quick', '--phases', 'flow', '--seconds', '5').stdout
    assert 'prepare' not in again and 'no time left for flow: call again' in again
