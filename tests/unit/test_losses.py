"A step's assignments and loss never make the CPU wait for the GPU; the queue survives checkpoints."
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vicc.losses import swapped_prediction_loss, view_assignments
from vicc.prototypes import ProjectionQueue, Prototypes, normalize_rows, sinkhorn

def test_no_waiting():
    "Fake tensors have no values, so reading one (as .item() would) raises. A whole step must get through."
    with FakeTensorMode():
        prototypes, queue = Prototypes(7, 4), ProjectionQueue(4, 6, 4)
        for _ in range(3):
            prototypes.normalize_()
            projections = [normalize_rows(torch.randn(3, 4, requires_grad=v < 2)) for v in range(4)]
            scores = [prototypes(z) for z in projections]
            assignments = view_assignments(scores, queue, prototypes.weight)
            swapped_prediction_loss(scores, assignments).backward()
            queue.push(torch.stack(projections))
        assert queue.full
        with pytest.raises(DataDependentOutputException): assignments[0].sum().item()  # the test can fail

def test_queue_in_safetensors(tmp_path):
    queue = ProjectionQueue(2, 4, 3)
    queue.push(torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)))
    save_file(queue.state_dict(), tmp_path/'queue.safetensors')
    restored = ProjectionQueue(2, 4, 3)
    restored.load_state_dict(load_file(tmp_path/'queue.safetensors'))
    assert restored.filled == 3 and torch.equal(restored.projections, queue.projections)

def test_queue_of_another_number_of_processes():
    "The length per process differs when the number of processes does: loading says so, and does not cut."
    with pytest.raises(RuntimeError, match='size mismatch for projections'):
        ProjectionQueue(2, 480, 8).load_state_dict(ProjectionQueue(2, 240, 8).state_dict())

@pytest.mark.parametrize('epsilon', [0, -.05])
def test_no_weight_of_the_entropy(epsilon):
    with pytest.raises(ValueError, match=f'epsilon={epsilon}: give a number above 0'): sinkhorn(torch.zeros(2, 2), epsilon)
    with pytest.raises(ValueError, match='a temperature above 0; got 2 and 2 views'): swapped_prediction_loss([torch.zeros(2, 2)]*2, [torch.ones(2, 2)/2]*2, epsilon)

def test_queue_takes_half_precision_and_empty_batches():
    queue = ProjectionQueue(1, 2, 3)
    queue.push(torch.ones(1, 1, 3, dtype=torch.bfloat16))
    queue.push(torch.ones(1, 0, 3))
    assert queue.filled == 1 and queue.projections.dtype == torch.float32
