"A store that can be trusted: odd and damaged videos, files decoded once, shards, left-overs, GPUs by turns, the report."
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pytest
from test_video import noise, turned, write_sound

from vicc import prepare as module
from vicc.flow import dequantise
from vicc.manifests import folder_manifest, read_manifest
from vicc.prepare import PrepareSettings, Store, prepare, prepare_video, decode_for_store
from vicc.synthetic import make_moving_shapes
from vicc.video import VideoWriter, read_frames, write_video

SETTINGS = PrepareSettings(short_side=48, flow_method='farneback', flow_bound=5)
WIDE = replace(SETTINGS, flow_bound=100)  # noise has no motion, and what is measured is large
QUIET = dict(workers=0, log=lambda line: None)
shared = Path(__file__).parents[3]/'shared'/'data'
needs_samples = pytest.mark.skipif(not (shared/'official_samples').is_dir(), reason='the official sample videos are not here')

def files(folder):
    "Where frames, flow and note of one video go."
    return folder/'rgb.mp4', folder/'flow.mp4', folder/'note.txt'

def one(folder, source, **options):
    "Facts of one video prepared into a folder, after a check that both files hold exactly what the facts say."
    facts = prepare_video(source, files(folder), WIDE, **options)
    rgb, flow = read_frames(folder/'rgb.mp4'), read_frames(folder/'flow.mp4')
    assert len(rgb) == len(flow) == facts['num_frames']
    assert rgb.shape[1:3] == (facts['height'], facts['width']) and flow.shape[1:3] == (2*facts['height'], facts['width'])
    assert facts['note'] == ((folder/'note.txt').read_text() if (folder/'note.txt').exists() else '')
    return facts

def holed(data, at=1/3, size=1/6):
    "A file with zeros in the middle."
    first, last = int(len(data)*at), int(len(data)*(at + size))
    return data[:first] + bytes(last - first) + data[last:]

# --- odd videos

@pytest.mark.parametrize('name, value', [('short_side', 8), ('short_side', True), ('short_side', '240'), ('flow_bound', float('nan')), ('flow_bound', float('inf')), ('rgb_quality', -1), ('rgb_quality', 99), ('flow_quality', 52), ('fps', 241), ('preset', 3), ('preset', [])])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f'{name}=.* is not (one of|a number from)'): PrepareSettings(**{name: value})

def test_settings_have_a_hash():
    assert PrepareSettings().hash == PrepareSettings(short_side=240).hash != PrepareSettings(flow_bound=5).hash

def test_versions():
    assert module.package_version('numpy') == np.__version__ and module.package_version('opencv-of-another-name') and module.package_version('vicc-of-another-name') is None

def test_container_claims_more_than_there_is(tmp_path):
    write_video(tmp_path/'a.avi', noise(20))
    data, claim = bytearray((tmp_path/'a.avi').read_bytes()), (20).to_bytes(4, 'little')
    place = data.find(b'vids', data.find(b'strh')) + 32  # dwLength of the stream's header
    assert data[place:place + 4] == claim
    for claimed in (22, 50):
        data[place:place + 4] = claimed.to_bytes(4, 'little')
        (tmp_path/'b.avi').write_bytes(data)
        (tmp_path/str(claimed)).mkdir()
        facts = one(tmp_path/str(claimed), tmp_path/'b.avi')
        assert facts['num_frames'] == 20
        assert facts['note'] == ('' if claimed == 22 else '50 frames are announced, 20 decode')

@pytest.mark.parametrize('height, width, stored', [(101, 75, (64, 48)), (75, 101, (48, 64)), (47, 33, (48, 32)), (64, 36, (64, 36)), (31, 57, (32, 56))])
def test_odd_sizes_and_portrait(tmp_path, height, width, stored):
    frames = np.random.default_rng(0).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    write_video(tmp_path/'a.mp4', frames, pixel_format='yuv444p')
    facts = one(tmp_path, tmp_path/'a.mp4')
    assert (facts['height'], facts['width']) == stored and facts['num_frames'] == 5 and facts['note'] == ''

