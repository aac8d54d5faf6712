"The experiments run by papermill, small; recipes and parameters belong together."
import json
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pandas as pd
import papermill as pm
import pytest
import yaml

from vicc.manifests import folder_manifest, write_manifest
from vicc.recipe import Recipe
from vicc.video import read_frames

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT/'nbs').glob('run_*.ipynb'))
RECIPES = sorted((ROOT/'nbs'/'recipes').glob('*.yaml'))
UT_INTERACTION = ROOT.parent/'shared'/'data'/'ut_interaction_set1'
TINY = dict(single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=1, cycles=1, cross_freeze_prototypes=0, single_batch_size=8, cross_batch_size=8, num_prototypes=6,
            backbone_options={'width': 4}, projection_dim=8)  # values of the recipe, as `-p name value`

def execute(values: dict, folder: Path, name: str = 'run_pretrain') -> nbformat.NotebookNode:
    "Run an experiment from the root of the project, as a user would."
    return pm.execute_notebook(ROOT/'nbs'/f'{name}.ipynb', folder/'out.ipynb', values, progress_bar=False, cwd=ROOT)

def pictures(notebook: nbformat.NotebookNode) -> int:
    "How many pictures a notebook shows."
    return sum('image/png' in output.get('data', {}) for cell in notebook.cells for output in cell.get('outputs', []))

@pytest.mark.timeout(300)
def test_pretrain_makes_its_own_data_and_goes_on(tmp_path):
    values = dict(TINY, num_train_videos=16, num_test_videos=8, output=str(tmp_path/'run'), collapse_lesson=True,
                  backbone_options="{'width': 4}", weight_decay='2e-5')  # texts, as -p gives them
    notebook = execute(values, tmp_path)
    metrics = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert metrics['recipe']['num_prototypes'] == 6 and metrics['train_videos'] == 16
    assert metrics['recipe']['backbone_options'] == {'width': 4} and metrics['recipe']['weight_decay'] == 2e-5
    assert set(metrics['results']) == {'chance', 'random rgb', 'random flow', 'rgb-1', 'flow-1', 'rgb-2 cycle 1', 'flow-2 cycle 1'}
    assert metrics['results']['chance'].keys() == {'R@1', 'R@5', 'R@10', 'quick probe'} and metrics['results']['chance']['R@1'] == 0.125
    rgb = metrics['results']['rgb-1']
    assert rgb['R@1 low'] <= rgb['R@1'] <= rgb['R@1 high'] and list(metrics['gains']) == ['rgb-2 cycle 1 − rgb-1', 'flow-2 cycle 1 − flow-1']
    assert pictures(notebook) >= 8
    for name in ('history.csv', 'results.csv', 'recipe.yaml', 'store', 'stages'): assert (tmp_path/'run'/name).exists()
    history = (tmp_path/'run'/'history.csv').read_bytes()
    execute({**values, 'collapse_lesson': False}, tmp_path)
    assert (tmp_path/'run'/'history.csv').read_bytes() == history

@pytest.mark.skipif(not UT_INTERACTION.is_dir(), reason='needs the real clips beside the clone')
@pytest.mark.timeout(300)
def test_pretrain_on_real_clips(tmp_path):
    manifest = folder_manifest(UT_INTERACTION, group=r'set1_\d+_(\d+)_')
    write_manifest(manifest[manifest.group.isin(['1', '2']) & (manifest.label < 4)], tmp_path/'clips.csv')
    execute(dict(TINY, manifest=str(tmp_path/'clips.csv'), videos=str(UT_INTERACTION), output=str(tmp_path/'run'), short_side=48, collapse_lesson=False, single_batch_size=4,
                 cross_batch_size=4, test_fraction=0.34), tmp_path)
    metrics = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert metrics['train_videos'] + metrics['test_videos'] == 8
    assert 0 < metrics['results']['chance']['R@1'] < 1

