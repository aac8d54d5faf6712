"Views: known answers, shapes that must not change, both streams."
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import default_collate

from helpers import STRONG, every_color_op, random_clips, views_of
from vicc.augment import (ViewSettings, apply_view, center_crop, denormalize, random_pair_params, random_view_params, flow_images, normalize)
from vicc.fast.views import IDENTITY_FACTORS, crop_resize

def test_paper_values():
    expected = dict(size=128, area=(.2, 1.), aspect=(3 / 4, 4 / 3), flip=.5, brightness=.4, contrast=.4,
                    saturation=.4, hue=.1, jitter=.8, grey=.2, blur=.5, blur_sigma=(.1, 2.), strong=.3, one_clip=.5,
                    flow_as_image=False, flow_channels='uv', whole_frame_crops=False, grey_frames=0)
    assert {f.name: getattr(ViewSettings(), f.name) for f in fields(ViewSettings)} == expected


@pytest.mark.parametrize('wrong', [
    dict(area=(0., 1.)), dict(area=(.2, 1.2)), dict(area=(.9, .2)), dict(aspect=(-1., 1.)), dict(blur_sigma=(0., 1.)),
    dict(flip=1.1), dict(jitter=-.1), dict(one_clip=2), dict(strong=2), dict(grey=2), dict(blur=2), dict(hue=2),
    dict(brightness=-.1), dict(contrast=1.5), dict(saturation=2)])
def test_settings_refuse(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}='): ViewSettings(**wrong)


@pytest.mark.parametrize('strong', [False, True])
def test_draw_keys_shapes_dtypes(strong):
    shapes = {'box': ((4,), 'float32'), 'flip': ((), 'bool'), 'strong': ((), 'bool'), 'order': ((4,), 'int64'),
              'factors': ((4,), 'float32'), 'grey': ((), 'int64'), 'sigma': ((), 'float32')}
    for seed in range(30):
        view = random_view_params(ViewSettings(), 240, 320, strong, np.random.default_rng(seed))
        assert {k: (v.shape, str(v.dtype)) for k, v in view.items()} == shapes
        assert sorted(view['order']) == [0, 1, 2, 3] and bool(view['strong']) == strong


def test_draws_repeat_and_always_take_as_many_numbers():
    options = {}, dict(blur=0., flip=0., area=(.9, 1.)), dict(grey=0., one_clip=0.)
    for settings in (ViewSettings(**values) for values in options):
        first, second = np.random.default_rng(3), np.random.default_rng(3)
        for _ in range(20):
            (one, a), (other, b) = random_pair_params(settings, 37, 91, first), random_pair_params(settings, 37, 91, second)
            assert one == other and all(np.array_equal(x[k], y[k]) for x, y in zip(a, b) for k in x)
        second = np.random.default_rng(3)
        second.random(20 * 73)
        assert first.random() == second.random()
    weak, strong = (random_view_params(ViewSettings(), 240, 320, s, np.random.default_rng(9)) for s in (False, True))
    assert np.array_equal(weak['box'], strong['box']) and weak['flip'] == strong['flip']


@pytest.mark.parametrize('height, width', [(1, 1), (2, 300), (300, 2), (40, 40), (240, 320)])
def test_boxes_inside(height, width):
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, h, w = random_view_params(ViewSettings(), height, width, False, rng)['box']
        assert top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= height and left + w <= width


def test_probabilities():
    rng = np.random.default_rng(1)
    settings = ViewSettings(strong=.6, one_clip=.2, flip=.9, jitter=.3, grey=.7, blur=.1)
    pairs = [random_pair_params(settings, 40, 40, rng) for _ in range(4000)]
    one = np.array([p[0] for p in pairs])
    drawn = {}
    for name in ('strong', 'flip', 'grey', 'sigma', 'factors'):
        drawn[name] = np.stack([[view[name] for view in views] for _, views in pairs])
    strong, jittered = drawn['strong'], (drawn['factors'] != IDENTITY_FACTORS).any(-1)
    assert (strong[one].sum(1) == 1).all()
    for shares, expected in ((one, .2), (strong[~one], .6), (drawn['flip'], .9), (jittered[strong], .3),
                             (drawn['grey'][strong] >= 0, .7), (drawn['sigma'][strong] > 0, .1),
                             (strong[one][:, 0], .5)):
        assert abs(shares.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / shares.size)
    assert (drawn['grey'][~strong] == -1).all() and (drawn['sigma'][~strong] == 0).all() and not jittered[~strong].any()
    spread = np.abs(drawn['factors'][strong] - IDENTITY_FACTORS).max(0)
    assert (spread <= (.4001, .4001, .4001, .1001)).all() and (spread > (.37, .37, .37, .09)).all()
    assert set(np.unique(drawn['grey'])) == {-1, 0, 1, 2}


