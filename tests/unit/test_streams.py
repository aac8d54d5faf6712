"""The files of ViCC, CoCLR and InfoNCE: read with every key in its place, refused with a reason, written.

No released file is needed: files are made from the list of released keys and shapes in tests/golden.
"""
import argparse
import hashlib
import json
import pickle
import tarfile
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from helpers import GOLDEN, golden_weights
from vicc.backbones import PAPER_LAYER_NAMES, create_backbone
from vicc.data import TestClips
from vicc.evaluation import evaluate_stream
from vicc.prepare import PrepareSettings, prepare
from vicc.streams import (
    Stream, TrainedOn, describe_released, export_released, guess_modality, load_released, load_stream, read_released,
    save_stream,
)
from vicc.synthetic import make_moving_shapes

pytestmark = pytest.mark.filterwarnings('ignore:.*does not say whether it saw RGB or flow')
load_rgb = partial(load_released, modality='rgb')
KEYS = json.loads((GOLDEN/'official_state_dict_keys.json').read_text())
FEATURES = {'s3d': 1024, 's3dg': 1024, 'r21d': 512}


def released_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    "Golden weights; S3D's second names get the tensor of the first, as in released files."
    weights = golden_weights(shapes)
    for place, paper in PAPER_LAYER_NAMES.items():
        for name in list(weights):
            if name.startswith(f'{paper}.'): weights[name] = weights[place + name[len(paper):]]
    return weights


def made_up(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator)*0.1 for name, shape in shapes.items()}


def encoder(backbone: str, first: str, seed: int = 0, dim: int = 8) -> dict[str, torch.Tensor]:
    "An encoder as in a released file, with a small projection."
    size = FEATURES[backbone]
    head = {'2.weight': [size, size, 1, 1, 1], '2.bias': [size], '4.weight': [dim, size, 1, 1, 1],
            '4.bias': [dim]}
    state = {f'0.{name}': tensor for name,
             tensor in released_weights(KEYS['backbones'][backbone]).items()} | made_up(head, seed)
    return {f'{first}.{name}': tensor + (0 if tensor.dtype == torch.int64 else 0.01*seed) for name,
            tensor in state.items()}


@pytest.fixture(scope='module', params=['s3d', 's3dg', 'r21d'])
def single(request):
    "Name and state dict of a single-stream file."
    prototypes = torch.nn.functional.normalize(torch.rand(6, 8), dim=1)
    return request.param, encoder(request.param, 'encoder_q') | {'prototypes.weight': prototypes}


