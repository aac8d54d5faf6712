"The loader: the same batches whatever happens to workers, files and restarts; planes that equal pixels."
import multiprocessing
import os
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vicc.data
from vicc.augment import ViewSettings, apply_view, denormalise
from vicc.data import EpochBatches, TestClips, TestVideos, TwoStreamClips, collate, epoch_batches, read_planes, set_epoch, training_loader
from vicc.manifests import read_manifest
from vicc.prepare import STREAMS, PrepareSettings, Store, prepare
from vicc.evaluation import centred_view, extract_features
from vicc.synthetic import make_moving_shapes
from vicc.video import read_frames, write_video

VIEWS = ViewSettings(size=24, area=(.2, 1))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loader')
    shapes = make_moving_shapes(folder/'shapes', 16, 8)
    prepare(read_manifest(shapes['train']), shapes['videos'], folder/'store', PrepareSettings(48, 'farneback', 5.), workers=0, log=lambda line: None)
    return folder/'store'

@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made, tmp_path/'store')
    return Store(tmp_path/'store')

def dataset(store, **options):
    return TwoStreamClips(store, **{**dict(clip_length=6, views=VIEWS, cache_gib=0), **options})

def facts(batch):
    return batch['sample'].tolist(), batch['starts'].tolist(), [batch[stream].data.long().sum().item() for stream in STREAMS], [view['box'].tolist() for view in batch['views']]

def served(store, workers, epoch=1, batch=2, log=None, kill=(), data=None, **options):
    loader = training_loader(data or dataset(store), batch, workers)
    set_epoch(loader, epoch)
    batches, seen = epoch_batches(loader, log=(log if log is not None else []).append, **options), []
    for number, one in enumerate(batches):
        seen.append(facts(one))
        if number in kill: os.kill(multiprocessing.active_children()[0].pid, 9)
    return seen, batches

def damage(store, number, stream='rgb'):
    file = store.file(store.manifest.video[number], stream)
    file.write_bytes(file.read_bytes()[:150])
    return store.manifest.video[number]

def test_any_number_of_workers_gives_the_same_batches(store):
    damage(store, 3)
    alone, batches = served(store, 0)
    assert len(alone) == 8 and len(batches.replaced) >= 1
    for workers in (1, 3):
        others, again = served(store, workers)
        assert others == alone and again.replaced == batches.replaced and again.restarts == 0

def test_kept_frames_and_decoded_ones_are_the_same_bytes(store):
    kept, fresh = dataset(store, cache_gib=1.), dataset(store)
    for sample in range(4):
        one, other = (collate([data[sample], data[sample + 4]]) for data in (kept, fresh))
        for stream in STREAMS:
            for view in range(2): assert torch.equal(one[stream][:, view], other[stream][:, view])

@pytest.mark.parametrize('kept', [0, 1])
def test_views_do_not_depend_on_what_was_sent(store, kept):
    whole, cut = (collate([data[sample] for sample in range(16)]) for data in (dataset(store, cut=cut, cache_gib=kept) for cut in (False, True)))
    for stream in STREAMS:
        assert len(cut[stream].data) < .9*len(whole[stream].data)
        for view in range(2):
            first, second = (255*denormalise(apply_view(batch[stream][:, view], batch['views'][view], VIEWS, stream)) for batch in (whole, cut))
            assert (first - second).abs().max() < .1
    assert torch.equal(cut['views'][0]['box'][:, :2] + cut['corners'][:, 0], whole['views'][0]['box'][:, :2])

def test_a_pair_of_one_clip_is_sent_once(store):
    batch = collate([dataset(store, views=ViewSettings(size=24, one_clip=1.))[sample] for sample in range(4)])
    assert len(batch['rgb'].clips) == 4 and batch['rgb'].seen == [[number, number] for number in range(4)]

def test_a_killed_worker_costs_nothing_but_time(store):
    quiet, _ = served(store, 2)
    lines = []
    killed, batches = served(store, 2, log=lines, kill=(1,))
    assert killed == quiet and batches.restarts == 1 and 'a reading process died' in lines[0]

class HangsOnce(TwoStreamClips):
    "Waits for ever when it reads one video for the first time, as for a disk that does not answer."
    def read(self, number, rng):
        flag = self.frames.store.path/'hung'
        if number == 7 and not flag.exists():
            flag.touch()
            time.sleep(600)
        return super().read(number, rng)

def test_a_hanging_worker_costs_nothing_but_time(store):
    quiet, _ = served(store, 0)
    loader, lines, begun = training_loader(HangsOnce(store, clip_length=6, views=VIEWS, cache_gib=0), 2, 2, timeout=1), [], time.monotonic()
    set_epoch(loader, 1)
    batches = epoch_batches(loader, log=lines.append)
    assert [facts(batch) for batch in batches] == quiet and batches.restarts == 1
    assert lines == [f'a reading process hangs (DataLoader timed out after 1 seconds): starting again at batch {lines[0].split()[-1]}'] and time.monotonic() - begun < 30
    assert not multiprocessing.active_children()
    (store.path/'hung').unlink()
    set_epoch(loader, 1)
    with pytest.raises(RuntimeError, match='timed out after 1 seconds'): list(epoch_batches(loader, restarts=0))