@pytest.mark.skipif(int(av.__version__.split('.')[0]) < 14, reason='this PyAV does not tell how a video is turned')
def test_turned(tmp_path):
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255
    write_video(tmp_path/'a.mp4', frames)
    turned(tmp_path/'a.mp4', tmp_path/'b.mp4')
    facts = one(tmp_path, tmp_path/'b.mp4')
    assert (facts['height'], facts['width']) == (64, 48)
    assert read_frames(tmp_path/'rgb.mp4')[0, 10, 40].min() > 200  # upright: white is at the upper right

@pytest.mark.parametrize('fps', [10, 12.5, 24000/1001, 30000/1001, 60])
def test_rates_are_kept(tmp_path, fps):
    write_video(tmp_path/'a.mp4', noise(8), fps=fps)
    assert one(tmp_path, tmp_path/'a.mp4')['fps'] == pytest.approx(fps, abs=1e-3)

def test_absurd_rate_is_noted(tmp_path):
    write_video(tmp_path/'a.mkv', noise(8), fps=500)
    facts = one(tmp_path, tmp_path/'a.mkv')
    assert facts['fps'] == 240 and facts['note'] == '500 frames a second are stored as 240'

def test_variable_rate(tmp_path):
    with VideoWriter(tmp_path/'a.mp4', fps=30) as video:
        video.write(noise(1)[0])
        for t, frame in enumerate(noise(30)[1:]):  # every third frame comes late
            picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
            picture.pts, picture.time_base = 1 + t + t//3, 1/video.stream.codec_context.rate
            video.container.mux(video.stream.encode(picture))
    facts = one(tmp_path, tmp_path/'a.mp4')
    assert facts['num_frames'] == 30 and 15 < facts['fps'] < 30

