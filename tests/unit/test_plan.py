"What a recipe needs: counts by hand, hours that follow a measured row, GB that follow bytes, and what is refused."
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from helpers import DEMO
from vicc import bench, cli, commands, plan
from vicc.engine.io import find_project
from vicc.manifests import write_manifest
from vicc.recipe import new_streams, Recipe

RECIPES = sorted((find_project(__file__)/'nbs'/'recipes').glob('*.yaml'))
CPU = Accelerator(cpu=True)
SHAPES = plan.Videos(800, 1000, 16000, 64, 64, 'by hand')
UCF101 = plan.Videos(9537, 13320, 2_490_840, 240, 320, 'by hand')
PAPER = Recipe.read('ucf101_s3d')


def made(part, value, recipe=DEMO, kind='cross', device='cpu', processes=1, unit='samples/s', source='made.json', **settings):
    "A row of `part` as if it had been measured with this recipe."
    size = f'{recipe.short_side}×{recipe.short_side}' if recipe.short_side == 64 else '240×320'
    usual = dict(batch_size=round(plan.chunk_size(recipe, kind, processes)), clip_length=recipe.clip_length, size=size,
                 streams='rgb,flow' if kind == 'cross' else 'rgb', cached=recipe.cache_gib > 0)
    settings = plan.step_settings(recipe, kind, device, processes) | usual | settings
    row = bench.bench_row(part, settings.pop('name', part), value, unit, **settings)
    return plan.name_source(row, source, dict(cpu='a CPU', cores=2))


@pytest.fixture
def manifest(tmp_path):
    "A file for 100 videos, of which nobody has counted the frames."
    write_manifest(pd.DataFrame(dict(video=[f'{number}.avi' for number in range(100)])), tmp_path/'videos.csv')
    return str(tmp_path/'videos.csv')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return bench.small_store(tmp_path_factory.mktemp('plan'), 2, 64, 64, 16, DEMO.prepare_settings())


def answer(capsys, *words):
    "Exit code and text of `vicc plan`."
    try: plan.main([str(word) for word in words])
    except SystemExit as ended: return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_steps_and_samples_by_hand():
    demo, paper = plan.count_steps(DEMO, 800), plan.count_steps(PAPER, 9537)
    assert (demo.steps.sum(), demo.samples.sum(), demo.epochs.sum()) == (1300, 41600, 52)
    assert demo.stage.tolist() == ['rgb-1', 'flow-1', 'rgb-2 cycle 1', 'flow-2 cycle 1', 'rgb-2 cycle 2', 'flow-2 cycle 2']
    assert paper.steps.tolist() == [300*49]*2 + [100*99]*4  # 9537 = 49·192 + 129 = 99·96 + 33
    assert (paper.steps.sum(), paper.samples.sum()) == (69_000, 600*9408 + 400*9504)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_hours(path):
    recipe = Recipe.read(path)
    videos, single, cross = 9537, 50.0, 20.0
    expected = 0.0
    for epochs, batch, speed in ((recipe.single_epochs_rgb, recipe.single_batch_size, single),
                                 (recipe.single_epochs_flow, recipe.single_batch_size, single),
                                 (2*recipe.cycles*recipe.cross_epochs, recipe.cross_batch_size, cross)):
        expected += epochs*(videos - videos % batch)/speed
    assert np.isclose(plan.hours_needed(recipe, videos, dict(single=single, cross=cross)), expected/3600)


def test_hours_follow_one_measured_row():
    def hours(**speeds):
        values = dict(single=400, cross=320, single_loader=4000, cross_loader=3200) | speeds
        rows = [made(kind.split('_')[-1] if 'loader' in kind else 'step', value, kind=kind.split('_')[0],
                     **(dict(name='workers 0') if 'loader' in kind else {})) for kind, value in values.items()]
        table, _ = plan.plan_stages(DEMO, SHAPES, rows)
        return table.groupby('kind').hours.sum().to_dict()
    before, after = hours(), hours(cross=160)
    assert np.isclose(before['single'], 9600*(1/400 + 1/4000)/3600) and np.isclose(before['cross'], 32000*(1/320 + 1/3200)/3600)
    assert after['single'] == before['single'] and np.isclose(after['cross'], 32000*(1/160 + 1/3200)/3600)
    assert np.isclose(hours(single_loader=400)['single'], 9600*2/400/3600)