def test_a_slow_reader_is_not_taken_for_a_hanging_one(store, monkeypatch):
    loader = training_loader(dataset(store), 2, 1)
    assert loader.timeout == 600 and training_loader(dataset(store, cache_gib=1.), 2, 1).timeout == 0
    begin = loader.begin
    monkeypatch.setattr(loader, 'begin', lambda: begin(look=.001))  # no batch comes within a look
    set_epoch(loader, 1)
    assert [facts(batch) for batch in epoch_batches(loader)] == served(store, 0)[0] and loader.timeout == 600

@pytest.mark.skipif(multiprocessing.get_start_method() != 'fork', reason='what a test replaces reaches workers by forking only')
def test_a_file_is_hashed_once_for_all_workers(store, tmp_path, monkeypatch):
    hashed, look = tmp_path/'hashed.txt', vicc.data.file_digest
    def noted(file):
        with open(hashed, 'a') as lines: lines.write(f'{os.getpid()} {file}\n')
        return look(file)
    monkeypatch.setattr(vicc.data, 'file_digest', noted)
    loader = training_loader(dataset(store), 2, 2)
    for epoch in range(3):  # each with new workers
        set_epoch(loader, epoch)
        assert len(list(epoch_batches(loader))) == 8
    processes, files = zip(*(line.split(' ', 1) for line in hashed.read_text().splitlines()))
    assert len(files) == len(set(files)) == 16*2 and len(set(processes)) == 2 and os.getpid() not in map(int, processes)
    name, frames = damage(store, 3), loader.dataset.frames
    assert frames.sound(name, 'rgb').exists()  # found sound before
    with pytest.raises(vicc.data.VideoError, match='its checksum is another'): dataset(store).frames.sound(name, 'rgb')

def test_too_little_shared_memory_is_told_before_workers_start(store, monkeypatch):
    free, looked = [0], []
    def statvfs(path):
        looked.append(path)
        return os.statvfs_result((1, 1, 2*free[0], 2*free[0], free[0], 0, 0, 0, 0, 255))
    data = dataset(store)
    expected = 2*2*4*data.expected_bytes()
    whole = sum(len(collate([dataset(store, cut=False)[sample]])[stream].data) for stream in STREAMS for sample in range(16))/16
    measured = sum(len(collate([data[sample]])[stream].data) for stream in STREAMS for sample in range(16))/16
    assert data.expected_bytes() == pytest.approx(measured) and dataset(store, cut=False).expected_bytes() == pytest.approx(whole)
    monkeypatch.setattr(os, 'statvfs', statvfs)
    free[0] = int(.4*expected)
    with pytest.raises(ValueError, match=r'2 reading processes with batches of 4 need about .* GB of shared memory.*--shm-size'): next(iter(training_loader(data, 4, 2)))
    assert not multiprocessing.active_children()
    free[0] = int(.6*expected)
    with pytest.warns(UserWarning, match='lower workers or batch_size'): assert len(list(epoch_batches(training_loader(data, 4, 2)))) == 4
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(list(training_loader(data, 4, 0))) == 4 and len(looked) == 2  # without workers nobody looks
        free[0] = int(expected) + 1
        assert len(list(epoch_batches(training_loader(data, 4, 2)))) == 4
        data.streams = ('rgb',)  # as a stage of one stream has it
        assert data.expected_bytes() == pytest.approx(expected/16*1.5/3.5)
        monkeypatch.delattr(os, 'statvfs')  # no such thing on this system
        assert len(list(epoch_batches(training_loader(data, 4, 1)))) == 4

def test_too_many_dead_workers_end_the_epoch(store):
    with pytest.raises((RuntimeError, OSError, EOFError)): served(store, 1, kill=(0,), restarts=0)

def test_going_on_in_mid_epoch_reads_nothing_twice(store, monkeypatch):
    whole, _ = served(store, 0)
    opened, read = [], vicc.data.read_planes
    monkeypatch.setattr(vicc.data, 'read_planes', lambda *arguments: opened.append(1) or read(*arguments))
    rest, _ = served(store, 0, start=5)
    assert rest == whole[5:] and len(opened) == 3*2*2
    assert served(store, 0, start=8)[0] == []
    with pytest.raises(ValueError, match='the epoch has 8 batches'): served(store, 0, start=9)

def test_processes_share_an_epoch_and_can_go_on(store):
    def part(process, start=0):
        loader = training_loader(dataset(store), 2, processes=2, process=process)
        set_epoch(loader, 1)
        return [facts(batch) for batch in epoch_batches(loader, start)]
    whole, _ = served(store, 0)
    assert [part(0), part(1)] == [whole[::2], whole[1::2]] and part(1, 2) == whole[1::2][2:]

