"The motion exam: encoders whose answers are known, flow of changed frames, real files, the command."
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vicc.encoders import VideoEncoder
from vicc.compare.exam import (
    TESTS, changed_clips, changed_order, draw_exam_scenes, encode_clips, exam_command, exam_on_shapes, exam_on_videos, exam_overview, plot_exam, probe_pairs,
    reference_encoders,
)
from vicc.flow import compute_flow, quantise
from vicc.protocols import bootstrap_interval
from vicc.streams import Stream, save_stream
from vicc.synthetic import render
from vicc.video import write_video

torch.set_num_threads(1)
T = 8


def first_frame(views): return F.adaptive_avg_pool2d(views[:, :, 0], 8).flatten(1)


def pace(views): return F.pad(views.var((3, 4)).sum(1), (0, 1), value=1)  # how much the flow of each frame varies


def constant(views): return torch.ones(len(views), 4)


@pytest.fixture(scope='module')
def exam():
    like = VideoEncoder(first_frame, T, 1, 32)
    references = {name: encoder for name, encoder in reference_encoders(like).items() if 'random' not in name}
    encoders = {**references, 'first frame': like, 'constant': VideoEncoder(constant, T, 3, 48)}
    return exam_on_shapes(encoders, 32)


def score(table, test, encoder): return table.set_index(['test', 'encoder']).score[test, encoder]


@pytest.mark.parametrize('encoder, test, wanted', [
    ('mean frame', 'arrow', .5), ('mean frame', 'order', .5), ('first frame', 'still', .5), ('first frame', 'speed', .5), ('mean frame', 'own first frame', 1),
    ('first frame', 'own first frame', 1), ('mean frame', 'looks swapped', 0), *[('constant', test, .5) for test in TESTS[1:-1]]])
def test_blind_encoders_have_exactly_what_they_must(exam, encoder, test, wanted):
    assert score(exam[0], test, encoder) == pytest.approx(wanted, abs=1e-9)
    if wanted == .5 and test != 'looks swapped': assert exam[0].set_index(['test', 'encoder']).moved[test, encoder] < 1e-4


@pytest.mark.parametrize('test', ['looks swapped', 'arrow', 'order', 'speed', 'still'])
def test_frame_differences_see_motion(exam, test):
    assert score(exam[0], test, 'frame differences') > .8


def test_flow_sees_motion():
    encoder, clips = VideoEncoder(pace, 4, 1, 32, modality='flow'), [('slowing', ''), ('slowing', 'backwards'), ('slowing', 'still')]
    videos = ({'slowing': render(draw_exam_scenes(number, 4)['slowing'])} for number in range(32))
    original, *others = encode_clips({'flow': encoder}, videos, clips)['flow'].values()
    for changed in others: assert np.nanmean(probe_pairs(original, changed, np.arange(32) < 16)[0]) > .9


def test_table_and_answers_belong_together(exam):
    table, answers = exam
    rows = table.set_index(['test', 'encoder'])
    assert list(dict.fromkeys(table.test)) == list(TESTS) and list(rows.loc['arrow'].index) == list(dict.fromkeys(answers.index.get_level_values(1)))
    assert rows.chance['moving shapes'].iloc[0] == pytest.approx(3/31) and rows.chance['own first frame'].iloc[0] == 1/32
    assert np.allclose(answers.mean(axis=1).loc[rows.index], rows.score)
    asked = answers.notna().sum(axis=1)
    assert asked['arrow'].eq(16).all() and asked['moving shapes'].eq(32).all() and (rows.videos == asked.loc[rows.index]).all()
    assert (rows.low <= rows.score).all() and (rows.score <= rows.high).all()
    assert rows.score['moving shapes', 'first frame'] < .35  # what the sizes of a first frame tell
    text = exam_overview(table)
    assert list(text.columns) == list(TESTS) and text.loc['mean frame', 'arrow'] == '50 (40–60)' and text.loc['chance', 'own first frame'] == '3.12'
    assert len(plot_exam(table).axes) == 7


def test_features_that_cannot_know_are_right_half_of_the_time():
    "The interval holds 50 % in about 95 of 100 exams of noise: the answers to the videos do not depend on each other."
    generator, known, held = torch.Generator().manual_seed(0), np.arange(120) < 60, []
    for _ in range(100):
        original, changed = torch.randn(2, 120, 8, generator=generator)
        low, high = bootstrap_interval(probe_pairs(original, changed, known)[0], draws=200)
        held.append(low <= .5 <= high)
    assert 88 <= sum(held) <= 100


def test_a_systematic_change_is_found_and_rounding_is_not():
    original = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    shift, known = torch.eye(8)[2], np.arange(100) < 50
    answers, moved = probe_pairs(original, original + 3*shift, known)
    assert np.nanmean(answers) == 1 and np.isnan(answers[:50]).all() and moved == pytest.approx(3/4, abs=.1)
    assert set(probe_pairs(original, original + 1e-6*shift, known)[0][50:]) == {.5}


