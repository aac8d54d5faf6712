"Kernels against plain PyTorch: in Triton's interpreter, compiled without a GPU, and on a GPU where there is one."
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vicc.fast.planes
import vicc.fast.views
from vicc.fast.planes import PackedClips, unpack_clips_reference
from vicc.fast.views import color_jitter, color_jitter_reference

triton = pytest.importorskip('triton')

ROOT = Path(__file__).parents[3]
SIZES = [[(6, 10)], [(2, 2), (34, 6), (8, 70)], [(16, 16)]*3, [(2, 98), (50, 2)],
         [(120, 160), (96, 128), (118, 30), (30, 158)]]


def packed(seed, sizes, channels, frames, gap=0):
    "Random bytes, and where clips of these sizes begin."
    rows, start = [], gap
    for height, width in sizes:
        size = height*width*2 if channels == 2 else height*width*3//2
        rows.append((start, (frames, size), (height, width)))
        start += frames*size + gap
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, start, np.uint8)), rows


def assemble_clips(data, rows, channels):
    "Pixels of a batch of one view, by the way that its device has."
    return PackedClips(data, rows, [[number] for number in range(len(rows))], channels)[:, 0]


def jitters(shape, spread):
    "Pictures, half of them greys and pure colours, an order for each and factors."
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    images[::2] = (2*images[::2]).round()/2
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(shape[0])])
    noise = spread*(torch.rand(shape[0], 4, generator=generator) - .5)*torch.tensor([1., 1., 1., .5])
    return images, order, torch.tensor([1., 1., 1., 0.]) + noise


def run(program, environment):
    "A program in a process of its own."
    command = [sys.executable, '-c', program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)


INTERPRETED = '''
import sys
import torch
sys.path.insert(0, 'tests/unit/fast')
from test_kernels import SIZES, jitters, packed
from vicc.fast.kernels import fused_unpack_clips, fused_jitter
from vicc.fast.planes import PackedClips, unpack_clips_reference
from vicc.fast.views import color_jitter_reference
for channels in (2, 3):
    for seed, sizes in enumerate(SIZES):
        for frames, gap in ((1, 0), (5, 3)):
            data, rows = packed(seed, sizes, channels, frames, gap)
            got = fused_unpack_clips(data, rows, channels)
            expected = unpack_clips_reference(data, rows, channels)
            assert got.dtype == torch.uint8 and torch.equal(got, expected), (channels, sizes, frames)
    data, rows = packed(9, [(8, 6), (4, 12), (10, 2)], channels, 2)
    batch = PackedClips(data, rows, [[0, 0], [1, 2], [2, 2]], channels)  # one clip, or two
    for view in range(2):
        seen = [rows[pair[view]] for pair in batch.seen]
        assert torch.equal(fused_unpack_clips(data, seen, channels), batch[:, view])
    tail = data[16:], [(0, *rows[1][1:])], channels  # a view into memory
    assert torch.equal(fused_unpack_clips(*tail), unpack_clips_reference(*tail))
odd = *packed(0, [(5, 7), (3, 3)], 2, 2), 2  # flow has no half planes
assert torch.equal(fused_unpack_clips(*odd), unpack_clips_reference(*odd))
for shape in ((5, 3, 2, 1, 1), (5, 3, 1, 70, 66), (5, 3, 3, 16, 16)):
    chosen = jitters(shape, 2.)
    assert (fused_jitter(*chosen) - color_jitter_reference(*chosen)).abs().max() < 5e-6, shape
images, order, factors = jitters((5, 3, 2, 8, 8), .8)
chosen = images.transpose(3, 4), order, factors
assert torch.allclose(fused_jitter(*chosen), color_jitter_reference(*chosen), atol=2e-6)
'''


def test_kernel_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    ran = run(INTERPRETED, environment)
    if 'only 0-dimensional arrays' in ran.stderr:
        pytest.skip('the interpreter of this Triton (3.6 or older) does not work with this NumPy (2.4 or newer)')
    assert ran.returncode == 0, ran.stderr


COMPILED = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vicc.fast.kernels import unpack_kernel, jitter_kernel
layout = {'data': '*u8', 'table': '*i64', 'pixels': '*u8', 'T': 'i32', 'H': 'i32', 'W': 'i32',
          'C': 'constexpr', 'BLOCK': 'constexpr'}
jitter = {'images': '*fp32', 'order': '*i64', 'factors': '*fp32', 'out': '*fp32', 'T': 'i32', 'P': 'i32',
          'BLOCK': 'constexpr'}