@pytest.mark.timeout(300)
def test_unlabelled_videos_in_two_processes(tmp_path):
    "All are trained on: nothing is held out, nothing evaluated, and the demo's network is noted."
    from vicc.manifests import read_manifest
    from vicc.synthetic import make_moving_shapes
    made = make_moving_shapes(tmp_path/'shapes', 16, 8)
    read_manifest(made['train'])[['video', 'num_frames']].to_csv(tmp_path/'train.csv', index=False)
    notebook = execute(dict(TINY, manifest=str(tmp_path/'train.csv'), videos=str(made['videos']), output=str(tmp_path/'run'), num_processes=2), tmp_path)
    said = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', []))
    for words in ('clips a step: batch 8 = 2 processes × 4', "note: this trains the demo's network, 0.0 M parameters, on views of 40×40 pixels", 'There are no test videos (no test_manifest'): assert words in said
    assert len((tmp_path/'run'/'history.csv').read_text().splitlines()) == 5 and yaml.safe_load((tmp_path/'run'/'recipe.yaml').read_text())['num_prototypes'] == 6
    metrics = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert metrics['results'] == {} and (metrics['train_videos'], metrics['test_videos']) == (16, 0) and not (tmp_path/'run'/'lesson').exists()

@pytest.mark.timeout(600)
def test_audit_of_a_stand_in_and_of_a_file(tmp_path):
    values = dict(shapes=16, epochs=1, repeats=1, output=str(tmp_path/'one'))
    assert pictures(execute(values, tmp_path, 'run_audit')) == 1
    one = json.loads((tmp_path/'one'/'metrics.json').read_text())
    assert one['read_as'] == 'flow' and one['stand_in'] and one['what'].startswith('s3d, ViCC, single-stream, K = 16')
    rows = {'as here', 'gallery: one random clip a video', 'test jitter', 'both: the released protocol', 'not centred', 'centred by one mean',
            'channels not translated', 'published: ViCC-RGB-2', 'chance'}
    assert rows <= set(one['audit']) and one['audit']['published: ViCC-R+F-2']['R@1'] == .651
    files = dict(released=tmp_path/'one'/'stand-in.pth.tar', store=tmp_path/'one'/'store', manifest=tmp_path/'one'/'moving_shapes'/'train.csv',
                 test_manifest=tmp_path/'one'/'moving_shapes'/'test.csv', output=tmp_path/'two')
    execute({name: str(path) for name, path in files.items()} | dict(repeats=1), tmp_path, 'run_audit')
    two = json.loads((tmp_path/'two'/'metrics.json').read_text())
    assert not two['stand_in'] and two['read_as'] in ('rgb', 'flow')
    if two['read_as'] == 'flow': assert two['audit']['as here'] == one['audit']['as here']

@pytest.mark.timeout(300)
def test_exam_of_a_run_and_of_real_clips(tmp_path):
    from vicc.alternation import stage_folder
    from vicc.recipe import new_streams
    from vicc.streams import save_stream
    from vicc.synthetic import make_moving_shapes
    recipe = Recipe.read('demo', **TINY, clip_length=4)
    for number, stage in enumerate(recipe.plan()): save_stream(new_streams(recipe)[stage.name], stage_folder(tmp_path/'run', number, stage)/'stream')
    recipe.write(tmp_path/'run'/'recipe.yaml')
    videos = make_moving_shapes(tmp_path/'shapes', 16, 4)['videos']
    values = dict(run=str(tmp_path/'run'), videos=str(videos), num_videos=32, torchvision_model='', output=str(tmp_path/'exam'))
    assert pictures(execute(values, tmp_path, 'run_exam')) == 3
    drawn, real = (pd.read_csv(tmp_path/'exam'/f'{name}.csv') for name in ('exam', 'exam_videos'))
    encoders = ['mean frame', 'frame differences', 'random rgb', 'random flow', 'rgb-1', 'rgb-2 cycle 1', 'flow-1']
    assert list(drawn.encoder.unique()) == list(real.encoder.unique()) == encoders and (drawn.test.nunique(), real.test.nunique()) == (7, 5)
    same = drawn.pivot(index='test', columns='encoder', values='score')
    assert (same['random rgb'] == same['rgb-1']).all() and (same['random flow'] == same['flow-1']).all()  # they are the same weights
    assert set(pd.read_csv(tmp_path/'exam'/'expectations.csv').verdict) <= {'as expected', 'not told apart', 'the other way round'}

