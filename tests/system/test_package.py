"The built package works outside of the clone and without the development packages, and explains itself."
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest

import vicc
from vicc.recipe import Recipe
from vicc.streams import Stream, save_stream
from vicc.video import write_video

ROOT = Path(__file__).parents[2]
CODE = '''
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names}: raise ImportError(name + ' is a development package')
sys.meta_path.insert(0, Blocked())
import vicc
for module in pkgutil.walk_packages(vicc.__path__, 'vicc.'):
    if not module.name.split('.')[-1].startswith('_'): importlib.import_module(module.name)
from vicc.manifests import KINETICS400_CLASSES
from vicc.plan import read_rows
from vicc.recipe import Recipe
print(vicc.__file__, vicc.__version__, len(KINETICS400_CLASSES), len(read_rows()) > 100, *(Recipe.read(name).num_prototypes for name in {recipes}))
try: Recipe.read('demmo')
except FileNotFoundError as error: assert str(error).endswith('or one of ' + ', '.join({recipes})), error
vicc.cli.main(['--version'])
'''

def build_wheel(folder: Path) -> Path:
    "The wheel of a copy of what it is made of: building leaves folders behind."
    pytest.importorskip('setuptools', '77')
    source = folder/'source'
    for name in ('vicc', 'data_manifests', 'nbs/recipes', 'nbs/results'):
        shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns('__pycache__', '*.ipynb', '*.png'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    command = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '--dist-dir', folder]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob('*.whl'))

def test_the_wheel_works_outside_of_the_clone_without_development_packages(tmp_path):
    recipes = sorted(path.stem for path in (ROOT/'nbs'/'recipes').glob('*.yaml'))
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        wheel.extractall(tmp_path/'site')
        entry_points, = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith('entry_points.txt'))
    assert 'vicc = vicc.cli:main' in entry_points
    assert {'LICENSE', 'METADATA'} <= {path.name for path in (tmp_path/'site').rglob('vicc-*/**/*')}
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    names = {requirement.split('=')[0].split('>')[0] for requirement in config['DEFAULT']['dev_requirements'].split()} - {'hypothesis', 'tensorboard'}  # torch and accelerate look for them, and do without
    result = subprocess.run([sys.executable, '-c', CODE.replace('{names}', repr(names)).replace('{recipes}', repr(recipes))], cwd=tmp_path,
                            env={**os.environ, 'PYTHONPATH': str(tmp_path/'site')}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, prototypes = config['DEFAULT']['version'], [str(Recipe.read(ROOT/'nbs'/'recipes'/f'{name}.yaml').num_prototypes) for name in recipes]
    assert result.stdout.split('\n')[0].split() == [str(tmp_path/'site'/'vicc'/'__init__.py'), version, '400', 'True', *prototypes]
    assert result.stdout.split('\n')[1] == f'vicc {version}'

def undocumented(module) -> list[str]:
    "Public names of a module whose help() would leave a question open: no words, or a parameter or result without a type."
    found = [] if module.__doc__ else [module.__name__]
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, '__module__', '') != module.__name__ or not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        own = {name: thing} if inspect.isfunction(thing) else {f'{name}.{method}': function for method, function in vars(thing).items() if inspect.isfunction(function)
                                                              and not method.startswith('_') and not any(hasattr(base, method) for base in thing.__bases__)}
        if inspect.isclass(thing) and '__init__' in vars(thing): found += [f'{module.__name__}.{name}({parameter}: ?)' for parameter in untyped(thing.__init__)]
        found += [f'{module.__name__}.{place} says nothing' for place, said in {name: thing, **own}.items() if not said.__doc__ or said.__doc__.startswith(f'{name}(')]
        for place, function in own.items():
            found += [f'{module.__name__}.{place}({parameter}: ?)' for parameter in untyped(function)]
            if inspect.signature(function).return_annotation is inspect.Signature.empty: found.append(f'{module.__name__}.{place} -> ?')
    return found

def untyped(function) -> list[str]:
    "Parameters without a type."
    return [parameter.name for parameter in inspect.signature(function).parameters.values() if parameter.annotation is parameter.empty and parameter.name not in ('self', 'cls')]

@pytest.mark.parametrize('name', [module.name for module in pkgutil.walk_packages([str(ROOT/'vicc')], 'vicc.') if not (module.ispkg or module.name.startswith('vicc._'))])
def test_help_of_every_public_name(name):
    assert undocumented(importlib.import_module(name)) == []

def test_names_and_version_of_the_package():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    assert vicc.__version__ == config['DEFAULT']['version']
    assert all(getattr(vicc, name) is not None for name in vicc.__all__) and set(vicc.__all__) <= set(dir(vicc))
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"): vicc.unheard_of

def test_types_are_there_for_users():
    assert (ROOT/'vicc'/'py.typed').is_file()

def test_the_readmes_example_without_notebooks(tmp_path, monkeypatch, capsys):
    code = re.search(r'## Use it without notebooks.*?```python\n(.*?)```', (ROOT/'README.md').read_text(), re.DOTALL).group(1)
    films = re.findall(r"'(\w+\.mp4)'", code)
    monkeypatch.chdir(tmp_path)
    save_stream(Stream('small', 6, projection_dim=8, backbone_options={'width': 4}, trained_on=dict(modality='rgb', clip_length=8, view_size=32)), re.search(r"load_stream\('(.*?)'\)", code).group(1))
    rng = np.random.default_rng(0)
    for film in films: write_video(film, rng.integers(0, 255, (12, 48, 64, 3), dtype=np.uint8))
    exec(compile(code, 'README.md', 'exec'), {})
    assert sorted(line.split(':')[0] for line in capsys.readouterr().out.splitlines()) == sorted(films[:-1])
