"Bad input gets a sentence that names the file and says what to do, before long work starts."
import subprocess
import sys

import pandas as pd
import pytest

from vicc.alternation import Recipe, find_project
from vicc.manifests import read_manifest
from vicc.prepare import PrepareSettings, Store, prepare
from vicc.synthetic import make_moving_shapes
from vicc.video import VideoError, read_frames

SETTINGS = PrepareSettings(short_side=64, flow_method='farneback', flow_bound=5)

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 8, 8)

def test_missing_video_is_named_before_any_work(shapes, tmp_path):
    rows = read_manifest(shapes['train'])
    rows.loc[3, 'video'] = 'grow/gone.mp4'
    with pytest.raises(FileNotFoundError, match='grow/gone.mp4'): prepare(rows, shapes['videos'], tmp_path/'store', SETTINGS)
    assert not (tmp_path/'store').exists()

def test_text_named_mp4(tmp_path):
    (tmp_path/'notes.mp4').write_text('not a video')
    with pytest.raises(VideoError, match='notes.mp4 .* cannot be decoded'): read_frames(tmp_path/'notes.mp4')

def test_empty_manifest(tmp_path):
    (tmp_path/'empty.csv').touch()
    with pytest.raises(ValueError, match='empty.csv'): read_manifest(tmp_path/'empty.csv')
    pd.DataFrame(columns=['video', 'label']).to_csv(tmp_path/'no_rows.csv', index=False)
    with pytest.raises(ValueError, match='no_rows.csv'): read_manifest(tmp_path/'no_rows.csv')

def test_unknown_and_missing_recipe_keys(tmp_path):
    demo = (find_project(__file__)/'nbs'/'recipes'/'demo.yaml').read_text()
    (tmp_path/'more.yaml').write_text(demo + '\nnum_prototype: 3\n')
    with pytest.raises(ValueError, match=r'more.yaml: unknown key .num_prototype. \(did you mean num_prototypes\?\)'): Recipe.read(tmp_path/'more.yaml')
    (tmp_path/'less.yaml').write_text(demo.replace('temperature: 0.1', ''))
    with pytest.raises(ValueError, match='less.yaml: the key temperature must be given'): Recipe.read(tmp_path/'less.yaml')

def test_a_killed_preparation_goes_on(shapes, tmp_path):
    command = [sys.executable, '-m', 'vicc.prepare', str(shapes['train']), str(shapes['videos']), str(tmp_path/'store'), '--short-side=64', '--flow-method=tvl1', '--flow-bound=5',
               '--workers=1']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob('store/rgb/*/*.mp4')) and process.poll() is None: pass
    finally: process.kill(); process.wait()
    assert 0 < len(list(tmp_path.glob('store/rgb/*/*.mp4'))) < 8
    with pytest.raises(FileNotFoundError, match='not a finished store'): Store(tmp_path/'store')
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob('store/rgb/*/*.mp4')}
    store = prepare(shapes['train'], shapes['videos'], tmp_path/'store', PrepareSettings(short_side=64, flow_method='tvl1', flow_bound=5), workers=2)
    assert len(store.manifest) == 8
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for row in store.manifest.itertuples():
        for stream in ('rgb', 'flow'): assert len(store.read(row.video, stream)) == row.num_frames == 16