@pytest.mark.timeout(300)
def test_lips_from_pictures_and_go_on(tmp_path):
    "Clips are made of cut-out pictures; speakers are held out whole; a row that is there is not computed again."
    for speaker in ('F01', 'M01', 'F02', 'F07'):
        for word, first, step in (('words/01', 0, 40), ('words/02', 240, -40), ('phrases/01', 120, 10), ('phrases/02', 120, -10)):
            place = tmp_path/'cropped'/speaker/word/'01'
            place.mkdir(parents=True)
            for number in range(1, 7):
                picture = np.full((30 + number, 61, 3), first + step*number, np.uint8)
                cv2.imwrite(str(place/f'color_{number:03d}.jpg'), picture + int(speaker[1:]))
    values = dict(cropped=str(tmp_path/'cropped'), videos=str(tmp_path/'videos'), output=str(tmp_path/'run'), folds=[0], seeds=[0],
                  changes=dict(TINY, clip_length=4, single_batch_size=2, cross_batch_size=2))
    assert pictures(execute(values, tmp_path, 'run_lips')) == 2
    frames = read_frames(tmp_path/'videos'/'words_01'/'F01_01.mp4')
    assert frames.shape == (13, 48, 64, 3) and abs(frames.mean((1, 2, 3)) - np.linspace(41, 241, 13)).max() < 2  # stretched in time
    file = tmp_path/'run'/'lips.csv'
    rows = pd.read_csv(file)
    assert len(rows) == 15 and set(rows.encoder) >= {'chance', 'stored flow', 'rgb-2 cycle 1', 'rgb alone', 'flow alone', 'rgb-2 + flow-2'} and (rows.clips == 8).all()
    by = rows.set_index('encoder')
    assert by['word R@1']['raw frames'] == 1 and by['word R@1']['chance'] == by['speaker R@1']['chance'] == .25
    rows[:-1].to_csv(file, index=False)
    trained, missing = rows.encoder[rows.seed == 0][:-1], [('word', 'rgb-2 cycle 1'), ('speaker', 'random flow')]
    known = [dict(fold=0, seed=0, encoder=encoder, question=what, epochs=1, accuracy=2.) for what in ('word', 'speaker') for encoder in trained]
    pd.DataFrame([row for row in known if (row['question'], row['encoder']) not in missing]).to_csv(tmp_path/'run'/'lips_probe.csv', index=False)
    execute({name: value for name, value in values.items() if name != 'cropped'} | dict(probe_epochs=1), tmp_path, 'run_lips')
    assert pd.read_csv(file).iloc[:-1].equals(rows[:-1]) and pd.read_csv(file).encoder.tolist() == rows.encoder.tolist()
    probes = pd.read_csv(tmp_path/'run'/'lips_probe.csv')
    assert len(probes) == 16 and list(zip(probes.question, probes.encoder))[-2:] == missing and probes.accuracy[-2:].between(0, 1).all()