@pytest.mark.parametrize('suffix', ['.avi', '.mkv', '.ts'])
def test_cut_off_file_is_used_up_to_there(tmp_path, suffix):
    write_video(tmp_path/f'a{suffix}', noise(100, 64, 64))
    good, whole = (tmp_path/f'a{suffix}').read_bytes(), read_frames(tmp_path/f'a{suffix}')
    (tmp_path/f'b{suffix}').write_bytes(good[:len(good)*2//3])
    facts = one(tmp_path, tmp_path/f'b{suffix}')
    assert 50 < facts['num_frames'] < 70
    if suffix != '.mkv': assert 'damaged after' in facts['note']
    else: assert re.fullmatch(rf'ends after 2.\d+ s, {facts["num_frames"]} of about 100 frames: the file announces 4 s', facts['note'])
    kept = np.stack(list(decode_for_store(tmp_path/f'b{suffix}', PrepareSettings(64), [])))
    assert np.array_equal(kept, whole[:len(kept)])  # no invented, no smeared frame

def test_damage_in_the_middle(tmp_path):
    write_video(tmp_path/'a.mp4', noise(100, 64, 64))
    (tmp_path/'b.mp4').write_bytes(holed((tmp_path/'a.mp4').read_bytes()))
    facts = one(tmp_path, tmp_path/'b.mp4')
    cause = r'(Invalid data found when processing input|marked by the decoder)'  # FFmpeg's versions differ
    assert re.fullmatch(rf'damaged after {facts["num_frames"]} frames \({cause}\): the rest is left out', facts['note'])
    assert 20 < facts['num_frames'] < 40

def test_frames_that_change_size(tmp_path):
    for name, height, width in (('a', 64, 64), ('b', 96, 128)): write_video(tmp_path/f'{name}.h264', noise(20, height, width))
    (tmp_path/'both.h264').write_bytes((tmp_path/'a.h264').read_bytes() + (tmp_path/'b.h264').read_bytes())
    facts = one(tmp_path, tmp_path/'both.h264')
    assert (facts['num_frames'], facts['height'], facts['width']) == (40, 48, 48)
    assert facts['note'] == 'frame 20 changes size from 64×64 to 96×128'

def test_a_made_again_video_loses_its_old_note(tmp_path):
    (tmp_path/'note.txt').write_text('old')
    write_video(tmp_path/'a.mp4', noise(5))
    assert one(tmp_path, tmp_path/'a.mp4')['note'] == '' and not (tmp_path/'note.txt').exists()

@pytest.fixture(scope='module')
def useless(tmp_path_factory):
    "Files that no store can be made of."
    folder = tmp_path_factory.mktemp('useless')
    write_video(folder/'one_frame.mp4', noise(1))
    write_video(folder/'tiny.mp4', noise(5, 16, 16)[:, :8, :8])
    (folder/'empty.mp4').touch()
    (folder/'text.mp4').write_text('I am a text.\n'*10)
    write_video(folder/'a.mp4', noise(50))
    (folder/'no_table.mp4').write_bytes((folder/'a.mp4').read_bytes()[:-3000])
    (folder/'a.mp4').unlink()
    write_sound(folder/'sound.mp4')
    return folder

def test_useless_files_are_listed_with_the_reason(useless, tmp_path):
    write_video(tmp_path/'good.mp4', noise(6))
    shutil.copytree(useless, tmp_path/'videos')
    shutil.copy(tmp_path/'good.mp4', tmp_path/'videos')
    rows, lines = pd.DataFrame(dict(video=sorted(path.name for path in (tmp_path/'videos').iterdir()))), []
    store = prepare(rows, tmp_path/'videos', tmp_path/'store', WIDE, workers=0, max_failed=1, log=lines.append)
    assert list(store.manifest.video) == ['good.mp4'] and store.manifest.num_frames[0] == 6 and 'note' not in store.manifest
    problems = pd.read_csv(tmp_path/'store'/'problems.csv').set_index('video').problem
    wanted = {'empty.mp4': 'cannot be decoded', 'no_table.mp4': 'cannot be decoded', 'one_frame.mp4': 'flow needs at least two frames, got 1', 'sound.mp4': 'holds sound only',
              'text.mp4': 'cannot be decoded', 'tiny.mp4': 'at least 16'}
    assert set(problems.index) == set(wanted)
    for video, text in wanted.items(): assert video in problems[video] and text in problems[video]
    assert store.report['set_aside'] == 6 and problems.str.contains('cannot be decoded: Invalid data found when processing input').sum() == 3
    assert '6 set aside' in lines[-1] and 'these were set aside: empty.mp4, no_table.mp4, one_frame.mp4' in lines[-1]
    assert sorted(path.name for path in (tmp_path/'store').rglob('*.mp4')) == ['good.mp4', 'good.mp4']
    assert not list((tmp_path/'store').rglob('*.part.*'))

@needs_samples
def test_real_odd_files(tmp_path):
    rows = folder_manifest(shared/'official_samples'/'hmdb51')
    store = prepare(rows, shared/'official_samples'/'hmdb51', tmp_path/'store', PrepareSettings(short_side=48, flow_method='dis'), **QUIET)
    assert sorted(store.manifest.num_frames) == [48, 72, 74, 83]  # the containers claim one more each
    for row in store.manifest.itertuples():
        for stream in ('rgb', 'flow'): assert len(store.read(row.video, stream)) == row.num_frames
    noted = [note for note in store.manifest.note if note]
    assert len(noted) == 3 and all(note.endswith('repeat the frame before') for note in noted)  # film made into television

# --- decoded once, the same on any device

def test_a_source_is_decoded_once(tmp_path, monkeypatch):
    write_video(tmp_path/'a.mkv', noise(150))  # three blocks; Matroska does not say how many frames there are
    decoded = []
    monkeypatch.setattr('vicc.video.heartbeat', lambda: decoded.append(1))  # once a decoded frame
    assert prepare_video(tmp_path/'a.mkv', files(tmp_path), SETTINGS)['num_frames'] == 150
    assert len(decoded) == 150

def test_tensors_and_blocks_change_nothing(tmp_path):
    frames = noise(5, 24, 32)
    whole = module.quantise(module.compute_flow(frames, 'tvl1'), 5).reshape(4, 48, 32)
    blocks = module.flow_blocks(frames, PrepareSettings(flow_bound=5), block=3)
    assert np.array_equal(np.concatenate([whole, whole[-1:]]), np.concatenate([flow for _, flow in blocks]))

def test_workers_take_gpus_by_turns(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, 'device_count', lambda: 3)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    for number, wanted in ((1, 'cuda:1'), (2, 'cuda:2'), (3, 'cuda:0')):
        monkeypatch.setattr(module, 'current_process', lambda: type('Process', (), dict(_identity=(number,))))
        assert module.gpu_of_worker('cuda') == wanted
    monkeypatch.setenv('LOCAL_RANK', '4')
    assert module.gpu_of_worker('cuda') == 'cuda:1' and module.gpu_of_worker('cpu') == 'cpu'

def test_a_gpu_is_chosen_for_tvl1_alone(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, 'is_available', lambda: True)
    assert [module.choose_device('auto', method) for method in ('tvl1', 'farneback', 'dis')] == ['cuda', 'cpu', 'cpu']
    assert module.choose_device('cpu', 'tvl1') == 'cpu'
    monkeypatch.setattr(module.torch.cuda, 'is_available', lambda: False)
    assert module.choose_device('auto', 'tvl1') == 'cpu'
    with pytest.raises(ValueError, match="PyTorch finds no GPU here.: use device='auto'"): module.choose_device('cuda', 'tvl1')
    with pytest.raises(ValueError, match="only 'cuda' with 'tvl1' can"): module.choose_device('gpu', 'tvl1')

# --- going on, left-overs, shards

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 8, 8)

@pytest.fixture(scope='module')
def whole(shapes, tmp_path_factory):
    "A store made by one process."
    return prepare(shapes['train'], shapes['videos'], tmp_path_factory.mktemp('whole')/'store', SETTINGS, **QUIET)

def contents(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob('*') if path.is_file() and path.suffix in ('.mp4', '.csv')}

def test_damaged_files_of_a_store_are_made_again(shapes, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path/'store')
    videos = list(whole.manifest.video)
    rgb, flow = (tmp_path/'store'/stream for stream in ('rgb', 'flow'))
    (rgb/videos[0]).write_bytes((rgb/videos[0]).read_bytes()[:-100])
    (flow/videos[1]).write_bytes(b'')
    (flow/videos[2]).unlink()
    write_video(flow/videos[3], np.zeros((15, 96, 48), np.uint8), pixel_format='gray')  # a frame is missing
    write_video(rgb/videos[4], np.zeros((16, 32, 32, 3), np.uint8))  # of another size
    times = {path: path.stat().st_mtime_ns for path in (tmp_path/'store').rglob('*.mp4')}
    store = prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, **QUIET)
    assert store.report['videos_made'] == 5 and contents(store.path) == contents(whole.path)
    for video in videos[5:]: assert (rgb/video).stat().st_mtime_ns == times[rgb/video]

