"What a stranger may send: texts that confuse, archives that grow, checkpoints made up, names that are programs. Nothing runs, nothing grows, and every refusal names its file."
import ast
import json
import os
import zipfile
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from fuzz_texts import KINDS, LAUGHS, PROBLEMS, Toy, fuzz_texts, make_checkpoint
from vicc.viz import plots
from vicc.recipe import Recipe
from vicc.engine.io import find_project
from vicc.alternation import alternate, main
from vicc.compare.finetune import Classifier, predictions_table
from vicc.viz.explorer import Clip, ExplorerSection, explorer_html
from vicc.engine.io import folder_lock
from vicc.streams import Stream, load_released, load_network, load_stream, save_stream
from vicc.engine.fit import FitLoop

DEMO = find_project(__file__)/'nbs'/'recipes'/'demo.yaml'
NAMES = ['<script>alert(1)</script>', r'$\frac$', '"><img src=x onerror=alert(2)>', 'x'*1000, 'مرحبا بالعالم', '😀👨‍👩‍👧', 'two\nlines\t\u202e', '_hidden', '', '</script>&amp;%s{0}', '[x](javascript:alert(3))', 'a|b`c`*d*']

# No code of strangers

FORBIDDEN = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pickle.load', 'pickle.Unpickler', 'marshal.loads', 'joblib.load', 'dill.load', 'shelve.open', 'yaml.load_all', 'yaml.unsafe_load', 'yaml.full_load',
             'pd.read_pickle', 'pandas.read_pickle', 'subprocess.getoutput', 'subprocess.getstatusoutput', 'torch.jit.load', 'torch.hub.load'}

def dangers(source: str) -> list[str]:
    "Calls in a module that could run what a file says."
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        first = ast.unparse(node.args[0]) if node.args else ''
        if name in FORBIDDEN or name.startswith('os.exec') or name.startswith('os.spawn'): found.append(name)
        if name == 'yaml.load' and [ast.unparse(value) for value in node.args[1:]] != ['StrictYamlLoader']: found.append('yaml.load')
        if name == 'pickle.loads' and not first.startswith('pickle.dumps('): found.append(name)  # a copy of something of our own
        if name == 'torch.load' and keywords.get('weights_only') != 'True': found.append(name)
        if keywords.get('shell', 'False') != 'False' or keywords.get('allow_pickle', 'False') != 'False': found.append(f'{name}({keywords})')
    return found

@pytest.mark.parametrize('line', ['eval(x)', 'os.system(x)', 'subprocess.run(x, shell=True)', 'yaml.load(x)', 'yaml.load(x, yaml.Loader)', 'pickle.load(x)', 'pickle.loads(x)', 'torch.load(x)', 'torch.load(x, weights_only=False)',
                                  'np.load(x, allow_pickle=True)', 'joblib.load(x)'])
def test_dangers_are_seen(line): assert dangers(line)

def test_no_danger_in_the_package():
    assert not dangers('network.eval(); re.compile(x); torch.load(x, weights_only=True); yaml.load(x, StrictYamlLoader)')
    modules = [path for path in sorted((find_project(__file__)/'vicc').rglob('*.py')) if path.name != '_modidx.py']
    assert len(modules) > 20 and {path.name: found for path in modules if (found := dangers(path.read_text(encoding='utf-8')))} == {}

# Recipes

@pytest.mark.parametrize('text, message', [
    (LAUGHS, 'an alias'), ('!!python/object/apply:os.system ["touch it_ran"]', 'could not determine a constructor'),
    ('['*5000, 'recursion depth'), ('- 1', 'must hold lines'), ('seed: 1\nseed: 2', "'seed' is there twice"),
    ('on: 1', 'unknown key 1'), ('7: 1', 'unknown key 7'), ('x'*300_000, 'not UTF-8 text of at most'),
    ('a\0b', 'not UTF-8 text')])
def test_recipes_that_are_none(tmp_path, text, message):
    (tmp_path/'odd.yaml').write_text(text)
    with pytest.raises(ValueError, match=f'odd.yaml.*({message})'): Recipe.read(tmp_path/'odd.yaml')

INTEGER = 'cycles is .*, but must be a valid integer'

@pytest.mark.parametrize('value, message', [
    ('9'*6000, 'too large to be shown|but must be|digits'), ('.nan', 'cycles is nan, but must be a finite number'), ('1e999', INTEGER),
    ('0x' + 'f'*5000, 'cycles is a int too large to be shown, but must be at most'), ('10**9', INTEGER), ('2.5', INTEGER),
    ('true', 'cycles is True, but must be a number'), ('1000000000000000', 'must be less than or equal to 1000'),
    ('__import__("os").system("x")', INTEGER), ('"' + 'x'*5000 + '"', INTEGER)])
def test_numbers_that_are_none(tmp_path, value, message):
    (tmp_path/'odd.yaml').write_text(DEMO.read_text().replace('cycles: 1', f'cycles: {value}'))
    with pytest.raises(ValueError, match=rf'odd.yaml.*({message})') as caught: Recipe.read(tmp_path/'odd.yaml')
    assert len(str(caught.value)) < 500 + len(str(tmp_path))

