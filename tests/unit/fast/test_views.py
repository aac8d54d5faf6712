"Views of a batch against PyTorch's and torchvision's own functions; both devices' paths."
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import STRONG, every_color_op, random_clips, views_of
from vicc.augment import ViewSettings
from vicc.fast.views import (IDENTITY_FACTORS, apply_color_ops, color_jitter, crop_resize, gaussian_blur, resize_matrix,
                             rotate_hue, single_channel, tf32)

@pytest.mark.parametrize('size', [7, 32, 61])
def test_resize_equals_torch(size):
    clips = random_clips(12, 2, 40, 53, 3)
    view = views_of(ViewSettings(area=(.05, 1.)), 12, 40, 53)
    ours = crop_resize(clips, view['box'], view['flip'], size)
    for b, (top, left, h, w) in enumerate(view['box'].int().tolist()):
        crop = clips[b, :, top:top + h, left:left + w].permute(0, 3, 1, 2).float()
        theirs = F.interpolate(crop, (size, size), mode='bicubic', antialias=True)
        theirs = (theirs.flip(-1) if view['flip'][b] else theirs).clamp(0, 255).transpose(0, 1)
        assert (ours[b] - theirs).abs().max() < .01


def test_resize_whole_box_copies_exactly():
    clips = random_clips(2, 3, 20, 20, 3)
    out = crop_resize(clips, torch.tensor([[0., 0., 20., 20.]] * 2), torch.tensor([False, True]), 20)
    assert torch.allclose(out[0], clips[0].permute(3, 0, 1, 2).float(), atol=1e-4)
    assert torch.allclose(out[1], clips[1].flip(2).permute(3, 0, 1, 2).float(), atol=1e-4)


def test_fractional_boxes_finite_and_flat_stays_flat():
    rng = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(200, 2, generator=rng) * 10, 1 + torch.rand(200, 2, generator=rng) * 9
    clips = torch.full((200, 1, 20, 20, 2), 77, dtype=torch.uint8)
    out = crop_resize(clips, torch.cat([corner, extent], 1), torch.zeros(200, dtype=torch.bool), 16)
    assert torch.allclose(out, torch.full_like(out, 77.), atol=.01)


def test_boxes_between_pixels():
    "In a picture whose value is its own x coordinate, a view shows the coordinates of its pixel centres."
    ramp = torch.arange(128, dtype=torch.uint8).expand(1, 1, 96, 128)[..., None]
    box, expected = torch.tensor([[10.25, 20.5, 40., 60.75]]), 20.5 + (torch.arange(30) + .5)*60.75/30 - .5
    plain, mirrored = (crop_resize(ramp, box, torch.tensor([flip]), 30)[0, 0, 0, 15] for flip in (False, True))
    assert (plain - expected)[3:-3].abs().max() < .02  # away from the edges, where the kernel is cut off
    assert (mirrored - expected.flip(0))[3:-3].abs().max() < .02


@pytest.mark.parametrize('half', [0x1000, 0])
def test_tf32_costs_less_than_a_grey_level(half):
    "10 bits of mantissa, rounded or cut off as hardware may do, on noise, the hardest picture."
    def short(values): return (values.contiguous().view(torch.int32) + half & ~0x1fff).view(torch.float32)
    noise, view = random_clips(4, 2, 96, 128, 3), views_of(ViewSettings(), 4, 96, 128, False)
    rows = resize_matrix(view['box'][:, 0], view['box'][:, 2], 96, 128)
    columns = resize_matrix(view['box'][:, 1], view['box'][:, 3], 128, 128)
    exact = crop_resize(noise, view['box'], torch.zeros(4, dtype=torch.bool), 128)
    first = torch.einsum('bthwc,bxw->bthxc', noise.float(), short(columns))
    difference = (torch.einsum('bthxc,byh->bctyx', short(first), short(rows)).clamp(0, 255) - exact).abs()
    assert difference.max() < .6 and difference.mean() < .15


def test_large_batches_in_parts_equal_one_by_one():
    clips = random_clips(3, 8, 700, 600, 3)  # 10 million values a clip: one clip at a time
    view = views_of(ViewSettings(), 3, 700, 600)
    whole = crop_resize(clips, view['box'], view['flip'], 16)
    for b in range(3):
        alone = crop_resize(clips[b:b + 1], view['box'][b:b + 1], view['flip'][b:b + 1], 16)
        assert torch.allclose(whole[b:b + 1], alone, atol=1e-3)
    assert whole.is_contiguous()


