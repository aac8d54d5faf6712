"Encoders of others: their own weights, normalisation and clips; a cache that is never stale; a gallery search that fits into memory."
import json
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from vicc.augment import normalize
from vicc.encoders import (
    VideoEncoder, check_encoder, encoder_features, evaluate_encoder, load_encoder, random_encoder, stream_encoder, torchvision_encoder, transformers_encoder,
)
from vicc.engine.checkpoint import weights_hash
from vicc.evaluation import evaluate_stream
from vicc.prepare import prepare
from vicc.recipe import Recipe
from vicc.streams import Stream
from vicc.synthetic import make_moving_shapes

RECIPE = Recipe.read('demo', test_step=8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A store and the rows of gallery and queries."
    root = tmp_path_factory.mktemp('encoders')
    shapes = make_moving_shapes(root/'shapes', 16, 8)
    tables = [pd.read_csv(shapes[name]) for name in ('train', 'test')]
    store = prepare(pd.concat(tables), shapes['videos'], root/'store', RECIPE.prepare_settings(), workers=0, log=lambda line: None)
    return store, [store.select(table) for table in tables]


def mean_colour(clips): return clips.mean((2, 3, 4))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, clips): return self.layer(mean_colour(clips))

    def twice(self, clips): return 2*self.forward(clips)


def test_normalisation_is_undone_and_redone_as_torchvision_does_it():
    from torchvision.transforms.functional import normalize as reference
    frames = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    seen, mean, std = [], (.43, .39, .38), (.23, .22, .21)
    encoder = VideoEncoder(lambda clips: seen.append(clips) or mean_colour(clips), size=8, resize=12, mean=mean, std=std)
    encoder(normalize(frames.transpose(0, 1)[None]))
    assert torch.allclose(seen[0][0].transpose(0, 1), reference(frames[:, :, 2:10, 2:10], mean, std), atol=1e-5)
    twin = VideoEncoder(lambda clips: seen.append(clips) or mean_colour(clips), size=12)
    views = normalize(frames.transpose(0, 1)[None])
    twin(views)
    assert torch.equal(seen[1], views)


def test_a_stream_has_the_numbers_of_evaluate_stream(data):
    torch.manual_seed(0)
    stream = Stream('small', 8, 16, {'width': 8}, RECIPE.trained_on('flow') | dict(flow_channels='vu'))
    encoder = stream_encoder(stream, crop=48)
    clips = [encoder.test_clips(data[0], rows, RECIPE) for rows in data[1]]
    scores, features = evaluate_encoder(encoder, *clips, ks=(1, 3))
    same, theirs = evaluate_stream(stream, 'flow', *clips, size=RECIPE.view_size, crop=48, ks=(1, 3))
    assert scores == same and torch.allclose(features['gallery'], theirs['gallery'], atol=1e-6)
    with pytest.raises(ValueError, match='trained on flow, not on rgb'): stream_encoder(stream, 'rgb')


def test_encoders_of_any_stride_see_the_same_videos(data):
    store, (gallery, _) = data
    gallery = gallery.assign(num_frames=[8, 9, 10] + 13*[16])
    strides = {stride: VideoEncoder(mean_colour, 4, stride).test_clips(store, gallery, RECIPE).kept_rows().video.tolist() for stride in (1, 2, 3, 4)}
    assert all(videos == gallery.video[1:].tolist() for videos in strides.values())  # min_frames is 9


def test_weights_of_torchvision_come_from_its_files(tmp_path, monkeypatch):
    from torchvision.models.video import R3D_18_Weights, r3d_18
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    network = r3d_18()
    entry = R3D_18_Weights.KINETICS400_V1
    torch.save(network.state_dict(), tmp_path/'checkpoints'/entry.url.rpartition('/')[2])
    encoder = torchvision_encoder('r3d_18', 'DEFAULT')
    assert (encoder.clip_length, encoder.stride, encoder.size, encoder.resize, encoder.weights) == (16, 2, 112, 128, 'KINETICS400_V1')
    assert list(encoder.mean) == entry.transforms().mean and not encoder.network.training
    clips = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.eval().fc = nn.Identity()
        assert torch.equal(encoder.function(clips), network(clips))
    torch.save(network.state_dict(), tmp_path/'checkpoints'/entry.url.rpartition('/')[2])
    with pytest.raises(RuntimeError, match='Missing key'): torchvision_encoder('r3d_18', entry)  # a file without classifier; an entry works as its name


def test_weights_that_cannot_be_had_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    def no_network(*arguments, **options): raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    with pytest.raises(ValueError, match=r'R3D_18_Weights.KINETICS400_V1 cannot be loaded \(no route to host\): copy .*r3d_18-.*\.pth to .*/checkpoints'): torchvision_encoder('r3d_18', 'DEFAULT')


