"""Optical flow: true flow and real video (skipped where the shared data is missing), OpenCV's and PyTorch's TV-L1,
threads, small frames, files."""
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
import torch

from vicc import flow as vf
from vicc.fast.tvl1 import TVL1Settings, median_filter
from vicc.video import read_frames

SHARED = Path(__file__).parents[3] / 'shared'
FLOW = SHARED / 'data' / 'flow'
UCF101 = SHARED / 'data' / 'official_samples' / 'ucf101' / 'SoccerJuggling'
needs_flow = pytest.mark.skipif(not FLOW.is_dir(), reason=f'no true flow: {FLOW} is missing')
needs_video = pytest.mark.skipif(not UCF101.is_dir(), reason=f'no real video: {UCF101} is missing')


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(opencv_threads)
    torch.set_num_threads(threads)


def texture(seed, height, width, smooth=2.5):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32), (0, 0), smooth)
    return (255 * (noise - noise.min()) / (noise.max() - noise.min())).round().astype(np.uint8)


def moving(seed, height, width, dx, dy, margin=12):
    "Two frames [1, H, W] of a texture that moves by (dx, dy) pixels."
    big = texture(seed, height + 2 * margin, width + 2 * margin)
    top, left = margin - dy, margin - dx
    return (big[None, margin:margin + height, margin:margin + width].copy(),
            big[None, top:top + height, left:left + width].copy())


def true_pair(name):
    "Grey frames [1, H, W] twice and true flow [1, 2, H, W]."
    files = [FLOW / 'flyingchairs' / f'{name}-{file}' for file in ('img0.ppm', 'img1.ppm', 'gt.flo')]
    if name == 'rubberwhale':
        files = [FLOW / name / file for file in ('frame10.png', 'frame11.png', 'flow10.flo')]
    # Pillow, since OpenCV cannot read PNG files once a decoder with another zlib is loaded
    frames = [vf.grey(np.asarray(Image.open(file).convert('RGB'))[None]) for file in files[:2]]
    return *frames, cv2.readOpticalFlow(str(files[2])).transpose(2, 0, 1)[None]


def crop(*arrays):
    return [array[..., 60:300, 100:420] for array in arrays]


# Bounds are a third above what was measured: mean and median end-point error in pixels
@needs_flow
@pytest.mark.parametrize('method, mean, median', [(vf.tvl1, 0.23, 0.08), (vf.dis, 0.34, 0.14), (vf.farneback, 0.47, 0.11)])
def test_rubberwhale(method, mean, median):
    previous, following, truth = crop(*true_pair('rubberwhale'))
    error = vf.end_point_error(method(previous, following), truth)
    assert np.nanmean(error) < mean and np.nanmedian(error) < median
    assert np.isnan(error).any()  # RubberWhale has unknown pixels


@needs_flow
@pytest.mark.parametrize('name, method, mean, median', [
    ('0000001', vf.tvl1, 2.1, 0.2), ('0000003', vf.dis, 2.3, 0.15), ('0000003', vf.farneback, 3.0, 0.3),
    ('0000006', vf.dis, 2.5, 0.6)])
def test_flyingchairs(name, method, mean, median):
    previous, following, truth = crop(*true_pair(name))
    error = vf.end_point_error(method(previous, following), truth)
    assert np.nanmean(error) < mean and np.nanmedian(error) < median
    standing_still = vf.end_point_error(np.zeros_like(truth), truth)
    assert np.nanmean(error) < np.nanmean(standing_still)


@needs_flow
def test_torch_backend_on_true_flow():
    previous, following, truth = (array[..., 100:196, 200:328] for array in true_pair('rubberwhale'))
    error = vf.end_point_error(vf.tvl1(previous, following, backend='torch'), truth)
    assert np.nanmean(error) < 0.25 and np.nanmedian(error) < 0.15


@needs_flow
def test_true_flow_undoes_the_motion():
    previous, following, truth = true_pair('rubberwhale')
    known = (np.abs(truth[0]) < 1e9).all(0)
    back = vf.warp(following, np.where(np.abs(truth) < 1e9, truth, 0))
    difference = lambda frames: np.abs(frames.astype(float) - previous)[0][known].mean()
    assert difference(back) < 0.5 * difference(following)


