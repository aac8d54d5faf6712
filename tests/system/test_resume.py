"Killed, asked to end, damaged: a training goes on from what is on disk and ends as if nothing had been."
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from helpers import Unplugged, assert_same, shapes_store, unplug
from kill_training import differences, kill_training, prepare_run, start, steps_seen
from vicc.augment import ViewSettings
from vicc.engine.checkpoint import checkpoint_folders, rank_files
from vicc.data import TwoStreamDataset
from vicc.engine.distributed import Interrupted
from vicc.trainer import StageConfig, Trainer, train_stage
from vicc.streams import Stream
from vicc.engine.fit import TIMING, RunConfig

SETTINGS = StageConfig(epochs=3, schedule_epochs=None, batch_size=4, optimizer='larc', learning_rate=.3, final_learning_rate=1e-3, freeze_prototypes_epochs=1, queue_length=8, queue_start_epoch=0)
STEPS = 4  # an epoch

@pytest.fixture(scope='module')
def store(tmp_path_factory): return shapes_store(tmp_path_factory.mktemp('shapes'))

class Dropping(Stream):
    "A stream with dropout, so that torch's generator matters."
    def features(self, clips): return torch.nn.functional.dropout(super().features(clips), .3, self.training)

def train(store, folder, stop_at=None, settings=SETTINGS, run_config=RunConfig(save_every_steps=1), lines=None, workers=0, **values):
    data = TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32))
    if stop_at is not None: unplug(data.frames, stop_at)
    torch.manual_seed(0)
    stream = Dropping('small', 6, 8, {'width': 4})
    history = train_stage('flow-1', 'flow', stream, data, settings, folder, accelerator=Accelerator(cpu=True), workers=workers, log=(lines if lines is not None else []).append, run_config=run_config, **values)
    return stream.state_dict(), history.drop(columns=list(TIMING))

@pytest.fixture(scope='module')
def unbroken(store, tmp_path_factory): return train(store, tmp_path_factory.mktemp('unbroken'))

@pytest.mark.parametrize('step', range(1, 3*STEPS))
def test_a_kill_at_every_step(store, tmp_path, unbroken, step):
    with pytest.raises(Unplugged): train(store, tmp_path, 4*step + 2)
    assert rank_files(tmp_path/f'step-{step:09d}')
    lines = []
    assert_same(unbroken, train(store, tmp_path, lines=lines))
    assert f'after epoch {step//STEPS}' in lines[0] and (f'and {step % STEPS} steps' in lines[0]) == (step % STEPS > 0)

def test_saving_within_an_epoch_changes_nothing(store, tmp_path, unbroken):
    assert_same(unbroken, train(store, tmp_path, run_config=RunConfig(check_every=1)))

def test_in_parts_too(store, tmp_path):
    settings = replace(SETTINGS, accumulate=2)
    whole = train(store, tmp_path/'whole', settings=settings)
    with pytest.raises(Unplugged): train(store, tmp_path/'broken', 4*6 + 2, settings)
    assert_same(whole, train(store, tmp_path/'broken', settings=settings))

def damage_newest(folder, how):
    path, = rank_files(checkpoint_folders(folder)[0])
    content = bytearray(path.read_bytes())
    if how == 'flip': content[len(content)//2] ^= 4; path.write_bytes(bytes(content))
    elif how == 'truncate': path.write_bytes(bytes(content[:-5]))
    elif how == 'replace': path.write_text('quota exceeded')
    else: path.unlink()

@pytest.mark.parametrize('how', ['flip', 'truncate', 'replace', 'delete'])
def test_a_damaged_checkpoint_is_left_out(store, tmp_path, unbroken, how):
    with pytest.raises(Unplugged): train(store, tmp_path, 4*6 + 2)
    damage_newest(tmp_path, how)
    lines = []
    warned = pytest.warns(UserWarning, match='step-000000006: .*rank-0-of-1.pt.*the one before is taken')
    with nullcontext() if how == 'delete' else warned: again = train(store, tmp_path, lines=lines)  # deleted: as a kill leaves it
    assert 'after epoch 1 and 1 steps' in lines[0]
    assert_same(unbroken, again)

@pytest.mark.filterwarnings('ignore::UserWarning')
def test_all_damaged_or_of_other_settings(store, tmp_path):
    with pytest.raises(Unplugged): train(store, tmp_path/'a', 4*6 + 2)
    assert len(checkpoint_folders(tmp_path/'a')) == 2
    with pytest.raises(ValueError, match='temperature was 0.1, is 0.2'): train(store, tmp_path/'a', settings=replace(SETTINGS, temperature=.2))
    for folder in checkpoint_folders(tmp_path/'a'): (folder/'rank-0-of-1.pt').write_bytes(b'')
    with pytest.raises(ValueError, match='every checkpoint is damaged .*rank-0-of-1.pt cannot be read'): train(store, tmp_path/'a')

def test_as_many_as_asked(store, tmp_path):
    train(store, tmp_path, run_config=RunConfig(keep_checkpoints=3))
    assert [path.name for path in checkpoint_folders(tmp_path)] == ['step-000000012', 'step-000000008', 'step-000000004']
    assert {path.name for path in tmp_path.rglob('*') if path.is_file()} == {'rank-0-of-1.pt'}  # no half-written file

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end(store, tmp_path, unbroken, number, monkeypatch):
    "The signal comes during a step; the step is finished."
    step, seen = Trainer.step, []
    def slow(self, batch, epoch, metrics):
        seen.append(epoch)
        if len(seen) == 6: os.kill(os.getpid(), number)
        step(self, batch, epoch, metrics)
    monkeypatch.setattr(Trainer, 'step', slow)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match='saved after step 2 of epoch 2. Start the same command again') as stopped:
        train(store, tmp_path, run_config=RunConfig())
    assert stopped.value.code == 143 and len(seen) == 6 and signal.getsignal(number) == before
    monkeypatch.undo()
    assert_same(unbroken, train(store, tmp_path))

@pytest.mark.timeout(300)
def test_command_line_ends_with_143_and_goes_on(tmp_path):
    command = prepare_run(tmp_path, cycles=0, single_epochs_rgb=12, single_epochs_flow=1)
    process = start(command, tmp_path/'run')
    deadline = time.monotonic() + 120
    while steps_seen(tmp_path/'run') < 2 and process.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (tmp_path/'run'/'said.txt').read_text()
    assert 'asked to end by SIGTERM; saved after' in (tmp_path/'run'/'said.txt').read_text()
    assert start(command, tmp_path/'run').wait(120) == 0
    assert 'going on after' in (tmp_path/'run'/'said.txt').read_text()
    assert start(command, tmp_path/'unbroken').wait(120) == 0
    assert differences(tmp_path/'unbroken', tmp_path/'run') == []

@pytest.mark.timeout(400)
def test_two_random_kills(tmp_path):
    table = kill_training(tmp_path, 2, seed=3, cycles=1, single_epochs_rgb=2, single_epochs_flow=1, cross_epochs=1)
    assert table.killed.any() and table.weights_and_log_identical.all(), table.to_string()
