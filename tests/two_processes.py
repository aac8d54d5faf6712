"""Two gloo processes with synchronised batch norm against one process with the whole batch: the losses of 20 steps.

python tests/two_processes.py OUT.csv [--compile]

With --compile the two processes compile their networks (which takes minutes), and the one process does not.
"""
import argparse
import os
import platform
import socket
import tempfile
from pathlib import Path

import pandas as pd
import torch

from vicc.prepare import PrepareSettings, Store, prepare
from vicc.synthetic import make_moving_shapes

CASES = {'single': dict(queue_length=0), 'single, queue': dict(queue_length=32), 'cross, queue': dict(queue_length=32), 'single, queue, plain batch norm': dict(queue_length=32, sync_batchnorm=False)}
STEPS = 20

def network():
    "A stream with batch norm."
    from vicc.streams import Stream
    return Stream('small', 8, 16, {'width': 4, 'multipliers': [1, 2], 'spatial_strides': [2, 2], 'temporal_strides': [2, 2]})

def losses(folder: Path, case: str, accelerator, compiled: bool) -> tuple[list[float], torch.Tensor]:
    "The losses of 20 steps (an epoch is one step of 16 videos), and the first layer at the end."
    from vicc.augment import ViewSettings
    from vicc.data import TwoStreamClips
    from vicc.trainer import StageConfig
    from vicc.trainer import RunConfig, fit
    values = dict(sync_batchnorm=True, **CASES[case]) if 'sync_batchnorm' not in CASES[case] else CASES[case]
    settings = StageConfig(epochs=STEPS, schedule_epochs=None, batch_size=16//accelerator.num_processes, optimiser='larc', learning_rate=.6, final_learning_rate=.01, freeze_prototypes_epochs=2,
                             queue_start_epoch=0, **values)
    dataset = TwoStreamClips(Store(folder/'store'), None, ('rgb', 'flow'), 8, views=ViewSettings(size=32))
    torch.manual_seed(0)
    stream, other = network(), network() if case.startswith('cross') else None
    history = fit('flow', 'flow', stream, dataset, settings, folder/f'{case}-{accelerator.num_processes}', other, accelerator, log=lambda line: None,
                          upkeep=RunConfig(compile=compiled))
    return history.loss.tolist(), next(stream.parameters()).detach()

def work(rank: int, folder: str, processes: int, compiled: bool) -> None:
    "What each process does."
    from accelerate import Accelerator
    if processes > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=Path(folder, 'port').read_text(), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    results = {case: losses(Path(folder), case, accelerator, compiled and processes > 1) for case in CASES}
    if rank == 0: torch.save(results, Path(folder)/f'{processes}.pt')

def two_processes(folder: Path, compiled: bool = False) -> pd.DataFrame:
    "One row a case: the largest difference of a loss and of a weight."
    made = make_moving_shapes(folder/'shapes', 16, 8, threads=1)
    prepare(made['train'], made['videos'], folder/'store', PrepareSettings(32, 'farneback', 5.), log=lambda line: None)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        (folder/'port').write_text(str(free.getsockname()[1]))
    for processes in (1, 2): torch.multiprocessing.spawn(work, (str(folder), processes, compiled), nprocs=processes)
    one, two = (torch.load(folder/f'{processes}.pt', weights_only=True) for processes in (1, 2))
    rows = []
    for case in CASES:
        (loss_one, weights_one), (loss_two, weights_two) = one[case], two[case]
        rows.append(dict(case=case, steps=STEPS, first_loss=loss_one[0], last_loss=loss_one[-1], largest_loss_difference=max(abs(a - b) for a, b in zip(loss_one, loss_two)),
                         largest_weight_difference=(weights_one - weights_two).abs().max().item()))
    return pd.DataFrame(rows)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('--compile', action='store_true', help='compile the networks of the two processes')
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: table = two_processes(Path(folder), values.compile)
    table['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}, gloo{", compiled" if values.compile else ""}, torch {torch.__version__}'
    table.to_csv(values.output, index=False)
    print(table.to_string())
