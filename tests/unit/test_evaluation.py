"Features, retrieval and the quick probe where a notebook has no room: exact neighbours, films, precision, cache, refusals."
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vicc.augment import ViewSettings, apply_view, center_crop
from vicc.data import TestClips
from vicc.engine.cache import split_clips
from vicc.evaluation import (
    PRECISIONS, cached_features, evaluate_stream, extract_features, nearest_neighbours, quick_probe,
    retrieval_recall, video_features,
)
from vicc.fast.layers import inference_copy
from vicc.prepare import prepare
from vicc.recipe import Recipe
from vicc.streams import Stream, TrainedOn
from vicc.synthetic import make_moving_shapes
from vicc.video import read_frames, write_video

OPTIONS = dict(clip_length=8, step=4, min_frames=9)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 32, 16)


@pytest.fixture(scope='module')
def recipe():
    return Recipe.read('demo', workers=0)


@pytest.fixture(scope='module')
def store(shapes, recipe, tmp_path_factory):
    rows = pd.concat([pd.read_csv(shapes[name]) for name in ('train', 'test')])
    return prepare(rows, shapes['videos'], tmp_path_factory.mktemp('store')/'store', recipe.prepare_settings(),
                   workers=0, log=lambda line: None)


@pytest.fixture(scope='module')
def rows(shapes, store):
    return {name: store.select(pd.read_csv(shapes[name])) for name in ('train', 'test')}


def small_stream() -> Stream:
    torch.manual_seed(0)
    return Stream('small', 8, 16, {'width': 8}).eval()


def mean_colour(views: torch.Tensor) -> torch.Tensor: return views.mean((2, 3, 4))


def test_neighbours_are_those_of_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(40, 7, generator=generator), torch.randn(60, 7, generator=generator)
    query_labels = torch.randint(5, (40,), generator=generator)
    gallery_labels = torch.randint(5, (60,), generator=generator)
    def slow_recall(k: int) -> float:
        hits = 0
        for query, label in zip(queries - queries.mean(0), query_labels):
            cosines = [float(query@row/query.norm()/row.norm()) for row in gallery - gallery.mean(0)]
            nearest = sorted(range(60), key=lambda i: -cosines[i])[:k]
            hits += any(gallery_labels[i] == label for i in nearest)
        return hits/40
    recall = retrieval_recall(queries, query_labels, gallery, gallery_labels)
    assert [recall[k] for k in (1, 5, 20)] == pytest.approx([slow_recall(k) for k in (1, 5, 20)], abs=1e-6)
    shifted = nearest_neighbours(queries - 7, gallery + 3, 1)[0]
    assert torch.equal(shifted, nearest_neighbours(queries, gallery, 1)[0])


@pytest.mark.parametrize('labels', [[0], [0, -1], [0, 1, 2]], ids=['too few', 'negative', 'too many'])
def test_labels_must_fit(labels):
    features = torch.randn(2, 3)
    with pytest.raises(ValueError, match=f'{len(labels)} and 2 labels for .2, 2. cosines: give each video a label'):
        retrieval_recall(features, torch.tensor(labels), features, torch.tensor([0, 1]))
    with pytest.raises((AssertionError, RuntimeError, ValueError), match='Size mismatch|some videos have no label'):
        quick_probe(features, torch.tensor(labels), features, torch.tensor([0, 1]))


def test_quick_probe_repeats_itself():
    blobs, labels = torch.randn(60, 5), torch.arange(60) % 3
    sets = blobs[:40], labels[:40], blobs[40:], labels[40:]
    (one, probabilities), (two, _) = quick_probe(*sets), quick_probe(*sets)
    assert one == two and torch.allclose(probabilities.sum(1), torch.ones(20), atol=1e-5)


def test_feature_of_a_film_is_that_of_its_clips(tmp_path):
    film = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path/'film.mp4', film)
    stream, square = small_stream(), center_crop(torch.tensor([[32, 32]]), None)
    seen = torch.from_numpy(read_frames(tmp_path/'film.mp4'))[:, :, 8:40]  # the centred square
    views = [apply_view(seen[None, start:start + 8], square, ViewSettings(size=32)) for start in (0, 6, 12)]
    with torch.no_grad(): by_hand = F.normalize(stream.features(torch.cat(views)), dim=1).mean(0)
    ours = video_features(stream, tmp_path/'film.mp4', clip_length=8, size=32, step=6)
    assert torch.allclose(ours, by_hand, atol=1e-5)
    write_video(tmp_path/'short.mp4', film[:3])
    assert video_features(stream, tmp_path/'short.mp4', clip_length=8, size=32).isfinite().all()
    with pytest.raises(FileNotFoundError, match='does not exist'): video_features(stream, tmp_path/'nothing.mp4')


def test_feature_of_a_film_takes_the_clips_that_the_stream_was_trained_on(tmp_path):
    write_video(tmp_path/'film.mp4', np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8))
    plain, recorded, flow = small_stream(), small_stream(), small_stream()
    recorded.trained_on = TrainedOn(modality='rgb', clip_length=4, stride=2, view_size=24)
    flow.trained_on = TrainedOn(modality='flow')
    given = video_features(plain, tmp_path/'film.mp4', clip_length=4, stride=2, size=24)
    assert torch.equal(video_features(recorded, tmp_path/'film.mp4'), given)
    assert torch.equal(video_features(recorded, tmp_path/'film.mp4', 8, 1, 32), video_features(plain, tmp_path/'film.mp4', 8, 1, 32))
    assert not torch.equal(video_features(plain, tmp_path/'film.mp4'), given)
    with pytest.raises(ValueError, match='trained on flow, and .*film.mp4 has RGB frames only: .*vicc prepare'):
        video_features(flow, tmp_path/'film.mp4')


