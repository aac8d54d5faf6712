"vicc.viz.explorer: clips that play, names that stay names, a page without network; run_prototypes from saved streams."
import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vicc.viz.explorer import (
    Clip, ExplorerSection, clip_bytes, explorer_html, prototype_sections, query_sections,
)

ROOT = Path(__file__).parents[3]
EVIL = '</script><script>alert(1)</script>"><img src=x onerror=alert(2)> \'&amp; $title ${style} ‮'
NAMES = ['kick', 'hug']

class Tags(HTMLParser):
    "All tags of a text with their attributes, as a browser finds them."
    def __init__(self, text: str):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))
    def handle_data(self, data): self.words.append(data)

def frames(value: int = 0, num_frames: int = 8, height: int = 24, width: int = 32) -> np.ndarray:
    "A white block that moves to the right on a grey ground."
    clip = np.full((num_frames, height, width, 3), value, np.uint8)
    for t in range(num_frames): clip[t, 8:16, 2*t:2*t + 8] = 255
    return clip

def decoded(film: bytes) -> np.ndarray:
    "All frames of a moving picture."
    picture, found = Image.open(io.BytesIO(film)), []
    for number in range(picture.n_frames):
        picture.seek(number)
        found.append(np.asarray(picture.convert('RGB')))
    return np.stack(found)

def clip_of(number: int) -> Clip:
    "A clip whose bytes tell its number."
    return Clip(clip_bytes(frames(10*number), frames()), f'videos/{number}.mp4', NAMES[number % 2])

def evil_clip(number: int) -> Clip:
    "A clip with names that are a program."
    return Clip(clip_bytes(frames(), frames()), EVIL, EVIL)

def some_entries() -> list[ExplorerSection]:
    "Two prototypes and a query of six videos."
    assignments = np.array([[.9, .1], [.2, .8], [.8, .2], [.3, .7], [.6, .4], [.4, .6]])
    labels = np.array([0, 1, 0, 1, 0, 1])
    return [*prototype_sections('rgb-1', assignments, labels, NAMES, 2),
            *query_sections('rgb-1', [5], [[3, 0]], [[.9, .1]], [f'videos/{i}.mp4' for i in range(6)], labels,
                           NAMES, assignments[[5]])]

@pytest.mark.parametrize('size', [(24, 32), (25, 33), (150, 40)])
def test_clip_bytes_decode_again(size):
    clip = frames(60, 8, *size)
    shown = decoded(film := clip_bytes(clip, 255 - clip))
    scale = min(1, 96/size[0])
    assert len(shown) == 8 and shown.shape[1] == round(size[0]*scale)
    assert abs(shown.shape[2] - (2*size[1] + 2)*scale) < 1
    if scale == 1:
        assert np.abs(shown[:, :, :size[1]].astype(int) - clip).mean() < 16
        assert np.abs(shown[:, :, size[1] + 2:].astype(int) - (255 - clip)).mean() < 16
    assert Image.open(io.BytesIO(film)).info['loop'] == 0

def test_long_clips_are_thinned_and_short_ones_kept():
    for count, wanted in ((12, 8), (2, 2), (1, 1)):
        clip = frames(num_frames=count)
        assert len(decoded(clip_bytes(clip, clip))) == wanted

@pytest.mark.parametrize('wrong',
                         [np.zeros((3, 8, 8)), np.zeros((3, 8, 8, 2), np.uint8),
                          np.zeros((0, 8, 8, 3), np.uint8)], ids=['float', 'two channels', 'empty'])
def test_wrong_frames_are_refused(wrong):
    with pytest.raises(ValueError, match='frames'): clip_bytes(wrong, wrong)
    with pytest.raises(ValueError): clip_bytes(frames(), frames()[:4])

def test_names_are_escaped_everywhere():
    entry = ExplorerSection(EVIL, EVIL, EVIL, [0], [EVIL])
    for text in (explorer_html([entry], evil_clip, [EVIL]), explorer_html([entry], evil_clip, [EVIL], EVIL, EVIL)):
        tags = Tags(text)
        assert EVIL in ''.join(tags.words)  # the reader sees the name as it is
        assert not [name for _, attributes in tags.found for name in attributes if name.startswith('on')]
        assert all(attributes['src'].startswith('data:image/webp;base64,') for _, attributes in tags.found
                   if 'src' in attributes)
        assert 'script' not in [tag for tag, _ in tags.found]

