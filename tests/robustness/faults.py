"""Break a training in every way that a cluster knows, start it again, and compare the end with an unbroken run, bit for bit.

python tests/robustness/faults.py FOLDER [--only NAME ...]

FOLDER (nbs/results) gets faults.csv, a row a fault, and faults.ipynb, which shows it. With --only the other rows stay as they are. The run is a tiny recipe with four
stages, started by the command line `python -m vicc.alternation`. Faults that only the inside of a process can have (a loss that is not a number, a clock that jumps, a
GPU that is full) are brought in by this file: `python tests/robustness/faults.py inside FAULT STEP …` sets the fault up and then is the same command.
"""
import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from kill_training import differences, prepare_run

TINY = dict(single_epochs_rgb=2, single_epochs_flow=1, cross_epochs=1, cycles=1, cross_freeze_prototypes=0, single_batch_size=2, cross_batch_size=2, workers=0, cache_gib=0.0)
STEPS = 8  # an epoch; all in all 40, from rgb-1 to flow-2
PATIENCE = 180  # seconds that anything may take
COLUMNS = ('fault', 'done', 'wanted', 'said', 'exit_code', 'said_so', 'exit_as_wanted', 'sound_checkpoints', 'went_on', 'identical', 'seconds', 'machine')

class Skipped(Exception): "This fault cannot be made here; the text says why."

# ---- inside a run

