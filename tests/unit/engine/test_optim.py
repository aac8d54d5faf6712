"LARC never makes the CPU wait for the GPU, and trains under accelerate's wrapper."
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vicc.engine.optim import LARC, create_optimizer, set_learning_rate

def test_no_waiting():
    "Fake tensors have no values, so reading one (as .item() or an if would) raises."
    with FakeTensorMode():
        network = nn.Linear(5, 3)
        optimizer = LARC(network.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            network(torch.ones(4, 5)).sum().backward()
            optimizer.step()

def test_mixed_types():
    "A model with parameters of two types is stepped bundle by bundle."
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(2, 2))]
    optimizer = LARC(parameters, lr=1., momentum=0., weight_decay=0., trust_coefficient=0.1)
    for p in parameters: p.grad = torch.ones_like(p)
    optimizer.step()
    for p in parameters: torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))

def test_closure():
    parameter = nn.Parameter(torch.tensor([3., 4.]))
    optimizer = LARC([parameter])
    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 25
    assert optimizer.step(closure).item() < 25

def test_scale_survives_a_checkpoint():
    make = lambda: create_optimizer('sgd', [dict(params=[nn.Parameter(torch.ones(1))], lr_scale=0.1), dict(params=[nn.Parameter(torch.ones(1))])], 0.1)
    optimizer = make()
    optimizer.load_state_dict(make().state_dict())
    set_learning_rate(optimizer, 1.)
    assert [group['lr'] for group in optimizer.param_groups] == [0.1, 1.]

def test_accelerate_wrapper():
    from accelerate import Accelerator
    network = nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    network, optimizer = accelerator.prepare(network, LARC(network.parameters()))
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]['lr'] == 0.25
    before = network.weight.detach().clone()
    accelerator.backward(network(torch.ones(4, 3)).square().sum())
    optimizer.step()
    torch.testing.assert_close((network.weight.detach() - before).norm() / before.norm(), torch.tensor(0.25 * 0.001), rtol=1e-3, atol=0)