def test_page_is_self_contained():
    page = explorer_html(some_entries(), clip_of, NAMES, 'Title', 'About')
    assert not re.search(r'https?:|@import|url\((?!data:image/webp)|<script|<link|<iframe|<img', page)
    assert "default-src 'none'" in page
    films = dict(re.findall(r'\.(clip\d+) { background-image: url\(data:image/webp;base64,(.*?)\) }', page))
    assert {name: base64.b64decode(film) for name, film in films.items()} == {
        f'clip{number}': clip_of(number).webp for entry in some_entries() for number in entry.clips}
    shown = [attributes['class'] for tag, attributes in Tags(page).found if tag == 'i']
    assert shown == [f'clip{number}' for entry in some_entries() for number in entry.clips]

def test_lists_fold_out_without_a_script():
    tags = Tags(explorer_html(some_entries(), clip_of, NAMES)).found
    assert {tag for tag, _ in tags} == {'p', 'b', 'details', 'summary', 'table', 'tr', 'td', 'img', 'br',
                                        'small'}
    # two groups, and the first prototype and query
    assert sum('open' in attributes for _, attributes in tags) == 4

def test_without_labels_nothing_is_said_about_classes():
    assignments, nobody = np.array([[.9, .1], [.2, .8]]), ['no label']
    entries = [*prototype_sections('rgb', assignments, [0, 0], nobody),
               *query_sections('rgb', [0], [[1]], [[.5]], ['a', 'b'], np.array([0, 0]), nobody, assignments)]
    assert not [words for entry in entries for words in (entry.title, entry.note, *entry.words)
                if 'class' in words or 'label' in words]

def test_every_clip_needs_its_words():
    with pytest.raises(ValueError): explorer_html([ExplorerSection('a', 'b', 'c', [0, 1], ['one word'])], clip_of, NAMES)

def test_page_in_a_browser(tmp_path):
    "A browser shows the first entry and the title, and no name of a stranger runs."
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None: pytest.skip('there is no Chromium')
    evil = ExplorerSection('evil', '<img src=x onerror="document.title=1">', EVIL, [0], ['word'])
    (tmp_path/'page.html').write_text(explorer_html([*some_entries(), evil], clip_of, NAMES, 'Title'),
                                      encoding='utf-8')
    command = [chromium, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile',
               '--virtual-time-budget=2000', '--dump-dom', f'file://{tmp_path}/page.html']
    page = subprocess.run(command, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'HOME': str(tmp_path)}).stdout
    assert '<title>Title</title>' in page and '<img ' not in page and page.count('role="img"') > 5

@pytest.mark.timeout(300)
def test_run_prototypes_from_saved_streams(tmp_path):
    "A single stream, a store, and a manifest with a name of a stranger."
    import papermill as pm
    from helpers import DEMO
    from vicc.alternation import new_streams
    from vicc.prepare import prepare
    from vicc.streams import save_stream
    from vicc.synthetic import make_moving_shapes
    made = make_moving_shapes(tmp_path/'shapes', 16, 8, threads=1)
    store = prepare(made['train'], made['videos'], tmp_path/'store', DEMO.prepare_settings(), workers=0,
                    log=lambda line: None)
    rows = store.manifest.assign(class_name=store.manifest.class_name.replace('rotate', EVIL))
    rows.to_csv(tmp_path/'train.csv', index=False)
    save_stream(new_streams(DEMO)['rgb'], tmp_path/'rgb')
    values = dict(rgb=str(tmp_path/'rgb'), recipe=str(ROOT/'nbs'/'recipes'/'demo.yaml'), store=str(store.path),
                  manifest=str(tmp_path/'train.csv'), test_fraction=.5,
                  output=str(tmp_path/'out'), page_prototypes=2, page_queries=2, clips_shown=3)
    pm.execute_notebook(ROOT/'nbs'/'run_prototypes.ipynb', tmp_path/'out.ipynb', values, progress_bar=False,
                        cwd=ROOT)
    metrics = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert 0 < metrics['encoders']['rgb']['purity'] <= 1 and metrics['encoders']['rgb']['K'] == DEMO.num_prototypes
    assigned = pd.read_csv(tmp_path/'out'/'assignments.csv')
    assert set(assigned.video) < set(rows.video) and len(assigned) == metrics['train_videos'] and set(assigned.stream) == {'rgb'}
    assert (assigned.share >= assigned.second_share).all() and (assigned.prototype != assigned.second).all() and assigned.prototype.max() < DEMO.num_prototypes
    assert {path.name for path in (tmp_path/'out'/'pictures').glob('*.png')} == {'assignments-rgb.png',
            'tsne-rgb.png', 'montage-rgb-00.png', 'neighbours-rgb.png'}
    assert not [attributes for _, attributes in Tags((tmp_path/'out'/'explorer.html').read_text()).found
                if 'onerror' in attributes]