def kill_worker() -> None:
    "SIGKILL to a reading process of this one."
    os.kill(min(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)

def lose_loss() -> None:
    "The next loss is not a number."
    from vicc import trainer as stage
    real = stage.swapped_prediction_loss
    def lost(*arguments):
        stage.swapped_prediction_loss = real
        return real(*arguments)*float('nan')
    stage.swapped_prediction_loss = lost

def lose_gradient() -> None:
    "The loss of the next step is a number, its gradients are not."
    from accelerate import Accelerator
    real = Accelerator.backward
    def lost(self, loss, **values):
        Accelerator.backward = real
        real(self, loss*float('nan'), **values)
    Accelerator.backward = lost

def fill_gpu() -> None:
    "What PyTorch says when a GPU is full."
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB (simulated)')

def jump(years: float) -> None:
    "From now on the clock is so many years off."
    real = time.time
    time.time = lambda: real() + years*365.25*24*3600

INSIDE = {'worker': kill_worker, 'loss': lose_loss, 'gradient': lose_gradient, 'memory': fill_gpu, 'back': lambda: jump(-1), 'ahead': lambda: jump(1)}

def inside(name: str, at: int, arguments: list[str]) -> None:
    "The command line of a training, with a fault before its step `at` (counted from 1 over all stages)."
    from vicc import alternation
    from vicc.trainer import Trainer
    real, steps = Trainer.step, count(1)
    def step(self, batch, epoch, metrics):
        if next(steps) == at: INSIDE[name]()
        real(self, batch, epoch, metrics)
    Trainer.step = step
    alternation.main(arguments)

# ---- beside a run

@contextmanager
def small_disk(place: Path, mib: int = 16) -> Iterator[Path]:
    "A file system of its own, in memory."
    place.mkdir(parents=True)
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={mib}m', 'tmpfs', str(place)], capture_output=True).returncode:
        raise Skipped('mounting a small file system needs root')
    try: yield place
    finally:
        for _ in range(20):
            if subprocess.run(['umount', str(place)], capture_output=True).returncode == 0: break
            time.sleep(.1)

def fill(place: Path) -> Path:
    "A file that takes all space that is left."
    with (place/'filler').open('wb', buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096: pass
        except OSError: pass
    return place/'filler'

def remount(place: Path, how: str) -> None:
    "Make a file system read-only ('ro') or writable ('rw'); nothing on it may be open for writing."
    if subprocess.run(['mount', '-o', f'remount,{how}', str(place)], capture_output=True).returncode: raise Skipped(f'the file system could not be made {how}')

def hurt(path: Path, how: str, seed: int = 0) -> None:
    "Damage a file: one bit, bits all over it, its end cut off, or all of it removed."
    if how == 'removed':
        path.unlink()
        return
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in {'bit': [len(content)//2], 'bits': rng.integers(64, len(content), max(8, len(content)//200)).tolist(), 'cut': []}[how]: content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content[:len(content)//2] if how == 'cut' else content))

def hurt_unseen(path: Path) -> None:
    "Flip a bit of an RGB video so that training can still read it, as many of its frames as can be with other pixels."
    from vicc.data import read_clips
    from vicc.video import VideoError, read_frames
    count, height, width, _ = read_frames(path).shape
    def planes() -> np.ndarray | None:
        clips = read_clips(path, 'rgb', [(np.arange(count), (0, 0, height, width))])
        return clips and clips[0].data
    whole, right, best = path.read_bytes(), planes(), (0., b'')
    for seed in range(300):
        content, rng = bytearray(whole), np.random.default_rng(seed)
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(content))
        try: found = planes()
        except (VideoError, OSError): continue
        if found is not None: best = max(best, ((found != right).any(1).mean(), bytes(content)))
    path.write_bytes(best[1] or whole)
    if not best[0]: raise Skipped('the decoder notices every changed bit')

def newest(output: Path) -> list[Path]:
    "The complete checkpoints of the stage that is at work, newest first."
    from vicc.engine.checkpoint import checkpoint_folders, rank_files
    stages = sorted(output.glob('stages/0*/checkpoints'))
    return [path for path in checkpoint_folders(stages[-1]) if rank_files(path)] if stages else []  # not: killed while it was deleted

def sound(output: Path) -> int:
    "How many of them are whole."
    from vicc.engine.checkpoint import verify
    return sum(verify(place) is None for place in newest(output))

# ---- a run

@dataclass
class Trial:
    "A run that a fault is tried on, and what it said."
    bench: 'Bench'
    name: str
    output: Path
    processes: int = 1
    values: dict = field(default_factory=dict)  # of the recipe, instead of the bench's
    store: Path | None = None

    @property
    def said(self) -> Path: return self.bench.folder/f'{self.name}.txt'

    def start(self, fault: str = '', at: int = 0) -> subprocess.Popen:
        "Start it, or go on with it; perhaps with a fault inside."
        words = [*self.bench.command[3:-1], str(self.store or self.bench.command[-1]), '--output', str(self.output)]
        if self.values: words += ['--set', *(f'{name}={value}' for name, value in self.values.items())]
        first = [str(Path(__file__).resolve()), 'inside', fault, str(at)] if fault else ['-m', 'vicc.alternation']
        if self.processes > 1: first = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(self.processes), '--max-restarts', '1', *first]
        environment = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', PYTHONUNBUFFERED='1', GLOO_SOCKET_IFNAME='lo')
        with self.said.open('a') as said: return subprocess.Popen([sys.executable, *first, *words], stdout=said, stderr=said, env=environment, start_new_session=True)

    def end(self, process: subprocess.Popen) -> int:
        "Wait for the end, which has to come: 999 if it does not."
        try: return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 999

    def run(self, fault: str = '', at: int = 0) -> int: return self.end(self.start(fault, at))

    def until(self, process: subprocess.Popen, stage: int, step: int) -> None:
        "Wait until the run has saved this step of this stage (both named by number, as the folders are)."
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(path.parent.name[5:]) >= step for path in self.output.glob(f'stages/{stage:02d}-*/checkpoints/step-*/rank-0-*.pt')): return
            time.sleep(.002)
        raise RuntimeError(f'{self.name}: the run was over before the fault came:\n{self.said.read_text()}')

    def text(self) -> str: return self.said.read_text(errors='replace') if self.said.is_file() else ''

    def forget(self) -> None:
        "What was said so far is of the first start."
        if self.said.is_file(): self.said.replace(self.said.with_suffix('.first.txt'))

    def same(self) -> bool:
        "Whether weights and log are those of the unbroken run; no, if some of them are not there."
        try: return not differences(self.bench.unbroken(self.processes), self.output)
        except FileNotFoundError: return False

    def result(self, code: int, pattern: str, exits: tuple[int, ...] = (0,), again: bool = False, compare: bool = True, repair: Callable[[], object] = lambda: None) -> dict:
        "A row of the table: what the run said and how it ended; then, after the repair, the same command once more if it was broken off (or `again`)."
        text, intact = self.text(), sound(self.output)
        row = dict(said=short(text, pattern, self.bench.folder), exit_code=code, said_so=bool(re.search(pattern, text)) and 'Traceback' not in text, exit_as_wanted=code in exits,
                   sound_checkpoints=intact if code else '', went_on='by itself' if code == 0 else '', identical='')
        if code or again:
            repair()
            self.forget()
            row['went_on'] = 'same command' if self.run() == 0 else 'no'
            if row['went_on'] == 'no': row['said'] += f' | then: {short(self.text(), "^$", self.bench.folder)}'
        if compare and row['went_on'] != 'no': row['identical'] = self.same()
        return row

def short(text: str, pattern: str, folder: Path, most: int = 400) -> str:
    "The line of a text that says it (else its last one), without paths."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if re.search(pattern, line)), lines[-1] if lines else 'nothing')
    line = re.sub(r'^\S+\.py:\d+: (?=\w+Warning)', '', re.sub(rf'{re.escape(str(folder))}[\w./-]*/|{re.escape(str(folder))}', '…/', line))
    line = re.sub(r'(?<![\w…])/[\w.-]+/[\w./-]*/', '…/', line)
    return line if len(line) <= most else line[:most - 1] + '…'

