"The library notebooks run from top to bottom, are stored clean, and match the package that is exported from them."
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(path for path in NBS.rglob('*.ipynb') if not {'results', '.ipynb_checkpoints', '_proc'} & set(path.parts))
HOWTO = NBS/'howto'
WINGS = {path.parent for path in NOTEBOOKS} - {NBS}
ALONE = {NBS/'engine', NBS/'fast'}  # their notebooks want a fresh process: some start others, some count kernels
# One process runs all of a folder, since importing takes longer than running
LIBRARY = [NBS/'0*.ipynb', *sorted(WINGS - ALONE)] + [path for path in NOTEBOOKS if path.parent in ALONE]

def run(command: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    "A command of nbdev."
    return subprocess.run([str(Path(sys.executable).with_name(command)), *arguments], cwd=folder, capture_output=True, text=True)

def contents(root: Path) -> dict[str, bytes]:
    "Every notebook and module, as it is on disk."
    return {str(path.relative_to(root)): path.read_bytes() for folder in ('nbs', 'vicc') for path in (root/folder).rglob('*') if path.suffix in ('.ipynb', '.py')}

@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_changes_nothing(command, tmp_path):
    for name in ('nbs', 'vicc'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc'))
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    before = contents(tmp_path)
    result = run(command, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    after = contents(tmp_path)
    assert sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)) == []

@pytest.mark.parametrize('notebooks', LIBRARY, ids=lambda path: path.stem)
@pytest.mark.timeout(400)
def test_run(notebooks):
    result = run('nbdev-test', str(notebooks), '--n-workers', '0')
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]

@pytest.mark.parametrize('page', sorted(HOWTO.glob('own_*.ipynb')), ids=lambda path: path.stem)
def test_a_page_for_your_own_is_short(page):
    cells = [cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == 'code']
    assert sum(bool(line.strip()) for cell in cells for line in cell.splitlines()) <= 30

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_notebooks(notebook):
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == 'markdown']
    assert [link for text in cells for link in re.findall(r'\]\(([\w./-]+\.ipynb)', text) if not (notebook.parent/link).is_file()] == []

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_holds_no_error_and_is_titled(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert cells[0].cell_type == 'markdown' and re.match(r'# .+\n\n?> .+', cells[0].source)
    assert not [output for cell in cells if cell.cell_type == 'code' for output in cell.outputs if output.output_type == 'error']

def test_readme_is_made_from_the_index():
    spec = importlib.util.spec_from_file_location('build_readme', ROOT/'.ci'/'build_readme.py')
    build_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_readme)
    assert (ROOT/'README.md').read_text(encoding='utf-8') == build_readme.readme_text(), 'run python .ci/build_readme.py'
