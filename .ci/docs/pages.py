"""Write what Sphinx reads: a page for every notebook with its stored outputs, and a page for every module. Nothing is run.

    python .ci/docs/pages.py ROOT TARGET COLAB

TARGET gets the pages; COLAB gets copies of the notebooks that install the package when they are opened in Colab, if settings.ini names a
repository on github.com.
"""
import json
import re
import shutil
import sys
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from modules import Entry, Row, entries

# Folder of nbs/ -> heading, in the order of the map: the numbered notebooks of nbs/ itself, its others, the wings.
GROUPS = {'': 'The paper', 'experiments': 'Experiments', 'howto': 'How to', 'datasets': 'Data sets', 'engine': 'What keeps a run alive', 'fast': 'The same, faster', 'viz': 'Pictures', 'compare': 'Other methods'}
# What the front page offers first: words, page, heading
START = [('the paper in ten minutes', '00_tour', ''), ('the main job with its pictures', 'run_pretrain', ''), ('clips that play, by prototype', 'run_prototypes', 'the-explorer'),
         ('your own videos', 'howto/own_data', ''), ('every name', 'api/index', '')]
# The page that run_prototypes wrote, if it was run here: `conf.py` copies it to the root of the site
EXPLORER = Path('runs', 'prototypes', 'explorer.html')
# Text in which no name becomes a link: code blocks, equations, links and pictures, tags, addresses, directives
KEPT = r'^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)|\$\$.*?\$\$|\$[^$\n]+\$|!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|<[^>\s][^>\n]*>|https?://\S+|`[^`\n]+`'

@dataclass
class Notebook:
    "A notebook and what its exported cells define."
    name: str                  # '05_prototypes', 'engine/io'
    cells: list[dict]
    module: str = ''           # 'prototypes'; '' for one that exports nothing
    entries: list[Entry] = field(default_factory=list)
    cell_of: dict[str, int] = field(default_factory=dict)  # the number of the cell that defines a name

    @property
    def title(self) -> str: return source(self.cells[0]).split('\n')[0].removeprefix('# ')

    @property
    def about(self) -> str: return source(self.cells[0]).partition('> ')[2].split('\n')[0]

    @property
    def number(self) -> str: return self.name.split('_')[0] if self.name[0].isdigit() else ''

    @property
    def up(self) -> str: return '../'*self.name.count('/')  # from its page to the root of the site

def source(cell: dict) -> str: return ''.join(cell['source'])

def directives(cell: dict) -> list[str]:
    "What `#|` lines say, as ['export', 'default_exp prototypes']."
    return re.findall(r'^#\|\s*(.+?)\s*$', source(cell), re.M) if cell['cell_type'] == 'code' else []

def shown_code(cell: dict) -> str: return re.sub(r'^#\|.*\n?', '', source(cell), flags=re.M).strip('\n')

def exported(cell: dict) -> bool: return bool({'export', 'exports'} & set(directives(cell)))

def read_notebook(path: Path, nbs: Path | None = None) -> Notebook:
    notebook = Notebook(path.relative_to(nbs or path.parent).with_suffix('').as_posix(), json.loads(path.read_text(encoding='utf-8'))['cells'])
    for number, cell in enumerate(notebook.cells):
        for directive in directives(cell):
            if directive.startswith('default_exp '): notebook.module = directive.split()[1]
        if not exported(cell): continue
        found = entries(shown_code(cell))
        notebook.entries += found
        notebook.cell_of |= {entry.name: number for entry in found}
    return notebook

# ---- links

