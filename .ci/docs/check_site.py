"""Check a built site: every link inside it leads somewhere, nothing is loaded from the network, every equation can be typeset.

    python .ci/docs/check_site.py FOLDER

Links that lead out are counted, not fetched; `-v` lists them.
"""
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

class Page(HTMLParser):
    "What a page links to, loads, and can be linked to; and its equations."
    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.anchors, self.equations, self.depth = [], [], set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ('id', 'name') if values.get(key)}
        if tag == 'a' and 'href' in values: self.links.append(values['href'] or '')
        elif tag == 'link' and not {'canonical', 'next', 'prev', 'index', 'search'} & set((values.get('rel') or '').split()): self.loads.append(values.get('href') or '')
        elif tag == 'link': self.links.append(values.get('href') or '')
        if values.get('src'): self.loads.append(values['src'])
        if tag in ('div', 'span') and 'math' in (values.get('class') or '').split(): self.equations.append('')

    def handle_data(self, data):
        if self.equations and self.equations[-1] == '': self.equations[-1] = data.strip()

def outside(link: str) -> bool: return bool(re.match(r'(https?:)?//|mailto:', link))

def leads_nowhere(link: str, page: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    target = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir(): target /= 'index.html'
    if not target.is_file(): return True
    return bool(parts.fragment) and target in pages and unquote(parts.fragment) not in pages[target].anchors

def bad_equations(equations: list[str], katex: Path) -> list[str]:
    "The equations that KaTeX refuses, with its reason."
    script = '''const katex = require(process.argv[1]), lines = JSON.parse(require('fs').readFileSync(0))
    const bad = []
    for (const line of lines) try { katex.renderToString(line.replace(/^\\\\[([]|\\\\[)\\]]$/g, ''), {displayMode: line.startsWith('\\\\[')}) } catch (error) { bad.push(`${line}: ${error.message}`) }
    console.log(JSON.stringify(bad))'''
    ran = subprocess.run(['node', '-e', script, str(katex.resolve())], input=json.dumps(equations), capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)

def check(folder: Path) -> tuple[list[str], list[str], str]:
    "Complaints, links that lead out, and a line about what was looked at."
    folder = folder.resolve()
    pages = {path: Page(path.read_text(encoding='utf-8')) for path in sorted(folder.rglob('*.html')) if '_static' not in path.parts}
    wrong, out, inside = [], set(), 0
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in {*page.links, *page.loads}:
            if link.startswith(('data:', 'javascript:')): continue
            if outside(link):
                if link in page.loads: wrong.append(f'{name} loads {link} from the network')
                else: out.add(link)
                continue
            inside += 1
            if leads_nowhere(link, path, pages): wrong.append(f'{name}: {link} leads nowhere')
    for style in (folder/'_static').rglob('*.css'):
        for link in re.findall(r'url\(["\']?([^"\')]+)["\']?\)', style.read_text(encoding='utf-8')):
            if outside(link) or not link.startswith(('data:', '#')) and not (style.parent/urlsplit(link).path).is_file(): wrong.append(f'{style.relative_to(folder)}: {link}')
    equations = sorted({equation for page in pages.values() for equation in page.equations if equation})
    if shutil.which('node') and (folder/'_static'/'katex.min.js').is_file(): wrong += bad_equations(equations, folder/'_static'/'katex.min.js')
    return wrong, sorted(out), f'{len(pages)} pages, {inside} links inside, {len(out)} lead out (not fetched), {len(equations)} equations'

if __name__ == '__main__':
    wrong, out, line = check(Path(sys.argv[1]))
    print(*wrong, *(out if '-v' in sys.argv else []), line, sep='\n')
    sys.exit(bool(wrong))