@pytest.mark.filterwarnings('ignore:all values of these clips are 0')
@pytest.mark.parametrize('stream, flow_as_image', [('rgb', False), ('flow', False), ('flow', True)])
def test_all_frames_alike_and_range(stream, flow_as_image):
    settings = replace(STRONG, flow_as_image=flow_as_image)
    frame = random_clips(16, 1, 40, 50, 3 if stream == 'rgb' else 2)
    moving = frame.expand(-1, 4, -1, -1, -1)
    for clips in (moving, torch.zeros_like(moving), torch.full_like(moving, 255)):
        before = clips.clone()
        out = apply_view(clips, views_of(settings, 16, 40, 50), settings, stream)
        assert out.shape == (16, 3, 4, 24, 24) and out.dtype == torch.float32
        assert out.is_contiguous() and not out.requires_grad
        assert torch.isfinite(out).all() and torch.equal(clips, before)
        assert torch.allclose(out, out[:, :, :1].expand_as(out), atol=1e-6)
        std, mean = (torch.tensor(values).view(3, 1, 1, 1) for values in ((.229, .224, .225), (.485, .456, .406)))
        plain = out * std + mean
        assert plain.min() > -1e-5 and plain.max() < 1 + 1e-5


def test_rgb_and_flow_show_the_same_place():
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing='ij')
    places = torch.stack([x * 5, y * 6], -1).to(torch.uint8).expand(20, 3, -1, -1, -1)
    rgb = torch.cat([places, places[..., :1]], -1)
    view = views_of(ViewSettings(), 20, 40, 50, strong=False)
    settings = ViewSettings(size=24)
    of_rgb, of_flow = (denormalize(apply_view(clips, view, settings, stream)) * 255
                       for clips, stream in ((rgb, 'rgb'), (places, 'flow')))
    sign = torch.where(view['flip'], 1., 0.).view(-1, 1, 1, 1)
    assert view['flip'].any() and not view['flip'].all()
    assert torch.allclose(of_flow[:, 0], sign * (255 - of_rgb[:, 0]) + (1 - sign) * of_rgb[:, 0], atol=1e-3)
    assert torch.allclose(of_flow[:, 1], of_rgb[:, 1], atol=1e-3)
    assert torch.allclose(of_flow[:, 2], torch.tensor(128.), atol=1e-3)
    released = denormalize(apply_view(places, view, replace(settings, flow_as_image=True), 'flow')) * 255
    assert torch.allclose(released[:, :2], of_rgb[:, :2], atol=1e-3)
    assert torch.allclose(released[:, 2], torch.tensor(128.), atol=1e-3)


def test_flip_negates_every_byte():
    values = torch.arange(256, dtype=torch.float32).view(1, 1, 1, 16, 16).expand(2, 2, -1, -1, -1)
    out = flow_images(values, torch.tensor([True, False]))
    assert torch.equal(out[0, 0], 255 - values[0, 0]) and torch.equal(out[1, 0], values[1, 0])
    assert torch.equal(out[:, 1], values[:, 1])
    motion = np.linspace(-20, 20, 1001)[1:-1]  # quantising -u is 255 - quantising u, rest apart
    byte = lambda u: np.round((u + 20) / 40 * 255)
    moving = np.abs((motion + 20) / 40 * 255 % 1 - .5) > 1e-6
    assert np.array_equal(byte(-motion)[moving], (255 - byte(motion))[moving])


def test_flow_channels_of_the_released_code():
    "A network sees (128, v, u); everything else of the view is the same."
    view, clips = views_of(ViewSettings(), 4, 24, 32), random_clips(4, 3, 24, 32, 2)
    ours, theirs = (denormalize(apply_view(clips, view, ViewSettings(size=16, flow_channels=order), 'flow')) for order in ('uv', 'vu'))
    assert torch.allclose(ours[:, 2], torch.full((), 128/255), atol=1e-6) and torch.allclose(theirs, ours.flip(1), atol=1e-6)


