"Reading and writing video: real odd files (skipped where they are not), damaged files, turned files."
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from vicc import video

shared = Path(__file__).parents[3]/'shared'/'data'
needs_samples = pytest.mark.skipif(not (shared/'official_samples').is_dir(), reason='the official sample videos are not here')
FRAMES = {'hmdb51/cartwheel/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi': 83,  # metadata that is not UTF-8; DivX
          'hmdb51/wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi': 72, 'hmdb51/wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi': 74,
          'hmdb51/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi': 48,
          'ucf101/SoccerJuggling/v_SoccerJuggling_g23_c01.avi': 240, 'kinetics/R6llTwEh07w.mp4': 303}


def noise(count=20, height=48, width=64, seed=0):
    "uint8 [T, H, W, 3]: soft blobs that differ from frame to frame."
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (count, height//8, width//8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)


@needs_samples
@pytest.mark.parametrize('name', FRAMES)
def test_real_files_give_the_right_frames(name):
    path = shared/'official_samples'/name
    truth = video.read_frames(path)
    assert len(truth) == FRAMES[name] == video.probe(path, count=True).num_frames
    asked = np.random.default_rng(0).integers(0, len(truth), 15)
    got = video.read_frames(path, asked)
    assert np.abs(got.astype(int) - truth[asked]).max() <= 2  # two versions of FFmpeg decode MPEG-4
    with pytest.raises(ValueError, match=f'has {FRAMES[name]} frames .* there is no frame {FRAMES[name]}'): video.read_frames(path, [0, FRAMES[name]])


@needs_samples
def test_container_claims_too_many():
    path = shared/'official_samples'/list(FRAMES)[0]
    assert video.probe(path).num_frames == 84 and video.probe(path, count=True).num_frames == 83


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.mov', '.avi', '.ts'])
def test_random_access_in_every_container(tmp_path, suffix):
    path = tmp_path/f'clip{suffix}'
    video.write_video(path, noise(60), gop=25)
    truth = video.read_frames(path)
    assert truth.shape == (60, 48, 64, 3)
    asked = np.random.default_rng(1).integers(0, 60, 30)
    assert np.array_equal(video.read_frames(path, asked), truth[asked])
    assert np.array_equal(video.read_frames(path), truth)
    assert video.probe(path).num_frames == 60


@pytest.mark.parametrize('options', [{}, {'pixel_format': 'yuv444p'}, {'pixel_format': 'gray'}, {'fps': 30000/1001, 'gop': 1}])
def test_round_trip(tmp_path, options):
    frames = noise(10)
    if options.get('pixel_format') == 'gray': frames = frames[..., 0]
    assert video.write_video(tmp_path/'a.mp4', frames, crf=4, **options) == 10
    read = video.read_frames(tmp_path/'a.mp4')
    expected = frames if frames.ndim == 4 else frames[..., None].repeat(3, -1)
    error = np.abs(read.astype(int) - expected)
    assert error.mean() < {'gray': 1, 'yuv444p': 3}.get(options.get('pixel_format'), 6)  # 4:2:0 halves the blobs' colour
    assert video.probe(tmp_path/'a.mp4').fps == pytest.approx(options.get('fps', 25))


def test_odd_sizes(tmp_path):
    frames = noise(6)[:, :47, :61]
    with pytest.raises(ValueError, match="frame 0 is 47×61, .*; only 'yuv444p' takes odd sides"): video.write_video(tmp_path/'a.mp4', frames)
    video.write_video(tmp_path/'a.mp4', frames, pixel_format='yuv444p')
    assert video.read_frames(tmp_path/'a.mp4').shape == frames.shape


def test_same_bytes_in_another_process(tmp_path):
    code = ('import sys; sys.path.insert(0, sys.argv[2]); import test_video; from vicc import video; '
            'video.write_video(sys.argv[1], test_video.noise(30), preset="veryfast")')
    for name in ('a.mp4', 'b.mp4'):
        subprocess.run([sys.executable, '-c', code, str(tmp_path/name), str(Path(__file__).parent)], check=True, capture_output=True)
    digests = {hashlib.sha256((tmp_path/name).read_bytes()).hexdigest() for name in ('a.mp4', 'b.mp4')}
    assert len(digests) == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='MALLOC_PERTURB_ is of glibc')