def test_a_note_survives_a_killed_run(tmp_path):
    rows, videos = pd.DataFrame(dict(video=['a.avi'])), tmp_path/'videos'
    videos.mkdir()
    write_video(videos/'a.avi', noise(100, 64, 64))
    (videos/'a.avi').write_bytes((videos/'a.avi').read_bytes()[:-10000])
    first = prepare(rows, videos, tmp_path/'store', SETTINGS, **QUIET)
    (tmp_path/'store'/'manifest.csv').unlink()  # as if it had been killed before the end
    again = prepare(rows, videos, tmp_path/'store', SETTINGS, **QUIET)
    assert again.report['videos_made'] == 0 and again.report['with_a_note'] == 1
    assert 'damaged after' in again.manifest.note[0] == first.manifest.note[0]

def test_a_replaced_source_is_prepared_again(tmp_path):
    frames, videos = noise(40, 64, 64), tmp_path/'videos'
    videos.mkdir()
    for name, part in dict(whole=frames, turned=frames[:, ::-1], other=frames[:20]).items(): write_video(videos/f'{name}.avi', part)
    whole, turned, source = (videos/'whole.avi').read_bytes(), (videos/'turned.avi').read_bytes(), videos/'a.avi'
    length = max(len(whole), len(turned))
    whole, turned = whole.ljust(length, b'\0'), turned.ljust(length, b'\0')
    rows = pd.DataFrame(dict(video=['a.avi', 'other.avi']))
    def made(*changes) -> list[int]:
        store = prepare(rows, videos, tmp_path/'store', WIDE, **QUIET)
        return [store.report['videos_made'], *store.manifest.num_frames]
    source.write_bytes(whole[:len(whole)*2//3])
    first = made()
    assert first[0] == 2 and first[1] < 40 and made() == [0, first[1], 20]
    source.write_bytes(whole)
    assert made() == [1, 40, 20] and made()[0] == 0
    source.touch()  # copied again, and the same
    assert made()[0] == 0
    source.write_bytes(turned)  # as long as before
    assert made() == [1, 40, 20]
    source.unlink()
    assert made()[0] == 0  # what is prepared needs it no more
    table = pd.read_csv(tmp_path/'store'/'checksums.csv')
    table.drop(columns=['source_bytes', 'source_sha256']).to_csv(tmp_path/'store'/'checksums.csv', index=False)  # an older store
    source.write_bytes(whole[:len(whole)*2//3])
    assert made() == [0, 40, 20]
    for name in ('manifest', 'checksums'): (tmp_path/'store'/f'{name}.csv').unlink()  # killed before the end, and replaced then
    assert made() == [1, first[1], 20]

def test_flow_beyond_the_bound_is_noted(tmp_path):
    write_video(tmp_path/'a.mp4', noise(6))
    note = prepare_video(tmp_path/'a.mp4', files(tmp_path), replace(SETTINGS, flow_bound=.5))['note']
    assert re.fullmatch(r'[67]\d% of the flow is clipped at flow_bound=0.5', note)

def test_what_is_no_store_is_left_alone(shapes, whole, tmp_path):
    "Refused before anything is written: a folder of videos or with files of others as the store, and shares above 1."
    videos = Path(shapes['videos'])
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'manifest.csv').write_text('video,label\nmine.mp4,3\n')
    shutil.copytree(whole.path, tmp_path/'run'/'store')
    shutil.copytree(whole.path, tmp_path/'again')
    before = contents(tmp_path)
    for message, store, options in [
            ('is in the folder of videos .*: choose a folder outside', videos, {}), ('is in the folder of videos', videos/'new'/'store', {}),
            (r'mine holds manifest.csv and is no store \(there is no settings.json\), so nothing is written over it', tmp_path/'mine', {}),
            ('run is no store: give .*run/store$', tmp_path/'run', {}), ('rgb holds the files of the store .* itself', tmp_path/'again', dict(videos=tmp_path/'again'/'rgb')),
            ('max_failed=5 is no share from 0 to 1: 5 % is 0.05', tmp_path/'new', dict(max_failed=5)), ('max_failed=nan', tmp_path/'new', dict(max_failed=float('nan')))]:
        with pytest.raises(ValueError, match=message): prepare(shapes['train'], **dict(videos=videos, store=store, settings=SETTINGS) | options | QUIET)
    assert contents(tmp_path) == before and not (videos/'new').exists() and not (tmp_path/'new').exists() and not list(videos.glob('*.*'))
    for folder, message in ((tmp_path/'run', 'run is not a finished store .*: give .*run/store'), (tmp_path/'new', 'no settings.json in it.: give the folder that vicc prepare has made')):
        with pytest.raises(FileNotFoundError, match=message): Store(folder)

def test_a_store_that_lacks_videos_says_so(shapes, whole):
    rows = read_manifest(shapes['train'])
    extra = rows.head(2).assign(video=['x/1.mp4', 'x/2.mp4'])
    with pytest.raises(ValueError, match=r'2 of 10 videos of the manifest are not in the store .*, such as x/1.mp4, x/2.mp4: prepare them'): whole.select(pd.concat([rows, extra]))
    with pytest.warns(UserWarning, match='2 of 10 videos .*: they are left out'): assert len(whole.select(pd.concat([rows, extra]), max_failed=.2)) == 8
    numbers = rows.assign(label=(rows.label + 1) % 8, class_name=((rows.label + 1) % 8).astype(str))
    with pytest.warns(UserWarning, match=r'8 of 8 videos have another label than .*: slide_x/train_00000.mp4 has 1 \(1\), and not 0 \(slide_x\)'): whole.select(numbers)

def test_left_overs_go_but_not_those_of_a_neighbour(shapes, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path/'store')
    host = re.sub(r'\W', '-', platform.node())[:40]
    neighbour = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    names = dict(dead=f'rgb/slide_x/.gone.{host}-999999999.part.mp4', alive=f'flow/.x.{host}-{neighbour.pid}.part.mp4',
                 hidden='rgb/.hidden.mp4', elsewhere='.manifest.elsewhere-9.part.csv', old='.problems.elsewhere-9.part.csv')
    files = {what: tmp_path/'store'/name for what, name in names.items()}
    for path in files.values(): path.touch()
    os.utime(files['old'], (time.time() - 25*3600,)*2)
    def left() -> set[str]:
        prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, **QUIET)
        return {what for what, path in files.items() if path.exists()}
    try: assert left() == {'alive', 'hidden', 'elsewhere'}
    finally:
        neighbour.kill()
        neighbour.wait()
    assert left() == {'hidden', 'elsewhere'}

@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_shards_make_the_same_store(shapes, whole, tmp_path, order):
    stores = [prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, num_shards=3, shard=shard, **QUIET) for shard in order]
    assert stores[0] is stores[1] is None and contents(stores[2].path) == contents(whole.path)
    assert stores[2].report['videos'] == stores[2].report['videos_made'] == 8
    again = prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, num_shards=3, shard=1, **QUIET)  # once more, all results are there
    assert contents(again.path) == contents(whole.path)
    assert prepare(read_manifest(shapes['train'])[:7], shapes['videos'], tmp_path/'store', SETTINGS, num_shards=3, shard=1, **QUIET) is None  # another manifest: other shards

