"Write README.md from nbs/index.ipynb: `python .ci/build_readme.py`."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]

def readme_text() -> str:
    "The README that nbs/index.ipynb stands for; cells that begin with `#| hide` are left out, paths of pictures start at the root."
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    notebook.cells = [cell for cell in notebook.cells if cell.source.split('\n')[0] != '#| hide']
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(notebook)
    text = re.sub(r'\]\((results/|(?:\w+/)?\w+\.ipynb)', r'](nbs/\1', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme_text(), encoding='utf-8')