@needs_video
@pytest.mark.parametrize('clip, first', [('v_SoccerJuggling_g23_c01.avi', 40), ('v_SoccerJuggling_g24_c01.avi', 20)])
def test_backends_agree_on_real_video(clip, first):
    """The two backends, default values, 320 x 240.

    Measured on the first pair: 0.002 / 0.006 px (OpenCV 5) and 0.014 / 0.019 px (OpenCV 4.12)."""
    frames = read_frames(UCF101 / clip, [first, first + 1])
    assert frames.shape[1:3] == (240, 320)
    one, other = (vf.compute_flow(frames, 'tvl1', backend=backend) for backend in ('opencv', 'torch'))
    distance = vf.end_point_error(other, one)
    assert np.median(distance) <= 0.08 and distance.mean() <= 0.25


@pytest.mark.parametrize('settings', [
    dict(scales=1), dict(warps=2), dict(epsilon=0.0, inner_iterations=7, outer_iterations=2, warps=2),
    dict(scale_step=0.5), dict(tau=0.1, lambda_=0.05, theta=0.5, warps=2)])
def test_backends_agree_for_other_settings(settings):
    previous, following = moving(0, 40, 56, 1, 2)
    one, other = (vf.tvl1(previous, following, backend=backend, **settings) for backend in ('opencv', 'torch'))
    distance = vf.end_point_error(other, one)
    assert np.median(distance) < 0.02 and distance.mean() < 0.1


def test_a_pair_does_not_depend_on_its_batch():
    "Pairs stop on their own: a still, a slow and a lost one give the same flow alone and together."
    pairs = [moving(seed, 32, 40, dx, dy) for seed, dx, dy in [(0, 0, 0), (1, 2, 1), (2, 11, 11)]]
    previous, following = (np.concatenate(frames) for frames in zip(*pairs))
    together = vf.tvl1(previous, following, backend='torch', outer_iterations=2)
    for i, (one, two) in enumerate(pairs):
        assert np.abs(vf.tvl1(one, two, backend='torch', outer_iterations=2)[0] - together[i]).max() < 1e-4
    assert np.abs(together[0]).max() < 1e-6  # nothing moved: exactly no flow


@pytest.mark.parametrize('name', ['tvl1', 'farneback', 'dis'])
def test_threads_change_nothing(name):
    previous, following = moving(3, 60, 90, 3, 2)
    flows = []
    for count in (1, 2, 3, 4):
        cv2.setNumThreads(count)
        assert cv2.getNumThreads() == count
        flows.append(vf.FLOW_METHODS[name](previous, following))
    assert all(np.array_equal(flow, flows[0]) for flow in flows)


def test_a_small_frame_leaves_no_trace():
    "OpenCV's TV-L1 object keeps fewer levels after a small frame; ours must not."
    big = moving(4, 64, 64, 3, 0)
    before = vf.tvl1(*big)
    vf.tvl1(*moving(5, 16, 16, 0, 0))
    assert np.array_equal(vf.tvl1(*big), before)


@pytest.mark.parametrize('size', [(16, 16), (17, 33), (40, 40), (64, 64), (90, 16)])
@pytest.mark.parametrize('name', ['tvl1', 'torch', 'farneback', 'dis'])
def test_small_frames(name, size):
    method = (lambda a, b: vf.tvl1(a, b, backend='torch')) if name == 'torch' else vf.FLOW_METHODS[name]
    flow = method(*moving(6, *size, 1, 0))
    assert flow.shape == (1, 2, *size) and flow.dtype == np.float32
    assert np.allclose(np.median(flow, axis=(0, 2, 3)), [1, 0], atol=0.15)