class Bench:
    "A folder with videos, a recipe, a store and the runs that were left in peace."
    def __init__(self, folder: Path):
        self.folder, self.command, self.ends = folder, prepare_run(folder, **TINY), {}

    def trial(self, name: str, processes: int = 1, output: Path | None = None, **values: object) -> Trial:
        if processes > 1: values = dict(single_batch_size=2*processes, cross_batch_size=2*processes) | values  # those of all
        return Trial(self, name, output or self.folder/'runs'/name, processes, values)

    def unbroken(self, processes: int = 1) -> Path:
        if processes not in self.ends:
            trial = self.trial(f'unbroken-{processes}', processes)
            if trial.run(): raise RuntimeError(f'the unbroken run failed:\n{trial.text()}')
            self.ends[processes] = trial.output
        return self.ends[processes]

    def killed(self, name: str) -> Trial:
        "A run that was killed in its third stage with two checkpoints there (made once, then copied)."
        first = self.trial('killed')
        if not first.output.is_dir():
            process = first.start()
            first.until(process, 2, 4)
            process.kill()
            process.wait()
        trial = self.trial(name)
        shutil.copytree(first.output, trial.output)
        return trial

    def own_store(self, trial: Trial) -> Path:
        "A copy of the store, for faults that damage it."
        self.unbroken()
        trial.store = self.folder/'stores'/trial.name
        shutil.copytree(self.command[-1], trial.store)
        return trial.store

# ---- the faults

FAULTS: dict[str, tuple[str, str, Callable[[Bench], dict]]] = {}

def fault(name: str, done: str, wanted: str) -> Callable:
    "Enter a fault into the list: what is done, and what should happen."
    def enter(function: Callable[[Bench], dict]) -> Callable[[Bench], dict]:
        FAULTS[name] = done, wanted, function
        return function
    return enter

@fault('reading worker killed', 'SIGKILL to one of two reading processes, in the second epoch', 'says so; the same command goes on')
def worker_killed(bench: Bench) -> dict:
    trial = bench.trial('worker', workers=2)
    return trial.result(trial.run('worker', STEPS + 2), 'a reading process died', (2,))

@fault('main process killed', 'SIGKILL to the only process, in the third stage', 'the same command goes on')
def main_killed(bench: Bench) -> dict:
    trial = bench.killed('main')
    row = trial.result(-signal.SIGKILL, '', (-signal.SIGKILL,))
    return {**row, 'said': short(trial.text(), 'going on after', bench.folder), 'said_so': 'going on after' in trial.text()}

@fault('one of two processes killed', 'SIGKILL to process 1 of two under torchrun --max-restarts 1, in the first stage', 'torchrun starts both again, they go on by themselves')
def one_of_two_killed(bench: Bench) -> dict:
    trial = bench.trial('two', 2)
    process = trial.start()
    trial.until(process, 0, 5)
    children = [child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get('RANK') == '1']
    min(children, key=lambda child: child.create_time()).kill()
    return trial.result(trial.end(process), 'going on after')