def test_strong_flow_view_keeps_its_colours_by_default():
    clips, strong = random_clips(8, 3, 40, 40, 2), views_of(STRONG, 8, 40, 40)
    neutral = torch.tensor([IDENTITY_FACTORS] * 8)
    weak = dict(strong, factors=neutral, grey=torch.full((8,), -1), sigma=torch.zeros(8))
    assert torch.equal(apply_view(clips, strong, STRONG, 'flow'), apply_view(clips, weak, STRONG, 'flow'))
    released = replace(STRONG, flow_as_image=True)
    as_image = apply_view(clips, strong, released, 'flow')
    by_hand = crop_resize(clips, strong['box'], strong['flip'], 24) / 255
    by_hand = torch.cat([by_hand, torch.full_like(by_hand[:, :1], 128 / 255)], 1)
    by_hand = every_color_op(by_hand, strong)
    assert torch.allclose(as_image, normalize(by_hand), atol=1e-4)


@pytest.mark.parametrize('stream', ['rgb', 'flow'])
def test_nothing_waits_for_the_device(stream):
    """Fake CUDA tensors have no values: reading one, or a shape that depends on one, raises."""
    settings = replace(STRONG, flow_as_image=True)
    view = views_of(settings, 4, 40, 40)
    with FakeTensorMode() as mode:
        clips = torch.empty(4, 3, 40, 40, 3 if stream == 'rgb' else 2, dtype=torch.uint8, device='cuda')
        on_device = {k: torch.empty(v.shape, dtype=v.dtype, device='cuda') for k, v in view.items()}
        out = apply_view(clips, on_device, settings, stream)
        assert out.device.type == 'cuda' and out.shape == (4, 3, 3, 24, 24)
    assert mode is not None


def test_autocast_does_not_coarsen_views():
    clips, view = random_clips(4, 2, 40, 40, 3), views_of(STRONG, 4, 40, 40)
    plain = apply_view(clips, view, STRONG)
    with torch.autocast('cpu', dtype=torch.bfloat16): mixed = apply_view(clips, view, STRONG)
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


def test_collated_pair_through_default_collate():
    rng = np.random.default_rng(0)
    one_clip, views = default_collate([random_pair_params(STRONG, 40, 40, rng) for _ in range(5)])
    assert one_clip.shape == (5,) and one_clip.dtype == torch.bool and len(views) == 2
    assert apply_view(random_clips(5, 2, 40, 40, 3), views[1], STRONG).shape == (5, 3, 2, 24, 24)


def test_misuse_is_explained():
    clips, view = random_clips(2, 2, 40, 40, 3), views_of(STRONG, 2, 40, 40)
    for call, words in ((lambda: apply_view(clips, view, STRONG, 'flow'), 'flow clips must be uint8'),
                        (lambda: apply_view(clips.float(), view, STRONG), r'float32.*by \(clips\*255\).round\(\).to\(torch.uint8\)'),
                        (lambda: apply_view(clips, view, STRONG, 'RGB'), "RGB clips must be .* C = 3 for stream='rgb'"),
                        (lambda: ViewSettings(size=0), 'size=0: give .* at least 1 pixel'),
                        (lambda: center_crop(torch.tensor([[40, 50]]), 60), 'crop of 60 does not fit')):
        with pytest.raises(ValueError, match=words): call()


def test_floats_cast_to_bytes_are_a_warning(recwarn):
    clips, view = random_clips(2, 2, 40, 40, 3), views_of(STRONG, 2, 40, 40)
    apply_view(clips, view, STRONG)
    dark = torch.zeros_like(clips)
    dark[1, 1, 0, 0] = 2  # one pixel of a dark clip
    apply_view(dark, view, STRONG)
    assert not recwarn
    with pytest.warns(UserWarning, match='0 or 1.*black, or floats') as caught: apply_view((clips/255).to(torch.uint8), view, STRONG)
    assert caught[0].filename == __file__


def test_center_crop():
    clips, sizes = random_clips(2, 3, 48, 64, 3), torch.tensor([[48, 64]]*2)
    theirs = clips[:, :, 2:46, 10:54].flatten(0, 1).permute(0, 3, 1, 2).float()
    theirs = F.interpolate(theirs, (32, 32), mode='bicubic', antialias=True).clamp(0, 255)
    ours = denormalize(apply_view(clips, center_crop(sizes, 44), ViewSettings(size=32))) * 255
    assert torch.allclose(ours.transpose(1, 2).flatten(0, 1), theirs, atol=.01)
    assert center_crop(sizes)['box'].tolist() == [[0, 8, 48, 48]]*2
