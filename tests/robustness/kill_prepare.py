"""Kills `python -m vicc.prepare` at random moments, starts it again, and compares the store with one that nobody killed.

python tests/robustness/kill_prepare.py OUT.csv [KILLS]
"""
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vicc.engine.io import HALF_WRITTEN
from vicc.prepare import main as prepare_main
from vicc.synthetic import ShapesSettings, make_moving_shapes

OPTIONS = ['--short-side=96', '--flow-method=farneback', '--flow-bound=5', '--workers=2', '--device=cpu']

def start(made: dict, store: Path) -> subprocess.Popen:
    "The command, in a process group of its own."
    command = [sys.executable, '-m', 'vicc.prepare', str(made['train']), str(made['videos']), str(store), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

def done(store: Path) -> int:
    "How many videos are complete."
    return len(list(store.glob('rgb/*/[!.]*.mp4')))

def contents(store: Path) -> dict[str, bytes]:
    "What must be the same to the last byte: the videos, the manifest, the notes and the problems."
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob('*') if path.is_file() and path.name not in ('report.json', '.lock')}

def half_written(store: Path) -> int:
    "How many hidden files a killed process has left."
    return sum(bool(HALF_WRITTEN.fullmatch(path.name)) for path in store.rglob('*'))

def alive(group: int) -> bool:
    "Whether any process of a group still runs."
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True

def unbroken(made: dict, store: Path) -> dict[str, bytes]:
    "What a run leaves that nobody kills: in this process, since workers change no byte."
    prepare_main([str(made['train']), str(made['videos']), str(store), *OPTIONS, '--workers=0'])
    return contents(store)

def kill_once(made: dict, store: Path, after: int, moment: float, whole_group: bool) -> dict:
    "Start, kill `moment` seconds after so many videos are done (or the first is begun), start again. Without `whole_group` only the main process is killed: its workers must end by themselves."
    process = start(made, store)
    while (not (store/'rgb').is_dir() or done(store) < after) and process.poll() is None: time.sleep(0.005)
    time.sleep(moment)
    finished = process.poll() is not None
    if not finished: (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while alive(process.pid) and time.monotonic() < deadline: time.sleep(0.02)
    row = dict(after_videos=after, moment=round(moment, 3), killed='all processes' if whole_group else 'main process', workers_left=int(alive(process.pid)),
               finished_before=int(finished), videos_done=done(store), half_written=half_written(store))
    return row | dict(restarted=int(start(made, store).wait() == 0), left_over=half_written(store))

def main(kills: int, folder: Path, videos: int = 12, frames: int = 80, seed: int = 0) -> list[dict]:
    "A row a kill."
    made = make_moving_shapes(folder/'shapes', videos, 1, settings=ShapesSettings(height=96, width=128, num_frames=frames))
    wanted = unbroken(made, folder/'unbroken')
    rng, rows = np.random.default_rng(seed), []
    for kill in range(kills):
        store = folder/f'killed_{kill}'
        row = kill_once(made, store, int(rng.integers(videos)), float(rng.uniform(0, 0.3)), whole_group=kill % 2 == 1)
        rows.append(dict(kill=kill) | row | dict(identical=int(contents(store) == wanted)))
        print(rows[-1], flush=True)
        shutil.rmtree(store)
    return rows

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as place: table = main(int(sys.argv[2]) if len(sys.argv) > 2 else 20, Path(place))
    with open(sys.argv[1], 'w', newline='') as file:
        writer = csv.DictWriter(file, table[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)
    sys.exit(not all(row['identical'] and row['restarted'] and not row['left_over'] and not row['workers_left'] for row in table))
