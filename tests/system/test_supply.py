"What settings.ini says of other packages and of Pythons is true: everything imported is required, everything required is used, what is installed is allowed, and it was tried (see .ci/lowest)."
import ast
import csv
import re
import sys
from configparser import ConfigParser
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
INDIRECT = {'jinja2': 'pandas.io.formats.style'}  # required because another package's part, which we import, cannot do without
PACKAGES = {'cv2': 'opencv-contrib-python-headless', 'sklearn': 'scikit-learn', 'PIL': 'pillow', 'yaml': 'pyyaml'}  # of modules that are called otherwise
OPTIONAL = {'ipywidgets': 'dev', 'transformers': 'compare'}  # imported only where they are used, and requirements of an extra: without them there are no menus, no VideoMAE

def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])

REQUIREMENTS = [requirement for requirement in map(Requirement, settings()['requirements'].split()) if requirement.marker is None or requirement.marker.evaluate()]

@cache
def imported() -> dict[str, str]:
    "The package of every module that vicc imports from elsewhere, and a file that does."
    found = {}
    for path in sorted((ROOT/'vicc').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.split('.')[0] for name in modules} - {'vicc'} - sys.stdlib_module_names:
                found[canonicalize_name(PACKAGES.get(module, module))] = path.name
    return found

def test_every_import_is_required():
    required = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    missing = {name: file for name, file in imported().items() if name not in required | set(OPTIONAL)}
    assert missing == {}, 'add to requirements in settings.ini'
    assert all(name in settings()[f'{extra}_requirements'] for name, extra in OPTIONAL.items())

def test_every_requirement_is_used():
    notebooks = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT/'nbs').rglob('*.ipynb'))
    modules = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT/'vicc').rglob('*.py'))
    unused = [name for name in (canonicalize_name(requirement.name) for requirement in REQUIREMENTS)
              if name not in imported() and INDIRECT.get(name, '?') not in modules and not re.search(rf'"import {name}\b', notebooks)]
    assert unused == [], 'remove from settings.ini, or say in INDIRECT what needs it'

@pytest.mark.parametrize('requirement', REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_bounds(requirement):
    assert [bound.operator for bound in requirement.specifier] == ['>='], 'one lower bound: .ci/lowest installs just that version'
    assert version(requirement.name) in requirement.specifier

def test_the_pythons_stated_were_tried():
    stated = settings()['pythons'].split()
    assert stated[0] == settings()['min_python'] and f'{sys.version_info.major}.{sys.version_info.minor}' in stated
    rows = csv.DictReader((ROOT/'nbs'/'results'/'versions.csv').read_text(encoding='utf-8').splitlines())
    tried = {(row['which'], row['python'].rsplit('.', 1)[0]) for row in rows if int(row['passed']) and row['failed'] == '0'}
    assert {('lowest', stated[0])} | {('newest', python) for python in stated} <= tried
    assert re.search(r'python: \[(.*?)\]', (ROOT/'.github'/'workflows'/'test.yaml').read_text()).group(1).replace("'", '').split(', ') == stated