class Names(TorchDispatchMode):
    "Notes the name of every operation."
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def test_a_gpu_gets_the_batch_in_one_part():
    with FakeTensorMode():
        boxes, flips = torch.empty(24, 4), torch.empty(24, dtype=torch.bool)
        for device, parts in (('cuda', 1), ('cpu', 24)):
            clips = torch.empty(24, 32, 240, 320, 3, dtype=torch.uint8, device=device)
            with Names() as seen: assert crop_resize(clips, boxes, flips, 128).is_contiguous()
            assert seen.names.count('bmm') == 2 * parts


def test_tf32_is_put_back_and_warns_of_nothing():
    setting = torch.backends.cuda.matmul
    name = 'fp32_precision' if hasattr(setting, 'fp32_precision') else 'allow_tf32'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for value in (('none', 'ieee', 'tf32') if name == 'fp32_precision' else (False, True)):
            before = getattr(setting, name)
            try:
                setattr(setting, name, value)
                expected = getattr(setting, name)
                with pytest.raises(KeyError), tf32(torch.device('cuda')):
                    assert getattr(setting, name) in ('tf32', True)
                    raise KeyError
                with tf32(torch.device('cpu')): assert getattr(setting, name) == expected
                assert getattr(setting, name) == expected
            finally: setattr(setting, name, before)


def test_colour_jitter_is_few_operations():
    images, view = torch.rand(4, 3, 2, 8, 8), views_of(STRONG, 4, 40, 40)
    with Names() as seen: color_jitter(images, view['order'], view['factors'])
    free = 'view', 'expand', 'slice', 'select', 'unsqueeze', 'unbind', 'scalar_tensor'
    assert sum(name not in free for name in seen.names) <= 105


def test_jitter_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 2, 12, 12, generator=generator)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(32)])
    factors = torch.rand(32, 4, generator=generator) * torch.tensor([2, 2, 2, 1.]) - torch.tensor([0, 0, 0, .5])
    adjust = [getattr(reference, f'adjust_{name}') for name in ('brightness', 'contrast', 'saturation', 'hue')]
    ours = color_jitter(images, order, factors)
    for b in range(32):
        theirs = images[b].transpose(0, 1)
        for k in order[b].tolist(): theirs = adjust[k](theirs, factors[b, k].item())
        assert (ours[b] - theirs.transpose(0, 1)).abs().max() < 1e-3


def test_hue_of_greys_and_pure_colours():
    corners = torch.cartesian_prod(*[torch.tensor([0., 1.])] * 3).T.reshape(1, 3, 1, 2, 4)
    for turn in (-.5, -1 / 3, .1, 1 / 3, .5):
        out = rotate_hue(corners, torch.tensor([turn]))
        theirs = reference.adjust_hue(corners[0, :, 0], turn)
        assert torch.isfinite(out).all() and torch.allclose(out[0, :, 0], theirs, atol=1e-5)
    grey = torch.full((1, 3, 1, 2, 2), .4)
    assert torch.allclose(rotate_hue(grey, torch.tensor([.3])), grey)


def test_blur_equals_torchvision_inside_and_keeps_flat_pictures():
    images = torch.rand(3, 3, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([.1, .7, 2.])
    ours = gaussian_blur(images, sigma)
    for b in range(3):
        theirs = reference.gaussian_blur(images[b].transpose(0, 1), 25, sigma[b].item()).transpose(0, 1)
        assert torch.allclose(ours[b, ..., 13:-13, 13:-13], theirs[..., 13:-13, 13:-13], atol=1e-5)
    flat = torch.full((3, 1, 1, 9, 9), .3)
    assert torch.allclose(gaussian_blur(flat, sigma), flat, atol=1e-6)


def test_doing_nothing_changes_nothing():
    images = torch.rand(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    assert torch.equal(color_jitter(images, order, torch.tensor([IDENTITY_FACTORS] * 4)), images)
    assert torch.equal(single_channel(images, torch.full((4,), -1)), images)
    assert torch.equal(gaussian_blur(images, torch.zeros(4)), images)


def test_picked_samples_equal_all_samples():
    view = views_of(ViewSettings(), 24, 40, 40)
    images = torch.rand(24, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    everyone = every_color_op(images, view)
    assert torch.allclose(apply_color_ops(images.clone(), view), everyone, atol=1e-5)
