"Bad input gets a sentence that names the file and says what to do, before long work starts."

from dataclasses import fields

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter

from vicc.augment import ViewSettings
from vicc.recipe import Recipe, stage_keys, suggest_recipe, TO_LOOK_AT
from vicc.trainer import StageConfig

from vicc.engine.io import find_project, HOST

from vicc.alternation import alternate
from vicc.cli import main as vicc
from vicc.data import TestClips, TwoStreamDataset
from vicc.manifests import read_manifest
from vicc.prepare import PrepareSettings, Store, prepare
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
    rows = read_manifest(shapes['train'])[:2]
    return prepare(rows, shapes['videos'], tmp_path_factory.mktemp('prepared'), SETTINGS, workers=0, log=lambda line: None)

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

def test_all_wrong_values_are_listed_and_those_of_the_command_line_are_called_so(demo):
    wrong = 'temperature=warm', 'momentum=x', 'seed=-1', 'view_size=0', 'temprature=1'
    with pytest.raises(ValueError, match=r'demo.yaml with --set temperature=warm .*: seed is .*view_size is .*temperature is .*momentum is .*unknown key'): Recipe.read(demo, *wrong)
    assert Recipe.read(demo, 'mixed_precision=no').mixed_precision == 'no' == Recipe.read(demo, mixed_precision=False).mixed_precision

def test_auto_is_bf16_on_newer_gpus_and_float32_elsewhere(monkeypatch):
    paper = Recipe.read('ucf101_s3d')
    for capability, best in (((8, 0), 'bf16'), ((7, 5), 'no')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
        assert [paper.precision(device) for device in ('cuda', 'cpu', 'mps', '')] == [best, 'no', 'no', best]
        assert [paper.replace(mixed_precision=given).precision() for given in ('no', 'fp16', 'bf16')] == ['no', 'fp16', 'bf16']
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    assert paper.precision() == 'no'
    monkeypatch.delenv('ACCELERATE_USE_CPU')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert (paper.precision(), paper.precision('cuda')) == ('no', 'bf16')  # a plan for another machine

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
    (dict(short_side=48), 'short_side is 64, not 48'), (dict(flow_bound=20.0), 'flow_bound is 5, not 20.0'), (dict(flow_method='dis'), 'flow_method is farneback, not dis'),
    (dict(store_fps=12.5), 'fps is 0.0, not 12.5')],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_store_of_another_recipe(store, demo, tmp_path, change, message):
    recipe = Recipe.read(demo, **change)
    with pytest.raises(ValueError, match=rf'made with other settings \({message}\): prepare another folder with this recipe \(vicc prepare … --short-side {recipe.short_side} --flow-method {recipe.flow_method}'):
        alternate(recipe, store, tmp_path/'run')
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
    with pytest.raises(ValueError, match="column class_name: label 0 is 'act slide_x' here, and 'slide_x' in the store's manifest"):
        prepare(other, shapes['videos'], store.path, SETTINGS)
    assert len(Store(store.path).manifest) == 2

def test_store_of_other_videos(shapes, store):
    with pytest.raises(ValueError, match='8 of 8 videos of the manifest are not in the store'): store.select(read_manifest(shapes['test']))
    with pytest.warns(UserWarning, match='6 of 8 videos'): assert len(store.select(read_manifest(shapes['train']), max_failed=1)) == 2

def test_clips_that_do_not_fit_the_store(store):
    with pytest.raises(ValueError, match='all 2 videos have fewer than 18 frames'): TestClips(store)  # the paper's values on videos of 16 frames
    clips = TestClips(store, clip_length=8, min_frames=1)
    with pytest.raises(ValueError, match='a crop of 224 does not fit into frames of 64×64: lower test_crop'): extract_features(lambda views: views.flatten(1), clips, size=32, crop=224)
    for make in (lambda: TestClips(store, stream='depth', clip_length=8, min_frames=1), lambda: TwoStreamDataset(store, streams=('rgb', 'depth'))):
        with pytest.raises((ValueError, KeyError), match='depth'): make()