def light(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    "One number a tensor, repeated by expand: quick to write and read. The number depends on the name."
    values = {name: torch.tensor(0 if name.endswith('tracked')
                                 else 0.5 + zlib.crc32(name.encode())%1000/1000) for name in shapes}
    return {name: values[name].expand(shape) for name, shape in shapes.items()}


@pytest.fixture(scope='module')
def r21d():
    "A small file of R(2+1)D."
    head = {'2.weight': [512, 512, 1, 1, 1], '2.bias': [512], '4.weight': [8, 512, 1, 1, 1], '4.bias': [8]}
    shapes = {f'encoder_q.0.{name}': shape for name, shape in KEYS['backbones']['r21d'].items()}
    shapes |= {f'encoder_q.{name}': shape for name, shape in head.items()}
    return light(shapes | {'prototypes.weight': [6, 8]})


@pytest.fixture
def write(tmp_path):
    def write(state, name='file.pth.tar', **extra):
        torch.save({'epoch': 3, 'state_dict': state, **extra}, tmp_path/name)
        return tmp_path/name
    return write


def holds(stream: Stream, weights: dict[str, torch.Tensor], first: str = 'encoder_q') -> None:
    "Every released tensor of one encoder is in the stream."
    backbone = stream.backbone
    state = backbone.released_state_dict() if hasattr(backbone,
                                                      'released_state_dict') else backbone.state_dict()
    theirs = {name.removeprefix(f'{first}.0.'): tensor for name, tensor in weights.items()
              if name.startswith(f'{first}.0.')}
    assert set(state) == set(theirs)
    for name, tensor in theirs.items(): assert torch.equal(state[name], tensor), name
    for ours, number in ((0, 2), (2, 4)):
        assert torch.equal(stream.head[ours].weight, weights[f'{first}.{number}.weight'].flatten(1))
        assert torch.equal(stream.head[ours].bias, weights[f'{first}.{number}.bias'])


def test_every_key_has_its_place_and_features_are_the_recorded_ones(single, write):
    name, weights = single
    stream = load_rgb(write(weights))
    assert not stream.training and type(stream.backbone) is type(create_backbone(name))
    assert tuple(stream.prototypes.weight.shape) == (6, 8)
    assert torch.equal(stream.prototypes.weight, weights['prototypes.weight'])
    assert all(parameter.requires_grad and parameter.dtype == torch.float32
               for parameter in stream.parameters())
    holds(stream, weights)
    golden = load_file(GOLDEN/f'backbone_{name}.safetensors')
    clips = torch.randn(*golden['input_shape'].tolist(),
                        generator=torch.Generator().manual_seed(int(golden['input_seed'])))
    recorded = golden['features_eval']
    recorded = recorded.flatten(1) if name == 'r21d' else recorded.flatten(2).mean(2)
    with torch.no_grad(): features, projections = stream.features(clips), stream.embed(clips)
    assert (features - recorded).norm() < 1e-4*recorded.norm()
    # the head as the released code has it: 1×1×1 convolutions
    hidden = torch.nn.functional.conv3d(features[:, :, None, None, None], weights['encoder_q.2.weight'],
                                        weights['encoder_q.2.bias']).relu()
    expected = torch.nn.functional.conv3d(hidden, weights['encoder_q.4.weight'],
                                          weights['encoder_q.4.bias']).flatten(1)
    torch.testing.assert_close(projections, torch.nn.functional.normalize(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kind', ['single', 'cross'])
def test_the_listed_checkpoints_come_back_key_by_key(kind, tmp_path):
    shapes = KEYS['checkpoints'][kind]
    weights = light(shapes)
    for name in weights:  # two names, one tensor
        for place, paper in PAPER_LAYER_NAMES.items():
            if f'.0.{paper}.' in name: weights[name] = weights[name.replace(f'.0.{paper}.', f'.0.{place}.')]
    torch.save({'epoch': 1, 'state_dict': weights}, tmp_path/'file.pth.tar')
    stream = load_rgb(tmp_path/'file.pth.tar')
    teacher = load_rgb(tmp_path/'file.pth.tar', 'frozen',
                            num_prototypes=300) if kind == 'cross' else None
    again = torch.load(export_released(stream, tmp_path/'again.pth.tar', teacher), weights_only=True)
    assert set(again) == {'epoch', 'state_dict'}
    assert {name: list(tensor.shape) for name, tensor in again['state_dict'].items()} == shapes
    for name, tensor in again['state_dict'].items():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.dtype == weights[name].dtype and tensor.is_contiguous(), name
    limit = 40e6 if kind == 'single' else 80e6
    assert (tmp_path/'again.pth.tar').stat().st_size < limit, 'a tensor with two names is stored twice'


@pytest.mark.parametrize('name', ['s3dg', 'r21d'])
def test_both_streams_of_a_cross_stream_file(name, tmp_path):
    first, second = (Stream(name, num_prototypes=k, projection_dim=8).eval() for k in (5, 7))
    path = export_released(first, tmp_path/'cross.pth.tar', teacher=second)
    weights = torch.load(path, weights_only=True)['state_dict']
    holds(load_rgb(path, stream='frozen', num_prototypes=7), weights, 'second')
    clips = torch.randn(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(load_rgb(path)(clips), first(clips)): assert torch.equal(ours, theirs)


def test_prefixes_of_parallel_training_and_old_formats(r21d, tmp_path):
    "module. is taken off; old and bare files are read too; half precision becomes float32."
    cases = {'module': {'state_dict': {f'module.{name}': tensor for name, tensor in r21d.items()}},
             'bare': r21d,
             'half': {'state_dict': {name: tensor.half() if tensor.is_floating_point() else tensor for name,
                                     tensor in r21d.items()}}, 'old': {'state_dict': r21d}}
    for case, content in cases.items():
        torch.save(content, tmp_path/case, _use_new_zipfile_serialization=case != 'old')
        stream = load_rgb(tmp_path/case)
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in stream.state_dict().values())
        if case != 'half': holds(stream, r21d)


@pytest.mark.parametrize('frozen', ['second', 'sampler'])
def test_contrastive_files_without_prototypes(r21d, write, frozen):
    encoder_q = {name: tensor for name, tensor in r21d.items() if name != 'prototypes.weight'}
    momentum = {name.replace('encoder_q', 'encoder_k'): tensor + 1 for name, tensor in encoder_q.items()}
    other = {name.replace('encoder_q', frozen): tensor + 2 for name, tensor in encoder_q.items()}
    queues = {'queue': torch.rand(8, 16), 'queue_ptr': torch.zeros(1, dtype=torch.int64),
              'queue_second': torch.rand(8, 16),
              'queue_vname': torch.zeros(16, dtype=torch.int64),
              'queue_label': torch.zeros(16, dtype=torch.int64)}
    path = write({**momentum, **queues, **encoder_q, **other})
    message = r'left out encoder_k, queue, .*queue_label \(153 tensors\).*300 random ones'
    with pytest.warns(UserWarning, match=message) as caught:
        torch.manual_seed(0)
        stream = load_rgb(path)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    holds(stream, encoder_q)
    assert tuple(stream.prototypes.weight.shape) == (300, 8)
    torch.testing.assert_close(stream.prototypes.weight.norm(dim=1), torch.ones(300))
    with pytest.warns(UserWarning, match='left out') as caught:
        torch.manual_seed(0)
        again = load_rgb(path, num_prototypes=300)
    assert 'random' not in str(caught[0].message)
    assert torch.equal(again.prototypes.weight, stream.prototypes.weight)
    with pytest.warns(UserWarning, match='left out .*no prototypes for the frozen stream: 300 random ones'):
        holds(load_rgb(path, 'frozen'), other, frozen)


def test_a_full_file_gives_no_warning_and_leaves_the_random_state_alone(r21d, write):
    path = write(r21d)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_rgb(path)
    assert torch.equal(torch.get_rng_state(), before)


IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None, None]

def flow_clips(order: list[int]) -> torch.Tensor:
    "Three random flow clips [3, 3, 8, 32, 32] as a network gets them: channels of (u, v, 128) in an order."
    pixels = torch.randint(256, (3, 3, 8, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels[:, 2] = 128
    return (pixels[:, order]/255 - IMAGENET[0])/IMAGENET[1]


@pytest.mark.parametrize('name', ['s3d', 's3dg', 'r21d'])
def test_flow_goes_to_the_released_code_and_back(name, tmp_path):
    """A minimal reader of released files, as METHOD of the released code has it: features of (128, v, u).

    Borders count: a third of the places of a 7×7 kernel on 32×32 pixels see padding."""
    torch.manual_seed(0)
    stream = Stream(name, 5, 8, trained_on=dict(modality='flow')).eval()
    path = export_released(stream, tmp_path/'flow.pth.tar')
    theirs = create_backbone(name).eval()
    theirs.load_state_dict({key.removeprefix('encoder_q.0.'): tensor for key, tensor in
                            torch.load(path, weights_only=True)['state_dict'].items() if key.startswith('encoder_q.0.')})
    uv, vu = flow_clips([0, 1, 2]), flow_clips([2, 1, 0])
    with torch.no_grad():
        ours, released, back = stream.features(uv), theirs(vu), load_released(path, modality='flow').features(uv)
        mixed = theirs(uv)
    for features in (released, back): assert (features - ours).norm() < 1e-5*ours.norm()
    assert (mixed - ours).norm() > .05*ours.norm(), 'the order does not matter: this test says nothing'
    loaded = load_released(path, modality='flow')
    assert loaded.trained_on == TrainedOn(modality='flow')
    assert load_stream(save_stream(loaded, tmp_path/'saved')).trained_on.modality == 'flow'
    again = torch.load(export_released(loaded, tmp_path/'again.pth.tar'), weights_only=True)['state_dict']
    for key, tensor in torch.load(path, weights_only=True)['state_dict'].items():
        torch.testing.assert_close(again[key], tensor, atol=2e-6, rtol=1e-5)


def test_what_is_trained_on_the_released_order_is_written_as_it_is(tmp_path):
    torch.manual_seed(0)
    stream, teacher = Stream('r21d', 4, 8, trained_on=dict(modality='flow', flow_channels='vu')), Stream('r21d', 4, 8, trained_on=dict(modality='rgb'))
    state = torch.load(export_released(stream, tmp_path/'vu.pth.tar', teacher), weights_only=True)['state_dict']
    first = '0.conv1.spatial_conv.weight'
    assert torch.equal(state[f'encoder_q.{first}'], stream.backbone.conv1.spatial_conv.weight)
    assert torch.equal(state[f'second.{first}'], teacher.backbone.conv1.spatial_conv.weight)
    before = stream.backbone.conv1.spatial_conv.weight.clone()
    stream.trained_on = TrainedOn(modality='flow')
    state = torch.load(export_released(stream, tmp_path/'uv.pth.tar'), weights_only=True)['state_dict']
    assert torch.equal(stream.backbone.conv1.spatial_conv.weight, before)  # the stream itself does not change
    assert not torch.equal(state[f'encoder_q.{first}'], before)


def test_the_unknown_modality_is_said(r21d, write, tmp_path):
    with pytest.warns(UserWarning, match="file.pth.tar: a file does not say what it saw: give modality='rgb' or 'flow'"):
        stream = load_released(write(r21d))
    assert stream.trained_on.modality is None
    holds(stream, r21d)
    with pytest.warns(UserWarning, match='does not say whether it saw RGB or flow'): export_released(stream, tmp_path/'x')
    assert load_stream(write(r21d), 'flow').trained_on == TrainedOn(modality='flow')
    with pytest.raises(ValueError, match='does not fit .*Input should be .rgb. or .flow.'): load_released(write(r21d), modality='depth')


@pytest.mark.parametrize(('colour', 'said', 'wrong'), [((128, 128, 128), 'flow', 'rgb'), ((101, 98, 90), 'rgb', 'flow'), ((128, 138, 128), '', '')])
def test_a_file_tells_by_the_colour_that_its_first_batch_norm_saw(colour, said, wrong, tmp_path):
    torch.manual_seed(0)
    stream = Stream('r21d', 4, 8, trained_on=dict(modality='rgb'))
    first = torch.nn.Sequential(stream.backbone.conv1.spatial_conv, stream.backbone.conv1.bn)
    first[1].momentum = None  # the mean of all batches
    for _ in range(3):
        pixels = torch.tensor(colour).view(3, 1, 1, 1) + 25*torch.randn(8, 3, 2, 48, 48)
        with torch.no_grad(): first((pixels/255 - IMAGENET[0])/IMAGENET[1])
    path = export_released(stream, tmp_path/'file.pth.tar')
    found, reason = guess_modality(stream.backbone.state_dict())
    assert found == said and reason.startswith(said or 'RGB or flow, by') and reason in describe_released(path)
    with pytest.warns(UserWarning, match='a file does not say what it saw.*' + (f'It looks like {said}, by' if said else 'order there$')): load_released(path)
    if not said: return
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_released(path, modality=said)
    with pytest.warns(UserWarning, match=f"modality='{wrong}' is probably wrong. It looks like {said}.*vicc evaluate"):
        load_released(path, modality=wrong)


def test_no_guess_without_a_colour():
    for module in (torch.nn.Linear(3, 4), torch.nn.Conv3d(3, 8, 1), torch.nn.Sequential(torch.nn.Conv3d(2, 8, 1), torch.nn.BatchNorm3d(8)),
                   torch.nn.Sequential(torch.nn.Conv3d(3, 8, 1, bias=False), torch.nn.BatchNorm3d(8))):
        assert guess_modality(module.state_dict()) == ('', 'RGB or flow: a file does not say')
    broken = torch.nn.Sequential(torch.nn.Conv3d(3, 8, 1, bias=False), torch.nn.BatchNorm3d(8))
    broken[1].running_mean.fill_(torch.nan)
    assert guess_modality(broken.state_dict())[0] == ''
    wide = {'weight': torch.ones(()).expand(8, 3, 10**5, 10**5, 10), 'running_mean': torch.ones(8), 'running_var': torch.ones(8)}
    assert guess_modality(wide)[0] == guess_modality({**wide, 'weight': torch.ones(8, 3, 1, 1, 1).to_sparse()})[0] == ''


def test_model_card(tmp_path, monkeypatch):
    stream = Stream('small', 6, 8, trained_on=dict(modality='flow', clip_length=8, view_size=32))
    stream.save_pretrained(tmp_path/'plain')
    plain = ModelCard.load(tmp_path/'plain'/'README.md')
    assert plain.data.library_name == 'vicc' and plain.data.license is None and 'No licence of the weights' in plain.text
    assert 'None' not in plain.text and 'measured' not in plain.text and 'Recipe' not in plain.text and '{' not in plain.text.split('@inproceedings')[0]
    assert '# Flow encoder' in plain.text and 'modality flow, clip_length 8, stride 1, view_size 32' in plain.text
    assert 'modality not recorded' in Stream('small', 6, 8).generate_model_card().text
    uploaded = {}
    def upload(api, *, repo_id, folder_path, **_):
        uploaded.update({path.name: path.read_text(errors='replace') for path in Path(folder_path).iterdir()}, id=repo_id)
        return 'address'
    monkeypatch.setattr('huggingface_hub.HfApi.create_repo', lambda api, repo_id, **_: argparse.Namespace(repo_id=repo_id))
    monkeypatch.setattr('huggingface_hub.HfApi.upload_folder', upload)
    values = dict(data='two drawn videos', metrics={'R@1': .5, 'R@5': 1}, recipe=dict(seed=0, widths=[1, 2]), license='cc-by-4.0')
    assert stream.push_to_hub('me/flow', model_card_kwargs=values) == 'address'
    assert set(uploaded) == {'id', 'README.md', 'config.json', 'model.safetensors'} and uploaded['id'] == 'me/flow'
    card = ModelCard(uploaded['README.md'])
    assert card.data.license == 'cc-by-4.0' and 'Trained on two drawn videos' in card.text
    assert '| --- | --- |\n| R@1 | 0.5 |\n| R@5 | 1 |\n' in card.text and '```yaml\nseed: 0\nwidths:\n- 1\n- 2\n```' in card.text
    monkeypatch.chdir(tmp_path/'plain')
    found = {}
    exec(card.text.split('```python\n')[1].split('```')[0], found)  # as a reader would
    assert found['features'].shape == (1, stream.num_features)


@pytest.mark.parametrize('wrap', [
    lambda name: f'module.{name}', lambda name: f'_orig_mod.{name}', lambda name: f'module._orig_mod.{name}', lambda name: f'model.{name}',
    lambda name: f'model.module.{name}', lambda name: f'encoder.{name}', lambda name: name.replace('encoder_q.', 'encoder_q._orig_mod.'),
    lambda name: name.replace('encoder_q.', 'encoder_q.module.'), lambda name: name.replace('encoder_q.', 'encoder.'),
], ids=['module', '_orig_mod', 'module._orig_mod', 'model', 'model.module', 'encoder', '_orig_mod inside', 'module inside', 'encoder for encoder_q'])
def test_names_that_training_tools_put_before(r21d, write, tmp_path, wrap):
    state = {wrap(name): tensor for name, tensor in r21d.items()}
    lightning = {'pytorch-lightning_version': '2.5', 'global_step': 3, 'callbacks': {}, 'optimizer_states': [{'lr': .1}]}
    holds(load_rgb(write(state, **lightning)), r21d)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path/'file.safetensors')
    holds(load_rgb(tmp_path/'file.safetensors'), r21d)


@pytest.mark.parametrize('classifier', [['final_bn.weight', 'final_fc.1.weight'], ['classifier.weight', 'classifier.bias']])
def test_fine_tuned_files_give_their_backbone(r21d, write, classifier):
    state = {name.replace('encoder_q.0.', 'backbone.'): tensor for name, tensor in r21d.items() if name.startswith('encoder_q.0.')}
    path = write({**state, **{name: torch.zeros(3) for name in classifier}})
    with pytest.warns(UserWarning, match=r'left out .*\(. tensors\).*no projection head: a random one took its place.*300 random ones'):
        stream = load_rgb(path)
    assert all(torch.equal(stream.backbone.state_dict()[name.removeprefix('encoder_q.0.')], tensor)
               for name, tensor in r21d.items() if name.startswith('encoder_q.0.'))
    assert tuple(stream.head[2].weight.shape) == (128, 512) and stream.head[0].weight.std() > 0


def test_options_of_a_command_line_are_plain_values(r21d, write):
    args = argparse.Namespace(lr=0.6, gpu=None, nested=argparse.Namespace(names=['a']))
    path = write(r21d, args=args)
    holds(load_rgb(path), r21d)
    assert read_released(path)['args'] == args


def test_safetensors_that_are_none(tmp_path, r21d):
    path = tmp_path/'file.safetensors'
    path.write_bytes(b'nonsense, but long enough')
    with pytest.raises(ValueError, match='file.safetensors is damaged or no PyTorch checkpoint'): load_rgb(path)
    save_stream(Stream('r21d', 4, 8), tmp_path/'own')
    with pytest.raises(ValueError, match="begin with encoder_q.*there are .*'head.0.bias'"): load_rgb(tmp_path/'own'/'model.safetensors')


def test_what_a_file_is(tmp_path, r21d, write):
    own, other = (Stream('r21d', k, 8, trained_on=dict(modality='rgb')) for k in (5, 7))
    cross = describe_released(export_released(own, tmp_path/'cross.pth.tar', other))
    assert cross == 'r21d, ViCC, cross-stream, K = 5 (it has second.*); RGB or flow: a file does not say'
    without = {name: tensor for name, tensor in r21d.items() if name != 'prototypes.weight'}
    sampler = {name.replace('encoder_q', 'sampler'): tensor for name, tensor in without.items()}
    assert describe_released(write(without)).startswith('r21d, without prototypes: InfoNCE, or fine-tuned')
    assert describe_released(write(without | sampler)).startswith('r21d, CoCLR')
    for name in ('s3d', 's3dg'):
        assert describe_released(write(encoder(name, 'encoder_q'))).startswith(f'{name}, ')


def test_the_stream_is_saved_and_loaded_like_any_other(r21d, write, tmp_path):
    stream = load_rgb(write(r21d))
    for again in (load_stream(save_stream(stream, tmp_path/'rgb')), Stream.from_pretrained(tmp_path/'rgb')):
        for name, tensor in stream.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    stream.train()(torch.randn(2, 3, 4, 16, 16))[1].square().sum().backward()
    assert all(parameter.grad is not None for parameter in stream.parameters())


def test_a_network_of_yours_must_tell_its_width_and_keep_it():
    network = torch.nn.Conv3d(3, 8, 1)
    with pytest.raises(ValueError, match=r'Conv3d has num_features=None, .*: a backbone needs .num_features = F'): Stream(network)
    network.num_features = 8
    with pytest.raises(ValueError, match=r'Conv3d must return \[B, F\], where F is its num_features, 8, and not \[2, 8, 4, 6, 6\]'):
        Stream(network)(torch.zeros(2, 3, 4, 6, 6))
    for wrong in (dict(num_prototypes=1), dict(projection_dim=0)):
        with pytest.raises(ValueError, match='2 prototypes or more, and a projection'): Stream('small', **wrong)


def test_wrong_folders_and_keywords_are_told_apart(tmp_path, monkeypatch):
    folder = tmp_path/'run'/'stages'/'00-rgb-1'/'stream'
    folder.parent.mkdir(parents=True)
    save_stream(Stream('small', 4, 8, {'width': 2}), folder)
    with pytest.raises(FileNotFoundError, match=r'save_stream wrote, such as .*/stages/00-rgb-1/stream$'): load_stream(tmp_path/'run')
    with pytest.raises(TypeError, match='num_prototype'): load_stream(folder, num_prototype=3)
    monkeypatch.chdir(tmp_path)
    assert Stream.from_pretrained('run/stages/00-rgb-1/stream').num_features == 8
    for missing in ('runs/stages/stream', './me/flow', '~/flow', '/flow', '../flow', 'run/flow', 'run', 'flow', Path('run')):
        with pytest.raises(FileNotFoundError, match=f'^{Path(missing)/"config.json"} does not exist: give the folder'): Stream.from_pretrained(missing)
    monkeypatch.setattr('huggingface_hub.hub_mixin.hf_hub_download', lambda *_, repo_id, **__: pytest.fail(f'asked for {repo_id}'))
    with pytest.raises(pytest.fail.Exception, match='asked for me/flow'): Stream.from_pretrained('me/flow')


def test_a_stream_saved_by_the_first_version(tmp_path):
    "Two files and their checksums, as written since the first version."
    torch.manual_seed(0)
    stream, folder = Stream('small', 24, 64, {'width': 4, 'multipliers': [1, 2, 4, 8]}), tmp_path/'stream'
    folder.mkdir()
    (folder/'config.json').write_text("""{
  "backbone": "small",
  "backbone_options": {
    "multipliers": [
      1,
      2,
      4,
      8
    ],
    "width": 4
  },
  "num_prototypes": 24,
  "projection_dim": 64
}""")
    save_file({name: tensor.contiguous() for name, tensor in stream.state_dict().items()},
              folder/'model.safetensors')
    files = {name: (folder/name).read_bytes() for name in ('config.json', 'model.safetensors')}
    digests = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name,
               data in files.items()}
    (folder/'checksums.json').write_text(json.dumps(digests))
    for again in (load_stream(folder), Stream.from_pretrained(folder)):
        assert not again.training
        for name, tensor in stream.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    config = (save_stream(stream, tmp_path/'again')/'config.json').read_text()
    assert json.loads(config) == json.loads(files['config.json']) | {'trained_on': None}
    assert load_stream(folder).trained_on == TrainedOn()  # nothing is recorded: the paper's clips


def test_a_stream_records_what_it_was_trained_on_beside_the_same_weights(tmp_path):
    record, folders = dict(modality='flow', clip_length=8, stride=2, view_size=32), []
    for name, trained_on in (('plain', None), ('recorded', record)):
        torch.manual_seed(0)
        folders.append(save_stream(Stream('small', 4, 8, {'width': 2}, trained_on), tmp_path/name))
    plain, recorded = ((folder/'model.safetensors').read_bytes() for folder in folders)
    assert plain == recorded
    assert json.loads((folders[1]/'config.json').read_text())['trained_on'] == record
    for again in (load_stream(folders[1]), Stream.from_pretrained(folders[1]), load_stream(folders[1], 'flow')):
        assert again.trained_on == TrainedOn(**record)
    with pytest.raises(ValueError, match='recorded was trained on flow, not on rgb: give it flow clips'):
        load_stream(folders[1], 'rgb')
    for modality in ('rgb', 'flow'): assert load_stream(folders[0], modality).trained_on.modality is None
    for wrong in (dict(modality='depth'), dict(clip_length=0), dict(view_size='32'), dict(fps=25), [1]):
        config = json.loads((folders[0]/'config.json').read_text()) | dict(trained_on=wrong)
        (folders[0]/'config.json').write_text(json.dumps(config))
        (folders[0]/'checksums.json').unlink(missing_ok=True)
        with pytest.raises(ValueError, match='does not hold the weights of the stream that its config'):
            load_stream(folders[0])


def test_the_stream_goes_straight_into_evaluation(write, tmp_path):
    weights = encoder('r21d', 'encoder_q') | {'prototypes.weight': torch.rand(6, 8)}
    shapes = make_moving_shapes(tmp_path/'shapes', 1, 4)
    settings = PrepareSettings(short_side=64, flow_method='farneback', flow_bound=5)
    clips = TestClips(prepare(shapes['test'], shapes['videos'], tmp_path/'store', settings, workers=1),
                      clip_length=8, min_frames=1)
    numbers, features = evaluate_stream(load_rgb(write(weights)), 'rgb', clips, clips, size=32,
                                        crop=None, ks=(1,), probe_epochs=2)
    assert numbers['R@1'] == 1 and features['queries'].shape == (4, 512)
    assert torch.isfinite(features['gallery']).all()


def test_numpy_numbers_are_plain_values(r21d, write):
    "Also under the name that NumPy had for them before version 2, as in the files of 2020 and 2021."
    path = write(r21d, best_acc=np.float64(0.5), iteration=np.int64(4), last=np.float32(0.25),
                 done=np.bool_(True))
    assert {key: value for key, value in read_released(path).items()
            if key != 'state_dict'} == {'epoch': 3, 'best_acc': 0.5, 'iteration': 4, 'last': 0.25,
                                        'done': True}
    holds(load_rgb(path), r21d)
    old = pickle.dumps(np.float64(0.5), protocol=2)
    old = old.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')
    assert b'cnumpy.core.multiarray\n' in old

    class Old:
        "Pickled as NumPy 1 did."
        def __reduce__(self): return OLD_SCALAR, (np.dtype('f8'), np.float64(0.5).tobytes())
    def OLD_SCALAR(): pass
    OLD_SCALAR.__module__ = 'numpy.core.multiarray'
    OLD_SCALAR.__qualname__ = OLD_SCALAR.__name__ = 'scalar'
    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is OLD_SCALAR: return self.write(b'cnumpy.core.multiarray\nscalar\n')
            super().save_global(obj, name)
        dispatch = {**pickle._Pickler.dispatch, type(OLD_SCALAR): save_global}
    module = argparse.Namespace(Pickler=Pickler, dump=pickle.dump, Unpickler=pickle.Unpickler,
                                __name__='pickle')
    torch.save({'best_acc': Old()}, path, pickle_module=module)
    assert read_released(path) == {'best_acc': 0.5}


class Trap:
    "Pretends to be a value; unpickling it would create a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('old', [False, True])
def test_code_in_a_file_is_not_run(r21d, tmp_path, old):
    ran, path = tmp_path/'it ran', tmp_path/'trap.pth.tar'
    for content in ({'state_dict': r21d, 'args': Trap(ran)},
                    {'state_dict': {**r21d, 'prototypes.weight': Trap(ran)}}, Trap(ran)):
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        torch.load(path, weights_only=False)
        assert ran.exists(), 'the trap does not work: this test says nothing'
        ran.unlink()
        message = r'trap.pth.tar holds [\w.]+, which is neither a tensor nor a plain value.*not read'
        with pytest.raises(ValueError, match=message): load_rgb(path)
        assert not ran.exists()
    path.write_bytes(pickle.dumps(Trap(ran)))
    with pytest.raises(ValueError, match='trap.pth.tar'): load_rgb(path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(ran).replace(' ', '\\ ').encode() + b"'\ntR.")
    with pytest.raises(ValueError, match='trap.pth.tar'): load_rgb(path)
    assert not ran.exists()


def bomb(kind: str) -> dict | list:
    "A value of a few bytes that asks for work without end, or for very much."
    if kind == 'pairs': return [nested_pair(60)]  # as a key, hashing it would never end here, either
    if kind == 'text': return {'x'*20_000: 1}
    if kind == 'counter': return {'a': Counter(range(9))}
    return {str(number): None for number in range(3000)}  # instructions


def test_a_list_that_stands_twice_is_no_reason_to_refuse(tmp_path):
    torch.save({'a': (numbers := [1, 2]), 'b': numbers, 'c': [numbers]*5}, tmp_path/'file.pth')
    assert read_released(tmp_path/'file.pth')['c'] == [[1, 2]]*5


def nested_pair(depth: int) -> tuple:
    "A tuple that holds one tuple twice, which holds one tuple twice, …: 2**depth steps to hash."
    pair = ()
    for _ in range(depth): pair = pair, pair
    return pair


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('kind', ['pairs', 'counter', 'instructions', 'text'])
def test_work_without_end_is_refused_before_it_begins(kind, old, tmp_path, monkeypatch):
    monkeypatch.setattr('vicc.streams.MAX_INSTRUCTIONS', 5000)
    path = tmp_path/'bomb.pth.tar'
    torch.save({'state_dict': bomb(kind)}, path, _use_new_zipfile_serialization=not old)
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('it was read'))
    message = 'collections.Counter, which is neither' if kind == 'counter' else 'asks for more work than weights do'
    with pytest.raises(ValueError, match=f'bomb.pth.tar .*{message}'): read_released(path)


def test_what_training_scripts_save_is_no_bomb(tmp_path):
    "Two groups of Adam share a tuple of betas; a tensor has two names; options and a NumPy score."
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
    optimizer = torch.optim.Adam([dict(params=layer.parameters()) for layer in layers])
    layers[1](layers[0](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    weight = layers[0].weight
    content = dict(epoch=3, state_dict={**layers[0].state_dict(), 'again': weight, 'parameter': weight, **layers[1].state_dict()},
                   optimizer=optimizer.state_dict(), args=argparse.Namespace(lr=.1, steps=[1, 2]), best_acc=np.float64(.5))
    for old in (False, True):
        torch.save(content, tmp_path/'whole.pth.tar', _use_new_zipfile_serialization=not old)
        again = read_released(tmp_path/'whole.pth.tar')
        assert again['args'] == content['args'] and again['optimizer']['param_groups'] == content['optimizer']['param_groups']


def test_old_archives_are_refused_at_once(tmp_path):
    with tarfile.open(tmp_path/'2016.pth.tar', 'w', format=tarfile.PAX_FORMAT, pax_headers={'comment': 'x'*10**6}) as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    with pytest.raises(ValueError, match='2016.pth.tar is damaged or no PyTorch checkpoint .*no file of torch.save'):
        read_released(tmp_path/'2016.pth.tar')


def test_objects_are_named(r21d, write):
    for value, name in ((argparse.Namespace(path=Path('x')), r'pathlib[\w.]*'), (Path('x'), r'pathlib[\w.]*'),
                        (np.zeros(3), r'numpy[\w.]+')):
        with pytest.raises(ValueError, match=f'file.pth.tar holds {name}, which is neither.*weights alone'):
            load_rgb(write(r21d, args=value))


@pytest.mark.parametrize('content', [b'', b'weights of ViCC, see below\n', b'<!DOCTYPE html><html>', b'PK\x03\x04' + bytes(1000),
                                     b'\x80\x02}q\x00.', b'\x89PNG\r\n'])
def test_other_files(content, tmp_path):
    (tmp_path/'notes.pth.tar').write_bytes(content)
    with pytest.raises(ValueError, match='notes.pth.tar is damaged or no PyTorch checkpoint'):
        load_rgb(tmp_path/'notes.pth.tar')


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('share', [0.001, 0.5, 0.999])
def test_half_a_download(r21d, tmp_path, share, old):
    path = tmp_path/'half.pth.tar'
    torch.save({'state_dict': {name: tensor for name, tensor in r21d.items() if '.0.conv5' not in name}},
               path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(ValueError, match='half.pth.tar is damaged.*download it again'): load_rgb(path)


def test_not_a_file(tmp_path):
    for path in (tmp_path/'gone.pth.tar', tmp_path):
        with pytest.raises(FileNotFoundError, match='is not a file'): load_rgb(path)


def test_checkpoint_of_another_backbone(write):
    resnet = {f'encoder_q.0.layer{n}.conv1.weight': torch.zeros(1) for n in range(30)}
    with pytest.raises(ValueError, match='encoder_q does not fit .*Missing key.*backbone'):
        load_rgb(write(resnet))


def test_missing_extra_and_misshapen_keys(r21d, write):
    def refused(state, message):
        with pytest.raises(ValueError, match=message): load_rgb(write(state))
    lack = {name: tensor for name, tensor in r21d.items() if '.bn1.' not in name}
    refused(lack, 'file.pth.tar: encoder_q does not fit .*Missing key.*"backbone.bn1.weight", ')
    refused({name: t for name, t in r21d.items() if name != 'encoder_q.4.bias'},
            'Missing key.*: "head.2.bias"')
    refused({name: t for name, t in r21d.items() if not name.startswith('encoder_q.2.')},
            'Missing key.*: "head.0.weight", "head.0.bias"')
    refused({**r21d, 'encoder_q.0.fc.weight': torch.zeros(1)}, 'Unexpected key.*: "backbone.fc.weight"')
    refused({**r21d, 'encoder_q.3.weight': torch.zeros(1)}, 'Unexpected key.*: "3.weight"')
    refused({**r21d, 'decoder.weight': torch.zeros(1)}, r"there are \['decoder.weight'\]")
    refused({**r21d, 'module.prototypes.weight': torch.zeros(6, 8)}, r"there are \['prototypes.weight twice'\]")
    refused({**r21d, 'backbone.bn1.weight': torch.zeros(64)}, r"there are \['encoder_q.0.bn1.weight twice'\]")
    refused({**r21d, 'encoder_q': torch.zeros(1)}, r"there are \['encoder_q'\]")
    refused({f'wrapped.{name}': tensor for name, tensor in r21d.items()},
            r"no file of ViCC or CoCLR.*there are \['wrapped.encoder_q.0")
    refused({**r21d, 'encoder_q.0.conv1.spatial_conv.weight': torch.zeros(83, 2, 1, 7, 7)},
            r'size mismatch for backbone.conv1.spatial_conv.weight.*\[83, 2, 1, 7, 7\].*\[83, 3, 1, 7, 7\]')
    refused({**r21d, 'encoder_q.2.weight': torch.zeros(())}, 'size mismatch for head.0.weight')
    refused({**r21d, 'prototypes.weight': torch.zeros(6, 9)},
            r'size mismatch for prototypes.weight.*\[6, 9\].*\[6, 8\]')
    refused({**r21d, 'prototypes.weight': torch.zeros(())}, 'size mismatch for prototypes.weight')
    refused({**r21d, 'encoder_q.2.bias': torch.full((512,), torch.nan)},
            'infinite or not numbers: head.0.bias')
    refused({**r21d, 'prototypes.weight': torch.full((6, 8), torch.inf)},
            'infinite or not numbers: prototypes.weight')


def test_a_second_name_may_miss_but_not_both(write):
    state = light(KEYS['checkpoints']['single'])
    def load(keep):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith('encoder_q.0.')
                or keep(name[12:])}
        return type(load_rgb(write(kept)).backbone).__name__
    assert load(lambda name: not name.startswith('block')) == 'S3D'
    assert load(lambda name: name.startswith('block')) == 'S3D'
    missing = '"backbone.block1.0.conv1.weight", "backbone.block1.0.conv2.weight"'
    with pytest.raises(ValueError, match=f'Missing key.*: {missing}'):
        load(lambda name: not (name.startswith(('block1', 'Conv_1a')) and 'conv' in name))


def test_nothing_in_it(tmp_path):
    for content in ({}, {'epoch': 3}, {'state_dict': {}}, {'state_dict': None}, {'state_dict': torch.zeros(2)}, [1, 2],
                    {'state_dict': {'encoder_q.0.conv1.weight': 1}}, torch.zeros(3)):
        torch.save(content, tmp_path/'odd.pth.tar')
        with pytest.raises(ValueError, match="odd.pth.tar.*('state_dict' is no|no file of ViCC)"):
            load_rgb(tmp_path/'odd.pth.tar')


def test_wrong_wishes(r21d, write):
    path = write(r21d)
    with pytest.raises(ValueError, match="holds no rgb stream: give stream='optimised'$"):
        load_rgb(path, stream='rgb')
    with pytest.raises(ValueError, match="holds no frozen stream: give stream='optimised'$"):
        load_rgb(path, stream='frozen')
    with pytest.raises(ValueError, match=r'size mismatch for prototypes.weight.*\[6, 8\].*\[300, 8\]'):
        load_rgb(path, num_prototypes=300)


def test_export_refuses_what_the_released_code_cannot_read(tmp_path):
    wide, path = Stream('r21d', 4, 8), tmp_path/'file.pth.tar'
    with pytest.raises(ValueError, match='no SmallBackbone, only S3D'): export_released(Stream('small', 4, 8), path)
    for other in (Stream('r21d', 4, 6), Stream('s3d', 4, 8)):
        with pytest.raises(ValueError, match='one backbone and one projection_dim'): export_released(wide, path, other)
    with pytest.raises(RuntimeError, match='gone does not exist'):
        export_released(wide, tmp_path/'gone'/'file.pth.tar')
    with pytest.raises(OSError, match='[Dd]irectory'): export_released(wide, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_is_whole_or_not_at_all(tmp_path, monkeypatch):
    stream, path = Stream('r21d', 4, 8), tmp_path/'file.pth.tar'
    path.write_text('before')
    def fails(content, file):
        Path(file).write_text('half')
        raise OSError('disk full')
    monkeypatch.setattr(torch, 'save', fails)
    with pytest.raises(OSError, match='disk full'): export_released(stream, path)
    assert [file.name for file in tmp_path.iterdir()] == ['file.pth.tar'] and path.read_text() == 'before'


def test_export_of_other_memory_layouts(tmp_path):
    stream = Stream('r21d', 4, 8).to(memory_format=torch.channels_last_3d)
    state = torch.load(export_released(stream, tmp_path/'file.pth.tar'), weights_only=True)['state_dict']
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    holds(stream, state)


def test_what_was_given_in_place_of_a_stream(tmp_path):
    small = Stream('small', 6, 8)
    run = tmp_path/'run'/'stages'/'02-rgb-2'
    save_stream(small, run/'stream')
    for folder in (run, run.parent, tmp_path/'run'):
        with pytest.raises(FileNotFoundError, match='02-rgb-2/stream'): load_stream(folder)
    with pytest.raises(FileNotFoundError, match='folders are for load_stream'): load_released(run/'stream')
    torch.save(small, tmp_path/'whole.pth')
    with pytest.raises(ValueError, match=r'save_pretrained\(folder\) writes, for load_stream'): load_released(tmp_path/'whole.pth')
    with pytest.raises(ValueError, match='built already'): Stream(torch.nn.Linear)
