"""Every frame of every kind of file: random access gives what reading in order gives.

30 files: codecs × kinds of GOP × containers. The quick form asks for some sets of frames a file; all of them with
VICC_EXACT=full: every frame alone, every clip of 16, and 200 random sets.
"""
import os

import av
import numpy as np
import pytest

from vicc.video import decoded_frames, read_frames, to_rgb

H264 = {
    'closed': {'x264-params': 'keyint=12:min-keyint=12:open-gop=0:bframes=2'},
    'open': {'x264-params': 'keyint=12:min-keyint=12:open-gop=1:bframes=3'},
    'refresh': {'x264-params': 'keyint=24:intra-refresh=1:bframes=0'},
    'refresh-b': {'x264-params': 'keyint=24:intra-refresh=1:bframes=2'},
    'long': {'x264-params': 'keyint=250'},
}
HEVC = {
    'closed': {'x265-params': 'keyint=12:min-keyint=12:open-gop=0:log-level=error'},
    'open': {'x265-params': 'keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=error'},
}
KINDS = [('libx264', kind, options, suffix) for kind, options in H264.items() for suffix in ('.mp4', '.mkv', '.avi')]
KINDS += [('libx265', kind, options, suffix) for kind, options in HEVC.items() for suffix in ('.mp4', '.mkv')]
KINDS += [('mpeg4', kind, {'bf': kind}, suffix) for kind in ('0', '2') for suffix in ('.mp4', '.avi', '.mkv')]
KINDS += [('mpeg2video', '2', {'bf': '2'}, suffix) for suffix in ('.mkv', '.ts')]
KINDS += [('libvpx-vp9', 'alt-ref', {'auto-alt-ref': '1', 'cpu-used': '8'}, '.webm'), ('mjpeg', 'intra', {}, '.avi'),
          ('libx264', 'closed', H264['closed'], '.ts')]
COUNT, HEIGHT, WIDTH = 60, 128, 160  # x265 needs 128 pixels


def pictures():
    "Frames that all differ everywhere, so that a wrong one shows."
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(COUNT):
        waves = [np.sin((rows*(1 + channel) + columns)/17 + number*.7) for channel in range(3)]
        picture = (127 + 90*np.stack(waves, -1)).astype(np.uint8)
        picture[20:60, (5*number) % 100:(5*number) % 100 + 40] = (number*4) % 256
        yield picture


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Paths of files, each made when it is first asked for."
    folder, made = tmp_path_factory.mktemp('exact'), {}

    def make(codec, kind, options, suffix):
        path = folder/f'{codec}-{kind}{suffix}'
        if path in made: return path
        with av.open(str(path), 'w') as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
            stream.codec_context.gop_size, stream.codec_context.options = 12, options
            for number, picture in enumerate(pictures()):
                frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        made[path] = True
        return path
    return make


@pytest.mark.parametrize('codec, kind, options, suffix', KINDS, ids=lambda value: str(value)[:12])
def test_any_frames_of_any_file(files, codec, kind, options, suffix):
    path = files(codec, kind, options, suffix)
    in_order = np.stack([to_rgb(frame) for frame in decoded_frames(path)])
    assert len(in_order) == COUNT and len({frame.tobytes() for frame in in_order}) == COUNT
    rng, full = np.random.default_rng(0), os.environ.get('VICC_EXACT') == 'full'
    singles = range(COUNT) if full else (0, 13, 30, 59)
    clips = range(COUNT - 15) if full else (7, 20, 44)
    wanted = [[number] for number in singles] + [list(range(start, start + 16)) for start in clips]
    wanted += [rng.permutation(COUNT)[:rng.integers(2, 12)].tolist() for _ in range(200 if full else 4)]
    for numbers in wanted:
        assert np.array_equal(read_frames(path, numbers), in_order[numbers]), numbers