def asked(bench: Bench, name: str, number: signal.Signals, group: bool, pattern: str, exits: tuple[int, ...]) -> dict:
    "A signal to the process, or to all of its group as a terminal sends it."
    trial = bench.trial(name)
    process = trial.start()
    trial.until(process, 0, STEPS + 3)
    (os.killpg if group else os.kill)(process.pid, number)
    return trial.result(trial.end(process), pattern, exits)

@fault('asked to end', 'SIGTERM, as schedulers send it', 'finishes the step, saves, says how to go on, exit code 143')
def terminated(bench: Bench) -> dict: return asked(bench, 'sigterm', signal.SIGTERM, False, 'asked to end by SIGTERM; saved after', (143,))

@fault('Ctrl-C', 'SIGINT to the whole process group, as a terminal sends it', 'ends, says how to go on, exit code 130')
def interrupted(bench: Bench) -> dict: return asked(bench, 'sigint', signal.SIGINT, True, 'Start the same command again', (130,))

@fault('loss not a number', 'the loss of step 13 is NaN', 'ends with advice before anything bad is saved')
def bad_loss(bench: Bench) -> dict:
    trial = bench.trial('loss')
    return trial.result(trial.run('loss', STEPS + 5), 'infinite or not a number: lower the learning rate', (2,))

@fault('gradients not numbers', 'the loss of step 13 is a number, its gradients are NaN', 'ends with advice before bad weights are saved')
def bad_gradient(bench: Bench) -> dict:
    trial = bench.trial('gradient')
    return trial.result(trial.run('gradient', STEPS + 5), 'not a number', (2,))

@fault('GPU out of memory', 'torch.OutOfMemoryError at step 13 (simulated: there is no GPU in this run)', 'ends and says what to lower')
def out_of_memory(bench: Bench) -> dict:
    trial = bench.trial('memory')
    return trial.result(trial.run('memory', STEPS + 5), 'too little memory: .* raise accumulate', (2,))

def damaged(bench: Bench, name: str, number: int, file: str, how: str) -> dict:
    "The same command on a run whose newest checkpoints were damaged."
    trial = bench.killed(name)
    for place in newest(trial.output)[:number]: hurt(place/file, how)
    row = trial.result(trial.run(), 'is left out; the one before is taken' if how != 'removed' else 'going on after')
    return {**row, 'went_on': row['went_on'].replace('by itself', 'same command')}

@fault('checkpoint: a bit flipped', 'one bit of the newest checkpoint is changed', 'warns, takes the one before')
def flipped(bench: Bench) -> dict: return damaged(bench, 'flip', 1, 'rank-0-of-1.pt', 'bit')

@fault('checkpoint: cut short', 'half of a file of the newest checkpoint is cut off', 'warns, takes the one before')
def cut(bench: Bench) -> dict: return damaged(bench, 'cut', 1, 'rank-0-of-1.pt', 'cut')

@fault('checkpoint: no index', 'the file of a process in the newest checkpoint is removed', 'is one that was never finished: the one before is taken')
def file_missing(bench: Bench) -> dict: return damaged(bench, 'missing', 1, 'rank-0-of-1.pt', 'removed')

@fault('every checkpoint damaged', 'a bit of every checkpoint of the stage is changed', 'refuses, names them, says what to delete')
def all_damaged(bench: Bench) -> dict:
    trial = bench.killed('all')
    for place in newest(trial.output): hurt(place/'rank-0-of-1.pt', 'bit')
    folder = newest(trial.output)[0].parent
    return trial.result(trial.run(), 'every checkpoint is damaged .* delete .* to start this stage again', (2,), repair=lambda: shutil.rmtree(folder))

def jumped(bench: Bench, name: str) -> dict:
    "The clock goes wrong in the second half."
    trial = bench.trial(name)
    return trial.result(trial.run(name, 21), 'epoch   1/1')

@fault('clock a year back', 'time.time() is a year less from step 21 of 40 on', 'nothing changes')
def clock_back(bench: Bench) -> dict: return jumped(bench, 'back')

@fault('clock a year ahead', 'time.time() is a year more from step 21 of 40 on', 'nothing changes')
def clock_ahead(bench: Bench) -> dict: return jumped(bench, 'ahead')

