"""Two gloo processes with synchronised batch norm against one process with the whole batch: the losses of 20 steps.

python tests/robustness/two_processes.py OUT.csv [--compile]

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

class AllReduceSum(torch.autograd.Function):
    "The sum of a tensor over all processes; the gradient is summed as well."
    @staticmethod
    def forward(context, values):
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient): return AllReduceSum.forward(context, gradient)

def sync_batchnorm_forward(self, values: torch.Tensor) -> torch.Tensor:
    "The forward pass of SyncBatchNorm in plain torch: PyTorch's own computes on GPUs only."
    if not self.training: return torch.nn.modules.batchnorm._BatchNorm.forward(self, values)
    x, over, shape = values, [0, *range(2, values.ndim)], (1, -1, *[1]*(values.ndim - 2))
    count = AllReduceSum.apply(x.new_tensor(float(x.numel()//x.shape[1])))
    mean = AllReduceSum.apply(x.sum(over))/count
    centred = x - mean.view(shape)
    variance = AllReduceSum.apply(centred.square().sum(over))/count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance*count/(count - 1), self.momentum)
    normed = centred*(variance + self.eps).rsqrt().view(shape)
    return (normed*self.weight.view(shape) + self.bias.view(shape)).to(values.dtype)

def network():
    "A stream with batch norm."
    from vicc.streams import Stream
    return Stream('small', 8, 16, {'width': 4, 'multipliers': [1, 2], 'spatial_strides': [2, 2], 'temporal_strides': [2, 2]})

def losses(folder: Path, case: str, accelerator, compiled: bool) -> tuple[list[float], torch.Tensor]:
    "The losses of 20 steps (an epoch is one step of 16 videos), and the first layer at the end."
    from vicc.augment import ViewSettings
    from vicc.data import TwoStreamDataset
    from vicc.engine.fit import RunConfig
    from vicc.trainer import MethodSpec, StageConfig, Trainer, train_stage
    class DoubleTrainer(Trainer):
        "All in float64: rounding must not hide what differs, nor grow over the steps."
        def __init__(self, name, stream, *arguments, **options):
            torch.set_default_dtype(torch.float64)
            super().__init__(name, stream, *arguments, **options)
            torch.set_default_dtype(torch.float32)

        def views(self, batch, name): return [view.double() for view in super().views(batch, name)]
    values = dict(sync_batchnorm=True, **CASES[case]) if 'sync_batchnorm' not in CASES[case] else CASES[case]
    settings = StageConfig(epochs=STEPS, schedule_epochs=None, batch_size=16, optimizer='larc', learning_rate=.6, final_learning_rate=.01, freeze_prototypes_epochs=2,
                             queue_start_epoch=0, **values)
    dataset = TwoStreamDataset(Store(folder/'store'), None, ('rgb', 'flow'), 8, views=ViewSettings(size=32))
    torch.manual_seed(0)
    stream, other = network().double(), network().double() if case.startswith('cross') else None
    history = train_stage('flow', 'flow', stream, dataset, settings, folder/f'{case}-{accelerator.num_processes}', other, accelerator, log=lambda line: None,
                  method=MethodSpec(trainer=DoubleTrainer), run_config=RunConfig(compile=compiled))
    return history.loss.tolist(), next(stream.parameters()).detach()

def work(rank: int, folder: str, processes: int, compiled: bool) -> None:
    "What each process does."
    from accelerate import Accelerator
    if processes > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=Path(folder, 'port').read_text(), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    torch.nn.SyncBatchNorm.forward = sync_batchnorm_forward
    torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # it refuses CPUs
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
