"Features, retrieval and the quick probe where a notebook has no room: exact neighbours, films, precision, cache, refusals."
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vicc import audit
from vicc.audit import ablate_protocol, PUBLISHED_RECALL
from vicc.augment import ViewSettings, apply_view, center_crop
from vicc.data import TestClips
from vicc.engine.cache import chunk_ranges
from vicc.evaluation import (
    cached_features, chance_recall, cosine_similarity, evaluate_stream, extract_features, nearest_neighbours,
    quick_probe, recall_at_k, retrieval_recall, retrieval_scores, unit_vectors, video_features,
)
from vicc.engine.io import find_project
from vicc.fast.views import IDENTITY_FACTORS
from vicc.manifests import OverlapWarning
from vicc.prepare import STREAMS, prepare
from vicc.protocols import (
    bootstrap_interval, iter_test_views, one_random_clip, overlap_remarks, paired_difference, released_jitter_params, search_gallery,
)
from vicc.recipe import Recipe
from vicc.streams import Stream, TrainedOn, export_released
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
    with pytest.raises(ValueError, match='1 videos have no label: leave them out' if -1 in labels else f'{len(labels)} and 2 labels for .2, 2. cosines'):
        retrieval_recall(features, torch.tensor(labels), features, torch.tensor([0, 1]))
    with pytest.raises((AssertionError, RuntimeError, ValueError), match='Size mismatch|1 videos have no label'):
        quick_probe(features, torch.tensor(labels), features, torch.tensor([0, 1]))


def test_features_that_are_no_numbers_and_labels_that_are_none():
    features, labels = torch.randn(6, 3), torch.arange(6) % 2
    broken = features.clone()
    broken[0, 0], broken[1, 1] = torch.nan, torch.inf
    for call in (lambda: nearest_neighbours(broken, features), lambda: retrieval_recall(features, labels, broken, labels),
                 lambda: quick_probe(features, labels, broken, labels)):
        with pytest.raises(ValueError, match='2 videos have NaN or infinite features: leave them out'): call()
    with pytest.raises(ValueError, match='3 videos have no label'): chance_recall([0, -1, -1], [0, 1, -1])
    with pytest.raises(ValueError, match='k of at least 1'): recall_at_k(features@features.T, labels, labels, (0, 1))


def test_one_query_and_one_gallery_video_have_neighbours():
    g = torch.Generator().manual_seed(0)
    gallery = torch.randn(20, 4, generator=g) + 5
    for row in (3, 17):
        index, cosines = nearest_neighbours(gallery[[row]], gallery, 2)  # is its own nearest neighbour
        assert index[0, 0] == row and cosines[0, 0].item() == pytest.approx(1, abs=1e-6) and cosines[0, 1] < .999
        assert cosine_similarity(gallery, gallery[[row]])[:, 0].argmax() == row
    assert cosine_similarity(gallery[:1], 2*gallery[:1]).item() == pytest.approx(1, abs=1e-6)


def test_few_queries_are_centred_by_the_gallery():
    "Two near-identical queries minus their own mean are noise, opposite to each other."
    g = torch.Generator().manual_seed(0)
    gallery = torch.randn(200, 32, generator=g) + 5
    twins = gallery[[7, 7]] + .1*torch.randn(2, 32, generator=g)
    assert nearest_neighbours(twins, gallery, 1)[0].flatten().tolist() == [7, 7]
    own_mean = cosine_similarity(twins, gallery)  # R@k keeps the paper's way
    assert own_mean.argmax(1).tolist() != [7, 7] and torch.equal(cosine_similarity(twins, gallery, 'gallery').argmax(1), torch.tensor([7, 7]))
    for count, centred in ((9, 'gallery'), (10, True)):
        index, cosines = nearest_neighbours(gallery[:count], gallery, 3)
        assert torch.equal(cosines, cosine_similarity(gallery[:count], gallery, centred).topk(3, dim=1).values) and index.shape == (count, 3)


def test_more_neighbours_than_videos_are_announced():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match='k=5, and the gallery has 4 videos: each query gets 4 neighbours'):
        assert nearest_neighbours(features, features)[0].shape == (4, 4)


class LargestTensor(TorchDispatchMode):
    "Watches what the functions of PyTorch return."
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor): self.numel = max(self.numel, each.numel())
        return result


