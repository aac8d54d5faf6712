"""Habits of the released code, each a switch: its distribution, or its numbers. Without switches nothing changes.

Flow channels are tested in test_augment.py and test_streams.py, test jitter and the gallery of one clip in test_evaluation.py."""
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import normalize

from helpers import DEMO, FLOW_STAGE, random_clips, shapes_store, views_of
from vicc.augment import ViewSettings, apply_view, random_pair_params, random_view_params
from vicc.data import TwoStreamDataset, collate
from vicc.engine.distributed import embed_shuffled, full_precision
from vicc.recipe import Recipe
from vicc.streams import Stream
from vicc.trainer import StudentNetwork, StageConfig, Trainer, train_stage

SMALL = 'small', 6, 8, {'width': 4}

@pytest.fixture(scope='module')
def store(tmp_path_factory): return shapes_store(tmp_path_factory.mktemp('shapes'))

def draw_views(settings: ViewSettings, count: int, strong: bool = True) -> list[dict]:
    rng = np.random.default_rng(0)
    return [random_view_params(settings, 240, 320, strong, rng) for _ in range(count)]

# The recipe

def test_habits_are_off_and_their_names_are_checked():
    assert Recipe().released_habits == [] and not any(Recipe().habits.values())
    assert DEMO.replace(released_habits='[grey_per_frame]').habits['grey_per_frame']  # as papermill and the shell give it
    for change, message in ((dict(released_habits=['grey_per_fram']), r"released_habits is 'grey_per_fram', but must be .*'one_clip_gallery' \(did you mean grey_per_frame\?\)"),
                            (dict(released_habits=['batch_shuffle']), 'set gradient_views to 1'), (dict(released_habits='grey_per_frame'), 'must be a valid list'),
                            (dict(single_mixed_precision='bf16'), "must be '' or 'no'")):
        with pytest.raises(ValueError, match=message): DEMO.replace(**change)

def test_the_released_recipe_has_all_habits_and_else_the_plain_values():
    plain, released = Recipe.read('ucf101_s3d'), Recipe.read('ucf101_s3d_released')
    assert all(released.habits.values()) and not any(plain.habits.values())
    differ = {name for name, value in released.model_dump().items() if value != getattr(plain, name)}
    assert differ == {'released_habits', 'flow_as_image', 'gradient_views', 'mixed_precision', 'single_mixed_precision', 'patience'}
    views, stages = released.view_settings(), [stage.settings for stage in released.plan()]
    assert views == replace(ViewSettings(), whole_frame_crops=True, grey_frames=32, flow_channels='vu', flow_as_image=True)
    assert all(settings.batch_shuffle and settings.teacher_trains_first_epoch for settings in stages)
    assert [settings.full_precision for settings in stages] == [True, True, False, False, False, False] and released.mixed_precision == 'fp16'

# Views

def test_whole_frames_where_a_box_does_not_fit():
    "Of 4,000 views that the released code made of 320×240, 29.3 % were the whole frame; their mean area was .642."
    plain, released = (np.array([view['box'] for view in draw_views(ViewSettings(whole_frame_crops=on), 4000)]) for on in (False, True))
    whole = (released == (0, 0, 240, 320)).all(1)
    assert abs(whole.mean() - .293) < .02 and abs((released[:, 2]*released[:, 3]).mean()/(240*320) - .642) < .02
    assert np.array_equal(released[~whole], plain[~whole])  # a box that fits is the same
    cropped = released[~whole]
    assert abs(np.median(cropped[:, 2]*cropped[:, 3])/(240*320) - .480) < .02

def test_a_whole_frame_is_squeezed():
    view = views_of(ViewSettings(size=24, area=(1, 1), whole_frame_crops=True, flip=0), 2, 30, 60, strong=False)
    assert view['box'].tolist() == [[0, 0, 30, 60]]*2
    clips = torch.zeros(2, 3, 30, 60, 3, dtype=torch.uint8)
    clips[:, :, :, 30:] = 255  # the right half is white
    columns = apply_view(clips, view, ViewSettings(size=24))[0, 0, 0].mean(0)
    assert columns[:11].std() < 1e-3 and columns[13:].std() < 1e-3 and columns[13] > columns[10]

