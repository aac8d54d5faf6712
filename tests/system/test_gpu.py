"A whole small alternation on a GPU in bf16, compiled, broken off in the middle of a taught stage and gone on with."
import warnings

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from helpers import DEMO, Unplugged, shapes_store
from vicc.alternation import alternate
from vicc.trainer import Trainer



@pytest.mark.gpu
@pytest.mark.timeout(400)
def test_an_alternation_goes_on_where_it_was(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    store = shapes_store(tmp_path)
    recipe = DEMO.replace(mixed_precision='bf16', compile=True, single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=2, cycles=1, cross_freeze_prototypes=0, single_batch_size=4, cross_batch_size=4, single_schedule_epochs=0,
                     cross_schedule_epochs=0, queue_length=8, single_queue_start_rgb=0, single_queue_start_flow=0, cross_queue_start=0, online_every=0, save_every_steps=1)
    whole = alternate(recipe, store, tmp_path/'whole', accelerator=Accelerator(mixed_precision='bf16'), log=lambda line: None)
    step, seen = Trainer.step, []
    def breaks(self, batch, epoch, metrics):
        seen.append(1)
        if len(seen) == 15: raise Unplugged
        step(self, batch, epoch, metrics)
    monkeypatch.setattr(Trainer, 'step', breaks)
    with pytest.raises(Unplugged): alternate(recipe, store, tmp_path/'broken', accelerator=Accelerator(mixed_precision='bf16'), log=lambda line: None)
    monkeypatch.undo()
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = alternate(recipe, store, tmp_path/'broken', accelerator=Accelerator(mixed_precision='bf16'), log=lines.append)
    assert any('going on after' in line for line in lines)
    assert again[['stage', 'epoch']].equals(whole[['stage', 'epoch']]) and len(whole) == 6
    assert again.loss.to_numpy() == pytest.approx(whole.loss.to_numpy(), rel=.2)  # a GPU adds up in another order every time, and few samples make small differences grow
