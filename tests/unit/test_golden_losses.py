"Sinkhorn, scores, losses, gradients and the queue against numbers of the released code (tests/golden)."
import pytest
import torch
from safetensors.torch import load_file
from helpers import GOLDEN
from vicc.losses import swapped_prediction_loss, view_assignments
from vicc.prototypes import ProjectionQueue, Prototypes, normalize_rows, sinkhorn

golden = GOLDEN
cases = ['single_stream_loss', 'single_stream_loss_queue', 'cross_stream_loss', 'cross_stream_loss_queue']

def relative(ours, theirs): return ((ours - theirs).norm() / theirs.norm()).item()

def step(numbers):
    "One training step without an encoder. Views 3 and 4, where there are any, are the frozen stream's."
    prototypes = Prototypes(*numbers['prototypes'].shape)
    with torch.no_grad(): prototypes.weight.copy_(numbers['prototypes'])
    prototypes.normalize_()
    raw = [p.clone().requires_grad_(v < 2) for v, p in enumerate(numbers['projections'])]
    projections = [normalize_rows(p) for p in raw]
    scores = [prototypes(z) for z in projections]
    queue = None
    if 'queue' in numbers:
        queue = ProjectionQueue(*numbers['queue'].shape)
        queue.push(numbers['queue'])
    loss = swapped_prediction_loss(scores, view_assignments(scores, queue, prototypes.weight))
    loss.backward()
    if queue is not None: queue.push(torch.stack(projections))
    return prototypes, raw, scores, loss, queue

@pytest.mark.parametrize('iterations, name', [(3, 'assignments'), (50, 'assignments_50_iterations')])
def test_sinkhorn(iterations, name):
    numbers = load_file(golden/'sinkhorn.safetensors')
    ours = sinkhorn(numbers['scores'], 0.05, iterations)
    torch.testing.assert_close(ours, numbers[name], atol=1e-5, rtol=0)

@pytest.mark.parametrize('case', cases)
def test_step(case):
    numbers = load_file(golden/f'{case}.safetensors')
    prototypes, raw, scores, loss, queue = step(numbers)
    assert len(raw) == (4 if case.startswith('cross') else 2)
    torch.testing.assert_close(torch.cat(scores), numbers['scores'], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, numbers['loss'], atol=1e-5, rtol=0)
    for name, ours in (('grad_projection_0', raw[0]), ('grad_projection_1', raw[1]),
                       ('grad_prototypes', prototypes.weight)):
        assert relative(ours.grad, numbers[name]) < 1e-4, name
    assert all(frozen.grad is None for frozen in raw[2:])
    if queue is not None:
        torch.testing.assert_close(queue.projections, numbers['queue_after'], atol=1e-6, rtol=0)

@pytest.mark.parametrize('case', cases)
def test_the_queue_and_the_frozen_views_matter(case):
    "The golden numbers would notice a queue or two views left out: no test above passes by accident."
    numbers = load_file(golden/f'{case}.safetensors')
    if 'queue' in numbers: numbers.pop('queue')
    elif len(numbers['projections']) == 4: numbers['projections'] = numbers['projections'][:2]
    else: pytest.skip('two views and no queue: nothing to leave out')
    assert abs(step(numbers)[3] - numbers['loss']) > 1e-3

def plain_loss(projections, prototypes, queue, epsilon, temperature, rounds):
    "The equations as they stand in the paper, in float64: exponentials and sums, clip after clip."
    assignments, log_predictions = [], []
    for view, projection in enumerate(projections):
        scores = projection@prototypes.T
        rows = scores if queue is None else torch.cat([scores, queue[view]@prototypes.T])
        table = (rows.detach()/epsilon).exp()
        for _ in range(rounds):
            table = table/table.sum(0)/table.shape[1]
            table = table/table.sum(1, keepdim=True)/table.shape[0]
        assignments.append((table/table.sum(1, keepdim=True))[:len(scores)])
        log_predictions.append((scores/temperature).log_softmax(1))
    views = len(projections)
    return sum(-(assignments[v][clip]*log_predictions[w][clip]).sum()/len(projections[0])
               for v in range(views) for w in range(views) if w != v
               for clip in range(len(projections[0])))/views/(views - 1)

@pytest.mark.parametrize('seed, views, clips, dim, count, queue_length, epsilon, temperature, rounds', [
    (1, 2, 5, 7, 11, 0, .05, .1, 3), (2, 4, 24, 128, 300, 0, .05, .1, 3), (3, 2, 3, 16, 4, 10, .05, .1, 3),
    (4, 4, 6, 32, 50, 33, .1, .2, 5), (5, 2, 48, 64, 24, 0, .03, .07, 1), (6, 3, 1, 8, 6, 12, .05, .1, 3)])
def test_other_draws(seed, views, clips, dim, count, queue_length, epsilon, temperature, rounds):
    "Other seeds and sizes, and other values of the loss, against the plain equations: loss and gradients."
    g = torch.Generator().manual_seed(seed)
    raw, weight = torch.randn(views, clips, dim,
                              generator=g), normalize_rows(torch.randn(count, dim, generator=g))
    older = normalize_rows(torch.randn(views, queue_length, dim, generator=g)) if queue_length else None
    results = []
    for kind in (torch.float32, torch.float64):
        inputs = raw.to(kind, copy=True).requires_grad_(True)
        prototypes = weight.to(kind, copy=True).requires_grad_(True)
        projections = [torch.nn.functional.normalize(z, dim=1) for z in inputs]
        if kind == torch.float64:
            loss = plain_loss(projections, prototypes, None if older is None else older.to(kind), epsilon,
                              temperature, rounds)
        else:
            queue = None
            if older is not None:
                queue = ProjectionQueue(views, queue_length, dim)
                queue.push(older)
            scores = [z@prototypes.T for z in projections]
            assignments = view_assignments(scores, queue, prototypes.detach(), epsilon, rounds)
            loss = swapped_prediction_loss(scores, assignments, temperature)
        loss.backward()
        results.append((loss.detach().double(), inputs.grad.double(), prototypes.grad.double()))
    assert abs(results[0][0] - results[1][0]) < 1e-5
    assert relative(results[0][1], results[1][1]) < 1e-4 and relative(results[0][2], results[1][2]) < 1e-4
