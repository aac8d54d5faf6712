"What several test files need: the golden weights, the demo's recipe and a small store, and a way to break a training off."
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from vicc.recipe import Recipe

from vicc.engine.io import find_project
from vicc.prepare import Store, prepare
from vicc.synthetic import make_moving_shapes

GOLDEN = Path(os.environ.get('VICC_GOLDEN') or Path(__file__).parent/'golden')  # numbers computed with the released code
DEMO = Recipe.read(find_project(__file__)/'nbs'/'recipes'/'demo.yaml')

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