def test_a_large_search_takes_little_memory():
    "3,000 × 8,000 cosines are 24 million, and those of Kinetics-400 4.5 billion (18 GB): never more than 2**24 at a time."
    g = torch.Generator().manual_seed(0)
    features = {name: {what: torch.randn(count, 4, generator=g) for what, count in (('queries', 3000), ('gallery', 8000))} for name in ('rgb', 'flow')}
    labels, (queries, gallery) = (torch.arange(3000) % 400, torch.arange(8000) % 400), features['rgb'].values()
    with LargestTensor() as watch:
        retrieval_scores(features, *labels)
        retrieval_recall(queries, labels[0], gallery, labels[1])
        nearest_neighbours(queries, gallery)
    assert 2**23 < watch.numel <= 2**24
    with LargestTensor() as watch: cosine_similarity(queries, gallery)
    assert watch.numel == 24_000_000


def test_a_search_in_parts_has_the_numbers_of_the_whole():
    g = torch.Generator().manual_seed(0)
    features = {name: {what: torch.randn(count, 12, generator=g) for what, count in (('queries', 90), ('gallery', 130))} for name in ('rgb', 'flow')}
    labels = torch.randint(9, (90,), generator=g), torch.randint(9, (130,), generator=g)
    whole = sum(cosine_similarity(sets['queries'], sets['gallery']) for sets in features.values())
    shares = retrieval_scores(features, *labels, (1, 5, 50))
    assert {k: shares[f'R@{k}'] for k in (1, 5, 50)} == pytest.approx(recall_at_k(whole, *labels, (1, 5, 50)))
    pairs = [unit_vectors(sets['queries'], sets['gallery']) for sets in features.values()]
    for most in (1, 1000, 10**9):
        cosines, index = search_gallery(pairs, 7, most)
        assert torch.equal(index, whole.topk(7).indices) and torch.allclose(cosines, whole.topk(7).values, atol=1e-6)


def test_intervals_are_over_groups():
    "Cuts of a recording that agree add nothing, names without a group are videos alone, and nobody moves the ends outside of what is possible."
    right = np.arange(100) % 10 < 7
    alone, names = bootstrap_interval(right), [f'g{number}' for number in range(100)]
    assert alone == bootstrap_interval(np.repeat(right, 3), np.repeat(names, 3)) == bootstrap_interval(torch.tensor(right), ['']*50 + names[:50])
    assert alone == bootstrap_interval([*right, np.nan, np.nan]) == pytest.approx((.7 - 1.98*.0458, .7 + 1.98*.0458), abs=.015)
    assert bootstrap_interval(right, np.repeat(names[:5], 20))[0] >= 0 and bootstrap_interval([1]*9 + [0])[1] == 1
    assert bootstrap_interval([1, 0, 1, 0], ['one']*4) == pytest.approx((.5*.025, 1 - .5*.025))  # one recording says next to nothing
    assert paired_difference([1]*8, [0]*8)[:2] == pytest.approx((1, 1 - 2*(1 - .025**(1/8))))
    with pytest.raises(IndexError): bootstrap_interval(right, names[:99])


def test_scores_have_the_interval_of_their_queries():
    g = torch.Generator().manual_seed(0)
    features = {name: {what: torch.randn(count, 12, generator=g) for what, count in (('queries', 60), ('gallery', 50))} for name in ('rgb', 'flow')}
    labels, groups = (torch.arange(60) % 4, torch.arange(50) % 4), np.repeat([f'g{number}' for number in range(12)], 5)
    scores = retrieval_scores(features, *labels, (1, 5), groups)
    assert list(scores) == ['R@1', 'R@1 low', 'R@1 high', 'R@5']
    cosines = sum(cosine_similarity(sets['queries'], sets['gallery']) for sets in features.values())
    right = labels[1][cosines.argmax(1)] == labels[0]
    assert (scores['R@1 low'], scores['R@1 high']) == bootstrap_interval(right, groups) != bootstrap_interval(right)


def test_quick_probe_repeats_itself():
    blobs, labels = torch.randn(60, 5), torch.arange(60) % 3
    sets = blobs[:40], labels[:40], blobs[40:], labels[40:]
    (one, probabilities), (two, _) = quick_probe(*sets), quick_probe(*sets)
    assert one == two and torch.allclose(probabilities.sum(1), torch.ones(20), atol=1e-5)


