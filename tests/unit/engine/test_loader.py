"The loader: the same batches whatever happens to workers, files and restarts; planes that equal pixels."
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vicc.data
from vicc.augment import ViewSettings, apply_view, center_crop, denormalize
from vicc.data import TestClips, TestClipsByVideo, TwoStreamDataset, collate, read_clips, training_loader
from vicc.evaluation import extract_features
from vicc.fast.planes import pack_clips
from vicc.manifests import read_manifest
from vicc.prepare import STREAMS, PrepareSettings, Store, prepare
from vicc.synthetic import make_moving_shapes
from vicc.video import read_frames, write_video

VIEWS = ViewSettings(size=24, area=(.2, 1))

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp('loader'), PrepareSettings(48, 'farneback', 5.)
    shapes = make_moving_shapes(folder/'shapes', 16, 8)
    prepare(read_manifest(shapes['train']), shapes['videos'], folder/'store', settings, workers=0, log=list)
    return folder/'store'

@pytest.fixture
def store(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path/'store')
    return Store(tmp_path/'store')

def dataset(store, **options):
    return TwoStreamDataset(store, **{**dict(clip_length=6, views=VIEWS, cache_gib=0), **options})

def summary(batch):
    sums = [batch[stream].data.long().sum().item() for stream in STREAMS]
    boxes = [view['box'].tolist() for view in batch['views']]
    return batch['sample'].tolist(), batch['starts'].tolist(), sums, boxes

def served(store, workers, epoch=1, first_batch=0, data=None, **options):
    loader = training_loader(data or dataset(store), 2, workers)
    return [summary(batch) for batch in loader.epoch(epoch, first_batch, **options)], loader

def damage(store, number, stream='rgb'):
    file = store.file(store.manifest.video[number], stream)
    file.write_bytes(file.read_bytes()[:150])
    return store.manifest.video[number]

def test_any_number_of_workers_gives_the_same_batches(store):
    damage(store, 3)
    alone, loader = served(store, 0)
    assert len(alone) == 8 and len(loader.replaced) >= 1
    for workers in (1, 3):
        others, again = served(store, workers)
        assert others == alone and again.replaced == loader.replaced

def test_kept_frames_and_decoded_ones_are_the_same_bytes(store):
    kept, fresh = dataset(store, cache_gib=1.), dataset(store)
    for sample in range(4):
        one, other = (collate([data[sample], data[sample + 4]]) for data in (kept, fresh))
        for stream in STREAMS:
            for view in range(2): assert torch.equal(one[stream][:, view], other[stream][:, view])

def test_a_video_that_is_listed_twice_is_kept_once(store):
    size = int(store.manifest.num_frames.sum())*48*48*5  # bytes of RGB and flow
    for gib, kept in ((size/2**30, True), ((size - 1)/2**30, False)):
        reader = vicc.data.FrameReader(store, store.manifest.iloc[np.arange(40) % 16], cache_gib=gib)
        assert (reader.cache is not None) == kept

def whole_frames(store, batch, stream, view):
    "What a view sees, as whole frames, and its choices for them."
    frames = []
    for sample, starts in zip(batch['sample'].tolist(), batch['starts'].tolist()):
        frames.append(store.read(store.manifest.video[sample], stream, starts[view] + np.arange(6)))
    corner = F.pad(batch['corners'][:, view], (0, 2))
    choices = batch['views'][view]
    return torch.from_numpy(np.stack(frames)), {**choices, 'box': choices['box'] + corner}

@pytest.mark.parametrize('kept', [0, 1])
def test_views_do_not_depend_on_what_was_sent(store, kept):
    data = dataset(store, cache_gib=kept)
    batch = collate([data[sample] for sample in range(16)])
    for stream, bytes_a_pixel in (('rgb', 3 if kept else 1.5), ('flow', 2)):
        assert len(batch[stream].data) < .9*len(batch[stream].clips)*6*48*48*bytes_a_pixel
        for view in range(2):
            whole = apply_view(*whole_frames(store, batch, stream, view), VIEWS, stream)
            cut = apply_view(batch[stream][:, view], batch['views'][view], VIEWS, stream)
            assert 255*(denormalize(whole) - denormalize(cut)).abs().max() < .1

def test_a_pair_of_one_clip_is_sent_once(store):
    batch = collate([dataset(store, views=ViewSettings(size=24, one_clip=1.))[sample] for sample in range(4)])
    assert len(batch['rgb'].clips) == 4 and batch['rgb'].seen == [[number, number] for number in range(4)]