def test_the_slower_counts_beside_a_gpu_and_both_in_turns():
    recipe = PAPER.replace(workers=4, accumulate=8)
    rows = [made('step', 400, recipe, device='cuda'), made('loader', 100, recipe, device='cuda', name='workers 4')]
    speed = plan.find_speed(recipe, 'cross', rows, UCF101, 'cuda')
    assert (speed.value, speed.limit) == (100, 'loader')
    rows[1] = made('loader', 900, recipe, device='cuda', name='workers 4')
    assert plan.find_speed(recipe, 'cross', rows, UCF101, 'cuda').limit == 'step'
    alone = plan.find_speed(recipe.replace(workers=0), 'cross', [rows[0], made('loader', 400, recipe, name='workers 0')], UCF101, 'cuda')
    assert (alone.value, alone.limit) == (200, 'step, in turns')


def test_a_row_of_another_step_does_not_count():
    for other in (dict(backbone='s3d'), dict(precision='bf16'), dict(device='cuda'), dict(compiled=True), dict(clip='8×32×33'),
                  dict(options={}), dict(kind='single'), dict(views='made before')):
        assert math.isnan(plan.find_speed(DEMO, 'cross', [made('step', 100, **other)], SHAPES).value), other
    near, far = made('step', 100, batch_size=24), made('step', 200, batch_size=4)
    speed = plan.find_speed(DEMO, 'cross', [far, near], SHAPES)
    assert speed.value == 100 and 'measured with 24 clips, not 32' in ' '.join(speed.notes)
    now = made('step', 300, batch_size=2, source=plan.NOW)
    assert plan.find_speed(DEMO, 'cross', [near, now], SHAPES).value == 300


def test_several_gpus_train_without_graphs_and_what_is_unmeasured_is_said():
    graphs, without = (made('step', value, PAPER, device='cuda', processes=count) for value, count in ((419, 1), (224, 4)))
    graphs |= dict(batch_size=24)
    epoch = dict(made('epoch', 257, PAPER, device='cuda'), batch_size=24)
    speed = plan.find_speed(PAPER, 'cross', [graphs, without, epoch], UCF101, 'cuda', 4)
    assert speed.value == 4*224 and speed.limit == 'step alone'
    text = ' '.join(speed.notes)
    assert 'without CUDA graphs' in text and 'is not measured' in text and 'the loader of cross-stream stages is not measured' in text
    one = plan.find_speed(PAPER.replace(accumulate=4), 'cross', [graphs, without, epoch], UCF101, 'cuda', 1)
    assert (one.value, one.limit) == (257, 'step and loader') and 'without gradient' in ' '.join(one.notes)


def test_stored_rows_give_the_hours_of_the_paper():
    "Four H100, from nbs/results: 224.1 and 444.3 samples/s a card."
    rows = plan.read_rows()
    table, speeds = plan.plan_stages(PAPER, UCF101, rows, 'cuda', 4)
    by_name = {(row['name'], row.get('graphs')): row['value'] for row in rows if row['source'] == 'gpu_training.json' and row['part'] == 'step'}
    single, cross = (by_name[f's3d {kind} with views', False] for kind in ('single', 'cross'))
    assert np.isclose(table.hours.sum(), (600*9408/single + 400*9504/cross)/4/3600)
    assert all(speed.basis.startswith('gpu_training.json, NVIDIA H100') and not speed.here for speed in speeds.values())


def test_gb_by_hand():
    filmed = made('store', 8000, PAPER, unit='bytes/frame', frames=648, preset='ultrafast', flow_method='tvl1')
    assert plan.store_gb(PAPER, [filmed], UCF101)[0] == 8000*2_490_840/1e9
    half = replace(UCF101, height=120, width=160)
    size, basis = plan.store_gb(PAPER, [filmed], half)
    assert size == 2000*2_490_840/1e9 and 'estimated from 648 frames of 240×320' in basis
    assert math.isnan(plan.store_gb(DEMO, [filmed], SHAPES)[0])  # another flow and preset
    weights = sum(value.numel()*value.element_size() for value in new_streams(PAPER)['rgb'].state_dict().values())
    queue = 4*1920*128*4
    assert np.isclose(plan.checkpoint_gb(PAPER), (3*(2*weights + queue) + 6*weights)/1e9)  # LARC keeps one number a weight
    assert np.isclose(plan.shared_gb(PAPER, UCF101, 4), 48*2*(2*32*240*320)*(2*14 + 1)/1e9)
    assert plan.shared_gb(DEMO, SHAPES) == 0 == plan.shared_gb(PAPER.replace(workers=0), UCF101)