def test_a_grey_channel_for_every_frame():
    "Of 297 grey views of the released code, 200 had another channel in the second frame than in the first: two in three."
    views = draw_views(ViewSettings(grey_frames=8), 1500)
    channels = np.array([view['grey'] for view in views if view['grey'][0] >= 0])
    assert 240 < len(channels) < 360 and all((view['grey'] == -1).all() for view in views if view['grey'][0] < 0)
    assert abs((channels[:, 0] != channels[:, 1]).mean() - 2/3) < .08
    assert all(abs((channels == channel).mean() - 1/3) < .05 for channel in range(3))

def test_frames_show_their_own_channel():
    settings = ViewSettings(size=16, area=(1, 1), flip=0, jitter=0, grey=1, blur=0, grey_frames=5)
    view, clips = views_of(settings, 3, 16, 16), random_clips(3, 5, 16, 16, 3)
    plain = apply_view(clips, view | {'grey': torch.full((3,), -1)}, settings)
    mean, spread = (torch.tensor(values)[:, None, None, None] for values in ((.485, .456, .406), (.229, .224, .225)))
    colours, grey = plain*spread + mean, apply_view(clips, view, settings)*spread + mean  # as 0 to 1
    for clip in range(3):
        for frame in range(5):
            assert torch.allclose(grey[clip, :, frame], colours[clip, view['grey'][clip, frame], frame].expand(3, -1, -1), atol=1e-6)

def test_other_choices_of_a_view_stay_as_they_were():
    plain, released = (random_pair_params(ViewSettings(grey_frames=frames), 64, 64, np.random.default_rng(5)) for frames in (0, 8))
    assert plain[0] == released[0]
    for one, two in zip(plain[1], released[1]):
        assert all(np.array_equal(one[name], two[name]) for name in one if name != 'grey') and (one['grey'] < 0) == (two['grey'] < 0).all()

# Batch shuffle

def stream_and_views() -> tuple[Stream, torch.Tensor]:
    torch.manual_seed(0)
    return Stream(*SMALL).double(), torch.randn(2, 8, 3, 8, 16, 16, dtype=torch.float64)  # views 1 and 2 of the 8 clips of both processes

def shuffled(rank: int, folder: str) -> None:
    "What each process does: embed its four clips."
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    stream, views = stream_and_views()
    torch.manual_seed(10 + rank)
    own = list(views[:, 4*rank:4*rank + 4])
    projections = StudentNetwork(stream, gradient_views=1, batch_shuffle=True).train()(own, [])[0]
    torch.save(([z.detach() for z in projections], [z.requires_grad for z in projections], stream.state_dict()), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_batch_shuffle(tmp_path):
    "View 2 is embedded in two batches mixed of both processes' clips, without gradient; view 1 in the process's own."
    torch.multiprocessing.spawn(shuffled, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path/f'{rank}.pt') for rank in range(2)]
    torch.manual_seed(10)
    order = torch.randperm(8)  # as process 0 draws it
    assert sorted(order[:4].tolist()) not in ([0, 1, 2, 3], [4, 5, 6, 7])  # the clips do mix
    expected, streams = torch.empty(8, 8, dtype=torch.float64), []
    for rank in range(2):
        stream, views = stream_and_views()
        stream.train()
        own = stream.embed(views[0, 4*rank:4*rank + 4])
        assert torch.allclose(results[rank][0][0], own, atol=1e-12) and results[rank][1] == [True, False]
        share = order[4*rank:4*rank + 4]
        expected[share] = stream.embed(views[1, share]).detach()
        streams.append(stream.state_dict())
    assert torch.allclose(torch.cat([result[0][1] for result in results]), expected, atol=1e-12)
    for result, state in zip(results, streams):  # the running statistics have seen the mixed batch
        assert all(torch.allclose(result[2][name], value, atol=1e-12) for name, value in state.items())
    alone = stream_and_views()[0].train()
    assert not torch.allclose(expected[:4], alone.embed(views[1, :4]), atol=1e-3)  # and without the shuffle it is another number

