"Write README.md from nbs/index.ipynb: `python .ci/build_readme.py`."
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]

def readme_text() -> str:
    "The README that nbs/index.ipynb stands for; cells that begin with `#| hide` are left out, paths of pictures start at the root."
    notebook = nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith('#| hide')]
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(notebook)
    return text.replace('](results/', '](nbs/results/').replace('.ipynb)', '.ipynb)').strip() + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme_text(), encoding='utf-8')
