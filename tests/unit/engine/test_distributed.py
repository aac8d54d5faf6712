"A training stage on two processes: one network, two queues, and the same weights after a kill as without one."
import os
from pathlib import Path

import pytest
import torch

from helpers import Unplugged, unplug
from two_processes import CASES, two_processes
from vicc.prepare import PrepareSettings, Store, prepare
from vicc.synthetic import make_moving_shapes

def train(folder: Path, where: str, stop: bool) -> tuple[dict, dict]:
    "Three epochs of flow-1 with a queue, broken off in the third if asked to: weights, and this process's queue in the last checkpoint."
    from accelerate import Accelerator
    from vicc.augment import ViewSettings
    from vicc.engine.checkpoint import load_checkpoint
    from vicc.data import TwoStreamDataset
    from vicc.trainer import StageConfig, train_stage
    from vicc.streams import Stream
    accelerator = Accelerator(cpu=True)
    dataset = TwoStreamDataset(Store(folder/'store'), None, ('flow',), 8, views=ViewSettings(size=16))
    if stop: unplug(dataset.frames, 2*8 + 5)  # in the third epoch: each process reads 8 of the 16 videos an epoch
    settings = StageConfig(epochs=3, schedule_epochs=None, batch_size=8, optimizer='adamw', learning_rate=1e-3, final_learning_rate=1e-5, freeze_prototypes_epochs=0,
                             queue_length=16, queue_start_epoch=0)
    torch.manual_seed(0)
    stream = Stream('small', 8, 16, {'width': 4, 'multipliers': [1, 2], 'spatial_strides': [2, 2], 'temporal_strides': [2, 2]})
    train_stage('flow-1', 'flow', stream, dataset, settings, folder/where, accelerator=accelerator, log=lambda line: None)
    rank_state = load_checkpoint(folder/where, accelerator)[1]
    return stream.state_dict(), rank_state['trainer']['queue']

def work(rank: int, folder: str) -> None:
    "What each process does."
    from accelerate.utils import gather_object
    from vicc.engine.fit import format_data_errors
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=Path(folder, 'port').read_text(), ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    unbroken = train(Path(folder), 'unbroken', False)
    try: train(Path(folder), 'broken', True)
    except Unplugged: pass
    else: raise AssertionError('was not broken off')
    torch.distributed.barrier()
    told = format_data_errors(gather_object([(f'{rank}.avi', 'is empty')]))
    torch.save((unbroken, train(Path(folder), 'broken', False), told), Path(folder)/f'{rank}.pt')

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    made = make_moving_shapes(folder/'shapes', 16, 8)
    prepare(made['train'], made['videos'], folder/'store', PrepareSettings(32, 'farneback', 5.), log=lambda line: None)
    import socket
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        (folder/'port').write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in range(2)]

def test_both_processes_hold_one_network(results):
    for name in results[0][0][0]:
        if 'running' in name or 'batches' in name: continue  # batch norm's statistics are each process's own until a stage ends
        assert torch.equal(results[0][0][0][name], results[1][0][0][name]), name

def test_each_process_has_a_queue_of_its_own(results):
    first, second = (result[0][1]['projections'] for result in results)
    assert first.shape == (2, 8, 16) and first.abs().sum() > 0
    assert not torch.equal(first, second)

@pytest.mark.parametrize('rank', [0, 1])
def test_a_kill_changes_nothing(results, rank):
    (weights, queue), (weights_again, queue_again), _ = results[rank]
    for name in weights:
        if rank and ('running' in name or 'batches' in name): continue  # process 1 goes on with the statistics of process 0
        assert torch.equal(weights[name], weights_again[name]), name
    assert torch.equal(queue['projections'], queue_again['projections'])

def test_what_could_not_be_read_is_told_for_all(results):
    assert results[0][2] == results[1][2] == '2 video(s) could not be read, and others took their place: 0.avi: is empty; 1.avi: is empty'

@pytest.fixture(scope='module')
def compared(tmp_path_factory): return two_processes(tmp_path_factory.mktemp('compared')).set_index('case')

@pytest.mark.parametrize('case', [case for case in CASES if 'plain' not in case])
def test_with_synchronised_batch_norm_two_processes_are_one(compared, case):
    assert compared.largest_loss_difference[case] < 1e-6  # a loss is summed up in float32
    assert compared.largest_weight_difference[case] < 1e-12

def test_without_it_they_are_not(compared):
    assert compared.largest_loss_difference['single, queue, plain batch norm'] > 1e-3
