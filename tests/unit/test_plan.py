"What a recipe needs: counts by hand, hours that follow a measured row, GB that follow bytes, and what is refused."
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import DEMO
from vicc import bench, cli, commands, plan
from vicc.backbones import create_backbone
from vicc.compare.finetune import FINE_TUNING, LINEAR_PROBE
from vicc.engine.io import find_project
from vicc.manifests import write_manifest
from vicc.recipe import new_streams, Recipe

RECIPES = sorted((find_project(__file__)/'nbs'/'recipes').glob('*.yaml'))
SHAPES = plan.Videos(800, 1000, 16000, 64, 64, 'by hand', 200)
UCF101 = plan.Videos(9537, 13320, 2_490_840, 240, 320, 'by hand', 3783)
PAPER = Recipe.read('ucf101_s3d')


def made(part, value, recipe=DEMO, kind='cross', device='cpu', processes=1, unit='samples/s', source='made.json', **settings):
    "A row of `part` as if it had been measured with this recipe."
    wanted, near = plan.step_settings(plan.Job(recipe, SHAPES, [], device, processes), kind)
    size = f'{recipe.short_side}×{recipe.short_side}' if recipe.short_side == 64 else '240×320'
    usual = dict(batch_size=round(near['clips']), clip_length=recipe.clip_length, size=size,
                 streams='rgb,flow' if kind == 'cross' else 'rgb', cached=recipe.cache_gib > 0)
    settings = wanted | usual | settings
    row = bench.bench_row(part, settings.pop('name', part), value, unit, **settings)
    return plan.describe_row(row, source, dict(cpu='a CPU', cores=2))


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
    assert (demo.steps.sum(), demo.samples.sum(), demo.epochs.sum()) == (1000, 32000, 40)
    assert demo.stage.tolist() == ['rgb-1', 'flow-1', 'rgb-2 cycle 1', 'flow-2 cycle 1']
    assert paper.steps.tolist() == [300*49]*2 + [100*99]*4  # 9537 = 49·192 + 129 = 99·96 + 33
    assert (paper.steps.sum(), paper.samples.sum()) == (69_000, 600*9408 + 400*9504)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_samples(path):
    recipe, videos = Recipe.read(path), 9537
    single, cross = recipe.single_batch_size, recipe.cross_batch_size
    expected = dict(single=(recipe.single_epochs_rgb + recipe.single_epochs_flow)*(videos - videos % single),
                    cross=2*recipe.cycles*recipe.cross_epochs*(videos - videos % cross))
    found = plan.count_steps(recipe, videos).groupby('kind').samples.sum().to_dict()
    assert found == {kind: count for kind, count in expected.items() if count}


def test_hours_follow_one_measured_row():
    "The slower of step and loader, and both in turns."
    def hours(**speeds):
        values = dict(single=400, cross=320, single_loader=4000, cross_loader=3200) | speeds
        rows = [made(kind.split('_')[-1] if 'loader' in kind else 'step', value, kind=kind.split('_')[0],
                     **(dict(name='workers 0') if 'loader' in kind else {})) for kind, value in values.items()]
        table = plan.plan_stages(plan.Job(DEMO, SHAPES, rows))
        return table.groupby('kind')[['hours', 'most']].sum().mul(3600).to_dict('list')
    before, after = hours(), hours(cross=160)  # cross, then single
    assert np.allclose(before['hours'], [25600/320, 6400/400])
    assert np.allclose(before['most'], [25600*(1/320 + 1/3200), 6400*(1/400 + 1/4000)])
    assert after['hours'][1] == before['hours'][1] and np.isclose(after['hours'][0], 25600/160)
    assert np.allclose([hours(single_loader=200)[name][1] for name in ('hours', 'most')], [6400/200, 6400*(1/200 + 1/400)])


def test_the_slower_is_named():
    recipe = PAPER.replace(workers=4, accumulate=8)
    rows = [made('step', 400, recipe, device='cuda', accumulate=8, batch_size=96), made('loader', 100, recipe, device='cuda', name='workers 4')]
    speed = plan.find_speed(plan.Job(recipe, UCF101, rows, 'cuda'), 'cross')
    assert (speed['value'], speed['slowest'], speed['slower']) == (100, 80, 'loader')
    rows[1] = made('loader', 900, recipe, device='cuda', name='workers 4')
    assert plan.find_speed(plan.Job(recipe, UCF101, rows, 'cuda'), 'cross')['slower'] == 'step'
    rows[1] = made('loader', 900, recipe, name='workers 3')  # another loader
    assert plan.find_speed(plan.Job(recipe, UCF101, rows, 'cuda'), 'cross')['slower'] == 'step alone'


