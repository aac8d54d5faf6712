"A few of the damaged and hostile videos of fuzz_videos.py: used, refused in words, or the end of a worker, and nothing else. `python tests/robustness/fuzz.py` tries thousands."
import numpy as np
import pytest
from fuzz_videos import ENDINGS, FOREIGN, FORMATS, MUTATIONS, PROBLEMS, absurd_stream, case, fuzz_videos, make_seeds, payload, pieces

from vicc.video import VideoError, probe, read_frames

@pytest.fixture(scope='module')
def seeds():
    return make_seeds()

def test_seeds_are_good_videos(seeds, tmp_path):
    assert len(seeds) == 2*len(FORMATS)
    for name, data in seeds.items():
        (tmp_path/name).write_bytes(data)
        large = name.startswith('large-')
        assert read_frames(tmp_path/name).shape == ((6, 80, 112, 3) if large else (20, 48, 64, 3))
        first, last = payload(data)
        assert 0 < first < last < len(data) and len(pieces(data)) > 15

def test_cases_are_fixed_by_seed_and_number(seeds):
    for number in range(0, 720, 17): assert case(seeds, 3, number) == case(seeds, 3, number)
    kinds = [case(seeds, 0, number)[:2] for number in range(len(FORMATS)*len(MUTATIONS))]
    assert len(set(kinds)) == len(kinds)  # all formats and kinds, one after the other

@pytest.mark.parametrize('name', ['h264.mp4', 'hevc.mp4', 'mpeg4.avi', 'vp9.mkv'])
def test_sizes_are_claimed_in_the_stream_itself(name, seeds, tmp_path):
    sizes = set()
    for number in range(8):
        (tmp_path/name).write_bytes(absurd_stream(seeds[f'large-{name}'], np.random.default_rng(number)))
        try: info = probe(tmp_path/name)
        except VideoError as error: assert name in str(error)
        else: sizes.add((info.height, info.width))
    assert sizes - {(80, 112)}

def test_no_video_does_harm():
    rows = fuzz_videos(len(FORMATS)*len(MUTATIONS), seed=5, isolated=False)  # none of these costs much time or memory
    assert sum(row['tried'] for row in rows) == len(FORMATS)*len(MUTATIONS)
    assert [row['first_problem'] for row in rows if any(row[name] for name in PROBLEMS)] == []
    assert sum(row['accepted'] for row in rows) > 20 and sum(row['refused'] for row in rows) > 20

def test_a_file_may_have_any_name(seeds, tmp_path):
    for ending in ENDINGS:
        (tmp_path/f'case{ending}').write_bytes(seeds['h264.mp4'])
        assert probe(tmp_path/f'case{ending}').num_frames == len(read_frames(tmp_path/f'case{ending}')) == 20

def test_a_playlist_opens_nothing_else(seeds, tmp_path):
    (tmp_path/'neighbour.mp4').write_bytes(seeds['h264.mp4'])
    for name in ('list', 'playlist', 'sdp', 'dash'):
        (tmp_path/'case.mp4').write_bytes(FOREIGN[name])
        with pytest.raises(VideoError, match='case.mp4'): read_frames(tmp_path/'case.mp4')