def test_shards_at_once_and_more_of_them_than_videos(shapes, whole, tmp_path, monkeypatch):
    rows = read_manifest(shapes['train'])[:1]
    rows.to_csv(tmp_path/'one.csv', index=False)
    command = [sys.executable, '-m', 'vicc.prepare', str(tmp_path/'one.csv'), str(shapes['videos']), str(tmp_path/'store'), '--short-side=48', '--flow-method=farneback', '--flow-bound=5',
               '--workers=0']
    for name in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    for name, value in dict(SLURM_PROCID='0', SLURM_NTASKS='2').items(): monkeypatch.setenv(name, value)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as other:  # it reads its shard from the environment
        module.main([*command[3:], '--num-shards=2', '--shard=1'])
    assert other.returncode == 0
    store = Store(tmp_path/'store')
    assert list(store.manifest.video) == list(rows.video) and store.report['videos'] == 1
    monkeypatch.setenv('WORLD_SIZE', '3')
    monkeypatch.setenv('RANK', '2')
    assert module.shard_from_environment() == (2, 3)
    for video in rows.video: assert store.file(video, 'flow').read_bytes() == whole.file(video, 'flow').read_bytes()
    assert not list((tmp_path/'store').rglob('*.part.*'))

def test_failures_are_judged_on_the_whole(shapes, tmp_path):
    shutil.copytree(shapes['videos'], tmp_path/'videos')
    rows = read_manifest(shapes['train'])
    (tmp_path/'videos'/rows.video[0]).write_text('no video')
    options = dict(num_shards=4, max_failed=0.2, **QUIET)
    for shard in range(4): store = prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, shard=shard, **options)  # 1 of 2 in the first shard, 1 of 8 in all
    assert len(store.manifest) == 7 and len(pd.read_csv(store.path/'problems.csv')) == 1
    with pytest.raises(ValueError, match='1 of 8 videos cannot be used'): prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, shard=3, **options | dict(max_failed=0.1))
    with pytest.raises(ValueError, match='shard 4 of 4'): prepare(rows, tmp_path/'videos', tmp_path/'store', SETTINGS, shard=4, **options)