def test_a_row_of_another_step_does_not_count():
    for other in (dict(backbone='s3d'), dict(precision='bf16'), dict(device='cuda'), dict(compiled=True), dict(clip='8×32×33'),
                  dict(options={}), dict(kind='single'), dict(views='made before')):
        assert math.isnan(plan.find_speed(plan.Job(DEMO, SHAPES, [made('step', 100, **other)]), 'cross')['value']), other
    near, far = made('step', 100, batch_size=24), made('step', 200, batch_size=4)
    speed = plan.find_speed(plan.Job(DEMO, SHAPES, [far, near]), 'cross')
    assert (speed['value'], speed['clips'], speed['measured']) == (100, 32, 24)


def test_several_gpus_train_without_graphs_and_what_is_unmeasured_is_said():
    graphs, without = (made('step', value, PAPER, device='cuda', processes=count) for value, count in ((419, 1), (224, 4)))
    graphs |= dict(batch_size=24, clips=24)
    epoch = made('epoch', 257, PAPER, device='cuda', batch_size=24)
    rows = [graphs, without, epoch]
    speed = plan.find_speed(plan.Job(PAPER, UCF101, rows, 'cuda', 4), 'cross')
    assert speed['value'] == 4*224 and speed['slower'] == 'step alone' and '61% of the speed of its steps' in speed['source']
    one = plan.find_speed(plan.Job(PAPER.replace(accumulate=4), UCF101, rows, 'cuda'), 'cross')
    assert np.isclose(one['value'], 257*8/10) and one['slower'] == 'step and loader'  # two more passes
    assert one['slowest'] == one['value'] and np.isclose(speed['slowest'], 4*224*257/419)  # an epoch beside its own step
    assert math.isnan(plan.find_speed(plan.Job(PAPER, UCF101, [without, dict(epoch, clip='8×32×32')], 'cuda', 4), 'cross')['slowest'])
    unmeasured = plan.find_speed(plan.Job(PAPER, UCF101, [graphs, epoch], 'cuda', 8), 'cross')
    assert math.isnan(unmeasured['value']) and unmeasured['source'].endswith('vicc bench --processes 8 --no-graphs step epoch')
    assert plan.find_speed(plan.Job(DEMO, SHAPES, []), 'cross')['source'].endswith('vicc bench --cached step epoch')  # kept in memory


def test_stored_rows_give_the_hours_of_the_paper():
    "Four H100, from nbs/results: 224.1 and 444.3 samples/s a card."
    rows = plan.read_rows()
    table = plan.plan_stages(plan.Job(PAPER, UCF101, rows, 'cuda', 4))
    by_name = {(row['name'], row.get('graphs')): row['value'] for row in rows if row['file'] == 'gpu_training.json' and row['part'] == 'step'}
    single, cross = (by_name[f's3d {kind} with views', False] for kind in ('single', 'cross'))
    assert np.isclose(table.hours.sum(), (600*9408/single + 400*9504/cross)/4/3600)
    assert table.source.str.startswith('gpu_training.json, NVIDIA H100').all()


def test_gb_by_hand():
    filmed = made('store', 8000, PAPER, unit='bytes/frame', frames=648, preset='ultrafast', flow_method='tvl1')
    assert plan.store_gb(plan.Job(PAPER, UCF101, [filmed]))[0] == 8000*2_490_840/1e9
    half = replace(UCF101, height=120, width=160)
    size, basis = plan.store_gb(plan.Job(PAPER, half, [filmed]))
    assert size == 2000*2_490_840/1e9 and '2,000 bytes a frame, from 648 frames of 240×320' in basis
    assert math.isnan(plan.store_gb(plan.Job(DEMO, SHAPES, [filmed]))[0])  # another flow and preset
    weights = sum(value.numel()*value.element_size() for value in new_streams(PAPER)['rgb'].state_dict().values())
    queue = 4*1920*128*4
    assert np.isclose(plan.checkpoint_gb(PAPER), (3*(2*weights + queue) + 6*weights)/1e9)  # LARC keeps one number a weight
    assert np.isclose(plan.shared_gb(plan.Job(PAPER, UCF101, [], 'cuda', 4)), 48*2*(2*32*240*320)*(2*14 + 1)/1e9)
    weights = sum(value.nbytes for value in new_streams(PAPER)['rgb'].backbone.state_dict().values())
    assert np.isclose(plan.evaluation_gb(plan.Job(PAPER, UCF101, [])), (51*weights + 4*13320*1024*4)/1e9)
    assert plan.shared_gb(plan.Job(DEMO, SHAPES, [])) == 0 == plan.shared_gb(plan.Job(PAPER.replace(workers=0), UCF101, []))


