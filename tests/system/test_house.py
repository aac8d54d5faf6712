"The package as a house: no import circle, wings that keep to themselves, short class chains, lines that need no sideways scrolling, no public name twice."
import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]/'vicc'
FILES = {'.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__'): path for path in sorted(PACKAGE.rglob('*.py')) if path.stem != '_modidx'}
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in FILES.items()}
WINGS = {'engine': {'engine'}, 'fast': {'fast', 'engine'}, 'viz': {'viz'}, 'ground': {'ground', 'engine', 'fast'}}  # who may import whom; compare imports everything
WIDTH = 120


def wing(module: str) -> str: return module.split('.')[0] if module.split('.')[0] in ('engine', 'fast', 'viz', 'compare') else 'ground'


def imported(name: str) -> set[str]:
    "Modules of ours that a module takes from, in functions and in strings such as 'vicc.flow' too."
    found, here = set(), name.split('.')[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or '').split('.') if node.module else []
            if node.level: base = here[:len(here) - node.level + 1] + base
            elif base[:1] == ['vicc']: base = base[1:]
            else: continue
            for alias in node.names: found |= {'.'.join(base), '.'.join([*base, alias.name])}
        elif isinstance(node, ast.Import): found |= {alias.name[5:] for alias in node.names if alias.name.startswith('vicc.')}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r'vicc(\.\w+)+', node.value): found.add(node.value[5:])
    return {module for module in found if module in FILES and module not in ('', '__init__', name)}


IMPORTS = {name: imported(name) for name in FILES}


@pytest.mark.parametrize('name', FILES)
def test_no_module_imports_itself_by_way_of_others(name):
    seen, stack = set(), [name]
    while stack:
        for other in IMPORTS[stack.pop()] - seen:
            seen.add(other)
            stack.append(other)
    assert name not in seen or name == '__init__', f'{name} imports {sorted(IMPORTS[name] & seen)}, which lead back to it'


@pytest.mark.parametrize('name', [name for name in FILES if name not in ('__init__', 'cli', 'bench') and wing(name) != 'compare'])
def test_wings_keep_to_themselves(name):
    assert [other for other in IMPORTS[name] if wing(other) not in WINGS[wing(name)]] == []


def test_chains_of_our_classes_are_short():
    bases = {node.name: [getattr(base, 'id', getattr(base, 'attr', '')) for base in node.bases] for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    def depth(name: str) -> int: return 1 + max([depth(base) for base in bases[name] if base != name] or [0]) if name in bases else 0
    assert [f'{name} stands on {depth(name) - 1} classes of ours' for name in bases if depth(name) > 2] == []


@pytest.mark.parametrize('name', FILES)
def test_lines_are_narrow(name):
    names = next((node for node in TREES[name].body if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__'), None)
    generated = range(names.lineno, names.end_lineno + 1) if names else ()  # nbdev wraps this list, a little wider
    lines = enumerate(FILES[name].read_text(encoding='utf-8').splitlines(), 1)
    wide = [number for number, line in lines if len(line) > WIDTH and number not in generated]
    assert wide == [], f'{FILES[name]}: lines over {WIDTH} columns'


def test_no_public_name_twice():
    homes = defaultdict(set)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_') and node.name != 'main': homes[node.name].add(name)
    assert {name: sorted(where) for name, where in homes.items() if len(where) > 1} == {}
