"The package imports without the development packages."
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = '''
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names}: raise ImportError(name + ' is a development package')
sys.meta_path.insert(0, Blocked())
import vicc
for module in pkgutil.iter_modules(vicc.__path__):
    if not module.name.startswith('_'): importlib.import_module('vicc.' + module.name)
'''

def test_imports_without_development_packages():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    names = {requirement.split('=')[0].split('>')[0] for requirement in config['DEFAULT']['dev_requirements'].split()}
    result = subprocess.run([sys.executable, '-c', CODE.replace('{names}', repr(names))], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