def test_gb_of_real_files_and_batches(store):
    files = sum(file.stat().st_size for stream in ('rgb', 'flow') for file in (store.path/stream).rglob('*') if file.is_file())
    assert plan.store_bytes(store) == files
    config = bench.BenchConfig(DEMO, store)
    trainer, batch = bench.new_trainer(config, 'cross')
    bench.take_steps(trainer, batch, 1)
    saved = io.BytesIO()
    torch.save(trainer.state_dict(), saved)
    weights = sum(value.numel()*value.element_size() for value in trainer.stream.state_dict().values())
    planned = (plan.checkpoint_gb(DEMO)*1e9 - len(DEMO.plan())*weights)/(DEMO.keep_checkpoints + 1)
    assert abs(saved.tell()/planned - 1) < .1
    read = sum(batch[stream].data.numel() for stream in ('rgb', 'flow'))
    at_most = plan.shared_gb(DEMO.replace(workers=1, cache_gib=0), plan.Videos(2, 2, 32, 64, 64, ''))*1e9/3
    assert at_most/4 < read <= at_most


def test_gpu_memory_is_measured_or_estimated():
    row = made('step', 10., PAPER, device='cuda', processes=4, unit='GiB', name='s3d cross memory reserved')
    rows = [row, dict(row, kind='single', name='s3d single memory reserved', value=20., batch_size=48)]
    size, basis = plan.gpu_memory(PAPER, rows, 4)
    assert size == 20*2**30/1e9 and basis.startswith('measured')
    alone = PAPER.replace(cycles=0)
    size, basis = plan.gpu_memory(alone.replace(accumulate=2), rows, 4)  # half of the clips at a time
    assert np.isclose(size, 10*2**30/1e9, rtol=.01) and basis.startswith('estimated')
    larger = plan.gpu_memory(alone.replace(backbone='r21d', mixed_precision='no'), rows, 4)[0]
    assert 2*2 < larger/(20*2**30/1e9) < 2*3  # R(2+1)D keeps more; float32 is twice as large as bf16
    assert math.isnan(plan.gpu_memory(PAPER, [], 4)[0])


def test_frames_are_counted_or_assumed_and_that_is_said():
    table = pd.DataFrame(dict(video=['a', 'b', 'c'], num_frames=[100, 300, 0], fps=25., height=[480, 480, 0], width=[640, 640, 0]))
    videos = plan.describe_videos(PAPER, table)
    assert (videos.frames, videos.size) == (600, '240×320') and 'num_frames is missing for 1 of 3 videos' in videos.source
    halved = plan.describe_videos(PAPER.replace(store_fps=12.5), table[:2])
    assert halved.frames == 200
    empty = table.assign(num_frames=0, height=0)
    assert plan.describe_videos(PAPER, empty, assumed_frames=50).frames == 150
    assert 'frames of 320×240 are assumed' in plan.describe_videos(PAPER, empty).source
    assert plan.describe_videos(PAPER.replace(online_every=5), pd.concat([table]*10)).train == 27
    both = plan.describe_videos(PAPER, table[:2], table[1:2].replace('b', 'd'))
    assert (both.train, both.stored, both.frames) == (2, 3, 700)