@fault('disk full', 'no byte is free on the output disk (a small tmpfs) from step 11 on; without root: no file may grow', 'ends and says so, older checkpoints stay; with space goes on')
def disk_full(bench: Bench) -> dict:
    try:
        with small_disk(bench.folder/'full-disk') as disk:
            trial = bench.trial('full', output=disk/'run')
            process = trial.start()
            trial.until(process, 0, STEPS + 3)
            filler = fill(disk)
            return trial.result(trial.end(process), 'full|No space|space', (2,), repair=filler.unlink)
    except Skipped:
        trial = bench.trial('full-limit')
        process = trial.start()
        trial.until(process, 0, STEPS + 3)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return trial.result(trial.end(process), 'full|large|space', (2,))

@fault('output read-only', 'a run that was killed is started again on a disk (a small tmpfs) that is read-only now', 'refuses and says so; writable again goes on')
def read_only(bench: Bench) -> dict:
    killed = bench.killed('read-only')
    with small_disk(bench.folder/'read-only-disk') as disk:
        trial = bench.trial('read-only', output=disk/'run')
        shutil.copytree(killed.output, trial.output)
        remount(disk, 'ro')
        return trial.result(trial.run(), 'Read-only file system.: make room, make it writable or choose another folder', (2,), repair=lambda: remount(disk, 'rw'))

@fault('output not writable', 'the folders of the run may no longer be written to from step 11 on (chmod; for root chattr +i)', 'ends and says so; writable again goes on')
def not_writable(bench: Bench) -> dict:
    trial = bench.trial('not-writable')
    process = trial.start()
    trial.until(process, 0, STEPS + 3)
    process.send_signal(signal.SIGSTOP)
    folders = [str(trial.output), *(str(path) for path in trial.output.rglob('*') if path.is_dir())]
    take, give = (['chattr', '+i'], ['chattr', '-i']) if not os.geteuid() else (['chmod', 'a-w'], ['chmod', 'u+w'])
    done = subprocess.run([*take, *folders], capture_output=True).returncode == 0
    process.send_signal(signal.SIGCONT)
    try: code = trial.end(process)
    finally: subprocess.run([*give, *folders], capture_output=True)
    if not done: raise Skipped('root may write everywhere, and this file system knows no chattr')
    return trial.result(code, 'make room, make it writable or choose another folder', (2,))

@fault('output disk gone', 'the output disk (a tmpfs) is unmounted at step 11, as a network disk may vanish', 'ends and says so, writes nothing elsewhere; back again goes on')
def mount_gone(bench: Bench) -> dict:
    with small_disk(bench.folder/'gone-disk') as disk, small_disk(bench.folder/'other-disk') as other:
        trial = bench.trial('gone', output=disk/'run')
        subprocess.run(['mount', '--bind', str(disk), str(other)], check=True)  # a second way to the same files
        process = trial.start()
        try:
            trial.until(process, 0, STEPS + 3)
            subprocess.run(['umount', '--lazy', str(disk)], check=True)
            code = trial.end(process)
            left = sorted(str(path.relative_to(disk)) for path in disk.rglob('*') if path.is_file())
        finally:
            shutil.rmtree(disk/'run', ignore_errors=True)
            subprocess.run(['mount', '--bind', str(other), str(disk)], check=True)
        row = trial.result(code, '(?i)gone|vanish|unmounted|taken away|no longer', (2,), again=True)
        subprocess.run(['umount', '--lazy', str(other)], check=True)
        if left: row.update(said_so=False, said=f'{row["said"]} | {len(left)} files written where the disk had been: {", ".join(left[:3])} …')
        return row

def hurt_store(bench: Bench, name: str, how: str) -> dict:
    "Damage a video of the store while it is trained on: what is not kept in memory is read again in the second epoch."
    trial = bench.trial(name)
    file = sorted(bench.own_store(trial).glob('rgb/**/*.mp4'))[5]
    process = trial.start()
    trial.until(process, 0, 2)
    process.send_signal(signal.SIGSTOP)
    hurt(file, how) if how != 'unseen' else hurt_unseen(file)
    process.send_signal(signal.SIGCONT)
    row = trial.result(trial.end(process), rf'{file.stem}', compare=False)
    return {**row, 'identical': trial.same() if not row['said_so'] else ''}  # a replaced video is said, and changes what is trained

@fault('store: one bit flipped', 'one bit of an RGB file of the store is changed after step 2, so that it can still be decoded, to other pixels', 'the run says so before it ends')
def store_bit(bench: Bench) -> dict: return hurt_store(bench, 'store-bit', 'unseen')