@pytest.mark.parametrize('name', ['videomae', 'vjepa2'])
def test_networks_of_transformers(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    transformers.utils.logging.set_verbosity_error()
    small = dict(patch_size=8, hidden_size=36, num_hidden_layers=1, num_attention_heads=2)
    if name == 'videomae': config = transformers.VideoMAEConfig(image_size=16, num_frames=4, intermediate_size=64, **small)
    else: config = transformers.VJEPA2Config(crop_size=16, frames_per_clip=4, pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2, **small)
    encoder = transformers_encoder(config, stride=2)
    assert (encoder.clip_length, encoder.stride, encoder.size, encoder.weights) == (4, 2, 16, 'random')
    assert check_encoder(encoder).shape == (1, 36)
    assert weights_hash(encoder.network) == weights_hash(transformers_encoder(config).network) != weights_hash(transformers_encoder(config, seed=1).network)
    model = encoder.network.model
    model.save_pretrained(tmp_path/'model')
    with pytest.raises(OSError): transformers_encoder(tmp_path/'model')  # no word about its normalisation
    kind = transformers.VideoMAEVideoProcessor if name == 'videomae' else transformers.VJEPA2VideoProcessor
    sizes = dict(size={'shortest_edge': 20}, crop_size={'height': 16, 'width': 16})
    kind(image_mean=[.1, .2, .3], image_std=[.5, .6, .7], **sizes).save_pretrained(tmp_path/'model')
    read = transformers_encoder(str(tmp_path/'model'))
    assert (read.mean, read.std, read.size, read.resize, read.weights) == ((.1, .2, .3), (.5, .6, .7), 16, 20 if name == 'videomae' else 18, str(tmp_path/'model'))  # V-JEPA's own: crop times 256/224
    clips = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model(clips.transpose(1, 2), **({} if name == 'videomae' else {'skip_predictor': True})).last_hidden_state
    assert torch.allclose(read.function(clips), tokens.mean(1), atol=1e-5)
    from safetensors.torch import load_file, save_file
    tensors = load_file(tmp_path/'model'/'model.safetensors')
    gone = next(key for key in tensors if 'query' in key or 'q_proj' in key)
    save_file({key: value for key, value in tensors.items() if key != gone}, tmp_path/'model'/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='lacks 1 tensors of'): transformers_encoder(str(tmp_path/'model'))


def test_transformers_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r"pip install 'vicc\[compare\]'"): transformers_encoder('folder')


def test_a_network_in_training_mode_is_noticed():
    torch.manual_seed(0)
    for layer in (nn.Dropout(.5), nn.BatchNorm1d(3)):
        network = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), layer)
        function = VideoEncoder(lambda clips: network(clips), size=8, clip_length=2)
        with pytest.raises((ValueError, RuntimeError), match='alone and beside another: call eval|more than 1 value per channel'): check_encoder(function)
        check_encoder(VideoEncoder(network, size=8, clip_length=2))  # a module is put in eval mode


def test_an_encoder_of_the_users(tmp_path, monkeypatch):
    (tmp_path/'theirs.py').write_text('from torch import nn\nfrom vicc.encoders import VideoEncoder\ndef net(): return nn.Flatten()\n'
                                      'def whole(): return VideoEncoder(nn.Flatten(), 2, size=4)\ndef function(): return lambda clips: clips.flatten(1)\n'
                                      'ready = VideoEncoder(nn.Flatten(), 3, size=4)\ndef nothing(): pass\n')
    monkeypatch.chdir(tmp_path)
    values = dict(clip_length=8, size=6)
    found = {name: load_encoder(f'theirs:{name}', **values) for name in ('net', 'whole', 'function', 'ready')}
    assert {name: (encoder.clip_length, encoder.size) for name, encoder in found.items()} == {'net': (8, 6), 'whole': (2, 4), 'function': (8, 6), 'ready': (3, 4)}
    with pytest.raises(ValueError, match='--encoder theirs:nothing returns a NoneType: return a VideoEncoder'): load_encoder('theirs:nothing')


def test_what_a_cache_is_keyed_by(data, tmp_path):
    torch.manual_seed(0)
    store, (gallery, _) = data
    values, computed, network = dict(clip_length=4, size=8), [], Tiny()
    def count(module, inputs, output): computed.append(len(inputs[0]))
    network.register_forward_hook(count)
    def features(function, **changes):
        encoder = VideoEncoder(function, **values | changes)
        computed.clear()
        found = encoder_features(encoder, encoder.test_clips(store, gallery, RECIPE), tmp_path)
        return found, sum(computed) > 3  # more than the noise
    first, fresh = features(network)
    again, stale = features(network)
    assert fresh and not stale and torch.equal(first, again)
    assert features(network, mean=(.5, .5, .5))[1] and features(network, resize=12)[1] and features(network, version='2')[1] and features(network, stride=2)[1]
    with torch.no_grad(): network.layer.weight += 1
    assert features(network)[1] and not torch.equal(features(network)[0], first)
    assert torch.allclose(features(network.twice)[0], features(network)[0])  # another key; of length 1 all the same
    Tiny.forward, kept = (lambda self, clips: self.layer(clips.amax((2, 3, 4)))), Tiny.forward
    try:
        with pytest.raises(ValueError, match='answers otherwise now: was its code changed'): features(network)
    finally: Tiny.forward = kept
    with pytest.raises(ValueError, match='needs a name for the cache'): features(mean_colour)
    assert torch.equal(features(mean_colour, version='a')[0], features(mean_colour, version='a')[0])


def test_random_networks_repeat_and_leave_the_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = (random_encoder('small', seed, {'width': 4}, clip_length=4, view_size=16) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert weights_hash(one.network) == weights_hash(two.network) != weights_hash(other.network)


def test_settings_name_the_extra():
    import configparser
    from pathlib import Path
    config = configparser.ConfigParser(delimiters=['='])
    config.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
    assert 'transformers' in config['DEFAULT']['compare_requirements'] and 'transformers' not in json.dumps(config['DEFAULT']['requirements'])
