"""Videos of strangers: turned and mirrored pictures, covers, odd pixels and odd times are shown right, or noted."""
import struct
import subprocess
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pandas as pd
import pytest

from vicc import video
from vicc.flow import dequantise
from vicc.prepare import common_rate, frame_rate_remark, prepare, PrepareSettings, prepare_video, stored_paths

SETTINGS = PrepareSettings(short_side=64, flow_method='farneback')
ONE = 2**16  # in a track header
CORNERS = {  # matrix a, b, c, d -> where players show the white corner, stored at the upper left: top, left
    (1, 0, 0, 1): (True, True), (-1, 0, 0, 1): (True, False), (1, 0, 0, -1): (False, True),
    (-1, 0, 0, -1): (False, False), (0, 1, 1, 0): (True, True), (0, 1, -1, 0): (True, False),
    (0, -1, 1, 0): (False, True), (0, -1, -1, 0): (False, False)}


def moving(count, size=(64, 96), step=3):
    "Noise that moves, so that no frame repeats another."
    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(0, 256, (size[0]//8, size[1]//8, 3), np.uint8), 8, 0), 8, 1)
    return [np.roll(noise, step*number, axis=1) for number in range(count)]


def encode(path, frames, times=None, options=(), codec='libx264', extra=(), rate=25):
    "Write a file with PyAV: times in 1/25 s, and settings of the codec that VideoWriter does not offer."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = 'yuv420p'
        stream.codec_context.options = dict(options)
        for name, value in dict(extra).items(): setattr(stream.codec_context, name, value)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize('matrix', CORNERS)
def test_eight_orientations(tmp_path, matrix):
    frames = np.zeros((20, 64, 96, 3), np.uint8)
    frames[1::2] = 12  # no frame repeats the one before
    frames[:, :16, :48] = 255  # long and low: a swap of the axes shows
    video.write_video(tmp_path/'a.mp4', frames)
    data = (tmp_path/'a.mp4').read_bytes()
    start = data.index(b'tkhd') + 4 + 4 + 20 + 8 + 8
    assert struct.unpack('>9i', data[start:start + 36]) == (ONE, 0, 0, 0, ONE, 0, 0, 0, 2**30)
    a, b, c, d = (ONE*value for value in matrix)
    changed = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 2**30)
    (tmp_path/'b.mp4').write_bytes(data[:start] + changed + data[start + 36:])
    wide, (top, left) = bool(matrix[0]), CORNERS[matrix]
    for shown in (video.read_frames(tmp_path/'b.mp4')[3], video.read_frames(tmp_path/'b.mp4', [3])[0]):
        assert shown.shape == ((64, 96, 3) if wide else (96, 64, 3))
        white = shown[..., 0] > 128
        assert white[0 if top else -1, 0 if left else -1] and white.mean() == pytest.approx(1/8, abs=.02)
        assert white.any(1).sum() == pytest.approx(16 if wide else 48, abs=2)
    info = video.probe(tmp_path/'b.mp4')
    assert (info.height, info.width) == ((64, 96) if wide else (96, 64))
    stored = prepare_video(tmp_path/'b.mp4', stored_paths(tmp_path/'store', 'b.mp4'), SETTINGS)
    assert (stored['height'], stored['width'], stored['note']) == ((64, 96, '') if wide else (96, 64, ''))


def test_a_cover_is_not_the_film(tmp_path):
    "A still as the first stream of a container, as sound shops and download tools put it there."
    with av.open(str(tmp_path/'a.mkv'), 'w') as container:
        cover, film = container.add_stream('mjpeg', rate=25), container.add_stream('libx264', rate=25)
        cover.width, cover.height, cover.pix_fmt = 320, 240, 'yuvj420p'
        film.width, film.height, film.pix_fmt = 96, 64, 'yuv420p'
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((240, 320, 3), 9, np.uint8), format='rgb24')))
        container.mux(cover.encode(None))
        for picture in moving(20): container.mux(film.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(film.encode(None))
    info = video.probe(tmp_path/'a.mkv')
    assert (info.codec, info.height, info.width, info.num_frames) == ('h264', 64, 96, 20)
    assert video.read_frames(tmp_path/'a.mkv', [3, 19]).shape == (2, 64, 96, 3)


def note_of(folder, path):
    "What prepare notes about a video."
    return prepare_video(path, stored_paths(folder/'store', path.name), SETTINGS)['note']


def test_an_ordinary_video_has_no_note(tmp_path):
    encode(tmp_path/'a.mp4', moving(30))
    assert note_of(tmp_path, tmp_path/'a.mp4') == ''


def test_pixels_that_are_not_square_are_noted(tmp_path):
    encode(tmp_path/'a.mp4', moving(20), options={'x264-params': 'sar=2/1'})
    assert video.probe(tmp_path/'a.mp4').pixel_aspect == 2
    assert note_of(tmp_path, tmp_path/'a.mp4') == 'pixels are 2 times as wide as high'


def test_uneven_times_are_noted(tmp_path):
    times = np.cumsum([1, 1, 3, 1, 2, 5, 1, 1, 1, 1]*3)
    encode(tmp_path/'a.mp4', moving(30), times=times.tolist())
    assert 'of 30 frames come at uneven times' in note_of(tmp_path, tmp_path/'a.mp4')


def test_doubled_frames_are_noted(tmp_path):
    frames = [frame for number, frame in enumerate(moving(24)) for _ in range(1 + (number % 4 == 3))]
    encode(tmp_path/'a.mp4', frames)
    assert note_of(tmp_path, tmp_path/'a.mp4') == '6 of 30 frames repeat the frame before'


def test_interlaced_video_is_noted(tmp_path):
    encode(tmp_path/'a.mp4', moving(20), options={'x264-params': 'interlaced=1'})
    assert note_of(tmp_path, tmp_path/'a.mp4') == '20 of 20 frames are interlaced'


def numbered(count, size=(64, 96)):
    "Noise that moves, above eight boxes that say the frame's number in binary."
    frames = [frame.copy() for frame in moving(count, size)]
    for number, frame in enumerate(frames):
        for bit in range(8): frame[size[0]//2:, bit*size[1]//8:(bit + 1)*size[1]//8] = 255*(number >> bit & 1)
    return frames


def numbers(frames):
    "The numbers that frames of `numbered` say."
    half, box = frames.shape[1]//2, frames.shape[2]//8
    bits = frames[:, half + 4:-4, :8*box].reshape(len(frames), -1, 8, box, 3)[:, :, :, 2:-2].mean((1, 3, 4)) > 127
    return (bits*2**np.arange(8)).sum(1).tolist()


def resampled(folder, path, fps, **changes):
    "What prepare stores of a video at this rate: numbers of the frames, rate and note."
    files = stored_paths(folder/f'at-{fps}', path.name)
    stored = prepare_video(path, files, replace(SETTINGS, fps=fps, flow_bound=999, **changes))  # the boxes move fast
    shown = numbers(video.read_frames(files[0]))
    assert len(shown) == stored['num_frames'] == len(video.read_frames(files[1]))
    return shown, stored['fps'], stored['note']


def shown_at(times, fps, last):
    "By hand: frame k is the one that is shown at (k + .22)/fps; the last frame is shown for `last` seconds."
    ends = [*times[1:], times[-1] + last]
    wanted, k = [], 0
    while k + .22 < ends[-1]*fps:
        wanted.append(next(number for number, end in enumerate(ends) if k + .22 < end*fps))
        k += 1
    return wanted


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
@pytest.mark.parametrize('fps', [25., 12.5, 10., 60.])
def test_uneven_times_become_even(tmp_path, suffix, fps):
    times = np.cumsum([0, 1, 1, 3, 1, 2, 5, 1, 1, 1, 1, 2, 7, 1, 1, 4])
    encode(tmp_path/f'a{suffix}', numbered(16), times=times.tolist())
    shown, stored_fps, note = resampled(tmp_path, tmp_path/f'a{suffix}', fps)
    last = 1/video.probe(tmp_path/f'a{suffix}').fps
    expected = shown_at((times/25).tolist(), fps, last)
    assert shown == expected and stored_fps == fps
    assert note.startswith(f'16 frames became {len(expected)} of {fps:g} a second')


@pytest.mark.parametrize('suffix, codec', [('.mp4', 'libx264'), ('.mkv', 'libx264'), ('.avi', 'libx264'), ('.avi', 'mpeg4'), ('.ts', 'mpeg2video')])
def test_the_rate_that_a_file_has_changes_nothing(tmp_path, suffix, codec):
    "Also where the container stores no times, or rounds them."
    encode(tmp_path/f'a{suffix}', numbered(50), codec=codec, options={'bf': '2'}, rate=30000/1001)
    shown, fps, note = resampled(tmp_path, tmp_path/f'a{suffix}', 30000/1001)
    assert shown == list(range(50)) and fps == 29.97 and note == ''


def test_raw_pictures_without_times(tmp_path):
    encode(tmp_path/'a.h264', numbered(40))  # FFmpeg takes 25 a second
    assert resampled(tmp_path, tmp_path/'a.h264', 12.5) == (list(range(0, 40, 2)), 12.5, '40 frames became 20 of 12.5 a second')


@pytest.mark.parametrize('filmed, fps, wanted', [
    (60, 25, [0, 2, 5, 7, 10, 12, 14, 17, 19, 22]), (60, 30, list(range(0, 24, 2))), (100, 25, list(range(0, 24, 4))),
    (25, 50, [number//2 for number in range(48)]), (24, 25, [*range(6), *range(5, 24)])])
@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_other_rates(tmp_path, filmed, fps, wanted, suffix):
    encode(tmp_path/f'a{suffix}', numbered(24), rate=filmed)
    shown, stored_fps, note = resampled(tmp_path, tmp_path/f'a{suffix}', float(fps))
    assert shown == wanted and stored_fps == fps and note.startswith(f'24 frames became {len(wanted)} of {fps} a second')


def test_one_rate_for_all_gives_clips_of_the_same_motion(tmp_path):
    "A film of 72 pixels a second, filmed at three rates: at one rate, frames and flow are those of that rate; else the report says how long clips last."
    (tmp_path/'videos').mkdir()
    for rate in (12, 24, 36): encode(tmp_path/'videos'/f'{rate}.mp4', moving(rate, step=72//rate), rate=rate)
    rows, lines = pd.DataFrame(dict(video=['12.mp4', '24.mp4', '36.mp4'])), []
    for fps, frames, pixels in ((0, [12, 24, 36], [6, 3, 2]), (12, [12]*3, [6]*3)):
        store = prepare(rows, tmp_path/'videos', tmp_path/f'store {fps}', replace(SETTINGS, fps=fps), workers=0, log=lines.append)
        flow = [dequantise(store.read(video, 'flow')[2, 8:-8, 16:-16, 0], 20) for video in rows.video]
        assert store.manifest.num_frames.tolist() == frames and [np.median(u) for u in flow] == pytest.approx(pixels, abs=.5)
    assert 'have 12 (1), 24 (1), 36 (1) frames a second: a clip of 32 frames lasts 0.89 to 2.7 s (a store prepared with --fps 12, store_fps' in lines[0]
    assert len(lines) == 2 and 'a clip of' not in lines[1]
    prepare(store.manifest.assign(fps=[12., 24, 36]), tmp_path/'videos', tmp_path/'known', SETTINGS, workers=0, log=lines.append)
    assert lines[2].startswith('note: videos have 12 (1), ')  # what the manifest knows is said before the work


@pytest.mark.parametrize('rates, shared', [([25]*8 + [30], 25), ([60]*9, 30), ([59.94, 29.97], 29.97), ([50], 25), ([30]*19 + [5], 30), ([.2], 1)])
def test_the_rate_for_all_is_one_that_nine_of_ten_videos_reach(rates, shared):
    assert common_rate(pd.Series(rates, dtype=float)) == pytest.approx(shared)
    assert frame_rate_remark(pd.Series([25., 0, 25.4])) == '' == frame_rate_remark(pd.Series([0.]))


def test_telecine(tmp_path):
    """Film of 24 pictures a second, on television at 30. By flags (a picture is shown for 3, 2, 3, 2 … fields) all come
    back; where pictures were doubled, only as far as the doubled ones are not shown: the note says how many are."""
    fields = np.cumsum([0, *([3, 2]*12)])[:24]
    encode(tmp_path/'flags.mp4', numbered(24), times=fields.tolist(), rate=60)
    assert resampled(tmp_path, tmp_path/'flags.mp4', 24.)[:2] == (list(range(24)), 24)
    film = numbered(24)
    doubled = [number for number in range(24) for _ in range(1 + (number % 4 == 3))]  # A B C D D
    encode(tmp_path/'doubled.mp4', [film[number] for number in doubled], rate=30)
    shown, _, note = resampled(tmp_path, tmp_path/'doubled.mp4', 24.)
    assert shown == list(range(24)) and note == '30 frames became 24 of 24 a second'


@pytest.mark.parametrize('gap', [300, 10**7])
def test_a_long_gap_is_closed_with_a_note(tmp_path, gap):
    "So that a hostile file cannot ask for a year of frames."
    times = [*range(12), *range(12 + gap, 24 + gap)]
    encode(tmp_path/'a.mkv', numbered(24), times=times)
    shown, _, note = resampled(tmp_path, tmp_path/'a.mkv', 25.)
    assert shown == list(range(24)) and note == '1 gaps of more than 10 s are left out'


def test_a_damaged_video_at_another_rate(tmp_path):
    encode(tmp_path/'a.mp4', numbered(100), options={'x264-params': 'bframes=0:keyint=10'})
    data = (tmp_path/'a.mp4').read_bytes()
    (tmp_path/'b.mp4').write_bytes(data[:len(data)//2] + bytes(len(data)//4) + data[len(data)*3//4:])
    shown, _, note = resampled(tmp_path, tmp_path/'b.mp4', 12.5)
    assert shown == list(range(0, 2*len(shown), 2)) and 20 < len(shown) < 35
    assert 'damaged after' in note and 'of 12.5 a second' in note


def test_clips_at_a_rate(tmp_path):
    encode(tmp_path/'a.mp4', numbered(60), rate=50)
    clips = [numbers(clip) for clip in video.iter_clips(tmp_path/'a.mp4', 8, 1, 10, fps=25)]
    assert clips == [list(range(start, start + 16, 2)) for start in (0, 20, 40)]


def interlace(frames):
    "A picture of two: odd lines are of the next frame, as cameras for television made them."
    both = []
    for first, second in zip(frames[::2], frames[1::2]):
        both.append(first.copy())
        both[-1][1::2] = second[1::2]
    return both


def combing(frames):
    "How much lines differ from the mean of their neighbours, more than those two from each other."
    frames = frames.astype(float)
    return np.clip(np.abs(frames[:, 1:-1] - (frames[:, :-2] + frames[:, 2:])/2) - np.abs(frames[:, :-2] - frames[:, 2:]), 0, None).mean()


def test_deinterlacing(tmp_path):
    plain = [cv2.GaussianBlur(frame, (0, 0), 4) for frame in moving(40)]
    encode(tmp_path/'a.mp4', interlace(plain), options={'x264-params': 'interlaced=1', 'crf': '5'})
    encode(tmp_path/'plain.mp4', plain[::2], options={'crf': '5'})
    stored, notes = {}, {}
    for name, settings in dict(a=SETTINGS, done=replace(SETTINGS, deinterlace=True), plain=SETTINGS).items():
        source = tmp_path/f'{"a" if name == "done" else name}.mp4'
        files = stored_paths(tmp_path/name, source.name)
        notes[name] = prepare_video(source, files, settings)['note']
        stored[name] = video.read_frames(files[0])
    assert [len(frames) for frames in stored.values()] == [20]*3
    assert combing(stored['done']) < 1.5*combing(stored['plain']) < combing(stored['a'])/5
    assert notes == dict(a='20 of 20 frames are interlaced', done='20 of 20 frames are interlaced, and their missing lines filled in', plain='')


@pytest.mark.parametrize('suffix, codec, interlaced', [('.mp4', 'libx264', False), ('.avi', 'mpeg4', False), ('.gif', 'gif', False)])
def test_deinterlacing_leaves_other_videos_alone(tmp_path, suffix, codec, interlaced):
    path = tmp_path/f'a{suffix}'
    if codec == 'gif': video.write_video(tmp_path/'b.mp4', moving(12)), subprocess.run(['ffmpeg', '-v', 'error', '-i', tmp_path/'b.mp4', path], check=True)
    else: encode(path, moving(30), codec=codec)
    for name, settings in dict(plain=SETTINGS, done=replace(SETTINGS, deinterlace=True)).items(): prepare_video(path, stored_paths(tmp_path/name, path.name), settings)
    for stream in ('rgb', 'flow'):
        assert (tmp_path/'plain'/stream/'a.mp4').read_bytes() == (tmp_path/'done'/stream/'a.mp4').read_bytes()


def test_deinterlacing_keeps_times_and_takes_other_sizes(tmp_path):
    "Pictures of old containers keep their clock; a size that changes needs a new filter."
    encode(tmp_path/'a.avi', interlace(numbered(48)), options={'x264-params': 'interlaced=1:bframes=2'})
    shown, _, note = resampled(tmp_path, tmp_path/'a.avi', 25., deinterlace=True)
    assert len(shown) == 24 and 'became' not in note
    for name, size in dict(b=(64, 96), c=(96, 128)).items(): encode(tmp_path/f'{name}.h264', interlace(moving(20, size)), options={'x264-params': 'interlaced=1'})
    (tmp_path/'d.h264').write_bytes((tmp_path/'b.h264').read_bytes() + (tmp_path/'c.h264').read_bytes())
    assert 'frame 10 changes size from 64×96 to 96×128' in prepare_video(tmp_path/'d.h264', stored_paths(tmp_path/'d', 'd.h264'), replace(SETTINGS, deinterlace=True))['note']
