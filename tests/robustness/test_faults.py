"Faults of the inside of a training (tests/robustness/faults.py) without its command line: what is said, what stays on disk, and where the run ends that goes on."
import re
import time

import pandas as pd
import pytest
import torch
from accelerate import Accelerator

import faults
from helpers import DEMO, assert_same
from vicc.engine.io import find_project
from vicc.augment import ViewSettings
from vicc.engine.checkpoint import checkpoint_folders, verify
from vicc.data import TwoStreamDataset
from vicc.prepare import prepare
from vicc.trainer import StageConfig, Trainer, train_stage
from vicc.streams import Stream
from vicc.synthetic import make_moving_shapes
from vicc.engine.fit import TIMING, RunConfig

SETTINGS = StageConfig(epochs=2, schedule_epochs=None, batch_size=2, optimizer='adamw', learning_rate=.003, final_learning_rate=1e-3, freeze_prototypes_epochs=0, queue_length=8, queue_start_epoch=0)
RESULTS = find_project(__file__)/'nbs'/'results'

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('shapes')
    made = make_moving_shapes(folder/'shapes', 8, 8, threads=1)
    return prepare(made['train'], made['videos'], folder/'store', DEMO.prepare_settings(), workers=0, log=lambda line: None)

def train(store, folder, cache_gib=1., lines=None):
    data = TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32), cache_gib=cache_gib)
    torch.manual_seed(0)
    stream = Stream('small', 6, 8, {'width': 4})
    history = train_stage('flow-1', 'flow', stream, data, SETTINGS, folder, accelerator=Accelerator(cpu=True), log=(lines if lines is not None else []).append, run_config=RunConfig(save_every_steps=1))
    return stream.state_dict(), history.drop(columns=list(TIMING))

@pytest.fixture(scope='module')
def unbroken(store, tmp_path_factory): return train(store, tmp_path_factory.mktemp('unbroken'))

def before_step(monkeypatch, at, act):
    "Do something before a step, counted from 1."
    real, seen = Trainer.step, []
    def step(self, *arguments):
        seen.append(1)
        if len(seen) == at: act()
        real(self, *arguments)
    monkeypatch.setattr(Trainer, 'step', step)

@pytest.mark.parametrize('name, message', [('loss', 'lower the learning rate.*last good checkpoint'), ('memory', 'too little memory: lower batch_size .2.*raise accumulate')])
def test_ends_with_advice_and_goes_on(store, tmp_path, unbroken, monkeypatch, name, message):
    before_step(monkeypatch, 6, faults.INSIDE[name])
    with pytest.raises(ValueError, match=message): train(store, tmp_path)
    assert [place.name for place in checkpoint_folders(tmp_path) if verify(place) is None] == ['step-000000005', 'step-000000004']
    monkeypatch.undo()
    assert_same(unbroken, train(store, tmp_path))

def test_the_clock_does_not_matter(store, tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(time, 'time', time.time)  # put back at the end
    before_step(monkeypatch, 5, faults.INSIDE['back'])
    assert_same(unbroken, train(store, tmp_path))

def test_a_removed_file_of_the_store_is_named_and_replaced(store, tmp_path, monkeypatch):
    file = store.file(store.manifest.video[3], 'flow')
    content, lines = file.read_bytes(), []
    before_step(monkeypatch, 4, file.unlink)
    try: train(store, tmp_path, 0., lines)
    finally: file.write_bytes(content)
    assert [line for line in lines if re.search(f'epoch 2: .*{file.stem}', line)], lines

def test_the_stored_table_has_every_fault_and_the_notebook_shows_it():
    table = pd.read_csv(RESULTS/'faults.csv', keep_default_na=False)
    assert table.fault.tolist() == list(faults.FAULTS)
    text = (RESULTS/'faults.ipynb').read_text(encoding='utf-8')
    assert all(name in text for name in table.fault)
