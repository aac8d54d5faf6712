"The documentation site: its generator on small notebooks, and a real build of two pages. The whole site is built and checked by `.ci/build_docs`."
import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[2]
DOCS = ROOT/'.ci'/'docs'

def load(name: str):
    "A script of .ci/docs as a module."
    spec = importlib.util.spec_from_file_location(name, DOCS/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look here
    spec.loader.exec_module(module)
    return module

modules, pages, check_site, fetch_katex = map(load, ('modules', 'pages', 'check_site', 'fetch_katex'))

CODE = '''
LIMIT = 3 # rounds at most

class Queue(Base):
    "First in, first out."
    def __init__(self,
        length: int, # N, rows
        *,
        dim: int | None = None, # D; None: as the first row
    ): pass

    @property
    def full(self) -> bool: # no place is left
        "Is it full?"

    def _inner(self): pass

def assign(
    scores: Tensor, # [N, K] similarities
    # above the line
    epsilon: float = 0.05,
    *others: Tensor,
) -> Tensor: # [N, K] assignments
    """Balance.

    Raises ValueError for nothing.
    """
'''

def cell(kind: str, text: str, **more) -> dict:
    return dict(cell_type=kind, metadata={}, source=text, **(dict(outputs=[], execution_count=None) if kind == 'code' else {}), **more)

def project(root: Path, url: str = 'https://example.org/vicc') -> Path:
    "A project with three notebooks of ours."
    (root/'nbs').mkdir(parents=True)
    (root/'settings.ini').write_text(f'[DEFAULT]\nlib_name = vicc\nversion = 1\nauthor = us\nurl = {url}\ndev_requirements = pytest>=8 fastcore==2.2.39\n', encoding='utf-8')
    widget = dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'a slider'})
    notebooks = {'index': [cell('markdown', '# Home\n\n> All of it\n\nBegin with 08_queue, then `run_it`.')],
                 '08_queue': [cell('markdown', '# The queue\n\n> Rows wait\n\n`assign` and $a_08_queue$, $$x = \\frac{1}{2}$$'), cell('code', '#| default_exp queue'),
                              cell('code', '#| exports\n' + CODE), cell('code', '#| hide\nsecret = 1'), cell('markdown', '## What to remember\n\nNext: `08_queue`, [08_queue](run_it.ipynb)')],
                 'run_it': [cell('markdown', '# It runs\n\n> Now'), {**cell('code', '#| hide_input\nslider()'), 'outputs': [widget]}]}
    for name, cells in notebooks.items():
        (root/'nbs'/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    return root

def test_reads_docments_without_importing():
    limit, queue, assign = modules.entries(CODE)
    assert (limit.sort, limit.signature, limit.text) == ('data', '3', 'rounds at most')
    assert (queue.name, queue.signature, queue.bases) == ('Queue', '(length, *, dim=None)', ['Base'])
    assert queue.rows[1] == modules.Row('dim', 'int | None', 'None', 'D; None: as the first row')
    assert [(entry.sort, entry.name, entry.returns.comment) for entry in queue.members if entry.name != '__init__'] == [('property', 'full', 'no place is left')]
    assert assign.signature == '(scores, epsilon=0.05, *others)'
    assert [row.comment for row in assign.rows] == ['[N, K] similarities', 'above the line', '']
    assert assign.returns == modules.Row('returns', 'Tensor', '', '[N, K] assignments')

@pytest.mark.parametrize('path', [path for path in sorted((ROOT/'nbs').rglob('*.ipynb')) if 'default_exp' in path.read_text(encoding='utf-8')], ids=lambda path: path.stem)
def test_describes_every_public_name(path):
    notebook = pages.read_notebook(path)
    code = ast.parse((ROOT/'vicc'/f'{notebook.module.replace(".", "/")}.py').read_text(encoding='utf-8'))
    public = next(ast.literal_eval(node.value) for node in code.body if isinstance(node, ast.Assign) and node.targets[0].id == '__all__')
    assert {entry.name for entry in notebook.entries} == set(public)

def test_links_names_but_not_in_code_equations_or_links(tmp_path):
    links = pages.Links([pages.read_notebook(path) for path in sorted((project(tmp_path)/'nbs').glob('*.ipynb'))], 'vicc')
    assert links.of('see 08_queue and `run_it`.') == 'see [08_queue](08_queue.ipynb) and [run_it](run_it.ipynb).'
    assert links.of('`assign()`, `Queue.full`') == '{py:obj}`assign() <vicc.queue.assign>`, {py:obj}`Queue.full <vicc.queue.Queue.full>`'
    for kept in ('```\n08_queue\n```', '$08_queue$', '[08_queue](x.ipynb)', '![a [b] 08_queue](x.png)', '`nbs/08_queue.ipynb`', 'nbs/08_queue.ipynb', '`unknown`', '`index`'):
        assert links.of(kept) == kept

def test_page_hides_directives_and_housekeeping(tmp_path):
    root = project(tmp_path)
    notebooks = [pages.read_notebook(path) for path in sorted((root/'nbs').glob('*.ipynb'))]
    queue, run = (pages.notebook_page(notebook, pages.Links(notebooks, 'vicc'), '') for notebook in (notebooks[0], notebooks[2]))
    text = json.dumps(queue)
    assert '#|' not in text and 'secret' not in text and 'colab' not in text
    assert run['cells'][1]['metadata']['tags'] == ['remove-input']
    assert run['cells'][1]['outputs'][0]['data'] == {'text/plain': 'a slider'}

@pytest.mark.parametrize(('url', 'repository'), [('https://github.com/someone/vicc', 'someone/vicc'), ('https://github.com/some-one/vicc.git', 'some-one/vicc'),
                                                 ('https://example.org/vicc', ''), ('https://github.com.example.org/a/b', ''), ('https://github.com/someone', '')])
def test_repository_comes_from_the_settings(url, repository): assert pages.github_repository({'url': url}) == repository

def test_colab_badge_and_copies_only_for_github(tmp_path, capsys, monkeypatch):
    root = project(tmp_path/'plain')
    pages.write_site(root, root/'site', root/'colab')
    assert 'no Colab badges: the url in settings.ini (https://example.org/vicc)' in capsys.readouterr().out and not (root/'colab').exists()
    root = project(tmp_path/'github', 'https://github.com/someone/vicc')
    pages.write_site(root, root/'site', root/'colab')
    assert 'https://colab.research.google.com/github/someone/vicc/blob/colab/08_queue.ipynb' in (root/'site'/'08_queue.ipynb').read_text(encoding='utf-8')
    assert 'colab' not in json.dumps(json.loads((root/'site'/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    cells = json.loads((root/'colab'/'run_it.ipynb').read_text(encoding='utf-8'))['cells']
    code, calls, where = TransformerManager().transform_cell(cells[1]['source']), [], []
    shell = SimpleNamespace(system=calls.append, run_line_magic=lambda name, line: calls.append(f'{name} {line}'))
    exec(code, dict(get_ipython=lambda: shell))
    assert not calls  # not in Colab
    monkeypatch.setitem(sys.modules, 'google.colab', pages)
    monkeypatch.setattr('os.chdir', where.append)
    exec(code, dict(get_ipython=lambda: shell))
    assert calls == ['git clone -q --depth 1 https://github.com/someone/vicc /content/vicc', 'pip install -q /content/vicc fastcore==2.2.39']
    assert where == ['/content/vicc/nbs']
    assert cells[2]['source'] == '#| hide_input\nslider()'

def test_contents_follow_the_map(tmp_path):
    book = lambda name, text='': pages.Notebook(name, [cell('markdown', f'# Title of {name}\n\n> About{text}')])
    names = ['00_tour', '01_flow', 'engine/io', 'index', 'run_claims', 'run_pretrain']
    table = '\n\n[run_claims](run_claims.ipynb) | [run_pretrain](run_pretrain.ipynb) | [run_claims](run_claims.ipynb)'
    tree = pages.contents([book(name, table if name == 'index' else '') for name in names])
    assert [line.rpartition('<')[2].rstrip('>') for line in tree.splitlines() if line.endswith('>')] == ['00_tour', '01_flow', 'run_pretrain', 'run_claims', 'engine/io']

def test_check_finds_what_leads_nowhere(tmp_path):
    (tmp_path/'_static').mkdir()
    (tmp_path/'_static'/'a.css').write_text('p {background: url(none.png)}', encoding='utf-8')
    (tmp_path/'a.html').write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><img src="https://example.org/x.png">'
                                   '<a href="https://example.org">4</a><a href="#top">5</a>', encoding='utf-8')
    (tmp_path/'b.html').write_text('<p id="here"></p>', encoding='utf-8')
    wrong, out, line = check_site.check(tmp_path)
    assert sorted(wrong) == ['_static/a.css: none.png', 'a.html loads https://example.org/x.png from the network', 'a.html: #top leads nowhere',
                             'a.html: b.html#gone leads nowhere', 'a.html: c.html leads nowhere']
    assert out == ['https://example.org'] and line.startswith('2 pages, 4 links inside, 1 lead out')

def test_builds_with_sphinx(tmp_path):
    for name in ('myst_nb', 'sphinx_book_theme'): pytest.importorskip(name)
    root = project(tmp_path/'project')
    shutil.copytree(DOCS, root/'.ci'/'docs', ignore=shutil.ignore_patterns('__pycache__'))
    katex = root/'_proc'/'katex'  # an empty one: the real one is fetched by .ci/build_docs
    katex.mkdir(parents=True)
    for name in ('katex.min.js', 'katex.min.css'): (katex/name).touch()
    explorer = root/'runs'/'prototypes'/'explorer.html'
    explorer.parent.mkdir(parents=True)
    explorer.write_text('<p>clips</p>')
    pages.write_site(root, root/'_proc'/'site', root/'_proc'/'colab')
    ran = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', root/'.ci'/'docs', '-d', root/'doctrees', root/'_proc'/'site', root/'_docs'],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (root/'_docs'/'_static'/'katex.min.js').unlink()  # without it equations are not tried
    wrong, _, _ = check_site.check(root/'_docs')
    assert [complaint for complaint in wrong if 'katex' not in complaint] == []
    page = (root/'_docs'/'api'/'queue.html').read_text(encoding='utf-8')
    assert 'id="vicc.queue.assign"' in page and 'id="vicc.queue.Queue.full"' in page and '[N, K] similarities' in page
    assert 'href="../08_queue.html#cell-queue-2"' in page
    assert 'href="api/index.html"' in (root/'_docs'/'index.html').read_text(encoding='utf-8').split('every name')[0][-200:]
    assert '<a href="explorer.html">' in (root/'_docs'/'index.html').read_text(encoding='utf-8') and (root/'_docs'/'explorer.html').is_file()
    assert 'vicc.queue' in (root/'_docs'/'searchindex.js').read_text(encoding='utf-8')
