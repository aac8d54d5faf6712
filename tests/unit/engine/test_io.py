"Full disks, folders that cannot be written to, mounts that go away, links that lead out: what is said, and that nothing is lost."
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faulty
import pandas as pd
import pytest
from test_prepare import QUIET, SETTINGS, contents
from test_video import noise

from vicc import prepare as module
from vicc.engine.io import IsolatedCall, Limits, StorageError, WorkerDied, WorkerPool, folder_lock, write_text
from vicc.prepare import Store, prepare
from vicc.synthetic import make_moving_shapes
from vicc.video import VideoError, write_video

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 6, 6)

@pytest.fixture(scope='module')
def whole(shapes, tmp_path_factory):
    return prepare(shapes['train'], shapes['videos'], tmp_path_factory.mktemp('whole')/'store', SETTINGS, **QUIET)

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 256 KiB."
    place = tmp_path/'disk'
    place.mkdir()
    if sys.platform != 'linux' or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', str(place)], capture_output=True).returncode: pytest.skip('needs the right to mount a disk')
    yield place
    subprocess.run(['umount', '-l', str(place)])

def test_a_full_disk_while_preparing(shapes, whole, small_disk):
    (small_disk/'ballast').write_bytes(b'x'*160_000)
    with pytest.raises(StorageError, match='cannot be written.*make room.*then start the same command again') as caught:
        prepare(shapes['train'], shapes['videos'], small_disk/'store', SETTINGS, **QUIET)
    assert caught.value.errno == errno.ENOSPC
    assert not list(small_disk.rglob('*.part.*')) and not (small_disk/'store'/'manifest.csv').exists()
    (small_disk/'ballast').unlink()
    assert contents(prepare(shapes['train'], shapes['videos'], small_disk/'store', SETTINGS, **QUIET).path) == contents(whole.path)

def test_a_full_disk_on_the_command_line(shapes, small_disk, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main([str(shapes['train']), str(shapes['videos']), str(small_disk/'store'), '--short-side=96', '--flow-method=farneback', '--workers=0', '--rgb-quality=0'])
    assert ended.value.code == 2 and 'make room' in capsys.readouterr().err

def test_a_full_disk_keeps_the_old_file(small_disk):
    write_text(small_disk/'log.csv', 'old')
    with pytest.raises(StorageError): write_text(small_disk/'log.csv', 'x'*400_000)
    assert (small_disk/'log.csv').read_text() == 'old' and os.listdir(small_disk) == ['log.csv']

def test_a_disk_that_may_only_be_read(shapes, whole, small_disk):
    (small_disk/'store').mkdir()
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    with pytest.raises(StorageError, match='choose another folder'): prepare(shapes['train'], shapes['videos'], small_disk/'store', SETTINGS, **QUIET)
    with pytest.raises(StorageError, match='choose another folder'), folder_lock(small_disk/'run'): pass
    subprocess.run(['mount', '-o', 'remount,rw', str(small_disk)], check=True)
    few = pd.read_csv(shapes['train'])[:2]
    prepare(few, shapes['videos'], small_disk/'store', SETTINGS, **QUIET)
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    assert len(prepare(few, shapes['videos'], small_disk/'store', SETTINGS, **QUIET).manifest) == 2  # what is finished can be used

def test_the_videos_go_away(shapes, tmp_path, monkeypatch):
    videos = tmp_path/'videos'
    shutil.copytree(shapes['videos'], videos)
    real = module.prepare_video
    def once(*arguments, **options):
        found = real(*arguments, **options)
        if videos.exists(): videos.rename(tmp_path/'elsewhere')
        return found
    monkeypatch.setattr(module, 'prepare_video', once)
    with pytest.raises(StorageError, match='is gone: bring its disk or network mount back'): prepare(shapes['train'], videos, tmp_path/'store', SETTINGS, **QUIET)
    (tmp_path/'elsewhere').rename(videos)
    monkeypatch.setattr(module, 'prepare_video', real)
    store = prepare(shapes['train'], videos, tmp_path/'store', SETTINGS, **QUIET)
    assert store.report['videos_made'] == 5 and len(store.manifest) == 6  # the first was not lost

def test_links(shapes, tmp_path):
    (tmp_path/'videos').mkdir()
    name = pd.read_csv(shapes['train']).video[0]
    (tmp_path/'videos'/'mine.mp4').write_bytes((Path(shapes['videos'])/name).read_bytes())
    (tmp_path/'videos'/'other.mp4').symlink_to(Path(shapes['videos'])/name)
    (tmp_path/'videos'/'inside.mp4').symlink_to('mine.mp4')
    rows = pd.DataFrame(dict(video=['mine.mp4', 'inside.mp4', 'other.mp4']))
    with pytest.raises(FileNotFoundError, match=r'1 of 3 videos .*other.mp4 \(row 4\) is reached by a link'): prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, **QUIET)
    assert not (tmp_path/'store').exists()
    assert len(prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, follow_links=True, **QUIET).manifest) == 3
    shutil.rmtree(tmp_path/'videos')  # what is prepared does not need its videos any more
    assert prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, **QUIET).report['videos_made'] == 0

