"The step of a stage: who moves, a batch in chunks, values that cannot work."
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from helpers import FLOW_STAGE as SETTINGS, shapes_store, train_flow as train
from vicc.augment import ViewSettings
from vicc.compare.baselines import create_method
from vicc.data import TwoStreamDataset, collate
from vicc.trainer import StageConfig, StageMetrics, Trainer, VICC
from vicc.streams import Stream

@pytest.fixture(scope='module')
def store(tmp_path_factory): return shapes_store(tmp_path_factory.mktemp('shapes'))

@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)

def test_other_methods_refuse_parts(store, cpu, tmp_path):
    with pytest.raises(ValueError, match='infonce has a step of its own, without accumulate'): train(store, cpu, tmp_path, replace(SETTINGS, accumulate=2), method=create_method('infonce', key_queue_length=8))

def test_prototypes_stand_still_at_first_and_the_teacher_always(store, cpu):
    data = TwoStreamDataset(store, None, clip_length=8, views=ViewSettings(size=32))
    batch = collate([data[sample] for sample in range(8)])
    trainer = Trainer('rgb', Stream('small', 6, 8, {'width': 4}), replace(SETTINGS, freeze_prototypes_epochs=1), data, cpu, Stream('small', 6, 8, {'width': 4}))
    trainer.model.train()
    trainer.stream.prototypes.normalize_()
    teacher, before, moved = copy.deepcopy(trainer.teacher.state_dict()), trainer.stream.prototypes.weight.clone(), []
    for epoch in (0, 1):
        trainer.step(batch, epoch, trainer.create_metrics())
        moved.append((trainer.stream.prototypes.weight - before).abs().max().item())
    assert moved[0] < 1e-6 < 1e-4 < moved[1]
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.state_dict().items())

def test_chunks_of_a_batch_are_the_whole_batch(store, cpu):
    "With batch norm in evaluation mode; in training it looks at chunks, and its statistics move once a chunk."
    data = TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32))
    batch = collate([data[sample] for sample in range(8)])
    def two_steps(accumulate, training):
        torch.manual_seed(0)
        settings = replace(SETTINGS, batch_size=8, accumulate=accumulate, optimizer='sgd', learning_rate=.5, queue_length=8, queue_start_epoch=0, freeze_prototypes_epochs=0)
        trainer = Trainer('flow', Stream('small', 6, 8, {'width': 4}), settings, data, cpu)
        trainer.model.train(training)
        metrics = trainer.create_metrics()
        for _ in range(2): trainer.step(batch, 1, metrics)  # the second with a full queue
        norm = next(layer for layer in trainer.stream.modules() if isinstance(layer, torch.nn.BatchNorm3d))
        return metrics.loss.item(), next(trainer.stream.parameters()).detach(), int(norm.num_batches_tracked)
    loss, weights, _ = two_steps(1, False)
    for chunks in (2, 4):
        own_loss, own_weights, _ = two_steps(chunks, False)
        assert abs(own_loss - loss) < 1e-5 and (own_weights - weights).abs().max() < 1e-5
    assert [two_steps(chunks, True)[2] for chunks in (1, 2)] == [2*2, 2*2*2]  # steps × views × chunks

def test_values_of_a_stage_that_cannot_work():
    for values, words in ((dict(epochs=0), 'epochs'), (dict(epochs=600), 'schedule_epochs=500 is less than epochs=600'), (dict(gradient_views=3), 'gradient_views'),
                          (dict(optimizer='adamx'), "optimizer='adamx' is not one of"), (dict(accumulate=5), 'cannot be computed in accumulate=5 equal chunks')):
        with pytest.raises(ValueError, match=words): StageConfig(**values)

def test_metrics_of_two_steps_by_hand(cpu):
    "The first views choose prototypes 0, 1 and 0, 1, the last views 0, 2 and 0, 1; one of eight targets is uniform."
    metrics, eye = StageMetrics(4, cpu.device), torch.eye(4)
    metrics.update(torch.tensor(1.), [eye[[0, 1]], eye[[0, 2]]])
    metrics.update(torch.tensor(2.), [eye[[0, 1]], torch.stack([eye[0], torch.full((4,), 1/4) + eye[1]*1e-6])])
    numbers = metrics.compute(cpu)
    assert (numbers['loss'], numbers['prototypes_in_use'], numbers['agreement']) == (1.5, 2, .75)
    assert abs(numbers['assignment_entropy'] - math.log(2)) < 1e-6 and abs(numbers['target_entropy'] - math.log(4)/8) < 1e-5

@pytest.mark.parametrize('processes, values, described', [
    (1, {}, 'batch 192'), (4, {}, 'batch 192 = 4 processes × 48 (batch norm sees 48 clips at a time)'), (8, dict(sync_batchnorm=True), 'batch 192 = 8 processes × 24'),
    (2, dict(accumulate=2), 'batch 192 = 2 processes × 2 chunks × 48 (batch norm sees 48 clips at a time)'),
    (4, dict(accumulate=2, sync_batchnorm=True), 'batch 192 = 4 processes × 2 chunks × 24 (batch norm sees 96 clips at a time)')])
def test_how_a_batch_is_divided(processes, values, described): assert StageConfig(**values).divide_batch(processes) == described

@pytest.mark.parametrize('processes, values, refused', [(5, {}, 'divided among 5 processes: give a multiple of 5'), (4, dict(accumulate=96), 'divided among 4 processes × 96 chunks')])
def test_batches_that_cannot_be_divided(processes, values, refused):
    with pytest.raises(ValueError, match=f'a batch of 192 cannot be {refused}'): StageConfig(**values).divide_batch(processes)

def test_checkpoints_say_how_many_clips_each_process_had(store, cpu):
    "Those of before, whose batch size was that of each process, do not go on with other batches."
    trainer = Trainer('flow', Stream('small', 6, 8, {'width': 4}), StageConfig(), TwoStreamDataset(store, None, ('flow',), 8), cpu)
    trainer.method, found = VICC, []
    for processes in (1, 4):
        trainer.accelerator = SimpleNamespace(num_processes=processes, mixed_precision='no')
        found.append(trainer.fingerprint()['processes'])
    assert found == [1, '4 × 48']

def test_a_loss_of_ones_own_is_used_with_chunks_and_without(store, cpu):
    class Shifted(Trainer):
        def compute_loss(self, scores, assignments): return super().compute_loss(scores, assignments) + 5
    data = TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32))
    batch = collate([data[sample] for sample in range(8)])
    def loss(kind, accumulate):
        torch.manual_seed(0)
        settings = replace(SETTINGS, batch_size=8, accumulate=accumulate)
        trainer = kind('flow', Stream('small', 6, 8, {'width': 4}), settings, data, cpu)
        metrics = trainer.create_metrics()
        trainer.step(batch, 1, metrics)
        return metrics.loss.item()
    for accumulate in (1, 2): assert abs(loss(Shifted, accumulate) - loss(Trainer, accumulate) - 5) < 1e-4