def test_gb_of_real_files_and_batches(store):
    files = sum(file.stat().st_size for stream in ('rgb', 'flow') for file in (store.path/stream).rglob('*') if file.is_file())
    assert plan.store_gb(plan.Job(DEMO, SHAPES, [], store=store)) == (files/1e9, 'as it is')
    config = bench.BenchConfig(DEMO, store)
    trainer, batch = bench.new_trainer(config, 'cross')
    bench.take_steps(trainer, batch, 1)
    saved = io.BytesIO()
    torch.save(trainer.state_dict(), saved)
    weights = sum(value.numel()*value.element_size() for value in trainer.stream.state_dict().values())
    planned = (plan.checkpoint_gb(DEMO)*1e9 - len(DEMO.plan())*weights)/(DEMO.keep_checkpoints + 1)
    assert abs(saved.tell()/planned - 1) < .1
    read = sum(batch[stream].data.numel() for stream in ('rgb', 'flow'))
    at_most = plan.shared_gb(plan.Job(DEMO.replace(workers=1, cache_gib=0), plan.Videos(2, 2, 32, 64, 64, ''), []))*1e9/3
    assert at_most/4 < read <= at_most


def test_gpu_memory_is_measured_or_estimated():
    row = made('step', 10., PAPER, device='cuda', processes=4, unit='GiB', name='s3d cross memory reserved')
    rows = [row, dict(row, kind='single', name='s3d single memory reserved', value=20., batch_size=48, clips=48)]
    def needed(recipe, rows=rows): return plan.gpu_memory(plan.Job(recipe, UCF101, rows, 'cuda', 4))
    size, basis = needed(PAPER)
    assert size == 20*2**30/1e9 and basis.startswith('measured')
    alone = PAPER.replace(cycles=0)
    size, basis = needed(alone.replace(accumulate=2))  # half of the clips at a time
    assert np.isclose(size, 10*2**30/1e9) and basis.startswith('estimated')
    assert np.isclose(needed(alone.replace(backbone='r21d', mixed_precision='no'))[0], size*2*2*plan.KEPT['r21d'])  # float32
    assert np.isclose(needed(alone.replace(clip_length=16, view_size=64))[0], size*2/8)
    assert math.isnan(needed(PAPER, [])[0]) and math.isnan(needed(alone.replace(backbone='torchvision:r3d_18'))[0])


def test_activations_of_the_networks():
    "What PyTorch keeps for the backward pass, on the meta device, which computes nothing."
    def kept(backbone):
        sizes = {}
        def note(tensor):
            storage = tensor.untyped_storage()
            sizes[id(storage)] = storage, storage.nbytes()
            return tensor
        with torch.device('meta'), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = create_backbone(backbone)(torch.empty(2, 3, 32, 128, 128))
        del features
        return sum(size for _, size in sizes.values())
    counts = {backbone: kept(backbone) for backbone in plan.KEPT}
    for backbone, ratio in plan.KEPT.items(): assert abs(counts[backbone]/counts['s3d']/ratio - 1) < .01, backbone