def test_wide_and_low_frames_do_not_crash_dis():
    "In a process of its own, since OpenCV used to take the whole process down."
    code = ('import numpy as np; from vicc.flow import dis\n'
            'for shape in [(16, 45), (16, 200), (20, 2000), (31, 300), (40, 101)]:\n'
            '    frames = np.random.default_rng(0).integers(0, 255, (1, *shape), dtype=np.uint8)\n'
            '    assert np.isfinite(dis(frames, frames)).all()\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_arrays_that_are_not_contiguous():
    previous, following = moving(7, 40, 56, 1, 1)
    turned = [np.ascontiguousarray(frames[:, ::-1, ::-1])[:, ::-1, ::-1] for frames in (previous, following)]
    for name in ('tvl1', 'farneback', 'dis'):
        assert np.array_equal(vf.FLOW_METHODS[name](*turned), vf.FLOW_METHODS[name](previous, following))
    quick = dict(backend='torch', warps=1)
    assert np.array_equal(vf.tvl1(*turned, **quick), vf.tvl1(previous, following, **quick))


@pytest.mark.parametrize('name', ['tvl1', 'farneback', 'dis'])
def test_tensors_in_tensors_out(name):
    previous, following = (torch.from_numpy(frames) for frames in moving(8, 32, 48, 1, 1))
    flow = vf.FLOW_METHODS[name](previous, following)
    assert isinstance(flow, torch.Tensor) and flow.dtype == torch.float32
    assert np.array_equal(flow.numpy(), vf.FLOW_METHODS[name](previous.numpy(), following.numpy()))
    with pytest.raises(ValueError, match='both be tensors'): vf.FLOW_METHODS[name](previous, following.numpy())


def test_median_filter():
    size = 5
    images = torch.rand(3, 1, 11, 13, generator=torch.Generator().manual_seed(size)).mul(20).round()  # with ties
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2], mode='edge')
    expected = np.median(np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3)), axis=(-2, -1))
    assert np.array_equal(median_filter(images).numpy(), expected)


@pytest.mark.parametrize('bound', [20, 7.5])
def test_quantise_every_value(bound):
    numbers = np.arange(256, dtype=np.uint8)
    assert np.array_equal(vf.quantise(vf.dequantise(numbers, bound), bound), numbers)
    assert vf.quantise(np.float32([0]), bound)[0] == 128 and abs(vf.dequantise(np.uint8([128]), bound)[0] - bound / 255) < 1e-6
    for wrong in (np.inf, -np.inf, np.nan):
        with pytest.raises(ValueError, match='not finite'): vf.quantise(torch.tensor([0., wrong]), bound)
    with pytest.raises(ValueError, match='positive'): vf.quantise(numbers, 0)


def test_colours_do_not_depend_on_the_leading_axes():
    flow = np.random.default_rng(0).normal(size=(2, 3, 2, 5, 6)).astype(np.float32)
    colours = vf.flow_to_colour(flow, max_magnitude=2)
    assert colours.shape == (2, 3, 5, 6, 3) and colours.dtype == np.uint8
    assert np.array_equal(colours[1, 2], vf.flow_to_colour(torch.from_numpy(flow[1, 2]), max_magnitude=2))
    with pytest.raises(ValueError, match='expected'): vf.flow_to_colour(flow[..., 0])
    assert (vf.flow_to_colour(np.zeros((5, 2, 4, 6))) == 255).all()  # nothing moves


@pytest.mark.parametrize('settings', [dict(scales=0), dict(theta=0), dict(epsilon=-1), dict(scale_step=1), dict(check_every=9)])
def test_settings_that_cannot_work(settings):
    with pytest.raises(ValueError): TVL1Settings(**settings)


def test_end_point_error_refuses_other_shapes():
    flow = np.zeros((1, 2, 4, 4), np.float32)
    with pytest.raises(ValueError, match='shape'): vf.end_point_error(flow, flow[0])
    assert np.isnan(vf.end_point_error(flow, flow * np.nan)).all()


def test_warp_takes_what_it_is_given():
    first, second = moving(10, 40, 56, 2, 1)
    motion = np.tile(np.float32([2, 1])[None, :, None, None], (1, 1, 40, 56))
    undone = vf.warp(second, motion)
    assert undone.dtype == np.uint8 and np.array_equal(undone[:, :-1, :-2], first[:, :-1, :-2])
    as_tensor = vf.warp(torch.from_numpy(second), torch.from_numpy(motion))
    assert isinstance(as_tensor, torch.Tensor) and np.array_equal(as_tensor.numpy(), undone)
    assert np.array_equal(vf.warp(np.repeat(second[..., None], 3, axis=-1), motion)[..., 1], undone)