def test_backend_is_recorded_outside_the_hash(whole):
    record = json.loads((whole.path/'settings.json').read_text())
    assert record['flow_made_by'] == ['opencv on cpu'] and record['hash'] == SETTINGS.hash == whole.settings.hash
    module.init_store(whole.path, SETTINGS, 'triton on cuda')
    assert json.loads((whole.path/'settings.json').read_text())['flow_made_by'] == ['opencv on cpu', 'triton on cuda']
    assert Store(whole.path).settings == SETTINGS

def test_the_report_says_what_was_done(shapes, tmp_path):
    lines = []
    report = prepare(shapes['train'], shapes['videos'], tmp_path/'store', SETTINGS, workers=0, log=lines.append).report
    assert (report['videos'], report['videos_made'], report['frames'], report['frames_made'], report['set_aside']) == (8, 8, 128, 128, 0)
    assert report['seconds'] > 0 and '8 videos: 8 made, 0 set aside' in lines[-1] and 'frames/s' in lines[-1]

@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='this system knows no process groups')
def test_a_kill(tmp_path, monkeypatch):
    import kill_prepare
    monkeypatch.setattr(kill_prepare, 'OPTIONS', [*kill_prepare.OPTIONS, '--workers=1'])  # each imports torch
    rows = kill_prepare.main(1, tmp_path, videos=4, frames=40, seed=1)
    for row in rows: assert row['identical'] and row['restarted'] and not row['left_over'] and not row['workers_left'], row