@fault('store: one bit, between starts', 'the run is killed, one bit of an RGB file of the store is changed as above, the same command', 'the file is made again, nothing changes')
def store_bit_between(bench: Bench) -> dict:
    trial = bench.killed('store-between')
    file = sorted(bench.own_store(trial).glob('rgb/**/*.mp4'))[5]
    before = file.read_bytes()
    hurt_unseen(file)
    row = trial.result(trial.run(), '1 made')
    return {**row, 'went_on': row['went_on'].replace('by itself', 'same command'), 'said_so': row['said_so'] and file.read_bytes() == before}

@fault('store: bits flipped', 'bits all over an RGB file of the store are changed after step 2', 'the video is named and replaced by another in each epoch')
def store_flipped(bench: Bench) -> dict: return hurt_store(bench, 'store-bits', 'bits')

@fault('store: a file cut short', 'an RGB file of the store loses its second half after step 2', 'the video is named and replaced by another in each epoch')
def store_cut(bench: Bench) -> dict: return hurt_store(bench, 'store-cut', 'cut')

@fault('store: a file removed', 'an RGB file of the store is removed after step 2', 'the video is named and replaced by another in each epoch')
def store_removed(bench: Bench) -> dict: return hurt_store(bench, 'store-removed', 'removed')

@fault('store renamed', 'the whole folder of the store gets another name after step 11', 'ends and names the videos; with the old name goes on')
def store_renamed(bench: Bench) -> dict:
    trial = bench.trial('store-renamed')
    store = bench.own_store(trial)
    process = trial.start()
    trial.until(process, 0, STEPS + 3)
    store.rename(store.with_name('elsewhere'))
    return trial.result(trial.end(process), 'videos in a row cannot be read|could not be read', (2,), repair=lambda: store.with_name('elsewhere').rename(store))

@fault('second run in the folder', 'the same command is started a second time while the first is at work (held by SIGSTOP)', 'the second is refused, the first is not disturbed')
def second_run(bench: Bench) -> dict:
    trial = bench.trial('second')
    first = trial.start()
    trial.until(first, 0, 2)
    second = Trial(bench, 'second-other', trial.output)
    first.send_signal(signal.SIGSTOP)
    code = second.run()
    first.send_signal(signal.SIGCONT)
    row = dict(said=short(second.text(), 'in use by another run', bench.folder), exit_code=code, exit_as_wanted=code == 2, sound_checkpoints='',
               said_so=bool(re.search('in use by another run', second.text())) and 'Traceback' not in second.text())
    done = trial.end(first) == 0
    return {**row, 'went_on': 'by itself' if done else 'no', 'identical': done and trial.same()}

# ---- the table

def describe_machine() -> str: return f'{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}, torch {torch.__version__}'

def try_faults(folder: Path, names: list[str], log: Callable[[str], None] = print) -> pd.DataFrame:
    "A row for each of these faults."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background has it ignored, and so would our runs
    bench, rows = Bench(folder), []
    bench.unbroken()
    for name in names:
        done, wanted, function = FAULTS[name]
        begin = time.monotonic()
        try: row = function(bench)
        except Skipped as reason: row = dict(said=f'skipped: {reason}', said_so='', exit_code='', exit_as_wanted='', sound_checkpoints='', went_on='', identical='')
        rows.append(dict(fault=name, done=done, wanted=wanted, **row, seconds=round(time.monotonic() - begin, 1), machine=describe_machine()))
        log(json.dumps({key: value for key, value in rows[-1].items() if key not in ('done', 'wanted', 'machine')}, ensure_ascii=False))
    return pd.DataFrame(rows, columns=COLUMNS)

# ---- the notebook

OPENING = """# Faults: what a training bears

> Workers killed, disks full, checkpoints damaged: what the run said, how it ended, and whether it went on as if nothing had been

**The question.** A run of days meets every fault. Does it say what happened, in words that help? Is what was saved still whole? And does the same command, started again, end *bit for bit* where an unbroken run ends?

**How it was tried.** A tiny recipe (16 moving shapes, four stages, 40 steps, a checkpoint at every step) was trained once in peace. Then it was trained again for each fault of the list below: the fault, a look at what the run said, a repair
where one is needed, and the same command once more. Weights of all stages and all of `log.csv` but its times were compared with the unbroken run.

Everything here was made by one command, which takes some minutes on two cores. This notebook only reads `faults.csv`, which it wrote:

`python tests/robustness/faults.py nbs/results`

A single fault is tried again by its name, and `--keep FOLDER` leaves its run there to look at: `python tests/robustness/faults.py nbs/results --only 'disk full' --keep /tmp/full`"""

