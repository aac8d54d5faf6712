"What several test files need: golden weights, the demo's recipe, a small store and a training on it, noise and views of it, and a way to break a training off."
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import default_collate

from vicc.augment import ViewSettings, random_view_params
from vicc.data import TwoStreamDataset
from vicc.engine.io import find_project
from vicc.fast.views import color_jitter, gaussian_blur, single_channel
from vicc.prepare import Store, prepare
from vicc.recipe import Recipe
from vicc.streams import Stream
from vicc.synthetic import make_moving_shapes
from vicc.trainer import StageConfig, train_stage

GOLDEN = Path(os.environ.get('VICC_GOLDEN') or Path(__file__).parent/'golden')  # numbers computed with the released code
DEMO = Recipe.read(find_project(__file__)/'nbs'/'recipes'/'demo.yaml')

FLOW_STAGE = StageConfig(epochs=3, schedule_epochs=None, batch_size=4, optimizer='adamw', learning_rate=1e-3, final_learning_rate=1e-5, queue_length=0)
STRONG = ViewSettings(size=24, flip=.5, jitter=1., grey=.5, blur=1.)

def shapes_store(folder: Path) -> Store:
    "Sixteen moving shapes, prepared as the demo does it."
    torch.set_num_threads(1)
    made = make_moving_shapes(folder/'shapes', 16, 8, threads=1)
    return prepare(made['train'], made['videos'], folder/'store', DEMO.prepare_settings(), workers=0, log=lambda line: None)

def golden_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    "Weights that depend on the released key name alone, as they were when the golden features were recorded (the rule of tests/golden)."
    weights = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith('num_batches_tracked'): weights[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith('running_var'): weights[name] = 0.5 + torch.rand(shape, generator=generator)
        elif name.endswith('running_mean'): weights[name] = 0.1*torch.randn(shape, generator=generator)
        elif len(shape) >= 2:
            weights[name] = torch.randn(shape, generator=generator)
            weights[name] *= (2/weights[name][0].numel())**0.5
        else: weights[name] = float(name.endswith('weight')) + 0.1*torch.randn(shape, generator=generator)
    return weights

class Unplugged(Exception): pass

def unplug(frames: Any, stop_at: int) -> None:
    "Make a data set's frames fail when a video is read for the time of this number, as if someone had pulled the plug."
    clips, seen = frames.clips, []
    def fails(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == stop_at: raise Unplugged
        return clips(*arguments)
    frames.clips = fails

def assert_same(one: tuple, two: tuple) -> None:
    "Two trainings, each its weights by name and its history, are the same to the last bit."
    assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())
    assert one[1].equals(two[1])

def train_flow(store: Store, accelerator: Accelerator, folder: Path, settings: StageConfig = FLOW_STAGE, lines: list | None = None, **values: Any) -> pd.DataFrame:
    "Train a small flow stream alone, or go on with it: the history. `lines` gets the log."
    torch.manual_seed(0)
    data, stream = TwoStreamDataset(store, None, ('flow',), 8, views=ViewSettings(size=32)), Stream('small', 6, 8, {'width': 4})
    return train_stage('flow-1', 'flow', stream, data, settings, folder, accelerator=accelerator, log=(lines if lines is not None else []).append, **values)

def random_clips(*shape: int, seed: int = 0) -> Tensor:
    "Noise, uint8."
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

def views_of(settings: ViewSettings, batch: int, height: int, width: int, strong: bool = True, seed: int = 0) -> dict[str, Tensor]:
    "Choices of a view for each of some clips of one size."
    rng = np.random.default_rng(seed)
    return default_collate([random_view_params(settings, height, width, strong, rng) for _ in range(batch)])

def every_color_op(images: Tensor, view: dict[str, Tensor]) -> Tensor:
    "All that a strong view does to colours, one after the other."
    images = single_channel(color_jitter(images, view['order'], view['factors']), view['grey'])
    return gaussian_blur(images, view['sigma'])
