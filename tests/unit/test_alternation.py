"What goes on from stage to stage, what starts anew, and what a folder refuses."
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from vicc.alternation import alternate, stage_folder
from vicc.data import TwoStreamDataset
from vicc.prepare import prepare
from vicc.recipe import Recipe
from vicc.run_dir import begin_run, video_remarks
from vicc.streams import TrainedOn, load_stream
from vicc.synthetic import make_moving_shapes
from vicc.trainer import MethodSpec, VICC


@pytest.fixture(scope='module')
def recipe():
    return Recipe.read('demo', single_epochs_rgb=1, single_epochs_flow=2, cross_epochs=1, cycles=1, cross_freeze_prototypes=0,
                       single_batch_size=8, cross_batch_size=8, num_prototypes=8)


@pytest.fixture(scope='module')
def store(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('videos')
    shapes = make_moving_shapes(folder/'shapes', 16, 8)
    return prepare(shapes['train'], shapes['videos'], folder/'store', recipe.prepare_settings(), workers=0,
                   log=lambda line: None)


@pytest.fixture(scope='module')
def cpu():
    return Accelerator(cpu=True)


@pytest.fixture(scope='module')
def run(recipe, store, cpu, tmp_path_factory):
    "Folder and history of a finished run."
    folder = tmp_path_factory.mktemp('run')/'run'
    return folder, alternate(recipe, store, folder, accelerator=cpu, log=lambda line: None)


@pytest.fixture(scope='module')
def trained(recipe, run):
    return {stage.title: load_stream(stage_folder(run[0], number, stage)/'stream')
            for number, stage in enumerate(recipe.plan())}


def test_batches_and_clips_that_do_not_fit_are_told_before_the_folder_is_taken(recipe, store, cpu, tmp_path):
    lines, run = [], dict(accelerator=cpu, log=lambda line: lines.append(line))
    large = recipe.replace(cross_batch_size=17, clip_length=20)
    with pytest.raises(ValueError, match='16 videos do not fill one batch of 17: .*single_batch_size=16 cross_batch_size=16'): alternate(large, store, tmp_path/'run', **run)
    assert not (tmp_path/'run'/'recipe.yaml').exists()
    alternate(large.replace(cross_batch_size=8, cycles=0), store, tmp_path/'run', train=('flow',), **run)  # without cycles no teacher is needed
    assert load_stream(tmp_path/'run'/'stages'/'01-flow-1'/'stream').trained_on.modality == 'flow' and not (tmp_path/'run'/'stages'/'00-rgb-1').exists()
    assert [line for line in lines if 'note' in line] == ['note: 16 of 16 videos are shorter than a clip (20 frames): their first frame is repeated in front']


def test_the_last_stage_alone_is_trained_again_to_the_same_bits(recipe, store, cpu, run):
    folder, history = run
    last, lines = folder/'stages'/'03-flow-2-cycle-1', []
    weights = load_stream(last/'stream').state_dict()
    shutil.rmtree(last)
    again = alternate(recipe, store, folder, accelerator=cpu, log=lines.append)
    assert len(lines) == 1 and list(again.loss) == list(history.loss)
    for name, value in load_stream(last/'stream').state_dict().items(): assert torch.equal(value, weights[name]), name
    assert list(pd.read_csv(folder/'log.csv', dtype=str).loss.map(float)) == list(history.loss)


def test_prototypes_are_carried_over_and_the_teachers_are_not_used(trained):
    directions = {title: stream.prototypes.weight.detach() for title, stream in trained.items()}
    for title, before in (('rgb-2 cycle 1', 'rgb-1'), ('flow-2 cycle 1', 'flow-1')):
        assert (directions[title] @ directions[before].T).diag().min() > .9
    assert (directions['rgb-2 cycle 1'] @ directions['flow-1'].T).diag().abs().mean() < .5


def test_streams_record_what_they_were_trained_on(recipe, run, trained):
    streams = trained | {f'{name} random': load_stream(run[0]/'stages'/'random'/name) for name in ('rgb', 'flow')}
    for title, stream in streams.items():
        assert stream.trained_on == TrainedOn(modality=title.split('-')[0].split()[0], clip_length=8, stride=1, view_size=recipe.view_size)


def test_optimizer_and_queue_are_new_and_the_teacher_is_frozen(recipe, store, cpu, trained):
    planned = recipe.plan()[2]
    dataset = TwoStreamDataset(store, store.manifest, ('rgb', 'flow'), recipe.clip_length, recipe.clip_stride,
                               recipe.view_settings(), recipe.seed)
    settings = replace(planned.settings, queue_length=16)
    trainer = VICC.trainer('rgb', trained['rgb-1'].requires_grad_(True), settings, dataset, cpu, trained['flow-1'])
    assert planned.title == 'rgb-2 cycle 1' and len(trainer.optimizer.state) == 0
    assert trainer.queue.filled == 0 and len(trainer.queue.projections) == 4
    assert not trainer.teacher.training and not any(value.requires_grad for value in trainer.teacher.parameters())
    assert all(value.requires_grad for value in trainer.stream.parameters())


@pytest.mark.parametrize('message, change', [
    ('seed is 0, not 1', dict(seed=1)), ('training_videos.csv is .*, not', dict(rows=12)),
    ("method.yaml is .'name: vicc'., not .'name: other'.", dict(method=MethodSpec('other'))),
    ('vicc teaches each stream by the other', dict(train=('rgb',))),
    ('flow_bound is 5.0, not 20.0', dict(flow_bound=20.))], ids=lambda value: value if isinstance(value, str) else '')
def test_another_run_in_the_folder_is_refused(recipe, store, cpu, run, message, change):
    options = {name: change[name] for name in ('method', 'train') if name in change}
    rows = store.manifest[:change['rows']] if 'rows' in change else None
    values = {name: value for name, value in change.items() if name in Recipe.model_fields}
    with pytest.raises(ValueError, match=message):
        alternate(recipe.replace(**values), store, run[0], rows, cpu, **options)


def test_r1_of_held_out_videos_is_measured_on_the_way(recipe, store, cpu, tmp_path):
    watched = recipe.replace(single_epochs_rgb=3, online_every=2, online_fraction=.25)
    alone = MethodSpec('alone', uses_teacher=False)
    history = alternate(watched, store, tmp_path/'run', accelerator=cpu, method=alone, train=('rgb',))
    assert list(history.stage) == ['rgb-1']*3 + ['rgb-2 cycle 1']
    assert list(history.online_r1.notna()) == [False, True, True, True]
    trained_on = set(pd.read_csv(tmp_path/'run'/'training_videos.csv').video)
    assert trained_on < set(store.manifest.video)


class Killed(Exception): pass


def test_a_begun_stage_becomes_longer_where_its_schedule_permits(recipe, store, cpu, tmp_path):
    def train(folder, epochs, schedule, killed=False, **options):
        values = recipe.replace(cycles=0, single_epochs_rgb=epochs, single_schedule_epochs=schedule)
        def log(line):
            if killed: raise Killed
        return alternate(values, store, tmp_path/folder, accelerator=cpu, log=log, train=('rgb',),
                         method=MethodSpec('alone', uses_teacher=False), **options)
    def weights(folder): return (tmp_path/folder/'stages'/'00-rgb-1'/'stream'/'model.safetensors').read_bytes()
    for schedule in (5, 0):
        with pytest.raises(Killed): train(f'run {schedule}', 3, schedule, killed=True)
    with pytest.raises(ValueError, match='single_epochs_rgb is 3, not 4.*accept_changes'): train('run 5', 4, 5)
    with pytest.raises(ValueError, match='has 3 epochs and cannot have 2: once begun it can only become longer'): train('run 5', 2, 5, accept_changes=True)
    with pytest.raises(ValueError, match='schedule_epochs=5 is less than epochs=6'): train('run 5', 6, 5, accept_changes=True)
    message = 'rgb-1 has 3 epochs and cannot have 4: .*the schedule_epochs of its kind are not 0'
    with pytest.raises(ValueError, match=message): train('run 0', 4, 0, accept_changes=True)
    longer, whole = train('run 5', 4, 5, accept_changes=True), train('whole', 4, 5)
    assert list(longer.loss) == list(whole.loss) and weights('run 5') == weights('whole')
    assert 'single_epochs_rgb,3,4' in (tmp_path/'run 5'/'changes.csv').read_text()
    with pytest.raises(ValueError, match='rgb-1 has 4 epochs and cannot have 5: .*while it is not over'): train('run 5', 5, 5, accept_changes=True)
    assert weights('run 5') == weights('whole') and Recipe.read(tmp_path/'run 5'/'recipe.yaml').single_epochs_rgb == 4


def test_half_precision_without_a_gpu_is_refused(recipe, store, tmp_path):
    for precision in ('fp16', 'bf16'):
        half = SimpleNamespace(device=torch.device('cpu'), mixed_precision=precision)
        with pytest.raises(ValueError, match=f'this cpu cannot compute gradients in {precision}: use mixed_precision no'): alternate(recipe, store, tmp_path/'run', accelerator=half)
    assert not (tmp_path/'run').exists()


def test_a_batch_that_is_divided_is_described_first(recipe, store, cpu, tmp_path):
    lines, chunks = [], recipe.replace(accumulate=2, single_batch_size=16, cycles=0)
    alternate(chunks, store, tmp_path/'run', accelerator=cpu, log=lines.append)
    assert lines[0] == 'note: batch 16 = 2 chunks × 8 (batch norm sees 8 clips at a time)'
    assert not any('batch' in line for line in lines[1:])


def test_other_frame_rates_are_counted(recipe, store):
    assert video_remarks(recipe, store.manifest) == []
    mixed = store.manifest.assign(fps=[25.]*12 + [50., 12.5, 25.2, 0.])
    [remark] = video_remarks(recipe, mixed)
    assert remark.startswith('videos have 25 (12), 50 (1), 12.5 (1), others (1) frames a second: a clip of 8 frames lasts 0.16 to 0.64 s')


def test_a_run_of_before_does_not_go_on_with_other_batches(recipe, store, tmp_path):
    "Batch sizes were those of each process: with one process nothing changes, several are refused."
    folder, one = tmp_path/'run', Accelerator(cpu=True)
    begin_run(recipe, folder, {}, store.manifest, MethodSpec(), one)
    method = folder/'method.yaml'
    assert 'batch: of all processes' in method.read_text()
    method.write_text(method.read_text().replace('batch: of all processes\n', ''))
    for _ in range(2): begin_run(recipe, folder, {}, store.manifest, MethodSpec(), one)
    assert 'batch:' not in method.read_text()
    two = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    with pytest.raises(ValueError, match='older version, for which a batch size was that of each process'):
        begin_run(recipe, folder, {}, store.manifest, MethodSpec(), two)
    begin_run(recipe, tmp_path/'new', {}, store.manifest, MethodSpec(), two)
    begin_run(recipe, tmp_path/'new', {}, store.manifest, MethodSpec(), two)