READ = """from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from vicc.engine.io import find_project
from vicc.viz.plots import RIGHT, WRONG, new_figure

folder = Path() if Path('faults.csv').is_file() else find_project()/'nbs'/'results'
faults = pd.read_csv(folder/'faults.csv', keep_default_na=False).set_index('fault')
went_on = faults.went_on.map({'by itself': 'True', 'same command': 'True', 'no': 'False', '': ''})
questions = {'said so': faults.said_so, 'ended as wanted': faults.exit_as_wanted, 'went on': went_on,
             'ends identical': faults.identical}
answers = pd.DataFrame(questions).astype(str)
tried = ~faults.said.str.startswith('skipped')
met = (answers != 'False').all(axis=1) & tried
print(f'{tried.sum()} of {len(faults)} faults were tried on {faults.machine.iloc[0]}, in '
      f'{faults.seconds.sum()/60:.0f} minutes; {met.sum()} ended as wanted in every respect')"""

PICTURE = """figure = new_figure(7, .26*len(answers) + .8)
axis = figure.subplots()
colours, words = {'True': RIGHT, 'False': WRONG, '': '0.88'}, {'True': 'yes', 'False': 'no', '': 'not asked'}
pixels = [to_rgb(colours[answer]) for answer in answers.to_numpy().flat]
axis.imshow(np.reshape(pixels, (*answers.shape, 3)), aspect='auto')
for row, column in np.ndindex(answers.shape):
    answer = answers.iat[row, column]
    ink = 'white' if answer else '0.4'
    axis.text(column, row, words[answer], ha='center', va='center', color=ink, fontsize=8)
axis.set_xticks(range(len(answers.columns)), answers.columns)
axis.set_yticks(range(len(answers)), answers.index)
axis.set_xticks(np.arange(.5, len(answers.columns) - 1), minor=True)
axis.set_yticks(np.arange(.5, len(answers) - 1), minor=True)
axis.grid(which='minor', color='white', linewidth=2)
axis.tick_params(which='both', length=0, labeltop=True, labelbottom=False)
for spine in axis.spines.values(): spine.set_visible(False)
figure"""

TABLE = """def shade(value: object) -> str:
    "Blue for yes, vermilion for no, as in the picture."
    good = str(value) in ('True', 'by itself', 'same command')
    if not good and str(value) not in ('False', 'no'): return ''
    return f'color: {RIGHT if good else WRONG}; font-weight: bold'

names = dict(said='what the run said', exit_code='exit code', said_so='said so', exit_as_wanted='as wanted',
             sound_checkpoints='sound checkpoints', went_on='went on', identical='identical',
             seconds='seconds')
style = faults[list(names)].rename(columns=names).style
style.map(shade, subset=['said so', 'as wanted', 'went on', 'identical'])
style.format({'seconds': '{:.0f}', 'what the run said': '{}'}, escape='html')
wide = {'text-align': 'left', 'max-width': '32em', 'white-space': 'normal'}
style.set_properties(subset=['what the run said'], **wide)
heading = 'text-align: left; white-space: normal; max-width: 10em'
style.set_table_styles([dict(selector='th.row_heading', props=heading),
                        dict(selector='td', props='vertical-align: top')])"""

LEFT = """for name, row in faults[~met].iterrows():
    asked = [question for question in answers.columns if answers.loc[name, question] == 'False']
    wanted = f'wanted was: {row.wanted}. Not so: {", ".join(asked)}. It said: ' if asked else ''
    print(f'{name}: {wanted}{row.said}')
if met.all(): print('nothing is left')"""