def test_damaged_store_settings(store, tmp_path):
    (tmp_path/'manifest.csv').write_text((store.path/'manifest.csv').read_text())
    for text in ('{', '{}', '{"settings": {"size": 64}}', '{"settings": {"short_side": 2}}'):
        (tmp_path/'settings.json').write_text(text)
        with pytest.raises(ValueError, match='settings.json|short_side'): Store(tmp_path)

def test_a_video_twice(tmp_path):
    (tmp_path/'m.csv').write_text('video,label\na.mp4,0\nb.mp4,1\na.mp4,1\n')
    with pytest.raises(ValueError, match="m.csv: row 4, column video: 'a.mp4' is there twice, with another label or group: take one of the two out"): read_manifest(tmp_path/'m.csv')
    (tmp_path/'m.csv').write_text('video,label\na.mp4,0\nb.mp4,1\na.mp4,0\n')
    with pytest.warns(UserWarning, match='m.csv: 1 rows repeat an earlier one'): assert read_manifest(tmp_path/'m.csv').video.tolist() == ['a.mp4', 'b.mp4']

def test_recipe_and_configs_have_the_same_defaults_and_ranges():
    "A recipe states every value; StageConfig and ViewSettings are what the library's functions take."
    recipe = Recipe()
    assert (recipe.plan()[0].settings, recipe.view_settings()) == (StageConfig(), ViewSettings())
    schema, keys = Recipe.model_json_schema()['properties'], {}
    for field in fields(StageConfig):
        found = {key for kind in ('single', 'cross') for stream in ('rgb', 'flow') for key in stage_keys(field.name, kind, stream)}
        keys[field.name] = sorted(found & schema.keys())
    def least(facts): return facts.get('minimum', facts.get('exclusiveMinimum')), 'exclusiveMinimum' in facts
    for name, facts in TypeAdapter(StageConfig).json_schema()['properties'].items():
        if 'anyOf' in facts or 'enum' in facts: continue  # schedule_epochs, gradient_views: written in another way
        for key in keys[name]: assert least(schema[key]) == least(facts) and schema[key]['type'] == facts['type'], key

@pytest.mark.parametrize('gpus', [1, 3, 4, 8, 32])
@pytest.mark.parametrize('clips', [1600, 9537, 240_000])
def test_a_suggested_recipe_fits_clips_and_gpus(clips, gpus):
    recipe, table = suggest_recipe(clips, gpus)
    for stage in recipe.plan():
        stage.settings.divide_batch(gpus)
        assert 0 < stage.settings.batch_size//gpus//stage.settings.accumulate <= 48 and stage.settings.batch_size*25 <= max(clips, 16*25)
        assert stage.settings.queue_length % gpus == 0 and stage.settings.queue_start_epoch < stage.settings.epochs
    assert recipe.num_prototypes <= max(2, clips/31) and (table.why.str.len() > 5).all()
    assert {name: getattr(recipe, name) for name in table.index} == table.value.to_dict()
    paper = Recipe.read('ucf101_s3d')
    assert all(getattr(recipe, name) == value for name, value in paper.model_dump().items() if name not in table.index)

def test_suggestions_are_the_papers_where_the_paper_was(tmp_path):
    assert suggest_recipe(9537, 4)[0] == Recipe.read('ucf101_s3d')
    one = suggest_recipe(9537, 1)[0]
    assert one == Recipe.read('ucf101_s3d', accumulate=4)
    one.write(tmp_path/'mine.yaml')
    assert Recipe.read(tmp_path/'mine.yaml') == one
    assert suggest_recipe(49)[0].single_batch_size == 16
    assert suggest_recipe(20_000, 4, 'k400_s3d')[0].save_every_steps == 0  # 104 steps an epoch, not 1,250
    assert suggest_recipe(500, 1, 'demo')[1].why.num_prototypes == 'that of the base, or fewer: each needs about 298 videos, and 1 clips of batch and queue'
    for clips in (5000, 20_000, 240_000):  # the same epochs from the recipe for 240,000 as from that for 9,537
        a, b = (suggest_recipe(clips, 4, base)[0] for base in ('ucf101_s3d', 'k400_s3d'))
        assert all(abs(getattr(a, name) - getattr(b, name)) <= 2 for name in ('single_epochs_rgb', 'single_queue_start_flow', 'cross_epochs'))
    for clips, gpus in ((1, 1), (100, 16)):
        with pytest.raises(ValueError, match=f'{clips} clips do not give batches that {gpus} GPUs can divide'): suggest_recipe(clips, gpus)