def test_a_changed_store_is_noticed_and_mended(shapes, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path/'store')
    store = Store(tmp_path/'store')
    assert store.check().empty
    first, second, third = (store.file(video, 'flow') for video in store.manifest.video[:3])
    content = bytearray(first.read_bytes())
    content[len(content)//2] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    assert [text[:11] for text in store.check().problem] == ['was changed', 'was changed', 'cannot be r']
    assert prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, **QUIET).report['videos_made'] == 3  # prepare makes them again
    assert contents(tmp_path/'store') == contents(whole.path) and store.check().empty
    (tmp_path/'store'/'checksums.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='checksums.csv has the columns a, b'): store.check()

# --- workers that crash, hang or take too much

def test_two_videos_that_end_their_worker(shapes, tmp_path, monkeypatch):
    videos = tmp_path/'videos'
    videos.mkdir()
    for name, source in zip(('a.mp4', 'crash.mp4', 'hang.mp4', 'z.mp4'), pd.read_csv(shapes['train']).video): shutil.copy(Path(shapes['videos'])/source, videos/name)
    monkeypatch.setattr(module, 'prepare_task', faulty.prepare_task)
    said = []
    rows = pd.DataFrame(dict(video=['a.mp4', 'crash.mp4', 'hang.mp4', 'z.mp4']))
    store = prepare(rows, videos, tmp_path/'store', SETTINGS, workers=2, log=said.append, max_failed=.5, limits=Limits(seconds=3))
    problems = pd.read_csv(store.path/'problems.csv').set_index('video').problem
    assert list(store.manifest.video) == ['a.mp4', 'z.mp4']
    assert 'crash.mp4: the decoder crashed (SIGABRT)' in problems['crash.mp4'] and 'hang.mp4: the decoder hung (no sign of life for 3 s)' in problems['hang.mp4']
    assert 'these were set aside: crash.mp4, hang.mp4' in said[-1]
    assert not list(store.path.rglob('*.part.*'))

def test_script_without_main_guard(tmp_path):
    "Every worker imports the script that started it, and would start workers of its own: an error, not an endless run."
    script = tmp_path/'script.py'
    script.write_text('from vicc.engine.io import WorkerPool\nwith WorkerPool() as pool: list(pool.run({0: (abs, -1)}))\n')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode and "__name__ == '__main__'" in done.stderr.splitlines()[-1]

def test_a_second_chance(shapes, tmp_path, monkeypatch):
    "A worker that dies of something else than its video."
    class Unlucky(WorkerPool):
        def run(self, tasks):
            for name, result in super().run(tasks): yield name, WorkerDied('hung') if not self.seen and not self.seen.append(name) else result
        seen = []
    monkeypatch.setattr(module, 'WorkerPool', Unlucky)
    store = prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, workers=1, log=lambda line: None)
    assert len(store.manifest) == 6 and len(Unlucky.seen) == 1

def test_a_list_of_files_is_no_video(tmp_path):
    write_video(tmp_path/'private.mp4', noise(8, 32, 32))
    (tmp_path/'list.mp4').write_text('ffconcat version 1.0\nfile private.mp4\n')
    with pytest.raises(VideoError, match='list.mp4'): module.probe(tmp_path/'list.mp4')

def test_a_claim_of_a_huge_picture(tmp_path):
    write_video(tmp_path/'a.mp4', noise(4, 48, 64))
    content = (tmp_path/'a.mp4').read_bytes()
    size = bytes.fromhex('00400030')  # width 64, height 48, as they stand in the box avc1
    assert content.count(size) >= 1
    (tmp_path/'a.mp4').write_bytes(content.replace(size, bytes.fromhex('ffffffff')))
    try: assert module.probe(tmp_path/'a.mp4').width == 64  # FFmpeg believes the stream instead
    except VideoError as error: assert 'a.mp4' in str(error)

def test_isolated_keeps_its_worker(tmp_path):
    import multiprocessing
    pid = IsolatedCall(os.getpid)
    assert pid() == pid() != os.getpid()
    pid.close()
    assert not multiprocessing.active_children()

def test_an_error_that_cannot_be_sent():
    with WorkerPool() as pool: results = dict(pool.run({1: (faulty.awkward,), 2: (int, 'x'), 3: (abs, -3)}))
    assert isinstance(results[1], RuntimeError) and str(results[1]) == 'Awkward: odd'
    assert isinstance(results[2], ValueError) and results[3] == 3

def test_a_pause_of_the_whole_job_is_no_hang():
    "The parent was silent, or stopped by a cluster: a worker that is just starting, or at work, is not blamed."
    with WorkerPool(1, Limits(seconds=5)) as pool:
        results = pool.run({1: (os.abort,), 2: (abs, -2), 3: (time.sleep, 1), 4: (abs, -4)})
        assert "crashed" in str(next(results)[1])
        time.sleep(5.5)
        assert [result for _, result in results] == [2, None, 4]