CLOSING = """## What to remember

- When a run has ended early, *start the same command again*: what was saved is not computed again, and none of it is lost. The exceptions are under "What is left".
- A message says what to do. If a line of the log names a video that was replaced, that video's file in the store is damaged: with the next start of the command `prepare` looks at every file and makes it again.
- Only what was saved counts: with `save_every_steps` at 0 a kill costs the epoch that was going on.

Back to [engine/robustness](../engine/robustness.ipynb). How checkpoints are written and checked: [engine/checkpoint](../engine/checkpoint.ipynb); how a stage goes on: [07_trainer](../07_trainer.ipynb); readers that die: [engine/loader](../engine/loader.ipynb); videos that cannot be read: [02_data](../02_data.ipynb)."""

def notebook_cells() -> list:
    "Text and code of faults.ipynb."
    from nbformat.v4 import new_code_cell, new_markdown_cell
    listed = '\n'.join(f'- **{name}**: {done}. Wanted: {wanted}.' for name, (done, wanted, _) in FAULTS.items())
    cells = [new_markdown_cell(OPENING), new_markdown_cell('## The answers, read from the file\n\nEvery fault gives four answers; some of them make no sense for some faults, and are left open.'), new_code_cell(READ),
             new_markdown_cell('## The faults\n\nEach is named as `--only` wants it; what is done comes first, then what should happen.\n\n' + listed),
             new_markdown_cell('## At a glance\n\nA row a fault, a column a question. *Said so*: a line of the run names the fault, and there is no traceback. *Ended as wanted*: the exit code is 0 where the run should bear the fault, 2 for an error with '
                               'advice, 130 after Ctrl-C, 143 after SIGTERM, −9 after a kill. *Went on*: by itself, or by the same command after the repair. *Ends identical*: weights and log, bit for bit. Grey: a video that had to be replaced changes '
                               'what is trained, so that nothing is asked.'), new_code_cell(PICTURE),
             new_markdown_cell('## In the words of the run\n\nThe line in which the run says it (its last one, if none does), with paths cut to `…/`; how many checkpoints of the stage were whole after the fault; and how long the trial took, with all its starts.'),
             new_code_cell(TABLE),
             new_markdown_cell('## What is left\n\nNothing is hidden in the table: these lines name every fault that did not end as wanted, or that could not be tried on this machine.'), new_code_cell(LEFT),
             new_markdown_cell(CLOSING)]
    for number, cell in enumerate(cells): cell['id'] = f'faults-{number}'
    return cells

def write_notebook(folder: Path) -> None:
    "Make faults.ipynb beside faults.csv, run it, and store it clean."
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    notebook = nbformat.v4.new_notebook(cells=notebook_cells(), metadata=kernel)
    ExecutePreprocessor(timeout=300, kernel_name='python3').preprocess(notebook, {'metadata': {'path': str(folder)}})
    notebook.metadata = kernel
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == 'code'):
        cell.metadata, cell.execution_count = {}, None
        for output in cell.outputs:
            if 'execution_count' in output: output['execution_count'] = None
            if 'metadata' in output: output['metadata'] = {}
    nbformat.write(notebook, folder/'faults.ipynb')
    clean = Path(sys.executable).with_name('nbdev-clean')
    if clean.is_file(): subprocess.run([str(clean), '--fname', str(folder/'faults.ipynb')], check=True)

def main() -> None:
    "The command."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='folder of faults.csv and faults.ipynb')
    parser.add_argument('--only', nargs='+', default=list(FAULTS), metavar='NAME', help='; '.join(FAULTS))
    parser.add_argument('--keep', type=Path, metavar='FOLDER', help='run in this new folder and leave everything there, to look at')
    values = parser.parse_args()
    if wrong := set(values.only) - set(FAULTS): parser.error(f'there is no fault {sorted(wrong)[0]}: choose {"; ".join(FAULTS)}')
    if values.keep: table = try_faults(values.keep, values.only)
    else:
        with tempfile.TemporaryDirectory() as folder: table = try_faults(Path(folder), values.only)
    file = values.output/'faults.csv'
    if file.is_file() and len(table) < len(FAULTS): table = pd.concat([pd.read_csv(file), table]).drop_duplicates('fault', keep='last')
    table = table.sort_values('fault', key=lambda names: names.map({name: number for number, name in enumerate(FAULTS)}))
    table.to_csv(file, index=False)
    write_notebook(values.output)

if __name__ == '__main__':
    if sys.argv[1:2] == ['inside']: inside(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else: main()