def test_a_recipe_with_one_list_in_two_places_comes_back(tmp_path):
    twice = [1, 1, 1, 1]
    recipe = Recipe.read(DEMO, backbone_options=dict(width=4, spatial_strides=twice, temporal_strides=twice))
    recipe.write(tmp_path/'again.yaml')
    assert Recipe.read(tmp_path/'again.yaml') == recipe

# Networks

def test_a_config_cannot_ask_for_gigabytes(tmp_path):
    save_stream(Stream('small', 4, 8, {'width': 2}), tmp_path/'rgb')
    good = json.loads((tmp_path/'rgb'/'config.json').read_text())
    (tmp_path/'rgb'/'checksums.json').unlink()
    for change, message in ((dict(num_prototypes=10**12), 'asks for 80000000.* numbers, model.safetensors has'), (dict(backbone_options={'width': 10**6}), 'does not hold the weights'), (dict(backbone='x'*10_000), 'was saved with the backbone .x*…'), (dict(backbone='torchvision:r3d_18', backbone_options={'num_classes': 10**12}), 'does not hold'),
                            (dict(projection_dim='8'), 'does not hold'), (dict(num_prototypes=10**40), 'does not hold'), (dict(backbone_options=[1]), 'does not hold'), (dict(odd=1), 'does not hold'), (dict(backbone_options={'generator': 1}), 'does not hold')):
        (tmp_path/'rgb'/'config.json').write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f'rgb.*{message}'): load_stream(tmp_path/'rgb')
    (tmp_path/'rgb'/'config.json').write_text(json.dumps(good | dict(backbone_options={'width': 2, 'weights': 'DEFAULT'})))
    load_stream(tmp_path/'rgb')  # nothing is downloaded: the folder's own weights count

def test_a_flipped_bit_and_a_nan_in_saved_weights(tmp_path):
    classifier = Classifier('small', 3, backbone_options={'width': 2})
    save_stream(classifier, tmp_path/'one')
    assert torch.equal(load_network(Classifier, tmp_path/'one').linear.weight, classifier.linear.weight)
    file = tmp_path/'one'/'model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors is not the file that was saved'): load_network(Classifier, tmp_path/'one')
    classifier.linear.weight.data[0, 0] = float('nan')
    save_stream(classifier, tmp_path/'two')
    with pytest.raises(ValueError, match='infinite or not numbers: linear.weight'): load_network(Classifier, tmp_path/'two')

