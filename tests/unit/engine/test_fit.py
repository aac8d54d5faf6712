"What a run tells while it goes on, and when it gives up: NaN, collapse, too little memory, missing packages."
import math
import shutil
import sys
import types
from dataclasses import replace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from helpers import DEMO, FLOW_STAGE as SETTINGS, shapes_store, train_flow as train
from vicc.alternation import alternate
from vicc.engine.checkpoint import checkpoint_folders
from vicc.prepare import Store
from vicc.trainer import Trainer
from vicc.streams import Stream
from vicc.engine.fit import MetricLogger, RunConfig, dataset_fingerprint

TINY = DEMO.replace(single_epochs_rgb=2, single_epochs_flow=1, cycles=0, single_batch_size=4, num_prototypes=6, projection_dim=8, backbone_options={'width': 4})

@pytest.fixture(scope='module')
def store(tmp_path_factory): return shapes_store(tmp_path_factory.mktemp('shapes'))

@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)

def test_a_line_and_a_row_an_epoch(store, cpu, tmp_path):
    lines = []
    history = train(store, cpu, tmp_path, lines=lines)
    assert len(lines) == 3
    for words in ('loss ', '(ln K 1.792, floor ', 'prototypes ', '/6', 'agreement ', 'samples/s', 'wait '): assert words in lines[0]
    assert 'GiB' not in lines[0] and history.gpu_gib.isna().all()  # no GPU, no memory of it
    assert ((history.wait > 0) & (history.wait < 1)).all() and (history.samples_per_second > 0).all()

def test_a_file_that_cannot_be_read_is_in_the_log(store, cpu, tmp_path, capsys):
    shutil.copytree(store.path, tmp_path/'store')
    spoiled = Store(tmp_path/'store')
    video = spoiled.manifest.video[3]
    spoiled.file(video, 'flow').write_bytes(b'')
    lines = []
    train(spoiled, cpu, tmp_path/'run', replace(SETTINGS, epochs=1), lines)
    assert lines[0].startswith('flow-1: epoch 1: 1 video(s) could not be read, and others took their place: ') and video in lines[0]
    assert len(lines) == 2 and 'loss ' in lines[1] and not capsys.readouterr().out

def test_nan_stops_at_the_next_look(store, cpu, tmp_path, monkeypatch):
    step, seen = Trainer.step, []
    def spoiled(self, batch, epoch, metrics):
        seen.append(epoch)
        if len(seen) == 6: self.stream.head[0].weight.data[0, 0] = math.nan
        step(self, batch, epoch, metrics)
    monkeypatch.setattr(Trainer, 'step', spoiled)
    with pytest.raises(ValueError, match='the loss or a weight of epoch 2 is infinite or not a number: lower the learning rate .0.001'): train(store, cpu, tmp_path, run_config=RunConfig(check_every=2))
    assert len(seen) == 6
    assert [path.name for path in checkpoint_folders(tmp_path)] == ['step-000000004']  # nothing was saved since
    seen.clear()
    with pytest.raises(ValueError, match="the loss or a weight of epoch 3"): train(store, cpu, tmp_path)  # goes on from the good one; looks only at the end of the epoch
    assert len(seen) == 8

def test_a_bad_loss_is_never_saved(store, cpu, tmp_path, monkeypatch):
    step, seen = Trainer.step, []
    def spoiled(self, batch, epoch, metrics):
        step(self, batch, epoch, metrics)
        seen.append(epoch)
        if len(seen) == 3: metrics.loss += math.inf
    monkeypatch.setattr(Trainer, 'step', spoiled)
    with pytest.raises(ValueError, match='infinite or not a number'): train(store, cpu, tmp_path, run_config=RunConfig(save_every_steps=1))
    assert [path.name for path in checkpoint_folders(tmp_path)] == ['step-000000002', 'step-000000001']

def test_the_device_is_not_asked_at_every_step(store, cpu, tmp_path, monkeypatch):
    import vicc.engine.fit
    asked = []
    def ask(accelerator, *answers):
        asked.append(len(answers))
        return [False]*len(answers)
    monkeypatch.setattr(vicc.engine.fit, 'any_process', ask)
    train(store, cpu, tmp_path, run_config=RunConfig(check_every=3))
    assert asked == [2, 2]*3  # once after the third of four steps, and at the end of an epoch, before it is saved

def test_a_bad_run_goes_on_with_another_learning_rate_if_that_is_accepted(store, cpu, tmp_path, monkeypatch):
    step, run = Trainer.step, dict(store=store, folder=tmp_path/'run', accelerator=cpu, log=lambda line: None)
    def spoiled(self, batch, epoch, metrics):
        step(self, batch, epoch, metrics)
        if epoch == 1 and self.settings.learning_rate > 2e-4: metrics.loss += math.inf
    monkeypatch.setattr(Trainer, 'step', spoiled)
    with pytest.raises(ValueError, match='the loss or a weight of epoch 2 .*With accept_changes the same folder goes on'): alternate(TINY, **run)
    gentle = TINY.replace(single_learning_rate=1e-4, weight_decay=.5)
    with pytest.raises(ValueError, match='single_learning_rate is 0.0003, not 0.0001.*go on with the new values on purpose: accept_changes'): alternate(gentle, **run)
    with pytest.raises(ValueError, match='num_prototypes is 6, not 7.*choose another folder$'): alternate(TINY.replace(num_prototypes=7), **run, accept_changes=True)
    history = alternate(gentle, **run, accept_changes=True)
    assert len(history) == 3 and history.learning_rate[0] > 1e-4 > history.learning_rate[1]  # the first epoch is from before
    changes = pd.read_csv(tmp_path/'run'/'changes.csv')
    assert changes[['name', 'was', 'is']].astype(str).values.tolist() == [['weight_decay', '1e-05', '0.5'], ['single_learning_rate', '0.0003', '0.0001']]
    assert len(alternate(gentle, **run)) == 3 and len(pd.read_csv(tmp_path/'run'/'changes.csv')) == 2  # the new recipe is the run's own

