"Batches laid out by the kernel against plain PyTorch: on the CPU through Triton's interpreter, compiled without a GPU, and on a GPU where there is one."
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import vicc.data
from vicc.augment import colour_jitter, colour_jitter_plainly, working_kernel
from vicc.data import ClipBatch, lay_out, lay_out_plainly

triton = pytest.importorskip('triton')
import vicc.fast.kernels  # noqa: E402

ROOT = Path(__file__).parents[1]
SIZES = [[(6, 10)], [(2, 2), (34, 6), (8, 70)], [(16, 16)]*3, [(2, 98), (50, 2)], [(120, 160), (96, 128), (118, 30), (30, 158)]]


def packed(seed, sizes, channels, frames, gap=0):
    "Random bytes, and where clips of these sizes begin."
    rows, start = [], gap
    for height, width in sizes:
        size = height*width*2 if channels == 2 else height*width*3//2
        rows.append((start, (frames, size), (height, width)))
        start += frames*size + gap
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, start, np.uint8)), rows


def jitters(shape, spread):
    "Pictures, half of them greys and pure colours, an order for each and factors."
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    images[::2] = (2*images[::2]).round()/2
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(shape[0])])
    return images, order, 1 - torch.tensor([0., 0., 0., 1.]) + spread*(torch.rand(shape[0], 4, generator=generator) - .5)*torch.tensor([1., 1., 1., .5])


INTERPRETED = '''
import sys
import torch
sys.path.insert(0, 'tests')
from test_data_gpu import SIZES, jitters, packed
from vicc.augment import colour_jitter_plainly
from vicc.data import ClipBatch, lay_out_plainly
from vicc.fast.kernels import CHECKS, fused_jitter, fused_lay_out, interpreted
assert interpreted() and all(agrees(torch.device('cpu')) for agrees in CHECKS.values())
for channels in (2, 3):
    for seed, sizes in enumerate(SIZES):
        for frames, gap in ((1, 0), (5, 3)):
            data, rows = packed(seed, sizes, channels, frames, gap)
            got, expected = fused_lay_out(data, rows, channels), lay_out_plainly(data, rows, channels)
            assert got.shape == expected.shape and got.dtype == torch.uint8 and torch.equal(got, expected), (channels, sizes, frames)
    data, rows = packed(9, [(8, 6), (4, 12), (10, 2)], channels, 2)
    batch = ClipBatch(data, rows, [[0, 0], [1, 2], [2, 2]], channels)  # pairs that see one clip beside one that sees two
    for view in range(2):
        seen = [rows[pair[view]] for pair in batch.seen]
        assert torch.equal(fused_lay_out(data, seen, channels), batch[:, view])
    assert torch.equal(fused_lay_out(data[16:], [(0, *rows[1][1:])], channels), lay_out_plainly(data[16:], [(0, *rows[1][1:])], channels))  # a view into memory
odd = packed(0, [(5, 7), (3, 3)], 2, 2)
assert torch.equal(fused_lay_out(*odd, 2), lay_out_plainly(*odd, 2))  # flow has no half planes
for shape in ((5, 3, 2, 1, 1), (5, 3, 1, 70, 66), (5, 3, 3, 16, 16)):
    chosen = jitters(shape, 2.)
    assert (fused_jitter(*chosen) - colour_jitter_plainly(*chosen)).abs().max() < 5e-6, shape
images, order, factors = jitters((5, 3, 2, 8, 8), .8)
strided = images.transpose(3, 4)
assert torch.allclose(fused_jitter(strided, order, factors), colour_jitter_plainly(strided, order, factors), atol=2e-6)
'''