def test_released_files_that_grow(tmp_path):
    with zipfile.ZipFile(tmp_path/'bomb.pth.tar', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('archive/data.pkl', bytes(30_000_000))
    with pytest.raises(ValueError, match='bomb.pth.tar has .* bytes and would become 30000000'): load_released(tmp_path/'bomb.pth.tar')
    torch.save({'state_dict': {'encoder_q.2.weight': torch.zeros(1).expand(10**12), 'prototypes.weight': torch.zeros(1, 1).expand(10**8, 10**6)}}, tmp_path/'wide.pth.tar')
    with pytest.raises(ValueError, match='wide.pth.tar: encoder_q does not fit'): load_released(tmp_path/'wide.pth.tar')
    for name in ('module.'*1000 + 'x', 'y'*10**6):
        torch.save({'state_dict': {name: torch.zeros(1)}}, tmp_path/'long.pth.tar')
        with pytest.raises(ValueError, match='long.pth.tar is (damaged|no file)') as caught: load_released(tmp_path/'long.pth.tar')
        assert len(str(caught.value)) < 1000

# Checkpoints with checksums that are right

class Program:
    "An object that says what to call when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

MADE_UP = {'program': (Program, 'is not what this version'), 'null': (None, 'is not what this version'), 'list': ([1], 'is not what this version'),
           'nothing': (dict(global_state=None, rank_state={}), 'holds a run with other settings'),
           'other facts': (dict(global_state=dict(fingerprint=[1]), rank_state={}), 'holds a run with other settings'),
           'no facts': (dict(global_state=dict(fingerprint={}), rank_state={}), 'title was None'),
           'no weights': (dict(global_state=dict(fingerprint=dict(title='toy', seed=0)), rank_state={}), 'of another network')}

@pytest.mark.parametrize('name', MADE_UP)
def test_checkpoints_made_up(tmp_path, name):
    state, message = MADE_UP[name]
    make_checkpoint(tmp_path)
    torch.save(Program(tmp_path/'ran') if state is Program else state, tmp_path/'step-000000003'/'rank-0-of-1.pt')
    with pytest.raises(ValueError, match=message): FitLoop(Toy(), [], tmp_path).load()
    assert not (tmp_path/'ran').exists()

def test_checkpoints_of_another_network(tmp_path):
    make_checkpoint(tmp_path)
    loop = FitLoop(Toy(), [], tmp_path)
    state = loop.load()
    assert loop.history[0]['epoch'] == 1 and state.step == 2
    other, changed = Toy(), Toy()
    other.stream, changed.seed = torch.nn.Linear(5, 3), 1
    with pytest.raises(ValueError, match='of another network'): FitLoop(other, [], tmp_path).load()
    with pytest.raises(ValueError, match='seed was 0, is 1'): FitLoop(changed, [], tmp_path).load()

# Names

class Tags(HTMLParser):
    "The tags of a page and the words between them."
    def __init__(self, text: str):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.found.append((tag, dict(attributes)))
    def handle_data(self, data): self.words.append(data)

def harmless(text: str) -> bool:
    "No tag, attribute or link of a name has become one of the page."
    tags = Tags(text).found
    return not any(name.startswith('on') and name != 'onsubmit' or str(value).startswith('javascript:') or name == 'src' and value == 'x' for _, attributes in tags for name, value in attributes.items())

@pytest.mark.filterwarnings('ignore:Glyph', 'ignore:Tight layout', 'ignore:Matplotlib currently does not support')
def test_names_in_every_plot():
    rng, count = np.random.default_rng(0), len(NAMES)
    clips, labels = rng.integers(0, 255, (count, 4, 12, 12, 3), np.uint8), np.arange(count)
    soft = {name: rng.dirichlet(np.ones(5), count) for name in NAMES[:2]}
    results = pd.DataFrame([dict(stage=name, stream=name, recall=.5) for name in NAMES if name])
    history = pd.DataFrame([dict(stage=name, stream=name, loss=1., target_entropy=.5, num_prototypes=5, prototypes_in_use=3, agreement=.1)
                            for name in NAMES])
    long, rows = NAMES[3] + '\n' + NAMES[1], [labels[2:4]]*2
    pictures = [plots.plot_clips({name: clips[:5] for name in NAMES[:2]}, NAMES[:5]),
                plots.plot_training_curves(history), plots.plot_assignments(soft, labels, NAMES),
                plots.plot_montage([clips[:2], clips[2:4]], rows, NAMES, NAMES[:2], title=long),
                plots.plot_montage([clips[:3]]*2, [labels[:3]]*2, NAMES, similarities=np.ones((2, 2)), title=long),
                plots.plot_recall_bars(results, .1, long), plots.plot_confusion(np.eye(count), NAMES, long),
                plots.plot_dots(pd.DataFrame(rng.random((count, 8)), NAMES, NAMES[:8]), 'right', title=long)]
    for picture in pictures:
        picture.set_dpi(40)
        data = picture.png()
        assert max(np.frombuffer(data[16:24], '>u4')) < 3000, 'a name pushed the picture out of its figure'
    page = plots.format_table(results, best=True).to_html()
    assert harmless(page) and 'script' not in [tag for tag, _ in Tags(page).found]

def test_names_in_explorer_and_tables():
    clip_of = lambda number: Clip(b'film', NAMES[number] + '\ud800', NAMES[number])
    entries = [ExplorerSection(name, name, name, range(len(NAMES)), NAMES) for name in NAMES]
    for page in (explorer_html(entries, clip_of, NAMES, NAMES[0], NAMES[2]), explorer_html(entries, clip_of, NAMES)):
        page.encode()
        assert harmless(page) and [tag for tag, _ in Tags(page).found].count('script') == 0 and 'x'*700 not in page
    for name in NAMES:
        page = plots.format_table(pd.DataFrame({name: [name]}, index=[name])).to_html()
        assert harmless(page) and '<script' not in page
    rows = pd.DataFrame(dict(video=NAMES, label=range(len(NAMES))))
    assert list(predictions_table(rows, torch.eye(len(NAMES)), NAMES).true) == NAMES

# The command

def test_the_command_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    arguments = ['--recipe', str(DEMO), '--manifest', str(tmp_path/'m.csv'), '--videos', str(tmp_path), '--output', str(tmp_path/'run')]
    for error, code, message in ((KeyboardInterrupt(), 130, 'interrupted'), (OSError(28, 'No space left on device', 'x'), 2, 'No space left'), (ValueError('wrong'), 2, 'wrong')):
        def fails(*_, error=error, **__): raise error
        monkeypatch.setattr('vicc.commands.read_manifest', fails)
        with pytest.raises(SystemExit) as ended: main(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == code and message in said and 'Traceback' not in said
    with pytest.raises(SystemExit): main([*arguments, '--set', 'seed=*a'])
    assert '--set seed is not YAML of plain values' in capsys.readouterr().err

def test_a_second_run_in_a_folder_is_refused(tmp_path):
    class Prepared: settings, path = Recipe.read(DEMO).prepare_settings(), tmp_path
    with folder_lock(tmp_path/'run'), pytest.raises(ValueError, match='run is in use by another run'): alternate(Recipe.read(DEMO), Prepared(), tmp_path/'run', accelerator=Accelerator(cpu=True))
    assert [path.name for path in (tmp_path/'run').iterdir()] == ['.lock']

# And what nobody thought of

def test_a_few_hundred_damaged_texts():
    "The long run is `python tests/robustness/fuzz_texts.py`."
    found = fuzz_texts(13*len(KINDS), seed=1, log=lambda line: None, isolated=False)
    assert {row['kind']: row['first_problem'] for row in found if any(row[name] for name in PROBLEMS)} == {}
    assert sum(row['refused'] for row in found) > 60 and all(row['tried'] == 13 for row in found)