def test_flow_is_computed_from_the_changed_frames():
    frames = {'shapes': render(draw_exam_scenes(0, T)['shapes'])}
    clips = [('shapes', change) for change in ('', 'backwards', 'shuffled')]
    forwards, backwards, shuffled = changed_clips(frames, clips, 'flow', T, 5)
    again = quantise(compute_flow(frames['shapes'][::-1].copy(), 'farneback'), 5).transpose(0, 2, 3, 1)
    assert torch.equal(backwards, torch.from_numpy(again))
    negated = 256 - forwards.flip(0).int()
    assert (backwards.int() - negated).abs().float().mean() > 1  # a shortcut from stored flow would give this
    order = changed_order('shuffled', T + 1, 5)
    assert sorted(order) == list(range(T + 1)) and not torch.equal(shuffled, forwards)
    assert torch.equal(changed_clips(frames, clips, 'rgb', T, 5)[1], torch.from_numpy(frames['shapes'][:T][::-1].copy()))


def test_scenes_hold_what_their_test_needs():
    for number in range(16):
        scenes = draw_exam_scenes(number, 16)
        assert {name: scene.settings.num_frames for name, scene in scenes.items()} == dict.fromkeys(scenes, 17) | {'paced': 33}
        query, motion, looks = (scenes[name] for name in ('query', 'same motion', 'same looks'))
        assert looks.class_name != query.class_name == motion.class_name
        for one, two, three in zip(query.shapes, motion.shapes, looks.shapes):
            assert np.array_equal(one.x, two.x) and np.array_equal(one.texture, three.texture) and not np.array_equal(one.texture, two.texture)
            assert np.allclose(one.x[8], three.x[8], atol=64*.15) or query.class_name.startswith('osc') or looks.class_name.startswith('osc') or 'orbit' in (query.class_name, looks.class_name)
        slow = scenes['slowing'].shapes[0]
        steps = np.abs(np.diff(slow.x)) + np.abs(np.diff(slow.y)) + np.abs(np.diff(slow.angle))
        assert (np.diff(steps) < 0).all() and scenes['paced'].class_name not in ('grow', 'shrink')
    assert np.array_equal(render(draw_exam_scenes(3, 8, 1)['query']), render(draw_exam_scenes(3, 8, 1)['query']))


@pytest.mark.parametrize('function, words', [(lambda views: views.mean((2, 3, 4))*torch.nan, 'broken: the encoder returns NaN'), (lambda views: views.mean((3, 4)), 'broken: the encoder returns .*8')])
def test_an_encoder_that_returns_no_features_is_refused(function, words):
    with pytest.raises(ValueError, match=words): exam_on_shapes({'broken': VideoEncoder(function, 8, 1, 16)}, 32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    for number in range(21):
        frames = render(draw_exam_scenes(number, 6)['paced'])
        write_video(root/f'{number:02d}.mp4', frames[:9] if number == 20 else frames, preset='ultrafast')
    return root


def test_real_videos(folder):
    encoders, lines = {**reference_encoders(VideoEncoder(first_frame, 3, 2, 32)), 'flow': VideoEncoder(constant, 6, 1, 32, modality='flow')}, []
    manifest = pd.DataFrame({'video': [f'{number:02d}.mp4' for number in range(21)], 'group': [f'{number//4}' for number in range(21)]})
    table, answers = exam_on_videos(encoders, folder, manifest, log=lines.append)
    assert lines == ['1 of 21 videos have fewer than 13 frames and are left out']
    assert list(dict.fromkeys(table.test)) == list(TESTS[2:]) and score(table, 'order', 'mean frame') == .5 and score(table, 'own first frame', 'mean frame') == 1
    asked = answers.loc['arrow'].iloc[0].notna().to_numpy()
    assert answers.columns.tolist() == [f'{number//4}' for number in range(20)]
    assert asked.tolist() == [number//4 % 2 == 1 for number in range(20)]  # a group is not divided
    exam_on = partial(exam_on_videos, folder=folder, log=lines.append)
    with pytest.raises(ValueError, match='slow sees flow with stride 2'): exam_on({'slow': VideoEncoder(constant, 3, 2, 32, modality='flow')})
    with pytest.raises(ValueError, match='0 videos of 0 groups have the 201 frames'): exam_on({'long': VideoEncoder(constant, 100, 1, 32)})
    with pytest.raises(ValueError, match='give at least 20 videos, of 2 groups'): exam_on(encoders, manifest=manifest.assign(group='one'))


def test_command(folder, tmp_path, monkeypatch, capsys):
    save_stream(Stream('small', 4, 8, {'width': 4}, trained_on=dict(modality='rgb', clip_length=4, view_size=32)), tmp_path/'00-rgb-1'/'stream')
    (tmp_path/'mine_exam.py').write_text('from vicc.encoders import VideoEncoder\ndef create(): return VideoEncoder(lambda views: views.mean((3, 4)).flatten(1), 4, 1, 16)\n')
    monkeypatch.chdir(tmp_path)
    exam_command(['rgb=00-rgb-1/stream', '--encoder', 'mine_exam:create', '--videos', str(folder), '--output', 'table.csv', '--device', 'cpu'])
    assert 'mine_exam:create' in capsys.readouterr().out
    names = ['mean frame', 'frame differences', 'random RGB network', '00-rgb-1', 'mine_exam:create']
    assert list(pd.read_csv('table.csv').encoder.unique()) == names
    for words, said in ((['rgb'], 'write rgb=PATH'), ([], 'name an encoder'), (['flow=00-rgb-1/stream'], 'trained on rgb'), (['rgb=00-rgb-1/stream', '--output', 'no/table.csv'], 'its folder does not exist')):
        with pytest.raises(SystemExit) as ended: exam_command([*words, '--device', 'cpu'])
        assert ended.value.code == 2 and said in capsys.readouterr().err