def test_command(manifest, store, capsys, tmp_path):
    assert 'plan' in cli.COMMANDS
    code, text = answer(capsys, 'ucf101_s3d', '--manifest', manifest, '--gpus', 4, '--set', 'single_batch_size=96')
    assert code == 0
    for words in ('96,000', '≥', 'num_frames is missing for 100 of 100 videos', 'NVIDIA H100', 'without CUDA graphs', 'not this machine', 'GPU memory'):
        assert words in text, words
    rows = [made('step', 100), made('step', 100, kind='single')]
    names = ('part', 'name', 'value', 'unit', 'settings')
    content = dict(machine=bench.describe_machine(), rows=[{name: row[name] for name in names} for row in rows])
    (tmp_path/'rows.json').write_text(json.dumps(content))
    write_manifest(store.manifest, tmp_path/'stored.csv')
    tiny = ['single_batch_size=2', 'cross_batch_size=2']
    code, text = answer(capsys, 'demo', '--manifest', tmp_path/'stored.csv', '--store', store.path, '--gpus', 0,
                        '--speeds', tmp_path/'rows.json', '--set', *tiny)
    assert code == 0 and 'like this machine' in text and 'as it is' in text and 'frames from the store' in text, text
    assert f'{104/100:.0f} s' in text  # 52 epochs of two videos at 100 samples/s


@pytest.mark.parametrize('words, message', [
    (['no_such'], 'no_such.yaml does not exist'), (['demo', '--set', 'cycels=1'], 'did you mean cycles?'),
    (['demo', '--set', 'cross_batch_size=101'], '100 videos do not fill one batch of 101'),
    (['demo', '--gpus', '3'], 'a batch of 32 cannot be divided among 3 processes'), (['demo', '--gpus', '-1'], '--gpus'),
    (['demo', '--store', 'nowhere'], 'not a finished store'), (['demo', '--speeds', 'none.json'], 'none.json'),
    (['demo', '--output', 'x.json'], '--measure'), (['demo', '--manifest', 'none.csv'], 'none.csv'),
    pytest.param(['demo', '--gpus', '1', '--measure'], '--measure needs a GPU',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'))])
def test_refused_in_one_line(words, message, manifest, capsys):
    code, text = answer(capsys, '--manifest', manifest, *words)
    assert code == 2 and message in text and len(text.splitlines()) == 1, text


def test_a_file_without_rows_is_refused(manifest, capsys, tmp_path):
    (tmp_path/'empty.json').write_text('{"rows": []}')
    code, text = answer(capsys, 'demo', '--manifest', manifest, '--speeds', tmp_path/'empty.json')
    assert code == 2 and 'holds no measured rows' in text


def test_measuring_gives_all_rows_that_a_plan_needs(store, monkeypatch, tmp_path):
    "Every call takes a tenth of a second, says the clock."
    monkeypatch.setattr(bench, 'measure', lambda work, repeats, *_, **__: (work(), (.1, dict(repeats=repeats, spread=0.)))[1])
    monkeypatch.setattr(plan, 'measure', lambda work, *_: (work(), (.1, {}))[1])
    tiny = DEMO.replace(single_batch_size=2, cross_batch_size=2)
    videos = plan.describe_videos(tiny, store.manifest, origin='the store')
    rows = plan.measure_here(tiny, videos, tmp_path, store)
    table, speeds = plan.plan_stages(tiny, videos, rows)
    assert [row['part'] for row in rows] == ['loader', 'step']*2 and all(speed.here for speed in speeds.values())
    # a step of two samples takes 0.1 s, and so do two batches of the loader
    assert np.allclose(table.samples_per_second, 1/(1/20 + 1/40))


def test_one_line_before_training(store, monkeypatch, capsys):
    line = plan.plan_line(DEMO.replace(single_batch_size=2, cross_batch_size=2), store.manifest, CPU, rows=[])
    assert line.startswith('plan: 6 stages, 52 steps, 104 samples') and '--measure' in line and '\n' not in line
    rows = [made('step', 1), made('step', 1, kind='single')]
    line = plan.plan_line(DEMO.replace(single_batch_size=2, cross_batch_size=2), store.manifest, CPU, rows=rows)
    assert 'at least 1.7 min' in line and 'made.json' in line and 'loading is not measured' in line
    said = []
    words = ['--recipe', 'demo', '--manifest', str(store.path/'manifest.csv'), '--prepared', '--store', str(store.path), '--output', 'none',
             '--set', 'single_batch_size=2', 'cross_batch_size=2']
    commands.train_command(lambda *_, **__: said.append(capsys.readouterr().out), words)
    assert said[0].count('plan: 6 stages') == 1