def test_quick_probe_chooses_on_held_out_recordings():
    "Each recording has a mark of its own, which tells its class and nothing else: useless for new recordings."
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    groups = [f'{label}-{number//3 % 8}' for number, label in enumerate(labels.tolist())]
    marks = F.one_hot(torch.tensor([sorted(set(groups)).index(group) for group in groups]), 24)*3.
    features = torch.cat([F.one_hot(labels, 3) + torch.randn(120, 3, generator=g), marks], 1)
    sets = features, labels, features[:12], labels[:12]
    rates = [(1e-7, 0.), (.1, 1e-3)]
    chosen = quick_probe(*sets, grid=rates, groups=groups)
    assert torch.equal(chosen[1], quick_probe(*sets, grid=rates[1:])[1])
    wrong = quick_probe(*sets[:2], features[:12], (labels[:12] + 1) % 3, grid=rates, groups=groups)
    assert torch.equal(wrong[1], chosen[1])  # test labels choose nothing
    with pytest.raises(ValueError, match='single group'): quick_probe(*sets, grid=rates, groups=['one']*120)


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
    with pytest.raises(ValueError, match=r'trained on flow, not on rgb: give it flow clips of a store \(vicc evaluate: flow=PATH'):
        video_features(flow, tmp_path/'film.mp4')


def test_workers_and_decoded_frames_give_the_same_features(store, rows):
    kept, decoded = (TestClips(store, rows['test'], **OPTIONS, cache_gib=gib) for gib in (1, 0))
    for crop in (None, 31):
        one = extract_features(mean_colour, kept, 32, crop)
        assert torch.allclose(one, extract_features(mean_colour, decoded, 32, crop, 5, workers=1), atol=1e-5)
    with pytest.raises(ValueError, match='crop of 224 does not fit into frames of'):
        extract_features(mean_colour, kept, 32)


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
    assert len(chunk_ranges(clips, 10)) > 2
    clips.frames.read = unplug
    with pytest.raises(RuntimeError, match='killed'): cached_features(stream, clips, tmp_path, **kept)
    clips.frames.read = read
    assert 0 < clips_seen() < len(clips)
    assert torch.allclose(cached_features(stream, clips, tmp_path, **kept), plain, atol=1e-5)
    assert clips_seen() == 0
    next(tmp_path.glob('*/*.safetensors')).write_bytes(b'damaged')
    assert 0 < clips_seen() < len(clips)
    for change in (dict(size=24), dict(crop=48), dict(what='embed'), dict(jitter_seed=0)):
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


def test_copies_and_recordings_on_both_sides_are_named(shapes, recipe, tmp_path):
    "The same bytes under another name, and a group on both sides; nothing where all is well."
    train, test = (pd.read_csv(shapes[name]).head(6) for name in ('train', 'test'))
    shutil.copytree(shapes['videos'], tmp_path/'videos')
    shutil.copy(tmp_path/'videos'/train.video[3], tmp_path/'videos'/'copy.mp4')
    copied = test.assign(video=[*test.video[:5], 'copy.mp4'])
    rows = pd.concat([train, test, copied[5:]])
    store = prepare(rows, tmp_path/'videos', tmp_path/'store', recipe.prepare_settings(), workers=0, log=str)
    right = {f'1 test videos have the same pixels as a training video: copy.mp4 = {train.video[3]}': copied,
             '1 groups have videos in both manifests, such as train_00005: siblings make a test look better than it is':
             test.assign(group=[*test.group[:5], train.group[5]])}
    for name in STREAMS:
        gallery, plain, *wrong = (recipe.test_clips(store, store.select(part), name) for part in (train, test, *right.values()))
        assert overlap_remarks(gallery, plain) == []
        for remark, queries in zip(right, wrong):
            with pytest.warns(OverlapWarning) as caught: evaluate_stream(small_stream(), name, gallery, queries, 32, None, probe_epochs=1)
            assert [str(warning.message) for warning in caught if warning.category is OverlapWarning] == [remark]


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