def test_workers_and_decoded_frames_give_the_same_features(store, rows):
    kept, decoded = (TestClips(store, rows['test'], **OPTIONS, cache_gib=gib) for gib in (1, 0))
    for crop in (None, 31):
        one = extract_features(mean_colour, kept, 32, crop)
        assert torch.allclose(one, extract_features(mean_colour, decoded, 32, crop, 5, workers=1), atol=1e-5)
    with pytest.raises(ValueError, match='crop of 224 does not fit into frames of'):
        extract_features(mean_colour, kept, 32)


def test_precision_moves_features_little(store, rows):
    frozen, clips = inference_copy(small_stream()), TestClips(store, rows['test'].head(8), **OPTIONS)
    features = {name: extract_features(frozen.features, clips, 32, None, precision=name) for name in PRECISIONS}
    moved = {name: (values - features['no']).abs().max().item() for name, values in features.items()}
    assert 0 < moved['fp16'] < 1e-3 and 3*moved['fp16'] < moved['bf16']  # bf16 has three bits less


def test_a_killed_evaluation_goes_on_and_nothing_stale_is_used(store, rows, tmp_path):
    stream, clips = small_stream(), TestClips(store, rows['test'], **OPTIONS)
    seen, kept = [], dict(size=32, crop=None, chunk_clips=10)
    stream.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    plain = extract_features(stream.features, clips, 32, None)
    def clips_seen(clips=clips, **changes) -> int:
        seen.clear()
        cached_features(stream, clips, tmp_path, **{**kept, **changes})
        return sum(seen)
    read, asked = clips.frames.read, []
    def unplug(*arguments):
        asked.append(1)
        if len(asked) > 9: raise RuntimeError('killed')
        return read(*arguments)
    assert len(split_clips(clips, 10)) > 2
    clips.frames.read = unplug
    with pytest.raises(RuntimeError, match='killed'): cached_features(stream, clips, tmp_path, **kept)
    clips.frames.read = read
    assert 0 < clips_seen() < len(clips)
    assert torch.allclose(cached_features(stream, clips, tmp_path, **kept), plain, atol=1e-5)
    assert clips_seen() == 0
    next(tmp_path.glob('*/*.safetensors')).write_bytes(b'damaged')
    assert 0 < clips_seen() < len(clips)
    for change in (dict(size=24), dict(crop=48), dict(what='embed'), dict(precision='bf16')):
        assert clips_seen(**change) == len(clips)
    with torch.no_grad(): next(stream.backbone.parameters())[0] += 1e-3
    assert clips_seen() == len(clips)
    os.utime(store.file(rows['test'].video[0], 'rgb'), ns=(0, 0))  # as if it had been written anew
    assert clips_seen() == len(clips)
    fewer = TestClips(store, rows['test'][:5], **OPTIONS)
    assert clips_seen(fewer) == len(fewer)


def test_clips_of_the_other_stream_are_refused(store, rows):
    clips = TestClips(store, rows['test'], **OPTIONS)
    with pytest.raises(ValueError, match="gallery clips are of 'rgb', not 'flow'"):
        evaluate_stream(small_stream(), 'flow', clips, clips, 32, None)
    stream = small_stream()
    stream.trained_on = TrainedOn(modality='flow')
    with pytest.raises(ValueError, match='this stream was trained on flow, not on rgb: give it flow clips'):
        evaluate_stream(stream, 'rgb', clips, clips, 32, None)


def test_videos_smaller_than_the_crop_are_set_aside(store, rows, recipe):
    table, small = rows['test'].copy(), recipe.replace(test_crop=48)
    table.loc[[1, 4], 'width'] = 47
    clips, rest = (small.test_clips(store, part, 'rgb') for part in (table, table.drop([1, 4])))
    assert clips.too_small == list(table.video[[1, 4]]) and rest.too_small == clips.too_short == []
    assert list(clips.kept_rows().video) == list(rest.rows.video)
    features = [extract_features(mean_colour, each, 32, 48) for each in (clips, rest)]
    assert torch.equal(*features) and len(features[0]) == len(table) - 2
    assert not recipe.replace(test_crop=0).test_clips(store, table, 'rgb').too_small
    with pytest.raises(ValueError, match='all 16 videos have .* or a side below 65 pixels .test_crop.: there is nothing'):
        recipe.replace(test_crop=65).test_clips(store, table, 'rgb')


def test_torchvision_is_not_needed():
    "A torchvision made for another PyTorch fails when it is imported: only its own backbones may need it."
    code = """import sys
sys.modules['torchvision'] = None  # import torchvision raises ImportError
import vicc, vicc.commands, vicc.compare.finetune, vicc.evaluation
from vicc import Recipe, Stream, create_backbone, retrieval_recall, video_features
Recipe.read('demo')
Stream('s3d')
try: create_backbone('torchvision:r3d_18')
except ImportError: print('needed here')
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == 'needed here\n', run.stderr[-1000:]