kernels = [(unpack_kernel, layout, {(6,): channels, (7,): 1024}) for channels in (2, 3)]
for kernel, names, fixed in [*kernels, (jitter_kernel, jitter, {(6,): 1024})]:
    source = ASTSource(fn=kernel, signature=names, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': 8})
    print(compiled.asm['ptx'])
'''


OLD_TRITON = tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)


@pytest.mark.skipif(OLD_TRITON, reason='compiling without a GPU is written otherwise in this Triton')
def test_kernels_compile_for_a_gpu_and_shifts_keep_the_sign(tmp_path):
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'}
    ran = run(COMPILED, environment)
    if 'ptxas' in ran.stderr: pytest.skip('no assembler beside this Triton')
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count('.visible .entry') == 3
    assert set(re.findall(r'(shr\.\w+)[^;]*, 16;', ran.stdout)) == {'shr.s32'}


def test_the_cpu_keeps_the_plain_way():
    data, rows = packed(0, [(6, 10), (8, 4)], 3, 2)
    assert torch.equal(assemble_clips(data, rows, 3), unpack_clips_reference(data, rows, 3))
    assert assemble_clips(data, rows, 3).is_contiguous()
    chosen = jitters((3, 3, 2, 8, 8), .8)
    assert torch.equal(color_jitter(*chosen), color_jitter_reference(*chosen))


def test_clips_of_pixels_never_reach_the_kernel(monkeypatch):
    monkeypatch.setattr(vicc.fast.planes, 'fused_unpack_clips', lambda *arguments: 'kernel')
    monkeypatch.setattr(vicc.fast.planes, 'unpack_clips_reference', lambda *arguments: 'plain')
    class OnGpu: device = torch.device('cuda:0')
    planes, pixels = (0, (2, 96), (8, 8)), (192, (2, 8, 8, 3), (8, 8))
    assert assemble_clips(OnGpu, [planes, planes], 3) == 'kernel'
    assert assemble_clips(OnGpu, [planes, pixels], 3) == assemble_clips(OnGpu, [pixels], 3) == 'plain'
    monkeypatch.setattr(vicc.fast.planes, 'fused_unpack_clips', None)  # without Triton
    assert assemble_clips(OnGpu, [planes, planes], 3) == 'plain'


@pytest.mark.gpu
@pytest.mark.parametrize('channels', [2, 3])
@pytest.mark.parametrize('sizes', SIZES + [[(240, 320)]*4])
def test_gpu_and_cpu_agree(channels, sizes):
    assert vicc.fast.planes.fused_unpack_clips is not None
    for frames, gap in ((1, 0), (7, 3)):
        data, rows = packed(0, sizes, channels, frames, gap)
        seen = [[number, (number + 1) % len(rows)] for number in range(len(rows))]
        batch = PackedClips(data, rows, seen, channels)
        moved = batch.pin_memory().to('cuda', non_blocking=True)
        for view in range(2): assert torch.equal(moved[:, view].cpu(), batch[:, view])


@pytest.mark.gpu
@pytest.mark.parametrize('shape', [(5, 3, 2, 1, 1), (9, 3, 4, 128, 128), (5, 3, 3, 70, 66)])
def test_colours_on_the_gpu_are_those_of_the_cpu(shape):
    assert vicc.fast.views.fused_jitter is not None
    chosen = jitters(shape, .8)
    on_gpu = color_jitter(*(tensor.cuda() for tensor in chosen)).cpu()
    assert (on_gpu - color_jitter_reference(*chosen)).abs().max() < 5e-6


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    data, rows = packed(0, [(64, 80), (32, 40)], 3, 4)
    data, chosen = data.cuda(), [tensor.cuda() for tensor in jitters((5, 3, 2, 16, 16), .8)]
    assemble_clips(data, rows, 3), color_jitter(*chosen)  # tried and compiled
    torch.cuda.set_sync_debug_mode('error')
    try: assemble_clips(data, rows, 3), color_jitter(*chosen)
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.gpu
def test_a_block_beyond_two_gib():
    if torch.cuda.mem_get_info()[0] < 8*2**30: pytest.skip('too little memory')
    data, rows = packed(0, [(64, 80)], 3, 4)
    far = 2**31 + 12345
    block = torch.zeros(far + len(data), dtype=torch.uint8, device='cuda')
    block[far:] = data.cuda()
    assert torch.equal(assemble_clips(block, [(far, *rows[0][1:])], 3).cpu(), assemble_clips(data, rows, 3))
    rows = [(0, (3000, 480*640*3//2), (480, 640))]  # 2.8 GB of pixels
    pixels = assemble_clips(block.new_full((3000*480*640*3//2,), 128), rows, 3)[0, ::999].cpu()
    assert torch.equal(pixels, torch.full((4, 480, 640, 3), 130, dtype=torch.uint8))  # every colour is neutral