def test_a_killed_worker_ends_the_run_with_a_sentence(store):
    with pytest.raises(ChildProcessError, match='a reading process died .*goes on from the last checkpoint'):
        with training_loader(dataset(store), 2, 2) as loader:
            for number, _ in enumerate(loader.epoch(1)):
                if not number: os.kill(multiprocessing.active_children()[0].pid, 9)
    assert not multiprocessing.active_children()

class Hangs(TwoStreamDataset):
    "Waits for ever when it reads one video, as for a disk that does not answer."
    def read(self, number, rng):
        if number == 7: time.sleep(600)
        return super().read(number, rng)

def test_a_hanging_worker_ends_the_run_with_a_sentence(store):
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match='a reading process hangs .*timed out after 1 seconds'):
        data = Hangs(store, clip_length=6, views=VIEWS, cache_gib=0)
        with training_loader(data, 2, 2, timeout=1) as loader: list(loader.epoch(1))
    assert time.monotonic() - start < 30 and not multiprocessing.active_children()

def test_an_error_of_the_run_is_not_taken_for_a_dead_worker(store):
    with pytest.raises(RuntimeError, match='^the network'):
        with training_loader(dataset(store), 2, 2) as loader:
            for _ in loader.epoch(1): raise RuntimeError('the network')
    loaders = [training_loader(dataset(store, **options), 2, 1) for options in ({}, dict(cache_gib=1.))]
    assert [loader.timeout for loader in loaders] == [600, 0]  # the second reads from memory

@pytest.mark.skipif(multiprocessing.get_start_method() != 'fork', reason='patches reach forked workers only')
def test_a_file_is_hashed_once_for_all_workers(store, tmp_path, monkeypatch):
    hashed, look = tmp_path/'hashed.txt', vicc.data.file_digest
    def noted(file):
        with open(hashed, 'a') as lines: lines.write(f'{os.getpid()} {file}\n')
        return look(file)
    monkeypatch.setattr(vicc.data, 'file_digest', noted)
    loader = training_loader(dataset(store), 2, 2)
    for epoch in range(3): assert len(list(loader.epoch(epoch))) == 8  # each with new workers
    processes, files = zip(*(line.split(' ', 1) for line in hashed.read_text().splitlines()))
    assert len(files) == len(set(files)) == 16*2 and len(set(processes)) == 2
    assert os.getpid() not in map(int, processes)
    name, frames = damage(store, 3), loader.dataset.frames
    assert frames.verify(name, 'rgb').exists()  # found sound before
    frames = dataset(store).frames
    with pytest.raises(vicc.data.VideoError, match='its checksum is another'): frames.verify(name, 'rgb')

def test_going_on_in_mid_epoch_reads_nothing_twice(store, monkeypatch):
    whole, _ = served(store, 0)
    opened, read = [], vicc.data.read_clips
    monkeypatch.setattr(vicc.data, 'read_clips', lambda *arguments: opened.append(1) or read(*arguments))
    rest, _ = served(store, 0, first_batch=5)
    assert rest == whole[5:] and len(opened) == 3*2*2
    assert served(store, 0, first_batch=8)[0] == []

def test_processes_share_an_epoch_and_can_go_on(store):
    def shard(process, first_batch=0):
        loader = training_loader(dataset(store), 4, processes=2, process=process)
        return [summary(batch) for batch in loader.epoch(1, first_batch)]
    whole, _ = served(store, 0)
    assert [shard(0), shard(1)] == [whole[::2], whole[1::2]] and shard(1, 2) == whole[1::2][2:]

def test_reading_ahead_changes_no_batch(store):
    damage(store, 3)
    def epochs(first_epoch, first_batch, count):
        seen, workers = [], []
        with training_loader(dataset(store), 2, 2, epochs=count) as loader:
            for epoch in range(first_epoch, count):
                for batch in loader.epoch(epoch, first_batch if epoch == first_epoch else 0):
                    seen.append((epoch, summary(batch)))
                    if len(workers) == epoch - first_epoch:
                        workers.append({child.pid for child in multiprocessing.active_children()})
        assert not multiprocessing.active_children()
        return seen, workers
    alone = [(epoch, batch) for epoch in range(3) for batch in served(store, 0, epoch)[0]]
    seen, workers = epochs(0, 0, 3)
    assert seen == alone and workers[0] == workers[1] == workers[2]
    assert epochs(1, 5, 3)[0] == alone[13:]  # the epoch after a broken one is whole

