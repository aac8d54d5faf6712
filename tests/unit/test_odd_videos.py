"""Videos of strangers: turned and mirrored pictures, covers, odd pixels and odd times are shown right, or noted."""
import struct

import av
import numpy as np
import pytest

from vicc import video
from vicc.prepare import PrepareSettings, prepare_video, stored_paths

SETTINGS = PrepareSettings(short_side=64, flow_method='farneback')
ONE = 2**16  # in a track header
CORNERS = {  # matrix a, b, c, d -> where players show the white corner, stored at the upper left: top, left
    (1, 0, 0, 1): (True, True), (-1, 0, 0, 1): (True, False), (1, 0, 0, -1): (False, True),
    (-1, 0, 0, -1): (False, False), (0, 1, 1, 0): (True, True), (0, 1, -1, 0): (True, False),
    (0, -1, 1, 0): (False, True), (0, -1, -1, 0): (False, False)}


def moving(count, size=(64, 96)):
    "Noise that moves, so that no frame repeats another."
    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(0, 256, (size[0]//8, size[1]//8, 3), np.uint8), 8, 0), 8, 1)
    return [np.roll(noise, 3*number, axis=1) for number in range(count)]


def encode(path, frames, times=None, options=(), codec='libx264', extra=()):
    "Write a file with PyAV: times in 1/25 s, and settings of the codec that VideoWriter does not offer."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
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
