"""TV-L1 in Triton against TV-L1 in PyTorch: on the CPU through Triton's interpreter (small and few), on a GPU where
there is one."""
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vicc import flow as vf

pytest.importorskip('triton')
ROOT = Path(__file__).parents[3]


def texture(seed, height, width, smooth=1.5):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32), (0, 0), smooth)
    return (255*(noise - noise.min())/np.ptp(noise)).round().astype(np.uint8)


def moving(height, width, motions):
    "Pairs [N, H, W] of textures, each with a motion (x, y) of its own."
    pairs = []
    for seed, (dx, dy) in enumerate(motions):
        big = texture(seed, height + 24, width + 24)
        pairs.append([big[12 - oy:12 - oy + height, 12 - ox:12 - ox + width] for ox, oy in ((0, 0), (dx, dy))])
    return [np.stack(frames) for frames in zip(*pairs)]


INTERPRETED = '''
import numpy as np, torch
from vicc.fast.tvl1 import INTERPRETED, TVL1Settings, fused_level, tvl1_level
assert INTERPRETED
rng = torch.Generator().manual_seed(0)
I0, I1 = (255*torch.nn.functional.avg_pool2d(torch.rand(2, 1, 21, 38, generator=rng), 3, 1, 1) for _ in range(2))
u = 0.5*torch.randn(2, 2, 21, 38, generator=rng)
for settings in (dict(check_every=3, inner_iterations=7), dict(check_every=1, inner_iterations=2),
                 dict(epsilon=0., tau=0.1, lambda_=0.05, theta=0.5, inner_iterations=6)):
    s = TVL1Settings(warps=1, outer_iterations=1, **settings)
    expected, got = tvl1_level(I0, I1, u, s), fused_level(I0, I1, u, s)
    distance = (got - expected).norm(dim=1)
    assert distance.median() < 1e-3 and distance.mean() < 2e-3, (settings, distance.median(), distance.mean())
'''


def test_kernels_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    ran = subprocess.run([sys.executable, '-c', INTERPRETED], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    if 'only 0-dimensional arrays' in ran.stderr:
        pytest.skip('the interpreter of Triton 3.6 and older does not work with NumPy 2.4 and newer')
    assert ran.returncode == 0, ran.stderr


COMPILED = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vicc.fast.tvl1 import TILE, iterate_kernel, median_kernel, warp_kernel
types = dict.fromkeys(('side', 'alive', 'side_next', 'alive_next'), '*i32') | dict(p='*fp16', gradient='*fp16')
types |= dict.fromkeys(('N', 'H', 'W', 'tiles', 'steps'), 'i32')
types |= dict.fromkeys(('limit', 'theta', 'step', 'threshold'), 'fp32')
fixed = TILE | dict(K=5, TILES=256, BLOCK=256)
cases = [(median_kernel, {}), (warp_kernel, {})]
cases += [(iterate_kernel, dict(FIRST=first, MEDIAN=median)) for first, median in ((True, True), (False, True), (False, False))]
for kernel, own in cases:
    values = fixed | own
    names = {name: 'constexpr' if name in values else types.get(name, '*fp32') for name in kernel.arg_names}
    constants = {(number,): values[name] for number, name in enumerate(kernel.arg_names) if name in values}
    source = ASTSource(fn=kernel, signature=names, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=8, maxnreg=128))
    print(compiled.asm['ptx'])
'''


def test_kernels_compile_for_a_gpu(tmp_path):
    "Without one: for an H100."
    environment = dict(os.environ, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    ran = subprocess.run([sys.executable, '-c', COMPILED], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    if 'ptxas' in ran.stderr: pytest.skip('no assembler beside this Triton')
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count('.visible .entry') == 5 and 'shfl.sync' in ran.stdout


@pytest.mark.gpu
@pytest.mark.parametrize('size', [(240, 320), (101, 75), (16, 300)])
def test_triton_and_torch_agree(size):
    frames = moving(*size, [(1, 2), (0, 0), (3, -1), (6, 2)])
    plain, fused = (vf.tvl1(*frames, backend=backend, device='cuda') for backend in ('torch', 'triton'))
    assert np.median(vf.end_point_error(fused, plain)) < 1e-3
    assert np.abs(fused[1]).max() < 1e-3


@pytest.mark.gpu
def test_a_pair_does_not_depend_on_its_batch_and_repeats_exactly():
    frames = moving(120, 160, [(1, 2), (0, 0), (3, -1), (7, 7), (11, 0)])
    together = vf.tvl1(*frames, device='cuda')
    assert np.array_equal(together, vf.tvl1(*frames, device='cuda'))
    assert np.array_equal(together, vf.tvl1(*frames, device='cuda', pairs_at_once=2))


@pytest.mark.gpu
@pytest.mark.skipif(not vf.opencv_has_tvl1(), reason='OpenCV without contrib modules')
def test_agrees_with_opencv():
    frames = moving(240, 320, [(1, 2), (3, -1)])
    distance = vf.end_point_error(vf.tvl1(*frames, device='cuda'), vf.tvl1(*frames, backend='opencv'))
    assert np.median(distance) <= 0.08 and distance.mean() <= 0.25


@pytest.mark.gpu
def test_memory_does_not_grow_with_length():
    peaks = []
    for pairs in (64, 256):
        frames = [torch.from_numpy(np.repeat(frame, pairs, axis=0)) for frame in moving(120, 160, [(1, 2)])]
        torch.cuda.reset_peak_memory_stats()
        vf.tvl1(*frames, device='cuda', pairs_at_once=32)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.2*peaks[0]