def test_kernel_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    ran = subprocess.run([sys.executable, '-c', INTERPRETED], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    if 'only 0-dimensional arrays' in ran.stderr: pytest.skip("the interpreter of this Triton does not work with this NumPy (3.6 and older with 2.4 and newer)")
    assert ran.returncode == 0, ran.stderr


COMPILED = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vicc.fast.kernels import jitter_kernel, lay_out_kernel
layout = {'data': '*u8', 'facts': '*i64', 'pixels': '*u8', 'T': 'i32', 'H': 'i32', 'W': 'i32', 'C': 'constexpr', 'BLOCK': 'constexpr'}
jitter = {'images': '*fp32', 'order': '*i64', 'factors': '*fp32', 'out': '*fp32', 'T': 'i32', 'P': 'i32', 'BLOCK': 'constexpr'}
for kernel, names, fixed in ((lay_out_kernel, layout, {(6,): 2, (7,): 1024}), (lay_out_kernel, layout, {(6,): 3, (7,): 1024}), (jitter_kernel, jitter, {(6,): 1024})):
    print(triton.compile(ASTSource(fn=kernel, signature=names, constexprs=fixed), target=GPUTarget('cuda', 90, 32), options={'num_warps': 8}).asm['ptx'])
'''


@pytest.mark.skipif(tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3), reason='compiling without a GPU is written otherwise in this Triton')
def test_kernels_compile_for_a_gpu_and_shifts_keep_the_sign(tmp_path):
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'}
    ran = subprocess.run([sys.executable, '-c', COMPILED], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    if 'ptxas' in ran.stderr: pytest.skip('no assembler beside this Triton')
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count('.visible .entry') == 3
    assert set(re.findall(r'(shr\.\w+)[^;]*, 16;', ran.stdout)) == {'shr.s32'}


def test_the_cpu_keeps_the_plain_way():
    data, rows = packed(0, [(6, 10), (8, 4)], 3, 2)
    assert torch.equal(lay_out(data, rows, 3), lay_out_plainly(data, rows, 3)) and lay_out(data, rows, 3).is_contiguous()
    with pytest.raises(ValueError, match='computes on a CUDA device'): vicc.fast.kernels.fused_lay_out(data, rows, 3)
    chosen = jitters((3, 3, 2, 8, 8), .8)
    assert torch.equal(colour_jitter(*chosen), colour_jitter_plainly(*chosen))
    with pytest.raises(ValueError, match='computes on a CUDA device'): vicc.fast.kernels.fused_jitter(*chosen)


@pytest.mark.parametrize('error, told', [(ImportError('no triton'), None), (RuntimeError('Failed to find C compiler.\nmore'), r'does not work on cuda:0 \(Failed to find C compiler\.\)'), (False, 'not that of PyTorch')])
def test_a_kernel_that_does_not_work_is_left_alone(monkeypatch, error, told):
    def agrees(device):
        if error: raise error
        return False
    monkeypatch.setitem(vicc.fast.kernels.CHECKS, 'fused_lay_out', agrees)
    working_kernel.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2): assert working_kernel('fused_lay_out', torch.device('cuda:0')) is None
    working_kernel.cache_clear()
    assert len(caught) == (told is not None) and (told is None or re.search(told, str(caught[0].message)))


def test_clips_of_pixels_never_reach_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(vicc.data, 'working_kernel', lambda name, device: asked.append(name) or (lambda *arguments: 'kernel'))
    monkeypatch.setattr(vicc.data, 'lay_out_plainly', lambda *arguments: 'plain')
    class OnGpu: device = torch.device('cuda:0')
    planes, pixels = (0, (2, 96), (8, 8)), (192, (2, 8, 8, 3), (8, 8))
    assert lay_out(OnGpu, [planes, planes], 3) == 'kernel' and len(asked) == 1
    assert lay_out(OnGpu, [planes, pixels], 3) == lay_out(OnGpu, [pixels], 3) == 'plain' and len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize('channels', [2, 3])
@pytest.mark.parametrize('sizes', SIZES + [[(240, 320)]*4])
def test_gpu_and_cpu_agree(channels, sizes):
    working_kernel.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for frames, gap in ((1, 0), (7, 3)):
            data, rows = packed(0, sizes, channels, frames, gap)
            batch = ClipBatch(data, rows, [[number, (number + 1) % len(rows)] for number in range(len(rows))], channels)
            moved = batch.pin_memory().to('cuda', non_blocking=True)
            for view in range(2): assert torch.equal(moved[:, view].cpu(), batch[:, view])
    assert working_kernel('fused_lay_out', torch.device('cuda', torch.cuda.current_device())) is not None


@pytest.mark.gpu
@pytest.mark.parametrize('shape', [(5, 3, 2, 1, 1), (9, 3, 4, 128, 128), (5, 3, 3, 70, 66)])
def test_colours_on_the_gpu_are_those_of_the_cpu(shape):
    working_kernel.cache_clear()
    chosen = jitters(shape, .8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (colour_jitter(*(part.cuda() for part in chosen)).cpu() - colour_jitter_plainly(*chosen)).abs().max() < 5e-6
    assert working_kernel('fused_jitter', torch.device('cuda', torch.cuda.current_device())) is not None


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    data, rows = packed(0, [(64, 80), (32, 40)], 3, 4)
    data, chosen = data.cuda(), [part.cuda() for part in jitters((5, 3, 2, 16, 16), .8)]
    lay_out(data, rows, 3), colour_jitter(*chosen)  # tried and compiled
    torch.cuda.set_sync_debug_mode('error')
    try: lay_out(data, rows, 3), colour_jitter(*chosen)
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.gpu
def test_a_block_beyond_two_gib():
    if torch.cuda.mem_get_info()[0] < 8*2**30: pytest.skip('too little memory')
    data, rows = packed(0, [(64, 80)], 3, 4)
    far = 2**31 + 12345
    block = torch.zeros(far + len(data), dtype=torch.uint8, device='cuda')
    block[far:] = data.cuda()
    assert torch.equal(lay_out(block, [(far, *rows[0][1:])], 3).cpu(), lay_out(data, rows, 3))
    rows = [(0, (3000, 480*640*3//2), (480, 640))]  # 2.8 GB of pixels
    assert torch.equal(lay_out(block.new_full((3000*480*640*3//2,), 128), rows, 3)[0, ::999].cpu(), torch.full((4, 480, 640, 3), 130, dtype=torch.uint8))  # every colour sample is neutral
