"""Notebooks in a real JupyterLab in a real browser: open, Run All, save, and look at what came out.

Needs Chromium (the system's) and `pip install playwright`; skipped where one of them is missing. run_prototypes looks at
the run that run_pretrain has left, and its explorer is clicked.
"""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if CHROMIUM is None: pytest.skip('there is no Chromium', allow_module_level=True)
ROOT = Path(__file__).parents[2]
# a folder for the screenshots, for people who want to look; else they lie beside the copied notebooks
PICTURES = os.environ.get('LAB_PICTURES')
PICTURES = Path(PICTURES) if PICTURES else None
SMALL = {'run_pretrain.ipynb': dict(num_train_videos=16, num_test_videos=8, collapse_lesson=False, changes=dict(
    single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=1, cycles=1, cross_freeze_prototypes=0, single_batch_size=8, cross_batch_size=8,
    num_prototypes=8))}
WRITTEN = {'run_pretrain.ipynb': ['pretrain/metrics.json', 'pretrain/pictures/training.png'],
           'run_prototypes.ipynb': ['prototypes/metrics.json', 'prototypes/explorer.html']}
RUN_ALL = '''async () => {
    await jupyterapp.restored
    const notebook = jupyterapp.shell.currentWidget
    await notebook.context.ready
    await notebook.sessionContext.ready
    await jupyterapp.commands.execute('notebook:run-all-cells')
    await notebook.context.save()
}'''

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab over a copy of the notebooks: its folder, and a function that makes addresses."
    root = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', root/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_proc'))
    shutil.copy(ROOT/'settings.ini', root)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = lambda place: f'http://127.0.0.1:{port}/{place}?token=test'
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={root}',
               '--IdentityProvider.token=test', '--LabApp.news_url=None', '--LabApp.expose_app_in_browser=True']
    with open(root/'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log,
                                  env={**os.environ, 'JUPYTER_CONFIG_DIR': str(root/'config'),
                                       'PYTHONPATH': str(ROOT)})
        try:
            for _ in range(300):
                assert server.poll() is None, (root/'lab.log').read_text()
                try: urllib.request.urlopen(address('api/status')); break
                except OSError: time.sleep(.2)
            yield root, address
        finally:
            server.terminate()
            server.wait(20)

def allowed(message: str) -> bool:
    "Whether the console may say this: JupyterLab's own remarks, of no concern to a notebook."
    return any(words in message
               for words in ('favicon', 'jupyterlab-manager', 'translation', 'Failed to load resource', 'news'))

@contextmanager
def opened(lab, name: str):
    "A notebook in JupyterLab, all cells run and saved: the page, and what the console complained of."
    root, address = lab
    complaints = []
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM,
                                       args=['--no-sandbox', '--disable-gpu', '--disable-background-networking',
                                             '--no-first-run'])
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.set_default_timeout(400_000)
        page.on('console', lambda message: complaints.append(message.text) if message.type == 'error'
                and not allowed(message.text) else None)
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.goto(address(f'lab/tree/nbs/{name}') + '&reset')
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        page.evaluate(RUN_ALL)
        yield page, complaints
        page.screenshot(path=(PICTURES or root)/f'{Path(name).stem}.png')
        browser.close()

def explore(page, file: Path) -> None:
    "Fold out every group of the explorer and its second entry: clips must become visible each time."
    page.goto(file.as_uri())
    for group in page.locator('body > details').all():
        if group.get_attribute('open') is None: group.locator('> summary').click()
        before = group.locator('[role=img]:visible').count()
        assert before >= 1, 'the first entry of a group shows no clip'
        group.locator('> details > summary').nth(1).click()
        assert group.locator('[role=img]:visible').count() > before, 'a folded-out entry shows no clip'

def emptied(path: Path) -> None:
    "Take the outputs out of a notebook, and make it small."
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
        if 'parameters' in cell.metadata.get('tags', []):
            cell.source += '\n' + '\n'.join(f'{key} = {value!r}' for key,
                                            value in SMALL.get(path.name, {}).items())
    nbformat.write(notebook, path)

@pytest.mark.parametrize('names',
                         [['05_prototypes'], ['viz/explorer'],
                          ['run_pretrain', 'run_prototypes']], ids=lambda names: names[-1])
@pytest.mark.timeout(800)
def test_runs_in_jupyterlab(lab, names):
    for path in [lab[0]/'nbs'/f'{name}.ipynb' for name in names]:
        emptied(path)
        with opened(lab, str(path.relative_to(lab[0]/'nbs'))) as (page, complaints):
            if path.stem == 'run_prototypes':
                explore(page.context.browser.new_page(), lab[0]/'runs'/'prototypes'/'explorer.html')
        code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code' and cell.source]
        outputs = [output for cell in code for output in cell.outputs]
        assert [output.evalue for output in outputs if output.output_type == 'error'] == []
        assert complaints == []
        assert all(cell.execution_count for cell in code)
        assert any({'image/png', 'text/html'} & output.get('data', {}).keys() for output in outputs)
        for file in WRITTEN.get(path.name, ()): assert (lab[0]/'runs'/file).is_file()