def test_a_loader_can_be_left_in_mid_epoch(store):
    loader = training_loader(dataset(store), 2, 2, epochs=2)
    with pytest.raises(KeyError), loader:
        for _ in loader.epoch(0): raise KeyError
    assert not multiprocessing.active_children()
    whole, _ = served(store, 0)
    with loader:
        assert [summary(batch) for batch in loader.epoch(1)] == whole

def test_what_was_replaced_is_named_and_limited(store):
    names = {damage(store, number) for number in (2, 7)}
    batches, loader = served(store, 0)
    assert {video for video, _ in loader.replaced} == names and len(batches) == 8
    for number in range(8, 14): damage(store, number, 'flow')
    with pytest.raises(ValueError, match='of 16 videos could not be read, which is more than 1 %'): served(store, 1)
    shutil.rmtree(store.path/'rgb')
    with pytest.raises(Exception, match='9 videos in a row cannot be read.*does not exist'): served(store, 0)

def test_a_mistake_is_not_taken_for_a_bad_file(store):
    data = dataset(store)
    data.views = None  # no settings to draw with
    with pytest.raises(AttributeError): data[0]

@pytest.mark.parametrize('fps', [10, 12.5, 15, 23.976, 25, 29.97, 30, 50, 59.94, 60])
def test_frame_numbers_at_any_rate(tmp_path, fps):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, 6, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    write_video(tmp_path/'v.mp4', frames, fps=fps, gop=8, preset='veryfast')
    decoded = read_frames(tmp_path/'v.mp4')
    for indices in (np.arange(40), np.array([39, 38, 3, 3, 20]), np.array([9])):
        clip, = read_clips(tmp_path/'v.mp4', 'rgb', [(indices, (2, 4, 12, 20))])
        luma = clip.data[:, :240].reshape(-1, 12, 20)
        other, = read_clips(tmp_path/'v.mp4', 'rgb', [(np.arange(40), (2, 4, 12, 20))])
        assert np.array_equal(clip.data, other.data[indices])
        laid_out = pack_clips([[clip]], 3)[:, 0][0].numpy()
        assert luma.shape[0] == len(indices)
        assert np.abs(laid_out.astype(int) - decoded[indices, 2:14, 4:24]).max() <= 1

def test_other_files_are_read_as_pixels(store):
    video = store.manifest.video[0]
    frames = store.read(video, 'rgb')
    write_video(store.file(video, 'rgb'), frames, pixel_format='yuv444p', crf=0)
    replaced = dataset(store)[0]['replaced']
    assert replaced[0][0] == video and 'its checksum is another' in replaced[0][1]  # not from prepare
    (store.path/'checksums.csv').unlink()  # as in a store of an older version
    item = dataset(store)[0]
    clip = item['rgb'][0]
    assert clip.data.ndim == 4 and item['flow'][0].data.ndim == 2
    assert clip.data.shape[1:3] == (clip.height, clip.width)
    mixed = collate([dataset(store)[sample] for sample in (0, 1)])
    for view in range(2):
        views = [apply_view(mixed['rgb'][:, view], mixed['views'][view], VIEWS),
                 apply_view(*whole_frames(store, mixed, 'rgb', view), VIEWS)]
        assert (denormalize(views[0]) - denormalize(views[1])).abs().max() < 1e-3

def test_videos_shorter_than_a_clip(store):
    data = dataset(store, clip_length=20)
    batch = collate([data[0], data[1]])
    first = batch['rgb'][:, 0]
    assert first.shape[1] == 20 and torch.equal(first[:, 0], first[:, 3])

@pytest.mark.parametrize('stream', STREAMS)
def test_features_by_video_equal_features_by_clip(store, stream):
    clips = TestClips(store, None, stream, 6, 3, 4, cache_gib=0)
    encoder = lambda views: views[:, :, ::2, ::8, ::8].flatten(1)
    fast = extract_features(encoder, clips, 24, 31, 5, workers=1)
    sums = [[] for _ in range(16)]
    for number in range(len(clips)):
        item = clips[number]
        clip, centre = torch.from_numpy(item[stream]), center_crop(torch.from_numpy(item['size'])[None], 31)
        view = apply_view(clip[None], centre, ViewSettings(size=24), stream)
        sums[item['video']].append(F.normalize(encoder(view), dim=1)[0])
    assert torch.allclose(fast, torch.stack([torch.stack(one).mean(0) for one in sums]), atol=1e-5)
    runs = TestClipsByVideo(clips, None, max_clips=2)
    assert sum(len(runs[number]['clips']) for number in range(3)) == 6
