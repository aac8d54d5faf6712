"""Put KaTeX, which typesets the equations, into a folder: from the npm registry the first time, never again after that.

    python .ci/docs/fetch_katex.py FOLDER
"""
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = '0.16.47'
SHA256 = 'ad2d1ab2f7fcc227019784320e8a2c5218ff6bb333b36df4136d10365ae29375'

def unpack(archive: Path, folder: Path) -> None:
    "The script, the style and one file a font, which is what a browser asks for."
    folder.mkdir(parents=True)
    (folder/'fonts').mkdir()
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            name = member.name.removeprefix('package/dist/')
            if name in ('katex.min.js', 'katex.min.css') or re.fullmatch(r'fonts/[\w-]+\.woff2', name):
                (folder/name).write_bytes(files.extractfile(member).read())
    style = folder/'katex.min.css'
    style.write_text(re.sub(r',url\([^)]*\.(woff|ttf)\) format\("\w+"\)', '', style.read_text(encoding='utf-8')), encoding='utf-8')

def fetch(folder: Path) -> None:
    if (folder/VERSION).is_file(): return
    if not shutil.which('npm'): sys.exit(f'npm is needed once, to fetch KaTeX {VERSION} into {folder}: install Node.js, or build where it is')
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(['npm', 'pack', '--silent', f'katex@{VERSION}'], cwd=place, check=True, stdout=subprocess.DEVNULL)
        archive = Path(place)/f'katex-{VERSION}.tgz'
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256: sys.exit(f'{archive.name} is not the file that is expected: SHA-256 {found}')
        unpack(archive, folder)
    (folder/VERSION).touch()

if __name__ == '__main__': fetch(Path(sys.argv[1]))