def test_collapse_stops_after_patience_and_can_go_on(store, cpu, tmp_path, monkeypatch):
    import vicc.engine.fit
    monkeypatch.setattr(vicc.engine.fit, 'is_collapsed', lambda row: row['epoch'] > 1)
    settings = replace(SETTINGS, epochs=6)
    with pytest.raises(ValueError, match='collapsed for 2 epochs .*Lower the learning rate.*patience=0 goes on'): train(store, cpu, tmp_path, settings, run_config=RunConfig(patience=2))
    lines = []
    assert len(train(store, cpu, tmp_path, settings, lines)) == 6
    assert lines[0] == 'flow-1: going on after epoch 3 of 6'

def test_a_stream_without_learning_is_a_collapse(store, cpu, tmp_path, monkeypatch):
    "All clips at one point: every prototype gets the same score."
    monkeypatch.setattr(Stream, 'embed', lambda self, clips: torch.nn.functional.normalize(self.head[0].weight[:1, :8].expand(len(clips), 8), dim=1))
    with pytest.raises(ValueError, match='collapsed for 2 epochs'): train(store, cpu, tmp_path, run_config=RunConfig(patience=2))

def test_out_of_memory_names_what_can_be_smaller(store, cpu, tmp_path, monkeypatch):
    def full(self, batch, epoch, metrics): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nmore')
    monkeypatch.setattr(Trainer, 'step', full)
    with pytest.raises(ValueError, match=r'lower batch_size .4., clip_length .8 frames. or view_size .32 pixels., or raise accumulate .2., which.*Tried to allocate 2.00 GiB'): train(store, cpu, tmp_path, replace(SETTINGS, accumulate=2))

def test_log_and_tensorboard(store, cpu, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = alternate(TINY.replace(tensorboard=True), store, tmp_path/'run', accelerator=cpu, log=lambda line: None)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'run'/'log.csv', float_precision='round_trip'), history)
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard'))
    events.Reload()
    scalars = events.Tags()['scalars']
    assert {f'rgb-1/{name}' for name in ('loss', 'ln_k', 'prototypes_in_use', 'assignment_entropy', 'agreement', 'samples_per_second', 'wait')} <= set(scalars) and 'rgb-1/gpu_gib' not in scalars
    assert [event.value for event in events.Scalars('rgb-1/loss')] == pytest.approx(history.loss[:2].tolist()) and [event.step for event in events.Scalars('flow-1/loss')] == [3]

def test_the_curves_go_on_after_a_kill(store, cpu, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    recipe, real, run = TINY.replace(tensorboard=True, single_epochs_rgb=3), MetricLogger.log, dict(store=store, folder=tmp_path/'run', accelerator=cpu, log=lambda line: None)
    def killed(self, history):
        real(self, history)
        if len(history) == 2: raise KeyboardInterrupt  # the second epoch is written
    monkeypatch.setattr(MetricLogger, 'log', killed)
    with pytest.raises(KeyboardInterrupt): alternate(recipe, **run)
    monkeypatch.undo()
    history = alternate(recipe, **run)
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard'))
    events.Reload()
    assert [event.step for event in events.Scalars('rgb-1/loss')] == [1, 2, 3]
    assert [event.value for event in events.Scalars('rgb-1/loss')] == pytest.approx(history.loss[:3].tolist())

def test_wandb_only_if_asked_for(store, cpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    alternate(TINY, store, tmp_path/'without', accelerator=cpu, log=lambda line: None)
    with pytest.raises(ValueError, match='wandb: true needs a package that is not installed: pip install wandb'): alternate(TINY.replace(wandb=True), store, tmp_path/'with', accelerator=cpu)
    assert not (tmp_path/'with').exists()
    rows, begun = [], []
    run = types.SimpleNamespace(log=lambda numbers, step: rows.append((step, numbers)), finish=lambda: rows.append('finished'))
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **values: begun.append(values) or run, __spec__='there'))
    alternate(TINY.replace(wandb=True), store, tmp_path/'with', accelerator=cpu, log=lambda line: None)
    assert len(begun) == 1 and begun[0]['config']['num_prototypes'] == 6
    assert [row[0] for row in rows[:-1]] == [1, 2, 3] and 'rgb-1/loss' in rows[0][1] and rows[-1] == 'finished'

def test_a_data_set_is_its_videos_in_any_order():
    rows = pd.DataFrame(dict(video=['a', 'b'], label=[0, 1]))
    assert dataset_fingerprint(rows) == dataset_fingerprint(rows[::-1])
    assert dataset_fingerprint(rows) not in (dataset_fingerprint(rows[:1]), dataset_fingerprint(rows, 'label'))
