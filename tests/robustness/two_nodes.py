"""The sbatch files of nbs/recipes on two "nodes" of this machine: two torchrun launchers, c10d, gloo; killed, and going on.

python tests/robustness/two_nodes.py OUT.csv

`srun` and `scontrol` are stand-ins, `vicc` is python -m vicc.cli. Stores are made by two tasks of an array job.
"""
import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch

from kill_training import differences, prepare_run, steps_seen
from vicc.manifests import read_manifest, write_manifest

RECIPES = Path(__file__).parents[2]/'nbs'/'recipes'
TINY = dict(single_epochs_rgb=2, single_epochs_flow=1, cross_epochs=1, cycles=1, cross_freeze_prototypes=0)
PATIENCE = 300  # seconds that anything may take
STAND_INS = {
    'srun': '''#!/bin/bash
trap 'kill -TERM $tasks' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
code=0
for task in $tasks; do wait $task || code=$?; done
for task in $tasks; do wait $task 2>/dev/null; done  # a signal cuts the first wait short
exit $code
''',
    'scontrol': '''#!/bin/bash
if [ "$1" = requeue ]; then echo "requeued $2"; exit; fi
for ((node = 0; node < SLURM_NNODES; node++)); do echo localhost; done
''',
    'vicc': f'#!/bin/bash\nexec {sys.executable} -m vicc.cli "$@"\n'}

def stand_ins(folder: Path, **others: str) -> str:
    "Write the stand-ins, or others; return the PATH that finds them first."
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (STAND_INS | others).items():
        (folder/name).write_text(text)
        (folder/name).chmod(0o755)
    return os.pathsep.join(map(str, (folder, Path(sys.executable).parent, os.environ['PATH'])))

@dataclass
class Cluster:
    "A folder with videos, a recipe, stand-ins and runs."
    folder: Path
    jobs: int = 0

    def __post_init__(self):
        prepare_run(self.folder, **TINY)
        self.path, shapes = stand_ins(self.folder/'bin'), self.folder/'shapes'
        self.train_csv = shapes/'train.csv'
        write_manifest(pd.concat([read_manifest(shapes/f'{part}.csv') for part in ('train', 'test')]), self.folder/'all.csv')

    def start(self, name: str, *words: object, said: Path, **slurm: object) -> subprocess.Popen:
        "Start a batch script in the background, as Slurm would; what it says goes to a file."
        environment = dict(os.environ, PATH=self.path, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', GLOO_SOCKET_IFNAME='lo', PYTHONUNBUFFERED='1')
        environment |= {f'SLURM_{key}': str(value) for key, value in slurm.items()}
        with said.open('a') as file:
            return subprocess.Popen(['bash', str(RECIPES/name), *map(str, words)], stdout=file, stderr=file, env=environment, start_new_session=True)

    def prepare(self, shards: int = 2) -> None:
        "Make the store in the tasks of an array job that counts from 1."
        for task in range(shards):
            words = self.folder/'recipe.yaml', self.folder/'all.csv', self.folder/'shapes'/'videos', self.folder/'store', '--workers', 0
            job = self.start('prepare.sbatch', *words, said=self.folder/'prepare.txt', ARRAY_TASK_ID=task + 1, ARRAY_TASK_COUNT=shards, ARRAY_TASK_MIN=1)
            if job.wait(PATIENCE): raise RuntimeError((self.folder/'prepare.txt').read_text())

    def train(self, name: str) -> subprocess.Popen:
        "Start a training on two nodes with one process each, or go on with it."
        self.jobs += 1
        words = self.folder/'recipe.yaml', self.train_csv, self.folder/'store', self.folder/name
        return self.start('train.sbatch', *words, said=self.folder/f'{name}.txt', NNODES=2, GPUS_ON_NODE=1, JOB_ID=os.getpid() % 9000 + 9001*(self.jobs % 2), JOB_NODELIST='two')

def processes_of(job: subprocess.Popen, module: str) -> list[psutil.Process]:
    "The processes of a job that run a module or command."
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try: words = process.cmdline()
        except psutil.Error: continue
        if any(Path(word).name == module for word in words[:3]): found.append(process)
    return found

def kill_process(job: subprocess.Popen) -> None:
    "SIGKILL to the training process of the second node."
    launcher = processes_of(job, 'torchrun')[1]
    launcher.children()[0].kill()

def lose_node(job: subprocess.Popen) -> None:
    "SIGKILL to a whole node; then Slurm ends what is left of the job."
    launcher = processes_of(job, 'torchrun')[1]
    for process in [launcher, *launcher.children(recursive=True)]: process.kill()
    time.sleep(5)
    os.killpg(job.pid, signal.SIGKILL)

def end_of_time(job: subprocess.Popen) -> None:
    "SIGTERM to the batch script alone, as --signal=B:TERM asks Slurm to do."
    job.send_signal(signal.SIGTERM)

CASES = {  # what happens → how, and what must be said
    'one training process is killed': (kill_process, 'going on after epoch'),
    'one node is lost, the job is started again': (lose_node, 'going on after epoch'),
    'the time is over, the job is started again': (end_of_time, 'requeued')}

def trial(cluster: Cluster, case: str, harm: Callable, wanted: str) -> dict:
    "One row: what happened, and whether weights and log are those of the run that was left in peace."
    name, begun = case.split(',')[0].replace(' ', '-'), time.monotonic()
    job, said = cluster.train(name), cluster.folder/f'{name}.txt'
    while job.poll() is None and steps_seen(cluster.folder/name) < 4 and time.monotonic() < begun + PATIENCE: time.sleep(.01)
    harm(job)
    codes = [job.wait(PATIENCE)]
    if codes[0]: codes.append(cluster.train(name).wait(PATIENCE))
    different = differences(cluster.folder/'peace', cluster.folder/name)
    return dict(case=case, exit_codes=' then '.join(map(str, codes)), said=wanted if wanted in said.read_text() else '', starts=len(codes),
                weights_and_log_identical=not different, seconds=round(time.monotonic() - begun))

def two_nodes(folder: Path) -> pd.DataFrame:
    "One row a case."
    cluster, begun = Cluster(folder), time.monotonic()
    cluster.prepare()
    if code := cluster.train('peace').wait(PATIENCE): raise RuntimeError((folder/'peace.txt').read_text())
    rows = [dict(case='left in peace', exit_codes=str(code), said='batch 4 = 2 processes × 2' if 'batch 4 = 2 processes × 2' in (folder/'peace.txt').read_text() else '', starts=1,
                 weights_and_log_identical=True, seconds=round(time.monotonic() - begun))]
    for case, (harm, wanted) in CASES.items():
        rows.append(trial(cluster, case, harm, wanted))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('--keep', type=Path, help='folder for everything, which is kept')
    values = parser.parse_args()
    folder = values.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try: table = two_nodes(folder)
    finally:
        if not values.keep: shutil.rmtree(folder, ignore_errors=True)
    table['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}, gloo, torch {torch.__version__}'
    table.to_csv(values.output, index=False)
    print(table.to_string())
