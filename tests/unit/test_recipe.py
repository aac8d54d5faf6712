"Bad input gets a sentence that names the file and says what to do, before long work starts."

import pandas as pd
import pytest

from vicc.recipe import Recipe

from vicc.engine.io import find_project, HOST

from vicc.alternation import alternate
from vicc.data import TestClips, TwoStreamDataset
from vicc.evaluation import evaluate_files
from vicc.manifests import read_manifest
from vicc.prepare import PrepareSettings, Store, finalize_store, init_store, prepare, prepare_video
from vicc.evaluation import extract_features
from vicc.synthetic import make_moving_shapes
from vicc.video import VideoError, read_frames

SETTINGS = PrepareSettings(short_side=64, flow_method='farneback', flow_bound=5)

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_moving_shapes(tmp_path_factory.mktemp('shapes'), 8, 8)

@pytest.fixture(scope='module')
def demo():
    return find_project(__file__)/'nbs'/'recipes'/'demo.yaml'

@pytest.fixture(scope='module')
def store(shapes, tmp_path_factory):
    "Two of the videos, as the demo's recipe wants them."
    folder, rows = tmp_path_factory.mktemp('prepared'), read_manifest(shapes['train'])[:2]
    init_store(folder, SETTINGS)
    return finalize_store(folder, rows, {video: prepare_video(shapes['videos']/video, folder/'rgb'/video, folder/'flow'/video, SETTINGS) for video in rows.video}, {}, 0)

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
    with pytest.raises(ValueError, match='less.yaml: temperature must be given: a recipe holds every value'): Recipe.read(tmp_path/'less.yaml')

def test_a_preparation_that_was_killed_goes_on(shapes, tmp_path):
    "What a kill leaves is made by hand here; real ones are in test_prepare.test_a_kill."
    settings, quiet = PrepareSettings(short_side=64, flow_method='farneback', flow_bound=5), dict(workers=0, log=lambda line: None)
    rows = read_manifest(shapes['train'])[:3]
    whole = prepare(rows, shapes['videos'], tmp_path/'store', settings, **quiet)
    for name in ('manifest.csv', 'checksums.csv', 'report.json', 'problems.csv'): (tmp_path/'store'/name).unlink()
    whole.file(rows.video[2], 'flow').unlink()
    whole.file(rows.video[2], 'rgb').with_name(f'.half.{HOST}-4194305.part.mp4').write_bytes(b'half')  # no process has this number
    with pytest.raises(FileNotFoundError, match='not a finished store'): Store(tmp_path/'store')
    done = {path: path.stat().st_mtime_ns for video in rows.video[:2] for path in (whole.file(video, 'rgb'), whole.file(video, 'flow'))}
    store = prepare(rows, shapes['videos'], tmp_path/'store', settings, **quiet)
    assert not list(tmp_path.rglob('*.part.*')) and len(store.manifest) == 3 and store.report['videos_made'] == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for row in store.manifest.itertuples():
        for stream in ('rgb', 'flow'): assert len(store.read(row.video, stream)) == row.num_frames == 16

@pytest.mark.parametrize('change, message', [
    (dict(short_side=48), 'short_side is 64, not 48'), (dict(flow_bound=20.0), 'flow_bound is 5, not 20.0'), (dict(flow_method='dis'), 'flow_method is farneback, not dis')],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_store_of_another_recipe(store, demo, tmp_path, change, message):
    recipe = Recipe.read(demo, **change)
    rows = store.manifest
    begun = {'training': lambda: alternate(recipe, store, tmp_path/'run'), 'evaluation': lambda: evaluate_files({'rgb': tmp_path/'nothing'}, store, rows, rows, recipe)}
    for what, work in begun.items():
        with pytest.raises(ValueError, match=rf'made with other settings \({message}\): prepare a store with this recipe'): work()
    assert not (tmp_path/'run').exists()
    Recipe.read(demo).check_store(store)  # and the right one passes

def test_store_grown_with_other_settings(shapes, store):
    before = sorted(store.path.rglob('*'))
    for change, message in ((dict(short_side=48), 'short_side is 64, not 48'), (dict(flow_bound=20.0), 'flow_bound is 5, not 20.0')):
        settings = PrepareSettings(**{**dict(short_side=64, flow_method='farneback', flow_bound=5), **change})
        with pytest.raises(ValueError, match=f'made with other settings .{message}.: choose another folder'): prepare(shapes['train'], shapes['videos'], store.path, settings)
    assert sorted(store.path.rglob('*')) == before

def test_store_grown_with_other_class_names(shapes, store):
    rows = read_manifest(shapes['test'])
    other = rows.assign(class_name='act ' + rows.class_name)
    with pytest.raises(ValueError, match="column class_name: label 0 is 'act slide_x' here and 'slide_x' before: make them the same"):
        prepare(other, shapes['videos'], store.path, SETTINGS)
    assert len(Store(store.path).manifest) == 2

def test_store_of_other_videos(shapes, store):
    with pytest.raises(ValueError, match='none of the 8 videos of the manifest is in the store'): store.select(read_manifest(shapes['test']))
    assert len(store.select(read_manifest(shapes['train']))) == 2

def test_clips_that_do_not_fit_the_store(store):
    with pytest.raises(ValueError, match='all 2 videos have fewer than 18 frames'): TestClips(store)  # the paper's values on videos of 16 frames
    clips = TestClips(store, clip_length=8, min_frames=1)
    with pytest.raises(ValueError, match='a crop of 224 does not fit into frames of 64×64: lower test_crop'): extract_features(lambda views: views.flatten(1), clips, size=32, crop=224)
    for make in (lambda: TestClips(store, stream='depth', clip_length=8, min_frames=1), lambda: TwoStreamDataset(store, streams=('rgb', 'depth'))):
        with pytest.raises(ValueError, match="stream 'depth' is not 'rgb' or 'flow'"): make()

def test_damaged_store_settings(store, tmp_path):
    (tmp_path/'manifest.csv').write_text((store.path/'manifest.csv').read_text())
    for text in ('{', '{}', '{"settings": {"size": 64}}', '{"settings": {"short_side": 2}}'):
        (tmp_path/'settings.json').write_text(text)
        with pytest.raises(ValueError, match='settings.json|short_side'): Store(tmp_path)

def test_labels_out_of_range_and_twice(tmp_path):
    (tmp_path/'m.csv').write_text('video,label,class_name\na.mp4,0,run\nb.mp4,101,jump\n')
    with pytest.raises(ValueError, match='m.csv: row 3, column label: 101 is not one of 0 … 100: correct it'): read_manifest(tmp_path/'m.csv', num_classes=101)
    (tmp_path/'m.csv').write_text('video,label\na.mp4,0\nb.mp4,1\na.mp4,0\n')
    with pytest.raises(ValueError, match="m.csv: row 4, column video: 'a.mp4' is there twice: take one of the two out"): read_manifest(tmp_path/'m.csv')