def test_same_bytes_whatever_lies_in_memory(tmp_path):
    "With other bytes in fresh memory: x264's code for AVX-512 gives other files, at 240x320 and 48x64, with B-frames or without."
    code = ('import sys; sys.path.insert(0, sys.argv[2]); import test_video; from vicc import video; import hashlib\n'
            'for size in ((48, 48), (48, 64), (64, 64), (240, 320)):\n'
            '    for pixel_format in ("yuv420p", "gray"):\n'
            '        frames = test_video.noise(16, *size)\n'
            '        if pixel_format == "gray": frames = frames[..., 0]\n'
            '        video.write_video(sys.argv[1], frames, preset="veryfast", pixel_format=pixel_format)\n'
            '        print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())')
    command = [sys.executable, '-c', code, str(tmp_path/'a.mp4'), str(Path(__file__).parent)]
    digests = {subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {'MALLOC_PERTURB_': byte}).stdout
               for byte in ('1', '85', '255')}
    assert len(digests) == 1 and len(set(digests.pop().split())) == 8


@pytest.mark.parametrize('size', [48, 64, 96, 112])
def test_same_bytes_whatever_lies_on_the_heap(tmp_path, size):
    "x264's look-ahead reads memory that it has not written: with its code for AVX-512 and B-frames this fails."
    frames, rng, digests = noise(32, size, size), np.random.default_rng(0), set()
    for _ in range(20):
        garbage = [np.frombuffer(rng.bytes(int(rng.integers(1000, 3_000_000))), np.uint8).copy() for _ in range(8)]
        del garbage
        video.write_video(tmp_path/'a.mp4', frames, preset='veryfast')
        digests.add(hashlib.sha256((tmp_path/'a.mp4').read_bytes()).hexdigest())
    assert len(digests) == 1


def test_every_frame_of_our_files_is_exact(tmp_path):
    video.write_video(tmp_path/'a.mp4', noise(60, 128, 160), gop=12)
    truth = video.read_frames(tmp_path/'a.mp4')
    for number in range(60): assert np.array_equal(video.read_frames(tmp_path/'a.mp4', [number])[0], truth[number]), number
    for start in range(0, 45): assert np.array_equal(video.read_frames(tmp_path/'a.mp4', np.arange(start, start + 16)), truth[start:start + 16]), start


def test_memory_does_not_grow_with_length(tmp_path):
    alive = 0

    def frames():
        nonlocal alive
        for t in range(300):
            alive = t
            yield np.full((32, 32, 3), t % 256, np.uint8)
    source = frames()
    assert video.write_video(tmp_path/'a.mp4', source) == 300 and alive == 299
    assert video.probe(tmp_path/'a.mp4').num_frames == 300


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    video.write_video(tmp_path/'a.mp4', noise(5))
    before = (tmp_path/'a.mp4').read_bytes()
    code = ('import os, sys; sys.path.insert(0, sys.argv[2]); import test_video; from vicc import video\n'
            'def frames():\n  yield from test_video.noise(8)\n  os._exit(9)\n'
            'video.write_video(sys.argv[1], frames())')
    result = subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.mp4'), str(Path(__file__).parent)], capture_output=True)
    assert result.returncode == 9
    assert (tmp_path/'a.mp4').read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith('.')] == ['a.mp4']