def test_reading_ahead_changes_no_batch(store):
    damage(store, 3)
    def epochs(first, start, last, kill=()):
        loader, seen, workers, lines = training_loader(dataset(store), 2, 2), [], [], []
        with loader.reading_ahead(last + 1):
            for epoch in range(first, last + 1):
                set_epoch(loader, epoch)
                batches = epoch_batches(loader, start if epoch == first else 0, log=lines.append)
                for number, batch in enumerate(batches):
                    seen.append((epoch, facts(batch)))
                    if (epoch, number) in kill: os.kill(multiprocessing.active_children()[0].pid, 9)
                    if not number: workers.append({child.pid for child in multiprocessing.active_children()})
        assert not multiprocessing.active_children()
        return seen, workers, lines
    alone = [(epoch, one) for epoch in range(3) for one in served(store, 0, epoch)[0]]
    seen, workers, lines = epochs(0, 0, 2)
    assert seen == alone and workers[0] == workers[1] == workers[2] and not lines
    assert epochs(1, 5, 2)[0] == alone[13:]  # going on in the middle of an epoch: the next one begins at its beginning
    seen, workers, lines = epochs(0, 0, 2, kill=[(0, 7), (2, 1)])  # the last batch of an epoch, and one within
    assert seen == alone and len(lines) == 2

def test_a_loader_can_be_left_in_mid_epoch(store):
    loader = training_loader(dataset(store), 2, 2)
    with pytest.raises(KeyError), loader.reading_ahead(2):
        for batch in epoch_batches(loader): raise KeyError
    assert not multiprocessing.active_children()
    whole, _ = served(store, 0)
    set_epoch(loader, 1)
    assert [facts(batch) for batch in loader] == whole and facts(loader.batch(1, 5)) == whole[5] and facts(loader.batch(1, 2)) == whole[2]
    loader.close()

def test_what_was_replaced_is_named_and_limited(store):
    names = {damage(store, number) for number in (2, 7)}
    _, batches = served(store, 0)
    assert {video for video, _ in batches.replaced} == names and batches.samples == 16 and all(name in batches.report() for name in names)
    for number in range(8, 14): damage(store, number, 'flow')
    with pytest.raises(ValueError, match='more than the share max_replaced=0.01'): served(store, 1)
    assert len(served(store, 1, max_replaced=5.)[0]) == 8
    shutil.rmtree(store.path/'rgb')
    with pytest.raises(Exception, match='9 videos in a row cannot be read.*does not exist'): served(store, 0)

def test_a_mistake_is_not_taken_for_a_bad_file(store):
    with pytest.raises(ValueError, match='order of its own'): list(EpochBatches(DataLoader(dataset(store), 2)))
    data = dataset(store)
    data.clip_length = 0
    with pytest.raises(ValueError, match='must all be at least 1'): data[0]

@pytest.mark.parametrize('fps', [10, 12.5, 15, 23.976, 25, 29.97, 30, 50, 59.94, 60])
def test_frame_numbers_at_any_rate(tmp_path, fps):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, 6, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    write_video(tmp_path/'v.mp4', frames, fps=fps, gop=8, preset='veryfast')
    decoded = read_frames(tmp_path/'v.mp4')
    for indices in (np.arange(40), np.array([39, 38, 3, 3, 20]), np.array([9])):
        clip, = read_planes(tmp_path/'v.mp4', 'rgb', [(indices, (2, 4, 12, 20))])
        luma = clip.data[:, :240].reshape(-1, 12, 20)
        other, = read_planes(tmp_path/'v.mp4', 'rgb', [(np.arange(40), (2, 4, 12, 20))])
        assert np.array_equal(clip.data, other.data[indices])
        laid_out = vicc.data.pack_clips([[clip]], 3)[:, 0][0].numpy()
        assert luma.shape[0] == len(indices) and np.abs(laid_out.astype(int) - decoded[indices, 2:14, 4:24]).max() <= 1

def test_other_files_are_read_as_pixels(store):
    video = store.manifest.video[0]
    frames = store.read(video, 'rgb')
    write_video(store.file(video, 'rgb'), frames, pixel_format='yuv444p', crf=0)
    replaced = dataset(store)[0]['replaced']
    assert replaced[0][0] == video and 'its checksum is another' in replaced[0][1]  # a file that prepare did not write
    (store.path/'checksums.csv').unlink()  # as in a store of an older version
    item = dataset(store)[0]
    assert not item['rgb'][0].planar and item['flow'][0].planar and item['rgb'][0].data.shape[1:3] == (item['rgb'][0].height, item['rgb'][0].width)
    mixed = collate([dataset(store)[sample] for sample in (0, 1)])
    whole = collate([dataset(store, cut=False)[sample] for sample in (0, 1)])
    for view in range(2):
        first, second = (denormalise(apply_view(batch['rgb'][:, view], batch['views'][view], VIEWS)) for batch in (mixed, whole))
        assert (first - second).abs().max() < 1e-3

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
        view = apply_view(torch.from_numpy(item[stream])[None], centred_view(torch.from_numpy(item['size'])[None], 31), ViewSettings(size=24), stream)
        sums[item['video']].append(F.normalize(encoder(view), dim=1)[0])
    assert torch.allclose(fast, torch.stack([torch.stack(one).mean(0) for one in sums]), atol=1e-5)
    assert sum(len(run['clips']) for run in (TestVideos(clips, None, most=2)[number] for number in range(3))) == 6