def test_batch_shuffle_changes_nothing_in_one_process():
    stream, views = stream_and_views()
    again = copy.deepcopy(stream)
    with torch.no_grad(): assert torch.equal(embed_shuffled(stream.train().embed, views[0]), again.train().embed(views[0]))

# The teacher

def teacher_statistics(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value for name, value in trainer.teacher.named_buffers() if 'running_mean' in name])

def test_the_teacher_is_in_train_mode_from_step_5_to_the_end_of_the_first_epoch(store):
    data = TwoStreamDataset(store, None, clip_length=8, views=ViewSettings(size=32))
    batch, networks = collate([data[sample] for sample in range(4)]), [Stream(*SMALL) for _ in range(2)]
    def new(on: bool) -> Trainer:
        settings = replace(FLOW_STAGE, teacher_trains_first_epoch=on)
        trainer = Trainer('rgb', copy.deepcopy(networks[0]), settings, data, Accelerator(cpu=True), copy.deepcopy(networks[1]))
        trainer.model.train()
        return trainer
    trainer, moved = new(True), []
    weights = copy.deepcopy(dict(trainer.teacher.named_parameters()))
    for epoch in range(2):
        metrics = trainer.create_metrics()
        for _ in range(7):
            before = teacher_statistics(trainer)
            trainer.step(batch, epoch, metrics)
            moved.append(not torch.equal(before, teacher_statistics(trainer)))
        trainer.end_epoch(epoch + 1, {}, [])
    assert moved == [False]*4 + [True]*3 + [False]*7
    assert all(torch.equal(value, weights[name]) for name, value in trainer.teacher.named_parameters())
    again = new(True)
    again.load_state_dict(trainer.state_dict())  # a run that goes on has the moved statistics
    assert torch.equal(teacher_statistics(again), teacher_statistics(trainer)) and again.teacher_hash == trainer.teacher_hash
    plain, projections = new(False), []
    for one in (plain, new(True)): projections.append(torch.stack(one.embed_teacher(batch, 0, 0)))
    assert torch.allclose(*projections, atol=1e-5)  # at first the habit changes nothing
    views = new(True).views(batch, 'flow')
    with torch.no_grad(): expected = normalize(networks[1].train().head(networks[1].features(views[0])), dim=1)
    assert torch.allclose(new(True).embed_teacher(batch, 0, 4)[1], expected, atol=1e-5)  # batch norm sees one view

# Precision

def test_single_stream_stages_compute_in_float32_where_asked(store, tmp_path):
    AcceleratorState._reset_state()
    try:
        accelerator, data = Accelerator(cpu=True, mixed_precision='bf16'), TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32))
        kinds = {}
        for full in (True, False):
            stream, seen = Stream(*SMALL), set()
            stream.backbone.layers[0].conv1.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
            train_stage('flow-1', 'flow', stream, data, replace(FLOW_STAGE, epochs=1, full_precision=full), Path(tmp_path, str(full)), accelerator=accelerator, log=lambda line: None)
            kinds[full] = seen
        assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
        accelerator.scaler = 'of fp16'
        with pytest.raises(KeyError), full_precision(accelerator):
            assert not accelerator.native_amp and accelerator.scaler is None
            raise KeyError
        assert accelerator.native_amp and accelerator.scaler == 'of fp16'
    finally:
        AcceleratorState._reset_state()
        Accelerator(cpu=True)

def test_stages_say_what_cannot_work():
    with pytest.raises(ValueError, match='batch_shuffle is for views without gradient'): StageConfig(batch_shuffle=True)