def test_a_gallery_of_one_random_clip_a_video(store, rows):
    gallery, queries = (TestClips(store, rows[name], **OPTIONS) for name in ('train', 'test'))
    given = small_stream(), 'rgb', gallery, queries, 32, None
    _, plain = evaluate_stream(*given, probe_epochs=1)
    results = [evaluate_stream(*given, probe_epochs=1, released=['one_clip_gallery'], seed=seed) for seed in (0, 0, 1)]
    features = [result[1] for result in results]
    assert results[0][0] == results[1][0] and torch.equal(features[0]['gallery'], features[1]['gallery'])
    assert not torch.equal(features[0]['gallery'], features[2]['gallery'])
    assert all(torch.equal(each['queries'], plain['queries']) for each in features)
    assert len(features[0]['gallery']) == len(plain['gallery']) and len(gallery.clips) > len(gallery.rows)
    drawn, square = one_random_clip(gallery), center_crop(torch.tensor([[64, 64]]), None)
    views = [apply_view(torch.from_numpy(drawn[video]['rgb'])[None], square, ViewSettings(size=32)) for video in (0, 7)]
    with torch.no_grad(): by_hand = F.normalize(given[0].features(torch.cat(views)), dim=1)
    torch.testing.assert_close(features[0]['gallery'][[0, 7]], by_hand, atol=1e-5, rtol=0)


def test_one_clip_of_short_and_long_videos(store, rows):
    short, count = TestClips(store, rows['test'].assign(num_frames=[5, 11] + 14*[16]), **OPTIONS | dict(min_frames=1)), 400
    starts = {video: set() for video in (0, 1, 2)}
    for seed in range(count):
        for video, indices in one_random_clip(short, seed).clips[:3]: starts[video].add(tuple(indices))
    assert starts[0] == {(0, 0, 0, 0, 1, 2, 3, 4)}  # padded at the front: nothing to choose
    assert {first[0] for first in starts[1]} == set(range(4)) and {first[0] for first in starts[2]} == set(range(9))


def test_released_jitter_is_drawn_once_a_video_for_three_in_ten(store, rows):
    "All clips of a video get one jitter, in RGB and in flow; without a seed nothing changes."
    for name in ('rgb', 'flow'):
        clips = TestClips(store, rows['train'], name, **OPTIONS)
        plain, moved = (torch.stack([view for view, _ in iter_test_views(clips, 16, jitter_seed=seed, crop=None)]) for seed in (None, 1))
        videos = torch.tensor([video for video, _ in clips.clips])
        changed = (plain != moved).flatten(1).any(1)
        assert all(len(changed[videos == video].unique()) == 1 for video in videos.unique())
    assert len(clips.rows) == 32 and 3 <= sum(changed[videos == video][0] for video in videos.unique()) <= 17  # p 0.3
    shares = [(released_jitter_params(0, video)['factors'] != released_jitter_params(0, video)['factors'].new_tensor(IDENTITY_FACTORS)).any() for video in range(3000)]
    assert abs(np.mean(shares) - .3) < 4*(.3*.7/3000)**.5


def test_a_stream_is_fed_the_order_of_channels_that_it_records(store, rows):
    clips = TestClips(store, rows['test'].head(4), 'flow', **OPTIONS)
    def last_channel(views): return torch.cat([views[:, :1].mean((2, 3, 4)), torch.ones(len(views), 1)], 1)
    uv, vu = (extract_features(last_channel, clips, 32, None, flow_channels=order) for order in ('uv', 'vu'))
    constant = (128/255 - .485)/.229
    torch.testing.assert_close(vu[:, 0]/vu[:, 1], torch.full((4,), constant), atol=1e-4, rtol=0)
    assert ((uv[:, 0]/uv[:, 1] - constant).abs() > 1e-3).any()
    stream = small_stream()
    plain = cached_features(stream, clips, size=32, crop=None)
    stream.trained_on = TrainedOn(modality='flow', flow_channels='vu')
    assert not torch.allclose(cached_features(stream, clips, size=32, crop=None), plain, atol=1e-3)
    given = cached_features(stream, clips, size=32, crop=None, flow_channels='uv')
    assert torch.equal(given, plain)


