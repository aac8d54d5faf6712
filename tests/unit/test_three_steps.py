"""Three whole optimizer steps of the trainer against the released code's, in float64: weights, losses, queue, batch norm.

With the recorded start, views, queue and learning rates of tests/golden. The released code's were made on one process, with a gradient through both views."""
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.nn.functional import normalize

from helpers import GOLDEN, golden_weights
from vicc.engine.optim import set_learning_rate
from vicc.streams import Stream
from vicc.trainer import StageConfig, Trainer

SHAPES = json.loads((GOLDEN/'official_state_dict_keys.json').read_text())['backbones']
HEAD = {'head.0': 'head.2', 'head.2': 'head.4'}  # ours: the released code's

class RecordedTrainer(Trainer):
    "A trainer whose batches are views already, and whose assignments are rounded to float32, as the released code does it in float64 too."
    def views(self, batch, name): return batch[name]
    def assign(self, scores, queue): return [q.float().double() for q in super().assign(scores, queue)]  # one switching ReLU of S3D hangs on it

def golden_stream(backbone: str, prefix: str = '') -> Stream:
    "A stream with the weights that the rule gives to released names."
    stream = Stream(backbone, 30, 128)
    width = stream.num_features
    stream.backbone.load_state_dict({name.removeprefix(prefix): value for name, value in golden_weights({prefix + name: shape for name, shape in SHAPES[backbone].items()}).items()})
    shapes = {'head.2.weight': [width, width, 1, 1, 1], 'head.2.bias': [width], 'head.4.weight': [128, width, 1, 1, 1], 'head.4.bias': [128]}
    head = {name: golden_weights({prefix + name: shape})[prefix + name] for name, shape in shapes.items()}
    stream.head.load_state_dict({f'{number}.{kind}': head[f'{HEAD["head." + number]}.{kind}'].flatten(1) if kind == 'weight' else head[f'{HEAD["head." + number]}.{kind}']
                                 for number in ('0', '2') for kind in ('weight', 'bias')})
    stream.prototypes.weight.data = golden_weights({'prototypes.weight': [30, 128]})['prototypes.weight']
    return stream.double()

def three_steps(kind: str, backbone: str, **changes) -> tuple[dict, dict]:
    "Our numbers and the recorded ones."
    with safe_open(GOLDEN/f'three_steps_{kind}_{backbone}.safetensors', 'pt') as file:
        recorded, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    batch, length, shape = int(facts['batch']), int(facts['queue_length']), json.loads(facts['shape'])
    settings = StageConfig(epochs=7, schedule_epochs=None, batch_size=batch, queue_length=length, queue_start_epoch=0,
                           freeze_prototypes_epochs=int(facts['freeze_prototypes_steps']), **changes)
    teacher = golden_stream(backbone, 'second.') if kind == 'cross' else None
    trainer = RecordedTrainer('rgb', golden_stream(backbone), settings, SimpleNamespace(seed=0), Accelerator(cpu=True, mixed_precision='no'), teacher)
    g = torch.Generator().manual_seed(int(facts['seed']))
    trainer.queue.double().push(normalize(torch.randn(4 if teacher else 2, length, 128, generator=g).double(), dim=-1))
    trainer.model.train()
    losses = []
    for step in range(3):
        views = [torch.randn(batch, 3, *shape, generator=g).double() for _ in range(4 if teacher else 2)]
        metrics = trainer.create_metrics()
        metrics.loss = metrics.loss.double()
        set_learning_rate(trainer.optimizer, trainer.learning_rate(step, 1))
        trainer.step(dict(rgb=views[:2], flow=views[2:]), step, metrics)
        losses.append(metrics.loss)
    network = trainer.stream.backbone
    state = getattr(network, 'released_state_dict', network.state_dict)()
    norm = facts['running_mean'].removesuffix('running_mean')
    ours = dict(first_convolution=state[facts['first_convolution']], running_mean=state[norm + 'running_mean'], running_var=state[norm + 'running_var'],
                losses=torch.stack(losses), prototypes=trainer.stream.prototypes.weight, head_4_weight=trainer.stream.head[2].weight,
                 last_convolution_16_rows=state[facts['last_convolution']][:16], queue=trainer.queue.projections)
    return ours, recorded

def relative(ours, theirs): return float((ours.detach().double() - theirs).norm()/theirs.norm())

@pytest.mark.parametrize('kind', ['single', 'cross'])
@pytest.mark.parametrize('backbone', ['s3d', 'r21d'])
def test_three_steps(kind, backbone):
    ours, recorded = three_steps(kind, backbone)
    assert recorded.keys() == ours.keys()
    for name, value in recorded.items(): assert relative(ours[name], value) < 1e-7, name