@pytest.mark.parametrize('indices', [None, [0, 50, 99]])
def test_damaged_files(tmp_path, indices):
    video.write_video(tmp_path/'good.mp4', noise(100, 64, 64))
    good = (tmp_path/'good.mp4').read_bytes()
    (tmp_path/'cut.mp4').write_bytes(good[:len(good)*2//3])
    (tmp_path/'hole.mp4').write_bytes(good[:len(good)//3] + bytes(len(good)//3) + good[len(good)//3*2:])
    (tmp_path/'empty.mp4').touch()
    (tmp_path/'text.mp4').write_text('hello')
    for name in ('cut', 'hole', 'empty', 'text'):
        if (name, indices) == ('hole', None): continue  # it is used up to there, with a warning
        with pytest.raises(video.VideoError, match=f'{name}.mp4'): video.read_frames(tmp_path/f'{name}.mp4', indices)
    with pytest.raises(FileNotFoundError, match='gone.mp4'): video.read_frames(tmp_path/'gone.mp4', indices)


@pytest.mark.parametrize('suffix', ['.avi', '.ts', '.mp4'])
def test_a_damaged_film_ends_where_prepare_ends(tmp_path, suffix):
    "In frames, clips and count, with a warning; the frames are those of the whole file. What comes behind is an error."
    video.write_video(tmp_path/f'a{suffix}', noise(100, 64, 64), gop=10)
    data, whole, path = (tmp_path/f'a{suffix}').read_bytes(), video.read_frames(tmp_path/f'a{suffix}'), tmp_path/f'b{suffix}'
    path.write_bytes(data[:len(data)//2] + (bytes(len(data)//4) + data[len(data)*3//4:] if suffix == '.mp4' else b''))
    notes = []
    count = sum(1 for _ in video.undamaged_frames(path, notes.append))
    assert 20 < count < 60 and [note.split(' (')[0] for note in notes] == [f'damaged after {count} frames']
    with pytest.warns(UserWarning, match=f'b{suffix}: damaged after {count} frames .*: the rest is left out'): read = video.read_frames(path)
    assert np.array_equal(read, whole[:count])
    with pytest.warns(UserWarning, match='damaged after'): assert video.probe(path, count=True).num_frames == count
    with pytest.warns(UserWarning, match='damaged after'): clips = list(video.iter_clips(path, 8, step=4))
    assert len(clips) == (count - 8)//4 + 1 and np.array_equal(clips[-1], whole[(count - 8)//4*4:][:8])
    assert np.array_equal(video.read_frames(path, [count - 1, 3]), whole[[count - 1, 3]])
    with pytest.raises(video.VideoError, match=f'b{suffix}'): video.read_frames(path, [count])


@pytest.mark.parametrize('name, value', [('clip_length', 0), ('stride', 0), ('step', 0), ('step', -15), ('stride', 1.5), ('fps', -1), ('fps', float('nan')), ('fps', 1e9)])
def test_clips_of_odd_numbers(tmp_path, name, value):
    video.write_video(tmp_path/'a.mp4', noise(20))
    with pytest.raises(ValueError, match=f'^{name}={value} .*(no whole number from 1|not from 0 to 240)$'): list(video.iter_clips(tmp_path/'a.mp4', **{name: value}))


def write_sound(path):
    "A file with sound and no pictures."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_sound_without_pictures(tmp_path):
    write_sound(tmp_path/'a.mp4')
    for read in (video.read_frames, video.probe):
        with pytest.raises(video.VideoError, match='a.mp4 holds sound only: leave it out'): read(tmp_path/'a.mp4')

def test_a_container_that_is_not_read_is_named(tmp_path):
    with av.open(str(tmp_path/'a.y4m'), 'w') as container:
        stream = container.add_stream('wrapped_avframe', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for frame in noise(3): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24').reformat(format='yuv420p')))
    with pytest.raises(video.VideoError, match='If it is whole, its container is none of mov, mp4, matroska'): video.read_frames(tmp_path/'a.y4m')


def turned(source: Path, target: Path) -> None:
    "A copy of an MP4 file whose header says: turn by a quarter to the right."
    data = bytearray(source.read_bytes())
    place = data.find(b'tkhd') + 4 + 40
    data[place:place + 36] = b''.join(int(value).to_bytes(4, 'big', signed=True) for value in (0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30))
    target.write_bytes(data)


@pytest.mark.skipif(int(video.av.__version__.split('.')[0]) < 14, reason='this PyAV does not tell how a video is turned')
def test_turned_video(tmp_path):
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # the upper left quarter is white
    video.write_video(tmp_path/'a.mp4', frames)
    turned(tmp_path/'a.mp4', tmp_path/'b.mp4')
    for indices in (None, [4, 0]):
        read = video.read_frames(tmp_path/'b.mp4', indices)
        assert read.shape[1:] == (64, 48, 3)
        assert read[0, 16, 36].min() > 200 and read[0, 16, 12].max() < 50 and read[0, 48, 36].max() < 50  # now the upper right
    info = video.probe(tmp_path/'b.mp4')
    assert (info.width, info.height) == (48, 64)


def test_jumps_only_where_they_are_safe(tmp_path):
    for name in ('a.mp4', 'a.avi'): video.write_video(tmp_path/name, noise(30), gop=10)
    frame, = video.jump_to_frames(tmp_path/'a.mp4', [13])
    assert np.array_equal(frame, video.read_frames(tmp_path/'a.mp4')[13])
    assert video.jump_to_frames(tmp_path/'a.avi', [13]) is None


def test_a_jump_decodes_one_group(tmp_path, monkeypatch):
    video.write_video(tmp_path/'a.mp4', noise(60), gop=10)
    asked, truth = [3, 4, 38, 39, 41], video.read_frames(tmp_path/'a.mp4')
    monkeypatch.setattr(video, 'rgb_frames', lambda *_: pytest.fail('read from the start'))
    assert np.array_equal(video.read_frames(tmp_path/'a.mp4', asked), truth[asked])


@pytest.mark.parametrize('indices', [[True, False], np.array([True, False, True]), [0, 1.9], [[0, 1]], [], 3])
def test_frame_numbers_are_one_list_of_whole_numbers(tmp_path, indices):
    video.write_video(tmp_path/'a.mp4', noise(4))
    with pytest.raises(ValueError, match='give one list of whole numbers, such as'): video.read_frames(tmp_path/'a.mp4', indices)
    assert len(video.read_frames(tmp_path/'a.mp4', np.uint8([2, 0]))) == 2

def test_wrong_options(tmp_path):
    with pytest.raises(ValueError, match="pixel_format 'rgb24'"): video.write_video(tmp_path/'a.mp4', noise(2), pixel_format='rgb24')
    assert list(tmp_path.iterdir()) == []


def test_test_clips_cover_what_the_protocol_says():
    for num_frames in range(200):
        clips = video.test_clip_indices(num_frames)
        assert clips.shape[1] == 32 and clips.dtype == np.int64
        if num_frames <= 17: assert len(clips) == 0
        else:
            assert len(clips) == max((num_frames - 32)//15, 0) + 1
            assert clips.min() == 0 and clips.max() < num_frames and (np.diff(clips, axis=1) >= 0).all()
            if num_frames < 32: assert clips[0, -1] == num_frames - 1 and (clips[0, :32 - num_frames + 1] == 0).all()


def test_every_random_clip_fits():
    rng = np.random.default_rng(0)
    for num_frames in (1, 2, 31, 32, 33, 100):
        for stride in (1, 2, 3):
            for _ in range(20):
                start = video.random_clip_start(num_frames, 32, rng, stride)
                clip = video.clip_indices(num_frames, 32, start, stride)
                assert len(clip) == 32 and 0 <= clip.min() and clip.max() < num_frames


@pytest.mark.parametrize('pixel_format', ['yuv420p', 'gray'])
def test_decord_agrees(tmp_path, monkeypatch, pixel_format):
    "Files of ours: every frame and random sets are those that PyAV reads, also without decord; errors too."
    frames = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8)
    video.write_video(tmp_path/'a.mp4', frames if pixel_format == 'yuv420p' else frames[..., 0], gop=8, pixel_format=pixel_format)
    sets = [[number] for number in range(50)] + [np.random.default_rng(seed).integers(0, 50, 12) for seed in range(20)]
    for indices in sets:
        assert np.array_equal(video.read_with_decord(tmp_path/'a.mp4', np.array(indices)), video.read_frames(tmp_path/'a.mp4', indices))
    for wrong in ([50], [-1]):
        with pytest.raises(ValueError, match='there is no frame'): video.read_with_decord(tmp_path/'a.mp4', np.array(wrong))
    monkeypatch.setattr(video, 'decord', None)
    assert np.array_equal(video.read_with_decord(tmp_path/'a.mp4', np.array([3, 29, 3])), video.read_frames(tmp_path/'a.mp4', [3, 29, 3]))