class Links:
    "Turns the names of notebooks, modules and public things into links to their pages."
    def __init__(self, notebooks: list[Notebook], package: str):
        self.package = package
        self.notebooks = {notebook.name for notebook in notebooks}
        self.mentions = re.compile(r'(?<![\w/.])(' + '|'.join(sorted(map(re.escape, self.notebooks - {'index'}), reverse=True)) + r')(?!\w|\.\w)')
        self.roles, self.places = {}, {}
        for notebook in notebooks:
            if not notebook.module: continue
            self.roles[f'{package}.{notebook.module}'] = 'mod'
            for entry in notebook.entries:
                for name in [entry.name, *(f'{entry.name}.{member.name}' for member in entry.members)]:
                    self.roles[f'{package}.{notebook.module}.{name}'] = 'py'
                    self.places.setdefault(name, []).append(f'{package}.{notebook.module}.{name}')

    def full_name(self, name: str, module: str = '') -> str:
        "'sinkhorn' → 'vicc.prototypes.sinkhorn'; '' if it is nobody's, or of several modules and not of this one."
        name = name.removesuffix('()')
        own = f'{self.package}.{module}.{name}'
        if own in self.roles: return own
        for known in (name, f'{self.package}.{name}'):
            if known in self.roles: return known
        return self.places[name][0] if len(self.places.get(name, [])) == 1 else ''

    def of(self, text: str, module: str = '', up: str = '') -> str:
        "The text with links. `module` is where names are looked for first; `up` leads to the notebooks' folder."
        def linked(match: re.Match) -> str:
            kept = match[0]
            if not kept.startswith('`') or kept.startswith('``'): return kept
            name = kept[1:-1]
            if name != 'index' and name.removesuffix('.ipynb') in self.notebooks: return f'[{name}]({up}{name.removesuffix(".ipynb")}.ipynb)'
            full = self.full_name(name, module)
            return f'{{py:obj}}`{name} <{full}>`' if full else kept
        parts, end, mention = [], 0, rf'[\1]({up}\1.ipynb)'
        for match in re.finditer(KEPT, text, re.M | re.S):
            parts += [self.mentions.sub(mention, text[end:match.start()]), linked(match)]
            end = match.end()
        return ''.join(parts) + self.mentions.sub(mention, text[end:])

# ---- Colab

def settings(root: Path) -> dict[str, str]:
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])

def github_repository(values: dict[str, str]) -> str:
    "'owner/name', from the address in settings.ini; '' if that is not one of github.com."
    found = re.fullmatch(r'https?://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?', values.get('url', ''))
    return found[1] if found else ''

def colab_cell(repository: str, values: dict[str, str]) -> str:
    "Code that fetches and installs the package where it is missing."
    fastcore = next((need for need in values.get('dev_requirements', '').split() if need.startswith('fastcore')), 'fastcore')
    folder = f'/content/{values["lib_name"]}'
    return '\n'.join(['# Colab: fetch the repository and install the package, once. Elsewhere this does nothing.', 'import os', 'import sys',
                      "if 'google.colab' in sys.modules:", f"    if not os.path.isdir('{folder}'):",
                      f'        !git clone -q --depth 1 https://github.com/{repository} {folder}', f'        %pip install -q {folder} {fastcore}',
                      f"    os.chdir('{folder}/nbs')"])

def write_colab_copy(path: Path, target: Path, repository: str, values: dict[str, str]) -> None:
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cell = dict(cell_type='code', id='colab', metadata={}, execution_count=None, outputs=[], source=colab_cell(repository, values))
    notebook['cells'].insert(1, cell)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding='utf-8')

# ---- pages of notebooks

def markdown(text: str) -> dict: return dict(cell_type='markdown', metadata={}, source=text)

def shown_output(output: dict, links: Links, module: str, up: str = '') -> dict:
    "An output as it can be shown without a kernel: widgets give way to what else the output holds."
    if 'data' not in output: return output
    data = {kind: value for kind, value in output['data'].items() if 'widget' not in kind}
    if 'text/markdown' in data: data = {'text/markdown': links.of(''.join(data['text/markdown']), module, up)}
    return {**output, 'data': data}

def anchor(notebook: Notebook, number: int) -> str: return f'cell-{notebook.module}-{number}'

def page_cells(notebook: Notebook, number: int, links: Links) -> list[dict]:
    "The cell as a reader should see it: without directives, with links, and with a place that the module's page leads to."
    cell = notebook.cells[number]
    said = directives(cell)
    if cell['cell_type'] == 'markdown': return [markdown(links.of(source(cell), notebook.module, notebook.up))]
    if cell['cell_type'] != 'code' or 'hide' in said: return []
    code = shown_code(cell)
    if not code: return []
    tags = ['exported']*exported(cell) + ['remove-input']*('hide_input' in said)
    outputs = [shown_output(output, links, notebook.module, notebook.up) for output in cell['outputs']]
    outputs = [output for output in outputs if output.get('data', True)]
    shown = dict(cell_type='code', metadata={'tags': tags}, source=code, outputs=outputs, execution_count=None)
    return [markdown(f'({anchor(notebook, number)})=')]*(number in notebook.cell_of.values()) + [shown]