@pytest.mark.timeout(300)
def test_small_sets_hold_recordings_out_and_go_on(tmp_path):
    "Two sets of four recordings, which are held out whole; what is known is not computed again."
    from vicc.synthetic import make_moving_shapes
    videos, rows = tmp_path/'videos', []
    for number, shape in enumerate(sorted(make_moving_shapes(videos/'shapes', 16, 8)['videos'].rglob('*.mp4'))[:16]):
        label, recording = number % 2, number//4
        rows.append((f'{"cd"[label]}/{number}.mp4', 'cd'[label], recording))
        for place in (f'ut_interaction_set1/{"ab"[label]}/set1_{number}_{recording}_{label}.mp4', f'surveillance_fights/{rows[-1][0]}'):
            (videos/place).parent.mkdir(parents=True, exist_ok=True)
            (videos/place).symlink_to(shape)
    pd.DataFrame(rows, columns=['path', 'label', 'source']).to_csv(videos/'surveillance_fights'/'groups.csv', index=False)
    short = {name: TINY[name] for name in ('backbone_options', 'num_prototypes', 'projection_dim')}
    values = dict(videos=str(videos), output=str(tmp_path/'run'), folds=2, steps=dict(single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=1),
                  changes=dict(short, clip_length=4, single_batch_size=4, cross_batch_size=4))
    file = tmp_path/'run'/'small_sets.csv'
    file.parent.mkdir()
    file.write_text('video,set,fold,group,rgb-2: R@1,"rgb-2, both sets: R@1"\n'
                    'one,ut_interaction_set1,1,x,1,0\ntwo,surveillance_fights,1,y,0,1\n')  # an earlier run's: fold 1 is not trained again
    assert pictures(execute(values, tmp_path, 'run_small_sets')) == 1
    answers = pd.read_csv(file)
    assert answers.groupby(['set', 'fold']).size().tolist() == [8, 1, 8, 1] and (answers['chance: R@1'].dropna() == .5).all()
    assert answers.set_index('video')['rgb-2: R@1'][['one', 'two']].tolist() == [1, 0] and answers['rgb-2, both sets: R@1'].notna().all()
    training = {file.parent.parent.name: set(pd.read_csv(file).video) for file in (tmp_path/'run').glob('*/alone/training_videos.csv')}
    assert {name: len(known) for name, known in training.items()} == {'both-0': 16, 'surveillance_fights-0': 8, 'ut_interaction_set1-0': 8}
    recording = lambda names: {name.split('_')[-2] if 'set1_' in name else str(int(Path(name).stem)//4 + 4) for name in names}
    assert not recording(set().union(*training.values())) & recording(answers.video[answers.fold == 0])

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda path: path.stem)
def test_has_documented_parameters(notebook):
    found = pm.inspect_notebook(notebook)
    assert found
    assert [name for name, about in found.items() if not about['help'] or about['inferred_type_name'] == 'None'] == []

@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_belongs_to_the_notebook(recipe):
    values = yaml.safe_load(recipe.read_text())
    assert set(values) == set(Recipe.model_fields) and Recipe.read(recipe).plan()
    assert Recipe.read('demo').replace(**values) == Recipe.read(recipe)  # as `papermill -f` gives them to the notebook
    parameters = pm.inspect_notebook(ROOT/'nbs'/'run_pretrain.ipynb')
    assert parameters['recipe']['default'] == "'demo'" and len(parameters) <= 16 and not set(parameters) & set(values)

def test_a_recipe_of_before_is_read(tmp_path):
    "Its optimizer was an optimiser, and it knew less."
    values = yaml.safe_load((ROOT/'nbs'/'recipes'/'demo.yaml').read_text())
    values['optimiser'] = values.pop('optimizer')
    for name in ('video_preset', 'accumulate', 'sync_batchnorm', 'patience', 'compile'): del values[name]
    (tmp_path/'old.yaml').write_text(yaml.safe_dump(values))
    assert Recipe.read(tmp_path/'old.yaml') == Recipe.read('demo')
    assert Recipe.read(tmp_path/'old.yaml', optimizer='sgd').optimizer == Recipe.read('demo', optimiser='sgd').optimizer == 'sgd'

def test_an_unknown_parameter_is_refused_before_any_work(tmp_path):
    with pytest.raises(Exception, match='no parameter .*sede.*did you mean seed'): execute(dict(TINY, output=str(tmp_path/'run'), sede=1), tmp_path)
    assert not (tmp_path/'run'/'store').exists()

@pytest.mark.parametrize('values, words', [
    (dict(seed=-1), 'seed is -1, but must be greater'),
    (dict(recipe='nothing'), 'the recipe .*nothing.yaml does not exist'),
    (dict(manifest='nowhere.csv', videos='.'), 'nowhere.csv'),
    (dict(manifest='nowhere.csv'), 'give both manifest and videos'),
], ids=['wrong value', 'missing recipe', 'missing manifest', 'manifest without videos'])  # others: engine/recipe
def test_wrong_parameters_are_refused_before_any_work(values, words, tmp_path, monkeypatch):
    "The first cells run in this process: a kernel takes six seconds to start."
    monkeypatch.chdir(ROOT)
    notebook = pm.iorw.load_notebook_node(str(ROOT/'nbs'/'run_pretrain.ipynb'))
    cells = pm.parameterize.parameterize_notebook(notebook, dict(TINY, output=str(tmp_path/'run'), **values)).cells
    names = {'In': [cell.source for cell in cells if cell.cell_type == 'code'][:5]}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        for source in names['In']: exec(source, names)
    assert not (tmp_path/'run'/'store').exists()

@pytest.mark.timeout(300)
def test_compare_makes_a_small_run_and_takes_an_encoder_of_the_users(tmp_path, monkeypatch):
    (tmp_path/'their_mean.py').write_text('from vicc.encoders import VideoEncoder\ndef colour(): return VideoEncoder(lambda clips: clips.mean((2, 3, 4)), 4, 3, size=8, version="1")\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    values = dict(run='small', output=str(tmp_path/'out'), num_gallery=16, num_queries=4, small_videos=16, yours='their_mean:colour', encoders=['vicc'],
                  small_run=dict(TINY, cycles=0))
    assert pictures(execute(values, tmp_path, 'run_compare')) == 2
    rows = [line.split(',') for line in (tmp_path/'out'/'compare_encoders.csv').read_text().splitlines()]
    assert [row[0] for row in rows] == ['encoder', 'chance', 'vicc', 'their_mean:colour'] and (tmp_path/'out'/'compare_encoders.png').exists()
    assert float(rows[1][rows[0].index('R@1')]) == 0.125