@needs_samples
def test_stored_tvl1_is_close_to_the_measured_one(tmp_path):
    source = shared/'official_samples'/'ucf101'/'SoccerJuggling'/'v_SoccerJuggling_g23_c01.avi'
    frames = np.stack([frame for frame, _ in zip(decode_for_store(source, PrepareSettings(120), []), range(3))])
    write_video(tmp_path/'short.mp4', frames, crf=0, pixel_format='yuv444p')
    prepare_video(tmp_path/'short.mp4', files(tmp_path), PrepareSettings())
    wanted = module.compute_flow(read_frames(tmp_path/'short.mp4'), 'tvl1').clip(-20, 20)
    stored = dequantise(module.unstack_flow(read_frames(tmp_path/'flow.mp4')).transpose(0, 3, 1, 2), 20)[:-1]
    assert np.abs(stored - wanted).mean() < 0.15

# --- a store of before, another rate, imported flow

def test_later_settings_leave_stores_of_before_as_they_were(shapes, whole, tmp_path):
    assert PrepareSettings().hash == 'ba051cee1b32'
    record = json.loads((whole.path/'settings.json').read_text())
    assert 'fps' not in record['settings'] and 'deinterlace' not in record['settings']
    other = PrepareSettings(48, 'farneback', 5, fps=12.5, deinterlace=True)
    assert other.hash != SETTINGS.hash and other.record() | dict(fps=0, deinterlace=False) == SETTINGS.record() | dict(fps=0, deinterlace=False)
    with pytest.raises(ValueError, match=r'other settings \(fps is 0.0, not 12.5; deinterlace is False, not True\)'):
        prepare(shapes['train'], shapes['videos'], whole.path, other, **QUIET)
    for wrong in (dict(fps=.5), dict(fps=500), dict(fps=True), dict(fps=25, flow_method='imported'), dict(deinterlace=2)):
        with pytest.raises(ValueError, match='fps|deinterlace'): PrepareSettings(**wrong)

def test_command_with_the_later_settings(shapes, tmp_path):
    words = '--short-side=48 --flow-method=farneback --flow-bound=5 --workers=0 --fps=6 --deinterlace'.split()
    module.main([str(shapes['test']), str(shapes['videos']), str(tmp_path/'store'), *words])
    store = Store(tmp_path/'store')
    assert store.settings == PrepareSettings(48, 'farneback', 5, fps=6, deinterlace=True)
    assert set(store.manifest.num_frames) == {8} and set(store.manifest.fps) == {6.} and set(store.manifest.note) == {'16 frames became 8 of 6 a second'}