def notebook_page(notebook: Notebook, links: Links, repository: str, explorer: bool = False) -> dict:
    "The notebook that stands for the page."
    cells = [shown for number in range(len(notebook.cells)) for shown in page_cells(notebook, number, links)]
    line = []
    if notebook.module: line.append(f'Exports {{py:mod}}`{links.package}.{notebook.module}`')
    if repository and notebook.name != 'index':
        line.append(f'<a class="colab" href="https://colab.research.google.com/github/{repository}/blob/colab/{notebook.name}.ipynb">Open in Colab</a>')
    if notebook.name == 'index':
        first = [f'[{words}]({place}.{"md" if "api/" in place else "ipynb"}{"#"*bool(heading)}{heading})'
                 for words, place, heading in START if place in {*links.notebooks, 'api/index'}]
        if explorer: first.insert(-1, f'<a href="{EXPLORER.name}">all prototypes of the stored run</a>')
        before, about, after = cells[0]['source'].partition(notebook.about)
        cells[0] = markdown(f'{before}{about}\n\nBegin with {" · ".join(first)}\n{after}')
    if line: cells.insert(1, markdown('{.about}\n' + ' · '.join(line)))
    for number, cell in enumerate(cells): cell['id'] = f'cell{number}'
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'), language_info=dict(name='python'))
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)

# ---- pages of modules

def table(rows: list[Row], returns: Row | None) -> str:
    "Parameters (or fields of a dataclass), and what is returned, as a table; '' where nothing but names would stand in it."
    if not any(row.kind or row.default or row.comment for row in rows) and not returns: return ''
    code = lambda text: '`' + text.replace('|', r'\|').replace('\n', ' ') + '`' if text else ''
    plain = lambda text: re.sub(r'(`[^`]*`|\$[^$]*\$)|([*<])', lambda found: found[1] or '\\' + found[2], text).replace('|', r'\|')
    kind = lambda row: code(re.sub(r"'([\w.]+)'", r'\1', row.kind))  # a class that names itself stands in quotes
    lines = [('parameter', 'type', 'default', ''), ('---',)*4]
    lines += [(code(row.name), kind(row), code(row.default), plain(row.comment)) for row in rows]
    if returns: lines.append(('*returns*', kind(returns), '', plain(returns.comment)))
    if not any(row.default for row in rows): lines = [(*line[:2], line[3]) for line in lines]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)

def described(entry: Entry, notebook: Notebook, links: Links, level: int = 0) -> str:
    "One public thing as a directive of Sphinx's Python domain, which gives it an anchor, a place in the index and in the search."
    fence, parts = '`'*(6 - level), []
    bases = [f'`{base}`' for base in entry.bases if not base.startswith(('Generic', 'Protocol'))]
    if bases: parts.append('A kind of ' + ', '.join(bases) + '.')
    text = re.sub(r'(`[^`]*`|\$[^$]*\$)|(<)', lambda found: found[1] or '\\' + found[2], entry.text)
    parts.append(re.sub(r'\n(Raises|Returns|Source)\b', r'\n\n\1', text))
    options, sort = [], entry.sort
    if sort == 'data': options.append(':value: ' + json.dumps(entry.signature if len(entry.signature) <= 70 else entry.signature[:67] + '…'))
    if sort in ('classmethod', 'staticmethod'): options, sort = [f':{sort}:'], 'method'
    if entry.sort != 'data': parts.append(table(entry.rows, entry.returns))
    if level == 0: parts.append(f'[Explained in {notebook.name}](#{anchor(notebook, notebook.cell_of[entry.name])})')
    signature = '' if sort == 'data' else entry.signature
    parts = [links.of(part, notebook.module, '../') for part in parts if part] + [described(member, notebook, links, 1) for member in entry.members]
    body = '\n\n'.join(parts)
    return '\n'.join([f'{fence}{{py:{sort}}} {entry.name}{signature}', *options, '', body, fence])

def module_page(notebook: Notebook, links: Links) -> str:
    name = f'{links.package}.{notebook.module}'
    parts = [f'# {name}', f'> {links.of(notebook.about, notebook.module, "../")}', f'Explained, tested and exported in [{notebook.name}](../{notebook.name}.ipynb).',
             f'```{{py:module}} {name}\n```', *(described(entry, notebook, links) for entry in notebook.entries)]
    return '\n\n'.join(parts) + '\n'