def test_grey_is_as_opencv_makes_it():
    colours = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert np.abs(vf.grey(colours).astype(int) - cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)).max() <= 1
    assert np.array_equal(vf.grey(torch.from_numpy(colours)).numpy(), vf.grey(colours))


def test_choice_of_the_backend():
    assert vf.choose_backend('auto', 'cpu') == 'opencv' and vf.choose_backend('torch', 'cpu') == 'torch'
    assert vf.choose_backend('auto', 'mps') == 'torch' and vf.choose_backend('auto', 'cuda:1') in ('triton', 'torch')
    previous, following = moving(11, 48, 64, 1, 1)
    quick = dict(warps=1, outer_iterations=1, inner_iterations=12)
    assert np.array_equal(vf.tvl1(previous, following, **quick), vf.tvl1(previous, following, backend='opencv', **quick))
    pairs = [np.concatenate(frames) for frames in ((previous, following), (following, previous))]
    together, apart = (vf.tvl1(*pairs, backend='torch', pairs_at_once=count, **quick) for count in (2, 1))
    assert np.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize('change, options, message', [
    (None, dict(backend='fast'), "backend 'fast' does not compute on cpu"), (None, dict(wraps=3), "'wraps'"),
    (None, dict(check_every=9), 'check_every 1 to 8'), (None, dict(backend='opencv', device='cuda'), 'does not compute on cuda here'),
    (lambda frames: frames[:1], {}, 'same shape'), (lambda frames: frames / 255, {}, 'float64'),
    (lambda frames: frames[..., :9], {}, 'at least 16 x 16')])
def test_tvl1_refuses(change, options, message):
    previous, following = (np.repeat(frames, 2, 0) for frames in moving(11, 48, 64, 1, 1))
    if change: following = change(following)
    if message.startswith('at least'): previous = change(previous)
    with pytest.raises((ValueError, TypeError), match=message): vf.tvl1(previous, following, **options)


def test_opencv_without_contrib_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cv2, 'optflow', None)
    with pytest.raises(ImportError, match='pip uninstall opencv-python'): vf.tvl1(*moving(11, 48, 64, 1, 1))


@pytest.mark.parametrize('change, method, message', [
    (lambda video: video, 'tv-l1', "there are ['tvl1', 'farneback', 'dis']"), (lambda video: video[:1], 'dis', 'at least two frames'),
    (lambda video: video[..., 0], 'dis', '[..., H, W, 3]'), (lambda video: video.astype(np.float32), 'dis', 'dtype float32')])
def test_compute_flow_refuses(change, method, message):
    video = np.zeros((3, 48, 64, 3), np.uint8)
    with pytest.raises(ValueError) as raised: vf.compute_flow(change(video), method)
    assert message in str(raised.value)


def test_dequantise_refuses_floats():
    with pytest.raises(ValueError, match='uint8'): vf.dequantise(np.float32([1]))


def test_without_triton():
    "PyTorch's TV-L1 does not need Triton, and a backend that does says so."
    code = ('import sys; sys.modules["triton"] = None\n'
            'import numpy as np, pytest\n'
            'from vicc.flow import choose_backend, tvl1\n'
            'frames = np.random.default_rng(0).integers(0, 255, (1, 20, 20), dtype=np.uint8)\n'
            'assert (tvl1(frames, frames, backend="torch", warps=1) == 0).all()\n'
            'assert choose_backend("auto", "cuda") == "torch"\n'
            'with pytest.raises(ValueError, match="the package triton"): choose_backend("triton", "cuda")\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_triton_needs_its_device():
    with pytest.raises(ValueError, match='CUDA device'): vf.tvl1(*moving(0, 20, 20, 0, 0), backend='triton')


@pytest.mark.gpu
def test_cuda_gives_the_flow_of_the_cpu():
    previous, following = moving(9, 64, 96, 3, 1)
    on_cpu = vf.tvl1(previous, following, backend='torch')
    on_gpu = vf.tvl1(torch.from_numpy(previous).cuda(), torch.from_numpy(following).cuda())
    assert on_gpu.is_cuda
    assert np.median(vf.end_point_error(on_gpu, on_cpu)) < 0.02
    assert isinstance(vf.tvl1(previous, following, device='cuda'), np.ndarray)
