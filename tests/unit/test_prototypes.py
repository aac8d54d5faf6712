"Two processes that hold half a batch each compute what one process computes on the whole batch."
import os
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vicc.losses import swapped_prediction_loss, view_assignments
from vicc.prototypes import ProjectionQueue, Prototypes, normalize_rows, sinkhorn

VIEWS, CLIPS, FEATURES, DIM, PROTOTYPES, QUEUE = 2, 12, 10, 8, 20, 28

class Model(nn.Module):
    "One layer and prototypes: features [V, B, F] -> scores V x [B, K] and projections [V, B, D]."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.encoder, self.prototypes = nn.Linear(FEATURES, DIM, bias=False), Prototypes(PROTOTYPES, DIM, g)
        with torch.no_grad(): self.encoder.weight.copy_(torch.randn(DIM, FEATURES, generator=g))

    def forward(self, features):
        projections = normalize_rows(self.encoder(features))
        return [self.prototypes(z) for z in projections], projections

def draw():
    g = torch.Generator().manual_seed(1)
    return torch.randn(VIEWS, CLIPS, FEATURES,
                       generator=g), normalize_rows(torch.randn(VIEWS, QUEUE, DIM, generator=g))

def one_step(features, older, wrap=lambda model: model):
    "Assignments, loss and gradients of a step, with a queue if `older` is given."
    model = Model()
    queue = None
    if older is not None:
        queue = ProjectionQueue(VIEWS, older.shape[1], DIM)
        queue.push(older)
    wrapped = wrap(model)  # kept: DistributedDataParallel must outlive the backward pass
    scores, _ = wrapped(features)
    assignments = view_assignments(scores, queue, model.prototypes.weight)
    loss = swapped_prediction_loss(scores, assignments)
    loss.backward()
    return {'assignments': torch.stack(assignments), 'loss': loss.detach(),
            'encoder': model.encoder.weight.grad, 'prototypes': model.prototypes.weight.grad}

def work(rank, folder):
    "What each of the two processes does; results go to a file."
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    features, older = draw()
    half = slice(rank * CLIPS // 2, (rank + 1) * CLIPS // 2)
    half_queue = older[:, rank * QUEUE // 2:(rank + 1) * QUEUE // 2]
    result = {'batch': one_step(features[:, half], None, DistributedDataParallel),
              'queue': one_step(features[:, half], half_queue, DistributedDataParallel)}
    # Halves of different sizes, and a process on its own
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    result['uneven'] = sinkhorn(scores[:2] if rank == 0 else scores[2:])
    result['alone'] = sinkhorn(scores[:2], all_processes=False) if rank == 0 else None
    torch.save(result, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in range(2)]

@pytest.mark.parametrize('case', ['batch', 'queue'])
def test_two_halves_are_the_whole(results, case):
    features, older = draw()
    whole, halves = one_step(features, older if case == 'queue' else None), [r[case] for r in results]
    close = lambda ours, expected: torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    close(torch.cat([h['assignments'] for h in halves], dim=1), whole['assignments'])
    close(sum(h['loss'] for h in halves) / 2, whole['loss'])
    for name in ('encoder', 'prototypes'):
        for half in halves: close(half[name], whole[name])  # DistributedDataParallel has averaged them
        assert whole[name].norm() > 1e-2

def test_balance_is_over_all_processes(results):
    "A process that balances its half alone gets something else: the exchange is not for nothing."
    features, _ = draw()
    alone = one_step(features[:, :CLIPS // 2], None)['assignments']
    assert (alone - results[0]['batch']['assignments']).abs().max() > 1e-2

def test_uneven_halves(results):
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    torch.testing.assert_close(torch.cat([r['uneven'] for r in results]), sinkhorn(scores), atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0]['alone'], sinkhorn(scores[:2]))