def test_evaluation_by_hand():
    "Of 9,537 videos 954 are held out, and 67 batches of 128 are full; a video of 187 frames has 11 clips of 32, every 15."
    step, tested = made('step', 80, PAPER, device='cuda', compiled=False), made('evaluation', 600, PAPER, device='cuda', unit='clips/s', name='s3d in batches')
    job = plan.Job(PAPER, UCF101, [step, tested], 'cuda')
    table = plan.plan_evaluation(job).set_index('evaluation')
    tests, own = 10*11*3783, 67*128
    clips = [11*13320, 100*(own + 954) + tests, 500*(own + 954) + tests, 600*(own + 954) + 2*tests]
    assert table.clips.tolist() == [2*count for count in clips] and table.trained.tolist() == [0, 0, 2*500*own, 2*500*own]
    trained = 80*8/3  # a cross-stream step passes eight times through a network, fine-tuning thrice
    assert np.allclose(table.hours, (2*np.array(clips) - table.trained)/600/3600 + table.trained/trained/3600)
    assert plan.evaluation_speeds(job).source.str.startswith('estimated').tolist() == [False, True]
    alone = plan.plan_evaluation(replace(job, rows=[tested])).hours
    assert alone[:2].notna().all() and alone[2:].isna().all()  # no step is measured: nothing is guessed
    assert np.allclose(table.most[:2], 2*table.hours[:2]) and table.most[2:].isna().all()  # float32 takes twice as long; no epoch is measured
    stored = plan.evaluation_speeds(replace(job, rows=plan.read_rows())).loc['trained']
    assert np.isclose(stored.slowest, stored.value/2*257.2/418.9)  # an epoch beside its own steps
    assert evaluated_in_float32(job, tested).tolist() == [True, True, False, False]
    compiled = dict(step, compiled=True)
    assert plan.plan_evaluation(replace(job, rows=[compiled])).hours.isna().all()
    for name, protocol in {'linear probe': LINEAR_PROBE, 'fine-tuning': FINE_TUNING}.items():
        assert (plan.EVALUATION[name], protocol.batch_size, protocol.validation_fraction) == (protocol.epochs, 128, .1)
    assert not plan.plan_evaluation(replace(job, videos=replace(UCF101, test=0))).clips.any()


def evaluated_in_float32(job, tested):
    "Whether the hours of each evaluation are no lower bound, with a forward speed of float32."
    return plan.plan_evaluation(replace(job, rows=[*job.rows, dict(tested, precision='no', value=300)])).most.notna()


def test_numbers_of_gpus_side_by_side():
    job = plan.Job(PAPER, UCF101, plan.read_rows(), 'cuda')
    table = plan.compare_gpus(job, [1, 4, 8, 16])
    assert table['batch norm sees'].tolist() == ['192 / 96', '48 / 24', '24 / 12', '12 / 6'] == table.clips.tolist()
    assert set(table['measured with']) == {'48 / 24'} and table['memory of a GPU'].str.contains('measured').tolist() == [False, True, False, False]
    four = plan.plan_stages(replace(job, processes=4)).hours.sum()
    assert table.training[1] == plan.format_hours(four, four*418.9/257.2)
    assert '80GB' not in table['memory of a GPU'][1] and 'more than the card has' in table['memory of a GPU'][0]
    synced = plan.compare_gpus(replace(job, recipe=PAPER.replace(sync_batchnorm=True)), [4])
    assert synced['batch norm sees'].tolist() == ['192 / 96']


def test_preparing_on_several_cores():
    rows = [made('prepare', 400, unit='frames/s', name='farneback', workers=0, flow_method='farneback')]
    for cores, job in ((plan.available_cpus(), plan.Job(DEMO, SHAPES, rows)), (2*plan.available_cpus(), plan.Job(DEMO, replace(SHAPES, height=128), rows))):
        assert np.isclose(plan.prepare_hours(job, cores)[0]*3600, 16000/400/plan.available_cpus())
    assert plan.prepare_hours(plan.Job(DEMO, SHAPES, rows)) == plan.prepare_hours(plan.Job(DEMO, SHAPES, rows), plan.available_cpus())
    assert math.isnan(plan.prepare_hours(plan.Job(DEMO, SHAPES, []))[0])
    flow = made('flow', .5, name='tvl1', unit='pairs/s', threads=1, size='240×320')
    hours, known = plan.prepare_hours(plan.Job(PAPER, UCF101, [flow], 'cuda'), 256)
    assert np.isclose(hours, 2_490_840/.5/256/3600) and known.startswith('flow alone')


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
    assert (both.train, both.stored, both.test, both.frames) == (2, 3, 1, 700)