LAYOUTS = {  # of ready-made flow: where picture number n of a video's axis lies
    'dense_flow': 'run/a/flow_{xy}_{n:05}.jpg', 'short': 'a/{xy}_{n:04}.png', 'folders x, y': 'run/a/{xy}/{n}.png',
    'folders u, v in the video': 'a/{uv}/img_{n:05}.jpg', 'folders u, v of all': '{uv}/a/frame{n:06}.jpg'}

def flow_files(folder, layout, count, size=(48, 64), first=1):
    "Pictures whose level is 100 + n for x and 200 - n for y."
    for n in range(count):
        for axis, (xy, uv) in enumerate(('xu', 'yv')):
            file = folder/LAYOUTS[layout].format(xy=xy, uv=uv, n=n + first)
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), np.full(size, (100 + n, 200 - n)[axis], np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 100])

def import_flow(folder, **options):
    "A store of run/a.avi and its ready-made flow."
    (folder/'videos'/'run').mkdir(parents=True, exist_ok=True)
    write_video(folder/'videos'/'run'/'a.avi', noise(12))
    rows = pd.DataFrame(dict(video=['run/a.avi']))
    return prepare(rows, folder/'videos', folder/'store', **QUIET | dict(settings=SETTINGS, flow_from=folder/'flow') | options)

@pytest.mark.parametrize('layout', LAYOUTS)
def test_ready_made_flow(tmp_path, layout):
    flow_files(tmp_path/'flow', layout, 11, first=0 if 'x, y' in layout else 1)
    store = import_flow(tmp_path)
    assert store.settings.flow_method == 'imported' and json.loads((store.path/'settings.json').read_text())['flow_made_by'] == ['imported']
    levels = store.read('run/a.avi', 'flow').mean((1, 2))
    assert np.abs(levels - [[100 + min(n, 10), 200 - min(n, 10)] for n in range(12)]).max() < 1  # the last is repeated
    shutil.rmtree(tmp_path/'flow')
    assert import_flow(tmp_path).report['videos_made'] == 0  # what is prepared needs its pictures no more

def test_ready_made_flow_of_another_size(tmp_path):
    flow_files(tmp_path/'flow', 'dense_flow', 11, size=(96, 128))
    levels = import_flow(tmp_path).read('run/a.avi', 'flow').mean((1, 2))
    u = dequantise(np.uint8([100]), 5)/2  # half the size, half the motion
    assert np.abs(levels[0, 0] - module.quantise(u, 5)) < 1

@pytest.mark.parametrize('count, size, message', [
    (10, (48, 64), '10 pairs of flow pictures for 12 frames: 11 are needed'), (12, (48, 64), '12 pairs of flow pictures for 12 frames: 11 are needed'),
    (11, (64, 64), r'have \(64, 64\) and \(64, 64\) pixels, the frames \(48, 64\)'), (0, (48, 64), 'holds 0 and 0 pictures of the horizontal and vertical flow of run/a.avi, such as run/a/flow_x_00001.jpg')])
def test_ready_made_flow_that_does_not_fit(tmp_path, count, size, message):
    (tmp_path/'flow').mkdir()
    flow_files(tmp_path/'flow', 'dense_flow', count, size)
    with pytest.raises(ValueError, match=f'1 of 1 videos cannot be used.*{message}'): import_flow(tmp_path)
    assert not list((tmp_path/'store').rglob('*.mp4')) and not list((tmp_path/'store').rglob('*.part*'))

def test_ready_made_flow_with_a_gap(tmp_path):
    flow_files(tmp_path/'flow', 'dense_flow', 12)
    for axis, message in (('y', 'holds 12 and 11 pictures'), ('x', 'flow of run/a.avi: the pictures are not one series of numbers without gaps')):
        (tmp_path/'flow'/'run'/'a'/f'flow_{axis}_00004.jpg').unlink()
        with pytest.raises(ValueError, match=message): import_flow(tmp_path)
    with pytest.raises(FileNotFoundError, match='flow_from=None is no folder'): import_flow(tmp_path/'other', settings=PrepareSettings(flow_method='imported'), flow_from=None)
