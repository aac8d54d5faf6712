"""Thousands of damaged, odd and hostile texts, and what the package says to them.

`python tests/robustness/fuzz_texts.py --count 2500` takes sound files of every kind that is read, changes each in one of many ways, and reads it. It may be accepted, or refused with a ValueError or FileNotFoundError
that names it. Everything else is a problem: a crash, a hang, another error, a message without the file's name, another file changed. The same count and seed give the same files.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from vicc.recipe import Recipe

from vicc.engine.io import find_project

from vicc.run_dir import begin_run, init_run_dir, read_history
from vicc.engine.checkpoint import save_checkpoint
from vicc.engine.io import file_digest, read_yaml
from vicc.engine.io import IsolatedCall, WorkerDied
from vicc.manifests import kinetics_manifest, read_manifest, read_split_list, write_manifest
from vicc.prepare import PrepareSettings, Store, init_store, read_checksums
from vicc.prototypes import ProjectionQueue
from vicc.evaluation import cached_chunks
from vicc.trainer import Trainer, StageConfig, VICC
from vicc.streams import SAVED_FILES, STREAM_CHECKSUMS, Stream, load_released, load_stream, save_stream, split_released
from vicc.engine.fit import EpochState, FitLoop

SECONDS = 20  # that one file may take
ROOT = find_project(__file__)
VIDEOS = pd.DataFrame([dict(video=f'run/v_{n}.mp4', label=n % 3, class_name=('run', 'jump', 'wave')[n % 3], group=f'g{n//2}', num_frames=30, fps=25., width=64, height=48) for n in range(8)])

# What is put into files

HUGE = ['9'*20, '9'*400, '9'*6000, '-1', '-99999999999999999999', '0', 'nan', 'inf', '-inf', '1e999', '0.5', '1e-320', '0x10', '1_000', '12:30:45', '٣']
WORDS = ['', ' ', '../../etc/passwd', '/etc/passwd', 'C:\\x', '..', 'a\tb', 'ü', '😀', 'مرحبا', '<script>alert(1)</script>', '$\\frac$', '\u202egnp.exe', 'x'*3000, '"', "'", 'null', 'true', '~', '=1+1', '%s%n', '{0}', '-', '#']
DEEP = ['['*90 + ']'*90, '['*20_000 + ']'*20_000, '['*5000, '{"a":'*5000]
YAML = ['*nowhere', '&a [*a]', '!!python/object/apply:os.system ["touch it_ran"]', '!!python/name:os.system', '!!binary x', '!!timestamp x', '!!int x', '!!float x', '!!bool x', '!!set {a, b}', '!!omap [a: 1]',
        '2001-99-99', '2001-02-03', '<<: {seed: 1}', '? [a]', '|\n  text', '>-\n  x', '[' * 3000, '{' * 3000, '"\\x00"', '@', '%', '`']
LAUGHS = 'laugh0: &l0 [ha, ha]\n' + ''.join(f'laugh{n}: &l{n} [{", ".join([f"*l{n - 1}"]*9)}]\n' for n in range(1, 10))

def pick(rng: np.random.Generator, values: Any) -> Any: return values[int(rng.integers(len(values)))]

# Changes of bytes, which any file can suffer

def change_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    "Bits, pieces, numbers or the encoding of a file are changed."
    size = len(data)
    a, b = sorted(rng.integers(0, size + 1, 2).tolist())
    how = int(rng.integers(14))
    if how == 0:
        out = bytearray(data)
        for place in rng.integers(0, max(size, 1), int(rng.integers(1, 20))).tolist() if size else []: out[place] ^= 1 << int(rng.integers(8))
        return bytes(out)
    if how == 1: return data[:a]
    if how == 2: return data[:a] + rng.bytes(int(rng.integers(1, 400))) + data[a:]
    if how == 3: return data[:b] + data[a:b] + data[b:]
    if how == 4: return data[:a] + data[b:]
    if how == 5: return b''
    if how == 6: return rng.bytes(int(rng.integers(1, 3000)))
    if how == 7: return data.decode('utf-8', 'replace').encode('utf-16')
    if how == 8: return data[:a] + 'größe'.encode('latin-1') + data[a:]
    if how == 9: return data[:a] + b'\0'*int(rng.integers(1, 50)) + data[a:]
    if how == 10: return data[:a] + pick(rng, [b'x', b',', b'9', b' ', b'\n', b'"', b'- '])*int(rng.integers(1, 600_000)) + data[a:]
    if how == 11: return b'\xef\xbb\xbf' + data.replace(b'\n', b'\r\n' if rng.random() < .5 else b'\r')
    if how == 12: return data[:a] + pick(rng, WORDS).encode() + data[b:]
    places = list(re.finditer(rb'\d+(\.\d+)?', data[:100_000]))
    if not places: return data[::-1]
    place = pick(rng, places)
    return data[:place.start()] + pick(rng, HUGE).encode() + data[place.end():]

# Changes of structure: still a file of its kind

def change_tree(tree: Any, rng: np.random.Generator) -> Any:
    "One place in lists and dictionaries is removed, renamed, doubled or becomes something else."
    places = []
    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
            places.append((node, key))
            walk(node[key])
    walk(tree)
    if not places: return pick(rng, [[], {}, 1, None, 'text'])
    node, key = pick(rng, places)
    how = int(rng.integers(6))
    if how == 0: del node[key]
    elif how == 1 and isinstance(node, dict): node[pick(rng, WORDS)] = node.pop(key)
    elif how == 2 and isinstance(node, list): node.insert(int(key), node[key])
    elif how == 3: node[key] = [node[key]]
    elif how == 4: node[key] = '@@DEEP@@'
    else: node[key] = pick(rng, [None, True, -1, 0, 10**30, 1.5, math.nan, math.inf, [], {}, [[]], {'a': 1}, *WORDS])
    return tree

def change_json(text: str, rng: np.random.Generator) -> str:
    return json.dumps(change_tree(json.loads(text), rng)).replace('"@@DEEP@@"', pick(rng, DEEP))

def change_yaml(text: str, rng: np.random.Generator) -> str:
    lines = text.splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r'\s*[\w"]+:', line)] or [0]
    number, how = pick(rng, keys), int(rng.integers(7))
    if how == 0: del lines[number]
    elif how == 1: lines.append(lines[number])
    elif how == 2: lines.insert(number, LAUGHS)
    elif how == 3: lines[number] = re.sub(r'[\w"]+:', lambda _: f'{pick(rng, [*WORDS[:20], "1", "on", "[a]"])}:', lines[number], count=1)
    elif how == 4: lines[number] = '  '*int(rng.integers(1, 200)) + lines[number]
    else: lines[number] = lines[number].split(':')[0] + ': ' + str(pick(rng, YAML + HUGE + WORDS))
    return '\n'.join(lines) + '\n'

def change_csv(text: str, rng: np.random.Generator) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    row, how = int(rng.integers(len(rows))), int(rng.integers(7))
    column = int(rng.integers(max(len(rows[row]), 1)))
    if how == 0:
        for cells in rows: del cells[column:column + 1]
    elif how == 1: rows.insert(row, list(rows[row]))
    elif how == 2: del rows[row]
    elif how == 3: rows[row] = rows[row][:column]
    else: rows[row][column:column + 1] = [pick(rng, WORDS + HUGE + ['a\nb', 'a\0b', 'x'*200_000])]
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(rows)
    return out.getvalue()

def change_lines(text: str, rng: np.random.Generator) -> str:
    lines = text.splitlines()
    number, how = int(rng.integers(len(lines))), int(rng.integers(4))
    if how == 0: lines[number] = pick(rng, WORDS)
    elif how == 1: lines.append(lines[number])
    elif how == 2: lines[number] += ' ' + pick(rng, HUGE)
    else: lines[number] = lines[number].replace(pick(rng, list(lines[number]) or ['x']), pick(rng, WORDS))
    return '\n'.join(lines)

def change_head(data: bytes, rng: np.random.Generator) -> bytes:
    "The list at the head of a safetensors file."
    length, = struct.unpack('<Q', data[:8])
    if rng.random() < .15: return struct.pack('<Q', int(pick(rng, [0, 1, length*2, 10**9, 2**63]))) + data[8:]
    head = change_json(data[8:8 + length].decode(), rng).encode()
    return struct.pack('<Q', len(head)) + head + data[8 + length:]

def change_archive(data: bytes, rng: np.random.Generator) -> bytes:
    "A part of a file of torch.save is changed, with a right check sum, or made into a bomb."
    out, bomb = io.BytesIO(), rng.random() < .2
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED) as new:
        parts = old.infolist()
        chosen = pick(rng, [part.filename for part in parts] + [part.filename for part in parts if part.filename.endswith('data.pkl')]*3)
        for part in parts: new.writestr(part.filename, bytes(3_000_000) if bomb and part.filename == chosen else change_bytes(old.read(part), rng) if part.filename == chosen else old.read(part))
        if rng.random() < .1: new.writestr('../../outside', b'x')
    return out.getvalue()

TEXTS = {'.json': change_json, '.yaml': change_yaml, '.csv': change_csv, '.txt': change_lines}
BINARIES = {'.safetensors': change_head, '.pt': change_archive, '.tar': change_archive}

def change(file: Path, rng: np.random.Generator) -> None:
    "Change a file in one way, now and then in two."
    data = file.read_bytes()
    for _ in range(1 + (rng.random() < .15)):
        try:
            if rng.random() < .5: data = change_bytes(data, rng)
            elif file.suffix in TEXTS: data = TEXTS[file.suffix](data.decode(), rng).encode('utf-8', 'surrogatepass')
            else: data = BINARIES[file.suffix](data, rng)
        except Exception: data = change_bytes(data, rng)  # the first change left nothing that has a structure
    file.write_bytes(data)

# Sound files of every kind, and who reads them

class Toy:
    "As much of a stage as a checkpoint needs."
    state_dict, load_state_dict = Trainer.state_dict, Trainer.load_state_dict
    rank_state_dict, load_rank_state_dict = Trainer.rank_state_dict, Trainer.load_rank_state_dict
    overridable, seed, teacher_moves = (), 0, False
    def fingerprint(self): return dict(title='toy', seed=self.seed)
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.settings, self.accelerator, self.stream, self.queue = StageConfig(), Accelerator(cpu=True), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), ProjectionQueue(2, 4, 3)
            self.optimizer = torch.optim.AdamW(self.stream.parameters())
            self.stream(torch.randn(5, 4)).square().sum().backward()
            self.optimizer.step()

def make_checkpoint(folder: Path) -> None:
    toy, metrics = Toy(), argparse.Namespace(loss=torch.tensor(1.), steps=2)
    history = [dict(stage='toy', epoch=1, loss=1.5, online_r1=math.nan)]
    state = EpochState.capture(2, metrics, torch.device('cpu'))
    shared = dict(trainer=toy.state_dict(), history=history, fingerprint=toy.fingerprint())
    own = dict(trainer=toy.rank_state_dict(), epoch_state=vars(state))
    save_checkpoint(folder, 3, shared, own, toy.accelerator)

def sign_stream(folder: Path) -> None: (folder/STREAM_CHECKSUMS).write_text(json.dumps({name: file_digest(folder/name) for name in SAVED_FILES}))

def make_released(folder: Path) -> None:
    state = {f'encoder_q.{name}': torch.rand(shape) for name, shape in (('0.conv1.weight', (4, 3)), ('2.weight', (4, 4, 1, 1, 1)), ('4.bias', (4,)))} | {'prototypes.weight': torch.rand(5, 4)}
    torch.save(dict(epoch=3, state_dict=state, best_acc=np.float64(.5)), folder/'ViCC-RGB-1.pth.tar')
    torch.save(dict(epoch=3, state_dict=state), folder/'old.pth.tar', _use_new_zipfile_serialization=False)

def read_released(folder: Path) -> None:
    for path in sorted(folder.glob('*.tar')):
        split_released(path)
        try: load_released(path)
        except ValueError as error: assert path.name in str(error)  # too small for a network

def make_store(folder: Path) -> None:
    init_store(folder, PrepareSettings(), 'opencv on cpu')
    write_manifest(VIDEOS, folder/'manifest.csv')
    (folder/'report.json').write_text(json.dumps(dict(videos=8, seconds=1.5, problems={}, flow_made_by='opencv on cpu')))
    sums = [dict(video=video, **{f'{stream}_{name}': value for stream in ('rgb', 'flow') for name, value in (('bytes', 10), ('sha256', 'a'*64))}) for video in VIDEOS.video]
    pd.DataFrame(sums).to_csv(folder/'checksums.csv', index=False)

def read_store(folder: Path) -> None:
    store = Store(folder)
    store.report, store.select()
    read_checksums(folder)
    init_store(folder, store.settings)

def make_run(folder: Path) -> None:
    tiny = Recipe.read(ROOT/'nbs'/'recipes'/'demo.yaml', backbone_options={'width': 4}, num_prototypes=6, projection_dim=8)
    begin_run(tiny, folder, {}, VIDEOS, VICC, Accelerator(cpu=True))
    (folder/'history.csv').write_text(pd.DataFrame([dict(stage='rgb-1', stream='rgb', epoch=epoch, loss=3/epoch, online_r1=math.nan) for epoch in (1, 2, 3)]).to_csv(index=False))

def read_run(folder: Path) -> None:
    recipe = Recipe.read(ROOT/'nbs'/'recipes'/'demo.yaml', backbone_options={'width': 4}, num_prototypes=6, projection_dim=8)
    read_history(folder/'history.csv')
    files = {name: (sound('files of a run')/name).read_text() for name in ('training_videos.csv', 'method.yaml')}
    init_run_dir(recipe, folder, files=files)

def make_lists(folder: Path) -> None:
    (folder/'wave_test_split1.txt').write_text(''.join(f'film_wave_u_nm_np1_fr_med_{n}.avi {n % 3}\n' for n in range(6)))

def make_kinetics(folder: Path) -> None:
    pd.DataFrame([dict(label='abseiling', youtube_id=f'id{n}', time_start=n, time_end=n + 10, split='train') for n in range(5)]).to_csv(folder/'kinetics.csv', index=False)
    for n in range(5): (folder/f'id{n}.mp4').touch()

def make_parts(folder: Path) -> None: cached_chunks(folder, 'facts', [range(0, 2)], lambda part: torch.ones(2, 3))

def read_parts(folder: Path) -> None: assert torch.equal(cached_chunks(folder, 'facts', [range(0, 2)], lambda part: torch.ones(2, 3)), torch.ones(2, 3))

@dataclass(frozen=True)
class Kind:
    "Files of one kind."
    make: Callable[[Path], Any]  # writes them into a folder
    read: Callable[[Path], Any]  # reads them
    files: str  # pattern of those that are changed
    sign: Callable[[Path], None] | None = None  # brings checksums up to date, for every other case

KINDS = {
    'manifests': Kind(lambda folder: write_manifest(VIDEOS, folder/'manifest.csv'), lambda folder: read_manifest(folder/'manifest.csv'), '*.csv'),
    'recipes': Kind(lambda folder: shutil.copy(ROOT/'nbs'/'recipes'/'demo.yaml', folder/'recipe.yaml'), lambda folder: Recipe.read(folder/'recipe.yaml'), '*.yaml'),
    'stores': Kind(make_store, read_store, '*.[cj]s*'),
    'checkpoints': Kind(make_checkpoint, lambda folder: FitLoop(Toy(), [], folder).load(), 'step-*/*'),
    'saved streams': Kind(lambda folder: save_stream(Stream('small', 4, 8, {'width': 2}), folder/'rgb'), lambda folder: load_stream(folder/'rgb'), 'rgb/*', lambda folder: sign_stream(folder/'rgb')),
    'released files': Kind(make_released, read_released, '*.tar'),
    'cached features': Kind(make_parts, read_parts, '*/*.safetensors'),
    'files of a run': Kind(make_run, read_run, '*.*'),
    'split lists': Kind(make_lists, lambda folder: read_split_list(folder/'wave_test_split1.txt'), '*.txt'),
    'Kinetics tables': Kind(make_kinetics, lambda folder: kinetics_manifest(folder, folder/'kinetics.csv'), '*.csv'),
    'descriptions': Kind(lambda folder: shutil.copy(ROOT/'data_manifests'/'datasets.yaml', folder/'datasets.yaml'), lambda folder: read_yaml(folder/'datasets.yaml'), '*.yaml'),
}

# One case, and many

@dataclass
class Outcome:
    "What happened to one file."
    kind: str
    number: int
    what: str  # accepted, refused, or a problem: crashes, hangs, without_a_message, losses
    line: str = ''  # of the message

class Hang(BaseException): pass

@contextmanager
def in_time():
    "Raises Hang after SECONDS, where signals can be had."
    if os.environ.get('FUZZ_TEXTS_ALARM') != '1' or threading.current_thread() is not threading.main_thread(): yield; return
    def late(*_: Any) -> None: raise Hang
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

SOUND: dict[str, tempfile.TemporaryDirectory] = {}

def sound(kind: str) -> Path:
    "A folder of sound files, made once a process; they are read once, so that a broken reader does not look like a careful one."
    if kind not in SOUND:
        SOUND[kind] = tempfile.TemporaryDirectory(prefix='sound-')
        folder = Path(SOUND[kind].name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            KINDS[kind].make(folder)
        KINDS[kind].read(folder)
        (folder/'.lock').unlink(missing_ok=True)
    return Path(SOUND[kind].name)

def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob('*')) if path.is_file() and path.name != '.lock'}

def one_case(kind: str, seed: int, number: int, keep: str | None = None) -> Outcome:
    "Change sound files of a kind and read them. `keep` is a folder to leave them in."
    rng, task = np.random.default_rng((seed, list(KINDS).index(kind), number)), KINDS[kind]
    with tempfile.TemporaryDirectory(prefix='fuzz-') as space:
        folder = Path(space)/'case'
        shutil.copytree(sound(kind), folder)
        file = pick(rng, [path for path in sorted(folder.glob(task.files)) if path.is_file()])
        change(file, rng)
        if task.sign and rng.random() < .6:
            try: task.sign(folder)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError): pass
        if keep: shutil.copytree(folder, keep, dirs_exist_ok=True)
        before, outcome, began = sums(folder), Outcome(kind, number, 'accepted'), time.monotonic()
        try:
            with in_time(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                task.read(folder)
        except (ValueError, FileNotFoundError) as error:
            outcome.line = f'{file.relative_to(folder)}: {type(error).__name__}: {str(error)[:300]!r}'
            named = str(folder) in str(error) or file.name in str(error)
            ours = type(error) in (ValueError, FileNotFoundError) and named and len(str(error)) < 5000
            outcome.what = 'refused' if ours else 'without_a_message'
        except Hang: outcome.what, outcome.line = 'hangs', f'{file.relative_to(folder)}: more than {SECONDS} s'
        except Exception as error: outcome.what, outcome.line = 'without_a_message', f'{file.relative_to(folder)}: {type(error).__name__}: {str(error)[:300]!r}'
        if outcome.what in ('accepted', 'refused') and time.monotonic() - began > SECONDS: outcome.what, outcome.line = 'hangs', f'{file.relative_to(folder)}: {time.monotonic() - began:.0f} s'
        changed = [name for name, content in before.items() if sums(folder).get(name) != content and not (kind == 'cached features' and name == str(file.relative_to(folder)))]
        if changed: outcome.what, outcome.line = 'losses', f'{file.relative_to(folder)} was changed, and {changed} with it'
        return outcome

def isolated_case(kind: str, seed: int, number: int) -> dict[str, Any]:
    "One case in a worker, as plain values."
    os.environ['FUZZ_TEXTS_ALARM'] = '1'
    torch.set_num_threads(1)
    return asdict(one_case(kind, seed, number))

PROBLEMS = ('crashes', 'hangs', 'without_a_message', 'losses')

def fuzz_texts(count: int = 2500, seed: int = 0, log: Callable[[str], None] = print, isolated: bool = True) -> list[dict[str, Any]]:
    "So many cases, evenly over all kinds; a row a kind with counts, seconds and the first problem. Not isolated: in this process, for a few."
    rows = []
    worker = IsolatedCall(isolated_case, seconds=2*SECONDS, gib=6) if isolated else None
    for kind, cases in zip(KINDS, np.array_split(np.arange(count), len(KINDS))):
        row, began = dict(kind=kind, tried=0, accepted=0, refused=0, **dict.fromkeys(PROBLEMS, 0), seconds=0., first_problem=''), time.monotonic()
        for number in range(len(cases)):
            try: outcome = Outcome(**worker(kind, seed, number)) if worker else one_case(kind, seed, number)
            except WorkerDied as died: outcome = Outcome(kind, number, 'hangs' if 'hung' in str(died) else 'crashes', str(died))
            row['tried'] += 1
            row[outcome.what] += 1
            if outcome.what in PROBLEMS:
                row['first_problem'] = row['first_problem'] or f'case {number}: {outcome.line}'
                log(f'{kind}, case {number}: {outcome.what}: {outcome.line}')
        row['seconds'] = round(time.monotonic() - began, 1)
        rows.append(row)
        log('  '.join(f'{name} {value}' for name, value in row.items() if name != 'first_problem'))
    if worker: worker.close()
    return rows

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=2500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--case', nargs=2, metavar=('KIND', 'NUMBER'), help='show one case, here and now')
    parser.add_argument('--keep', help='with --case: a folder for its files')
    arguments = parser.parse_args()
    if arguments.case: print(one_case(arguments.case[0], arguments.seed, int(arguments.case[1]), arguments.keep))
    else:
        found = pd.DataFrame(fuzz_texts(arguments.count, arguments.seed))
        print(found.drop(columns='first_problem').to_string(index=False))
        print(f'{found.tried.sum()} cases, {found[list(PROBLEMS)].to_numpy().sum()} problems, {found.seconds.sum():.0f} s')
        sys.exit(int(found[list(PROBLEMS)].to_numpy().any()))
