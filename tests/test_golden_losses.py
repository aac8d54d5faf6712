"Sinkhorn, scores, losses, gradients and the queue against numbers computed once with the method's released code (tests/golden)."
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from vicc.losses import swapped_prediction_loss, view_assignments
from vicc.prototypes import ProjectionQueue, Prototypes, normalise_rows, sinkhorn

golden = Path(__file__).parent/'golden'
cases = ['single_stream_loss', 'single_stream_loss_queue', 'cross_stream_loss', 'cross_stream_loss_queue']

def relative(ours, theirs): return ((ours - theirs).norm() / theirs.norm()).item()

def step(numbers):
    "One training step without an encoder. Views 3 and 4, where there are any, are the frozen stream's."
    prototypes = Prototypes(*numbers['prototypes'].shape)
    with torch.no_grad(): prototypes.weight.copy_(numbers['prototypes'])
    prototypes.normalise_()
    raw = [p.clone().requires_grad_(v < 2) for v, p in enumerate(numbers['projections'])]
    projections = [normalise_rows(p) for p in raw]
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
    for name, ours in (('grad_projection_0', raw[0]), ('grad_projection_1', raw[1]), ('grad_prototypes', prototypes.weight)):
        assert relative(ours.grad, numbers[name]) < 1e-4, name
    assert all(frozen.grad is None for frozen in raw[2:])
    if queue is not None: torch.testing.assert_close(queue.projections, numbers['queue_after'], atol=1e-6, rtol=0)

@pytest.mark.parametrize('case', cases)
def test_the_queue_and_the_frozen_views_matter(case):
    "The golden numbers would notice a queue left out, or two views left out: neither test above passes by accident."
    numbers = load_file(golden/f'{case}.safetensors')
    if 'queue' in numbers: numbers.pop('queue')
    elif len(numbers['projections']) == 4: numbers['projections'] = numbers['projections'][:2]
    else: pytest.skip('two views and no queue: nothing to leave out')
    assert abs(step(numbers)[3] - numbers['loss']) > 1e-3