def test_command(manifest, store, capsys, tmp_path):
    assert 'plan' in cli.COMMANDS
    code, text = answer(capsys, 'ucf101_s3d', '--manifest', manifest, '--gpus', 4, '--set', 'single_batch_size=96')
    assert code == 0
    for words in ('96,000', '–', '61% of the speed', '14 reading processes', 'num_frames is missing for 100 of 100 videos', 'NVIDIA H100', 'memory of a GPU', 'all machines together: 4',
                  'preparing, 256 cores', 'without --test-manifest'):
        assert words in text, words
    rows = [made('step', 100), made('step', 100, kind='single')]
    names = ('part', 'name', 'value', 'unit', 'settings')
    content = dict(machine=bench.describe_machine(), rows=[{name: row[name] for name in names} for row in rows])
    (tmp_path/'rows.json').write_text(json.dumps(content))
    write_manifest(store.manifest, tmp_path/'stored.csv')
    tiny = ['single_batch_size=2', 'cross_batch_size=2']
    code, text = answer(capsys, 'demo', '--manifest', tmp_path/'stored.csv', '--store', store.path, '--gpus', 0,
                        '--speeds', tmp_path/'rows.json', '--set', *tiny)
    assert code == 0 and 'rows.json' in text and 'as it is' in text and 'frames from the store' in text, text
    assert '≥ 0.5 min' in plan.format_plan(plan.Job(DEMO, SHAPES, [made('step', 1000), made('step', 1000, kind='single')]))  # 32,000 samples


@pytest.mark.parametrize('words, message', [
    (['no_such'], 'no_such.yaml does not exist'), (['demo', '--set', 'cycels=1'], 'did you mean cycles?'),
    (['demo', '--set', 'cross_batch_size=101'], '100 videos do not fill one batch of 101'),
    (['demo', '--gpus', '3'], 'a batch of 32 cannot be divided among 3 processes'), (['demo', '--gpus', '-1'], '--gpus'), (['demo', '--gpus', '0', '4'], '--gpus'),
    (['demo', '--gpus', '1', '3'], 'cannot be divided among 3 processes'),
    (['demo', '--store', 'nowhere'], 'not a finished store'), (['demo', '--speeds', 'none.json'], 'none.json'),
    (['demo', '--manifest', 'none.csv'], 'none.csv')])
def test_refused_in_one_line(words, message, manifest, capsys):
    code, text = answer(capsys, '--manifest', manifest, *words)
    assert code == 2 and message in text and len(text.splitlines()) == 1, text


def test_a_file_without_rows_is_refused(manifest, capsys, tmp_path):
    (tmp_path/'empty.json').write_text('{"rows": []}')
    code, text = answer(capsys, 'demo', '--manifest', manifest, '--speeds', tmp_path/'empty.json')
    assert code == 2 and 'holds no measured rows' in text


def test_rows_of_bench_are_all_that_a_plan_needs(store, monkeypatch, tmp_path):
    "Every call takes a tenth of a second, says the clock."
    monkeypatch.setattr(bench, 'measure', lambda work, repeats, *_, **__: (work(), (.1, dict(repeats=repeats, spread=0.)))[1])
    tiny = DEMO.replace(single_batch_size=4, cross_batch_size=2, accumulate=2)
    config = bench.BenchConfig(tiny, store, repeats=1, cache_gib=math.inf)
    bench.run(config, ['prepare', 'loader', 'step'], tmp_path/'rows.json')
    job = plan.Job(tiny, plan.describe_videos(tiny, store.manifest, origin='the store'), plan.read_rows([tmp_path/'rows.json']))
    single, cross = (plan.find_speed(job, kind) for kind in ('single', 'cross'))
    assert (single['value'], single['slower'], single['measured']) == (40, 'step alone', 2)
    assert plan.prepare_hours(job, 1)[0] == job.videos.frames/(16*17/.1)/3600  # 16 videos of 17 frames, too
    # a step of two samples takes 0.1 s, and so do two batches of the loader
    assert (cross['value'], cross['slower'], cross['measured']) == (20, 'step', 1) and np.isclose(cross['slowest'], 1/(1/20 + 1/40))


def test_one_line_before_training(store, monkeypatch, capsys):
    line = plan.plan_line(DEMO.replace(single_batch_size=2, cross_batch_size=2), store.manifest, rows=[])
    assert line.startswith('plan: 4 stages, 40 steps, 80 samples') and 'vicc bench measures them' in line and '\n' not in line
    rows = [made('step', 1), made('step', 1, kind='single')]
    line = plan.plan_line(DEMO.replace(single_batch_size=2, cross_batch_size=2), store.manifest, rows=rows)
    assert 'at least 1.3 min' in line and 'made.json' in line
    said = []
    words = ['--recipe', 'demo', '--manifest', str(store.path/'manifest.csv'), '--prepared', '--store', str(store.path), '--output', 'none',
             '--set', 'single_batch_size=2', 'cross_batch_size=2']
    commands.train_command(lambda *_, **__: said.append(capsys.readouterr().out), words)
    assert said[0].count('plan: 4 stages') == 1
