"The fast path against the plain one: a whole step of a stage, on the CPU without and with compilation, on a GPU with recorded graphs."
import copy
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from vicc.backbones import create_backbone
from vicc.bench import repeat_videos, small_store
from vicc.data import TwoStreamDataset, collate, training_loader
from vicc.engine.fit import compile_and_warm_up
from vicc.fast.layers import compile_embed, inference_copy, use_fast_layers, use_plain_layers, mark_cudagraph_step
from vicc.augment import ViewSettings
from vicc.trainer import Trainer, StageConfig
from vicc.streams import Stream

needs_compiler = pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler')


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
    store = small_store(tmp_path_factory.mktemp('fast'), videos=2, height=48, width=64, num_frames=24)
    dataset = TwoStreamDataset(store, repeat_videos(store, 8), clip_length=8, views=ViewSettings(size=32))
    return dataset, collate([dataset[number] for number in range(8)])


def new_stage(samples, device, compiled, backbone=('small', {'width': 8}), precision='no', graphs=True):
    "A cross-stream stage, the same each time."
    AcceleratorState._reset_state(reset_partial_state=True)  # or the device of the first test would be that of all
    accelerator = Accelerator(cpu=device == 'cpu', mixed_precision=precision)
    assert accelerator.device.type == device
    torch.manual_seed(0)
    rgb, flow = (Stream(backbone[0], 8, 16, backbone[1]) for _ in range(2))
    stage = Trainer('rgb', rgb, StageConfig(batch_size=8, queue_length=0, optimizer='sgd', learning_rate=0.1, freeze_prototypes_epochs=0), samples[0], accelerator, flow)
    if compiled: stage.compile(graphs)
    stage.model.train()
    return stage


def one_step(stage, batch):
    "Its loss, all its gradients in a row, and the weights after it."
    metrics = stage.create_metrics()
    stage.step(batch, 0, metrics)
    return metrics.loss.item(), torch.cat([parameter.grad.flatten().float() for parameter in stage.stream.parameters()]).cpu(), {name: value.float().cpu() for name, value in stage.stream.state_dict().items()}


@pytest.mark.parametrize('device, count', [pytest.param('cpu', 2, marks=needs_compiler), pytest.param('cuda', 5, marks=pytest.mark.gpu)])
def test_compiled_steps_are_the_same(samples, device, count):
    "On a GPU the first steps compile and record, the others are played back. Each begins with the plain path's weights, or rounding would grow from step to step."
    plain, compiled = (new_stage(samples, device, fast) for fast in (False, True))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for number in range(count):
            compiled.stream.load_state_dict(plain.stream.state_dict())  # in place: recorded graphs know the addresses
            (loss, gradients, weights), (own_loss, own_gradients, own_weights) = (one_step(stage, samples[1]) for stage in (plain, compiled))
            assert own_loss == pytest.approx(loss, rel=1e-4), number
            assert (own_gradients - gradients).norm() <= 1e-2*gradients.norm(), number
            for name, value in weights.items(): assert (value - own_weights[name]).norm() <= 2e-3*value.norm() + 1e-4, (number, name)
    for stage in (plain, compiled): stage.teardown()


@pytest.mark.gpu
@pytest.mark.parametrize('backbone', [('small', {'width': 8}), ('s3d', {})], ids=['small', 's3d'])
def test_steps_in_bf16_are_as_near_to_float32_with_and_without_graphs(samples, backbone):
    "Compiled steps round otherwise than plain ones: their gradients may be no farther from float32's than half as much again."
    stages = {'float32': new_stage(samples, 'cuda', False, backbone), 'plain': new_stage(samples, 'cuda', False, backbone, 'bf16'),
              'compiled': new_stage(samples, 'cuda', True, backbone, 'bf16', graphs=False), 'graphs': new_stage(samples, 'cuda', True, backbone, 'bf16')}
    for number in range(4):  # the first steps compile and record, the last is played back
        for name in ('plain', 'compiled', 'graphs'): stages[name].stream.load_state_dict(stages['float32'].stream.state_dict())
        results = {name: one_step(stage, samples[1])[:2] for name, stage in stages.items()}
        loss, gradients = results['float32']
        distance = {name: ((own - gradients).norm()/gradients.norm()).item() for name, (_, own) in results.items()}
        for name in ('compiled', 'graphs'):
            assert results[name][0] == pytest.approx(loss, rel=5e-2), (name, number)
            assert distance[name] <= 1.5*distance['plain'] + 1e-2, (number, distance)
    for stage in stages.values(): stage.teardown()


def test_the_other_stream_and_the_names_stay(samples):
    stream = Stream('small', 8, 16, {'width': 8})
    before, kinds = copy.deepcopy(stream.state_dict()), [type(layer) for layer in stream.modules()]
    clips = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    inference_copy(stream).embed(clips)
    assert [type(layer) for layer in stream.modules()] == kinds  # a frozen stream is copied
    use_fast_layers(stream.backbone)
    stream.embed(clips)
    assert [type(layer) for layer in stream.modules()] != kinds
    assert [type(layer) for layer in use_plain_layers(stream).modules()] == kinds and all(torch.equal(value, before[name]) for name, value in stream.state_dict().items() if 'running' not in name and 'tracked' not in name)


@pytest.mark.gpu
@pytest.mark.parametrize('name', ['s3d', 'r21d'])
def test_fast_layers_on_a_gpu(name):
    plain = create_backbone(name).cuda().eval()
    fast = use_fast_layers(copy.deepcopy(plain))
    clips = torch.randn(2, 3, 16, 64, 64, device='cuda').to(memory_format=torch.channels_last_3d)
    with torch.no_grad(): assert torch.allclose(plain(clips), fast(clips), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_results_of_one_step_live_through_it():
    stream = Stream('small', 8, 16, {'width': 8}).cuda().train()
    embed, generator = compile_embed(stream), torch.Generator('cuda').manual_seed(0)
    for _ in range(4):
        mark_cudagraph_step()
        views = [torch.randn(4, 3, 8, 32, 32, device='cuda', generator=generator) for _ in range(2)]
        first, second = (embed(view) for view in views)
        kept = first.clone()
        embed(views[1])
        assert torch.equal(first, kept)
        stream.zero_grad(set_to_none=True)  # the old gradients lie where the graph will write again
        (first + second).sum().backward()


def test_warmup_leaves_no_trace(samples, monkeypatch):
    "Not in the weights, the statistics of batch norm, the optimizer, the generator, the gradients."
    trainer = new_stage(samples, 'cpu', False)
    trainer.step(samples[1], 0, trainer.create_metrics())
    monkeypatch.setattr(trainer, 'compile', lambda: 'nowhere')
    before, generator, lines = copy.deepcopy(trainer.state_dict()), torch.get_rng_state(), []
    compile_and_warm_up(trainer, training_loader(samples[0], 8), lines.append)
    for name, value in trainer.stream.state_dict().items(): assert torch.equal(value, before['stream'][name]), name
    for number, state in trainer.optimizer.state_dict()['state'].items():
        for name, value in state.items(): assert torch.equal(value, before['optimizer']['state'][number][name]), name
    assert torch.equal(torch.get_rng_state(), generator) and len(lines) == 2
    assert all(parameter.grad is None for parameter in trainer.stream.parameters())
