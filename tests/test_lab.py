"""Notebooks in a real JupyterLab in a real browser: open, Run All, save, and look at what came out.

Needs Chromium (the system's) and `pip install playwright`; skipped where one of them is missing.
"""
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
if CHROMIUM is None: pytest.skip('there is no Chromium', allow_module_level=True)
ROOT = Path(__file__).parents[1]
TINY = dict(num_train_videos=16, num_test_videos=8, single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=1, cycles=1, single_batch_size=8, cross_batch_size=8, num_prototypes=8, collapse_lesson=False)
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
    shutil.copytree(ROOT/'nbs', root/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copy(ROOT/'settings.ini', root)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = lambda place: f'http://127.0.0.1:{port}/{place}?token=test'
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={root}',
               '--IdentityProvider.token=test', '--LabApp.news_url=None', '--LabApp.expose_app_in_browser=True']
    with open(root/'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'JUPYTER_CONFIG_DIR': str(root/'config'), 'PYTHONPATH': str(ROOT)})
        try:
            for _ in range(300):
                assert server.poll() is None, (root/'lab.log').read_text()
                try: urllib.request.urlopen(address('api/status')); break
                except OSError: time.sleep(.2)
            yield root, address
        finally:
            server.terminate()
            server.wait(20)

def run_all(lab, name: str) -> nbformat.NotebookNode:
    "The notebook, after it was opened, run and saved in JupyterLab."
    root, address = lab
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run'])
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.set_default_timeout(300_000)
        page.goto(address(f'lab/tree/nbs/{name}') + '&reset')
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        page.evaluate(RUN_ALL)
        browser.close()
    return nbformat.read(root/'nbs'/name, 4)

@pytest.mark.parametrize('name', ['08_prototypes.ipynb', 'run_pretrain.ipynb'])
@pytest.mark.timeout(500)
def test_runs_in_jupyterlab(lab, name):
    path = lab[0]/'nbs'/name
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
        if 'parameters' in cell.metadata.get('tags', []): cell.source += '\n' + '\n'.join(f'{key} = {value!r}' for key, value in TINY.items())
    nbformat.write(notebook, path)
    code = [cell for cell in run_all(lab, name).cells if cell.cell_type == 'code' and cell.source]
    outputs = [output for cell in code for output in cell.outputs]
    assert [output.evalue for output in outputs if output.output_type == 'error'] == []
    assert all(cell.execution_count for cell in code)
    assert any('image/png' in output.get('data', {}) for output in outputs)
    if name == 'run_pretrain.ipynb': assert (lab[0]/'runs'/'pretrain'/'metrics.json').is_file()