def modules_page(notebooks: list[Notebook], links: Links) -> str:
    "The overview of the modules."
    with_module = [notebook for notebook in notebooks if notebook.module]
    lines = ['# Modules', '', f'Every public name of `{links.package}`, as the notebooks define it; {{ref}}`all names from A to Z <genindex>`.', '',
             '| module | | notebook |', '| --- | --- | --- |']
    lines += [f'| {{py:mod}}`{links.package}.{notebook.module}` | {notebook.about} | [{notebook.name}](../{notebook.name}.ipynb) |' for notebook in with_module]
    return '\n'.join(lines) + '\n\n' + toctree('', [f'{links.package}.{notebook.module} <{notebook.module}>' for notebook in with_module])

# ---- all of it

def toctree(caption: str, lines: list[str]) -> str:
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *lines, '```', ''])

def map_order(notebooks: list[Notebook]) -> list[Notebook]:
    "The notebooks with the experiments in the order of the index's table; everything else by name."
    index = next((notebook for notebook in notebooks if notebook.name == 'index'), None)
    text = json.dumps(index.cells) if index else ''
    return sorted(notebooks, key=lambda notebook: text.rfind(f']({notebook.name}.ipynb)') if notebook.name.startswith('run_') else -1)

def contents(notebooks: list[Notebook], stored: list[Notebook] = []) -> str:
    "The book's table of contents, in the order of the map: the paper, the experiments and what they stored in results/, the wings, the modules."
    groups = {heading: [] for heading in GROUPS.values()}
    for notebook in map_order(notebooks):
        if notebook.name == 'index': continue
        folder = notebook.name.rpartition('/')[0]
        heading = GROUPS.get(folder or ('' if notebook.number else 'experiments'), folder)
        groups.setdefault(heading, []).append(f'{notebook.number + " " if notebook.number else ""}{notebook.title} <{notebook.name}>')
    groups['Experiments'] += [f'{notebook.title} <results/{notebook.name}>' for notebook in stored]
    return '\n'.join(toctree(group, lines) for group, lines in groups.items() if lines) + '\n' + toctree('Reference', ['api/index'])

def write_site(root: Path, target: Path, colab: Path, names: list[str] | None = None) -> None:
    "Write every page; `names` keeps to some of the notebooks."
    values = settings(root)
    nbs, kept = root/'nbs', ('results', '.ipynb_checkpoints', '_proc')
    paths = [path for path in sorted(nbs.rglob('*.ipynb')) if not set(path.parts) & set(kept) and (names is None or path.stem in names)]
    notebooks, stored = [read_notebook(path, nbs) for path in paths], [read_notebook(path) for path in sorted((nbs/'results').glob('*.ipynb'))]
    links, repository = Links(notebooks, values['lib_name']), github_repository(values)
    for folder in (target, colab): shutil.rmtree(folder, ignore_errors=True)
    (target/'api').mkdir(parents=True)
    for notebook in notebooks:
        page = notebook_page(notebook, links, repository, (root/EXPLORER).is_file())
        if notebook.name == 'index': page['cells'].append(dict(markdown(contents(notebooks, stored)), id='contents'))
        (target/notebook.name).parent.mkdir(parents=True, exist_ok=True)
        (target/f'{notebook.name}.ipynb').write_text(json.dumps(page), encoding='utf-8')
        if notebook.module: (target/'api'/f'{notebook.module}.md').write_text(module_page(notebook, links), encoding='utf-8')
    (target/'api'/'index.md').write_text(modules_page(notebooks, links), encoding='utf-8')
    for folder in ('results', 'recipes'):
        if (root/'nbs'/folder).is_dir(): shutil.copytree(root/'nbs'/folder, target/folder)
    print(f'{len(notebooks)} notebooks, {sum(bool(notebook.module) for notebook in notebooks)} modules')
    if not repository: return print(f'no Colab badges: the url in settings.ini ({values.get("url", "none")}) is not a repository on github.com')
    colab.mkdir(parents=True)
    for path in paths:
        if path.stem != 'index': write_colab_copy(path, colab/path.relative_to(nbs), repository, values)

if __name__ == '__main__': write_site(*map(Path, sys.argv[1:4]))