def videos_with(**columns): return pd.DataFrame(dict(video=map(str, range(1000)), num_frames=0, fps=0., width=0, height=0) | columns)

@pytest.mark.parametrize('columns, decided', [
    ({}, {}), (dict(height=480, width=640, fps=25., num_frames=100), {}),  # nothing is known; nothing is in the way
    (dict(height=640, width=100), dict(short_side=100, view_size=100, test_crop=0)),  # upright
    (dict(height=[480]*990 + [160]*10, width=640), dict(test_crop=0)), (dict(fps=[25.]*500 + [30.]*500), dict(store_fps=25)), (dict(fps=60.), dict(store_fps=30)),
    (dict(num_frames=[20]*200 + [90]*800), dict(clip_length=16, min_frames=16)), (dict(num_frames=5), dict(clip_length=8, min_frames=8)),
    (dict(num_frames=60, fps=60.), dict(store_fps=30, clip_length=24)), (dict(num_frames=[60]*500 + [0]*500, fps=[60.]*500 + [0.]*500), dict(store_fps=30, clip_length=24))])
def test_a_manifest_that_knows_its_videos_decides_more(columns, decided):
    recipe, table = suggest_recipe(videos_with(**columns), 4)
    assert recipe == suggest_recipe(1000, 4)[0].replace(**decided)
    asked = set(table.index[table.why.str.startswith('look: ')])
    groups = dict(fps={'store_fps'}, num_frames={'clip_length', 'min_frames'}, height={'short_side', 'view_size', 'test_crop'})
    assert asked == set(TO_LOOK_AT) - set().union(*(names for name, names in groups.items() if name in columns))

def test_the_command_writes_a_recipe_and_what_comes_next(shapes, tmp_path, capsys):
    rows = read_manifest(shapes['train']).assign(num_frames=0, fps=0., height=0)
    rows.to_csv(tmp_path/'m.csv', index=False)
    words = [str(tmp_path/'mine.yaml'), '--manifest', str(tmp_path/'m.csv'), '--base', 'demo']
    vicc(['suggest', *words, '--videos', str(shapes['videos'])])
    text = before = capsys.readouterr().out
    assert Recipe.read(tmp_path/'mine.yaml') == suggest_recipe(rows.assign(num_frames=16, fps=12., height=64, width=64), 1, 'demo')[0]
    assert '8 videos have 12 frames a second' in text and '\n  vicc train --recipe ' in text and '--gpus 1 --frames 16' in text and f"{shapes['videos']} STORE --short-side 64 --flow-method farneback --flow-bound 5.0" in text
    vicc(['suggest', str(tmp_path/'four.yaml'), *words[1:], '--gpus', '4'])
    text = capsys.readouterr().out
    assert 'no frame rate is known, so store_fps is left to you' in text and 'left to you' not in before
    assert "\n  torchrun --standalone --nproc-per-node 4 -m vicc.alternation --prepared" in text.replace(f" --recipe {tmp_path/'four.yaml'} --manifest {tmp_path/'m.csv'}", '')
    for wrong, said in ((words, 'does not exist yet'), ([str(tmp_path/'new.yaml'), *words[1:], '--videos', str(tmp_path)], '8 of 8 videos cannot be read'),
                        ([str(tmp_path/'new.yaml'), *words[1:], '--gpus', '0'], 'at least one process')):
        with pytest.raises(SystemExit): vicc(['suggest', *wrong])
        assert said in capsys.readouterr().err and not (tmp_path/'new.yaml').exists()