@pytest.mark.parametrize('labels, message', [
    ([3], 'all test videos are of one class.*1 of 1 classes have fewer than 5'), ([1]*6, 'all test videos are of one class'),
    ([0, 1], '2 of 2 classes have fewer than 5'), ([7]*5 + [1]*5, '5 of 10 test videos are of a class that no training video has'),
    ([0]*5 + [1]*5, 'there are only 6 training videos: R@10, R@20, R@50')])
def test_retrieval_says_when_it_means_little(labels, message):
    generator = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(6, 4, generator=generator), torch.randn(len(labels), 4, generator=generator)
    ks = (1, 5, 10, 20, 50) if 'only' in message else (1,)
    with pytest.warns(UserWarning, match='R@k means little here: ' + message) as caught:
        retrieval_recall(queries, torch.tensor(labels), gallery, torch.tensor([0, 0, 0, 1, 1, 1]) + 3*(labels == [3]), ks)
    assert len(caught) == 1


def test_a_healthy_retrieval_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        retrieval_recall(torch.randn(10, 3), torch.arange(10)//5, torch.randn(20, 3), torch.arange(20)//10, (1, 5))


def test_published_numbers_are_those_of_the_results():
    table = pd.read_csv(find_project()/'nbs'/'results'/'published.csv').query("data == 'UCF101' and backbone == 's3d'")
    for name, share in PUBLISHED_RECALL.items():
        [percent] = table[table.encoder.str.startswith(name) & (table.measure == 'R@1')].percent
        assert percent == pytest.approx(100*share), name


@pytest.mark.parametrize('modality', STREAMS)
def test_an_audit_moves_what_it_should(store, rows, tmp_path, modality, monkeypatch):
    "A file of random weights: the row as here is that of the stream; each change is one change."
    torch.manual_seed(0)
    stream = Stream('r21d', 4, 8, trained_on=dict(modality=modality)).eval()
    path = export_released(stream, tmp_path/'file.pth.tar')
    gallery, queries = (TestClips(store, rows[name].head(4), modality, **OPTIONS) for name in ('train', 'test'))
    asked = []
    def evaluate(stream, name, gallery, queries, **options):
        options = dict(options)
        asked.append((len(gallery), options.get('released', []), options['crop'], stream.trained_on.flow_channels))
        return evaluate_stream(stream, name, gallery, queries, **options)
    monkeypatch.setattr(audit, 'evaluate_stream', evaluate)
    table = ablate_protocol(path, modality, gallery, queries, (1, 5), size=32, crop=None, probe_epochs=1)
    numbers, features = evaluate_stream(stream, modality, gallery, queries, 32, None, (1, 5), 1)
    assert dict(table.loc['as here', ['R@1', 'R@5']]) == pytest.approx({name: numbers[name] for name in ('R@1', 'R@5')})
    both = ['one_clip_gallery', 'test_jitter']
    changes = [([], None, 'uv'), ([], 56, 'uv'), (both[:1], None, 'vu'), (both[1:], None, 'vu'), (both, None, 'vu')]
    assert [change[1:] for change in asked] == changes + [([], None, 'uv')]*(modality == 'flow')
    known = features['queries'], features['gallery']
    labels = torch.tensor(queries.rows.label.to_numpy()), torch.tensor(gallery.rows.label.to_numpy())
    for title, centred in (('not centred', False), ('centred by one mean', 'joint')):
        assert table.loc[title, 'R@1'] == pytest.approx(recall_at_k(cosine_similarity(*known, centred), *labels, (1,))[1])
    assert table.loc['published: ViCC-RGB-2', 'R@1'] == .621 and table['R@5'].isna().sum() == 4


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


def test_what_makes_other_features_is_refused():
    clips = SimpleNamespace(stream='flow')
    with pytest.raises(ValueError, match='train mode'): extract_features(Stream('small', 6, 8).train().features, clips)
    stream = Stream('small', 6, 8, trained_on={'modality': 'rgb'}).eval()
    with pytest.raises(ValueError, match='trained on rgb'): extract_features(stream.features, clips)
    with pytest.raises(ValueError, match=r'features\[None\]'): nearest_neighbours(torch.ones(4), torch.ones(3, 4))
    with pytest.raises(ValueError, match='with one F'): nearest_neighbours(torch.ones(2, 4), torch.ones(3, 5))
