"""What a newcomer's mistakes lead to: the message of the trial, whether its first repair worked, and what is said now.

python tests/robustness/message_trials.py nbs/results/message_trials.csv

A newcomer tried wrong inputs and repaired each as its message said; columns mistake, message and first_try are that record.
Column mended is computed here: each case under `@now(mistake, …)` makes the mistake again in an empty folder and returns what
is said, or 'value right now' after it has compared the value. 'as before' stands where the first repair had worked.
"""
import argparse
import os
import tempfile
import warnings
from pathlib import Path

import av
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from odd_inputs import message, picture, rows, table

from vicc.alternation import alternate
from vicc.augment import ViewSettings, apply_view, center_crop
from vicc.backbones import BACKBONES, create_backbone, register_backbone
from vicc.engine.io import atomic_write, find_project
from vicc.evaluation import (
    chance_recall, cosine_similarity, nearest_neighbours, quick_probe, recall_at_k, retrieval_recall,
)
from vicc.losses import swapped_prediction_loss
from vicc.manifests import check_manifest, check_train_test, read_manifest, require_videos
from vicc.prepare import PrepareSettings, choose_device, prepare
from vicc.prototypes import sinkhorn
from vicc.recipe import Recipe
from vicc.streams import Stream, load_released, load_stream, save_stream
from vicc.synthetic import make_moving_shapes
from vicc.video import read_frames, write_video

RIGHT = 'value right now'
CASES = {}  # mistake → function of an empty folder
FEATURES, LABELS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


def now(mistake):
    "Register what makes a mistake again."
    def register(function):
        CASES[mistake] = function
        return function
    return register


def simply(mistake, *call, **options):
    "Register a mistake that needs no folder."
    CASES[mistake] = lambda folder: message(*call, **options)


for mistake, text in {
        'label 1.5, or -2': 'video,label\na.mp4,1.5\n', 'columns called Video,Label': 'video,Label\na.mp4,1\n',
        'query manifest with column lable (labels -1)': 'video,lable\na.mp4,1\n',
        'comment line before the header': '# my videos\nvideo,label\na.mp4,1\n',
        'a row with too few cells': 'video,label\na.mp4,1\nb.mp4\n',
        'header with , and rows with ;': 'video,label\na.mp4;1\n',
        'a quote that is never closed': 'video,label\n"a.mp4,1\nb.mp4",1\n'}.items():
    CASES[mistake] = lambda folder, text=text: message(table, folder, text)


@now('a label left empty where class_name is known')
def label_of_the_class(folder):
    return RIGHT if rows(table(folder, 'video,label,class_name\na.mp4,3,run\nb.mp4,,run\n')) == [['a.mp4', 3], ['b.mp4', 3]] else 'wrong'


# --- videos

def prepared(folder, videos, **options):
    "What prepare says, or notes of each video."
    names, settings = pd.DataFrame(dict(video=videos)), options.pop('settings', PrepareSettings(48, 'farneback', 100))
    try: store = prepare(names, folder, folder.parent/'store', settings, workers=0, log=lambda line: None, **options)
    except (ValueError, OSError) as error: return str(error)
    noted = '; '.join(store.manifest.get('note', pd.Series([''])))
    return f'{store.manifest.num_frames[0]} frames are stored' + f' ({noted})'*bool(noted)


def noise(count=100):
    "Pictures that do not compress well."
    return np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)


def cut(path):
    "Leave the first half of a file."
    write_video(path, noise())
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    return whole


@now('video cut in half (mp4 faststart, also avi, ts, mpg, flv, wmv)')
def cut_and_replaced(folder):
    whole = cut(folder/'a.ts')
    first = prepared(folder, ['a.ts'])
    (folder/'a.ts').write_bytes(whole)
    return f'{first}. After the repair: {prepared(folder, ["a.ts"])}'


@now('video cut in half (mkv, webm)')
def cut_matroska(folder):
    cut(folder/'a.mkv')
    return prepared(folder, ['a.mkv'])


def with_sound(path, codec):
    "A second of silence."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@now('sound file named .mp4')
def sound(folder):
    with_sound(folder/'sound.mp4', 'aac')
    return prepared(folder, ['sound.mp4'])


@now('picture/sound .png .mp3')
def sound_container(folder):
    with_sound(folder/'sound.mp3', 'mp3')
    return prepared(folder, ['sound.mp3'])


@now('container not supported: .y4m, .webp (read_frames, prepare)')
def y4m(folder):
    with av.open(str(folder/'a.y4m'), 'w') as container:
        stream = container.add_stream('wrapped_avframe', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for frame in noise(3): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24').reformat(format='yuv420p')))
    return prepared(folder, ['a.y4m'])


@now('video listed that does not exist (prepare)')
def folder_as_video(folder):
    (folder/'dir.mp4').mkdir()
    return message(require_videos, pd.DataFrame(dict(video=['gone.mp4', 'dir.mp4'])), folder)


@now('flow_bound much too small')
def clipped(folder):
    write_video(folder/'a.mp4', noise(5))
    return prepared(folder, ['a.mp4'], settings=PrepareSettings(48, 'farneback', .5))


for mistake, indices in {'read_frames with []': [], 'read_frames with a mask': [True, False], 'read_frames with 1.9': [0, 1.9]}.items():
    CASES[mistake] = lambda folder, indices=indices: message(read_frames, write_film(folder), indices)


def write_film(folder):
    "Four frames."
    write_video(folder/'a.mp4', [picture(number) for number in range(4)])
    return folder/'a.mp4'


# --- recipes, runs, stores

simply('value of wrong type (text)', Recipe.read, 'demo', 'temperature=warm')
simply('four values of wrong type', Recipe.read, 'demo', 'tensorboard=1', 'view_size=', "momentum='0,9'", 'seed=x')
CASES['mixed_precision: no without quotes (YAML)'] = lambda folder: RIGHT if Recipe.read('demo', mixed_precision=False).mixed_precision == 'no' else 'wrong'
simply('--device cuda without a GPU (prepare)', choose_device, 'cuda' if not torch.cuda.is_available() else 'gpu', 'tvl1')


CASES['fp16 on a CPU'] = lambda folder: RIGHT if Recipe.read('demo', 'mixed_precision=no').mixed_precision == 'no' else 'wrong'


@now('recipe by name, not inside the clone')
def outside(folder):
    here = os.getcwd()
    os.chdir(folder)
    try: return RIGHT if Recipe.read('demo').backbone == 'small' else 'another recipe'
    finally: os.chdir(here)


def small_store(folder, count=8):
    "A recipe, its store, and the training videos."
    recipe = Recipe.read('demo', cycles=0, single_epochs_rgb=1, single_epochs_flow=1, single_batch_size=4, cross_batch_size=4)
    shapes = make_moving_shapes(folder/'shapes', count, 8)
    store = prepare(shapes['train'], shapes['videos'], folder/'store', recipe.prepare_settings(), workers=0, log=lambda line: None)
    return recipe, store, read_manifest(shapes['train'])


@now('batch larger than the number of videos')
def large_batch(folder):
    recipe, store, _ = small_store(folder)
    return message(alternate, recipe.replace(single_batch_size=32), store, folder/'run', accelerator=Accelerator(cpu=True))


@now('clip_length longer than the videos')
def long_clips(folder):
    recipe, store, _ = small_store(folder)
    lines = []
    alternate(recipe.replace(clip_length=20), store, folder/'run', accelerator=Accelerator(cpu=True), log=lines.append)
    return lines[0]


def finished_run(folder):
    "A recipe, and a function that goes on with its run."
    recipe, store, _ = small_store(folder)
    def run(recipe, **options): alternate(recipe, store, folder/'run', accelerator=Accelerator(cpu=True), log=lambda line: None, **options)
    run(recipe)
    return recipe, run


@now('run folder of another recipe')
def another_run(folder):
    recipe, run = finished_run(folder)
    return message(run, recipe.replace(cycles=1))


@now('more epochs of a finished stage')
def longer(folder):
    recipe, run = finished_run(folder)
    return message(run, recipe.replace(single_epochs_rgb=2, single_schedule_epochs=2), accept_changes=True)


@now('folder of the run instead of the stream')
def run_as_stream(folder):
    finished_run(folder)
    return message(load_stream, folder/'run')


@now('store made with other settings (train)')
def another_store(folder):
    recipe, store, _ = small_store(folder)
    return message(recipe.replace(short_side=32, flow_bound=20., flow_method='dis').check_store, store)


@now('store lacks videos of the manifest (some)')
def lacks(folder):
    _, store, train = small_store(folder)
    return message(store.select, pd.concat([train, train.head(2).assign(video=['x/1.mp4', 'x/2.mp4'])]))


@now('labels without names, numbered otherwise than in the store')
def numbered(folder):
    _, store, train = small_store(folder)
    labels = (train.label + 1) % 8
    return message(store.select, train.assign(label=labels, class_name=labels.astype(str)))


# --- tensors

STREAM = Stream('small', 4, 8, {'width': 2})
SQUARE = center_crop(torch.tensor([[16, 16]]))
BROKEN = FEATURES*torch.tensor([torch.nan] + 7*[1.])[:, None]
simply('NaN features', retrieval_recall, BROKEN, LABELS, FEATURES, LABELS)
simply('NaN features in the quick probe', quick_probe, BROKEN, LABELS, FEATURES, LABELS)
simply('queries with label -1 (retrieval_recall)', retrieval_recall, FEATURES, LABELS - 1, FEATURES, LABELS)
simply('chance_recall of label -1', chance_recall, [0, -1], [0, 1])
simply('R@0', recall_at_k, FEATURES@FEATURES.T, LABELS, LABELS, (0, 1))
simply('swapped_prediction_loss with temperature -1', swapped_prediction_loss, [torch.zeros(2, 3)]*2, [torch.ones(2, 3)/3]*2, -1)
simply('sinkhorn with epsilon 0', sinkhorn, torch.zeros(2, 3), 0)
simply('views of size 0', ViewSettings, 0)
simply('one prototype', Stream, 'small', 1)
simply('float clips given to apply_view', apply_view, torch.zeros(1, 2, 16, 16, 3), SQUARE)
simply("apply_view(stream='RGB')", apply_view, torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8), SQUARE, stream='RGB')
CASES['nearest_neighbours of one query'] = lambda folder: RIGHT if int(nearest_neighbours(FEATURES[3:4], FEATURES)[0][0, 0]) == 3 else 'wrong'
CASES['one gallery video'] = lambda folder: RIGHT if int(cosine_similarity(FEATURES, FEATURES[3:4]).argmax()) == 3 else 'wrong'


@now('register_backbone with the name of a built-in')
def register(folder):
    before = dict(BACKBONES)
    try: return message(register_backbone, 'small', BACKBONES['small'])
    finally: BACKBONES.update(before)


@now('load_stream with misspelt option')
def keyword(folder):
    try: load_stream(save_stream(STREAM, folder/'stream'), num_prototype=3)
    except TypeError as error: return f'TypeError: {error}'


@now('weights with foreign names (own state_dict of a vicc Stream)')
def own_weights(folder):
    torch.save(STREAM.state_dict(), folder/'own.pth')
    return message(load_released, folder/'own.pth', modality='rgb')


@now('Stream with a backbone without num_features (that returns maps)')
def maps(folder):
    network = torch.nn.Conv3d(3, 8, 1)
    first = message(Stream, network)
    network.num_features = 8
    return f'{first}. After the repair: {message(Stream(network), torch.zeros(2, 3, 4, 6, 6))}'


@now("backbone s3d with the demo's backbone_options")
def options_of_another_backbone(folder):
    return message(create_backbone, 's3d', width=16, multipliers=[1, 2, 4, 8])


@now('vicc evaluate with a stream of flow as rgb=')
def flow_as_rgb(folder):
    stream = Stream('small', 6, 8, backbone_options={'width': 2}, trained_on={'modality': 'flow'})
    return message(load_stream, save_stream(stream, folder/'stream'), 'rgb')


@now('the same without class_name')
def shifted_labels(folder):
    tables = [check_manifest(pd.DataFrame(dict(video=[f'{name}/{side}.mp4' for name in names], label=labels)))
              for side, names, labels in (('train', 'abc', [0, 1, 2]), ('test', 'ab', [1, 2]))]
    return message(check_train_test, *tables)


def main():
    "Make each mistake again, and write the table."
    parser = argparse.ArgumentParser()
    parser.add_argument('table', type=Path)
    file = parser.parse_args().table
    record, said = pd.read_csv(file, dtype=str, keep_default_na=False), {}
    for mistake in CASES:
        with tempfile.TemporaryDirectory() as outer, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            folder = Path(outer)/'in'  # a store lies beside it
            folder.mkdir()
            said[mistake] = CASES[mistake](folder)
            for path in (folder, outer, find_project()): said[mistake] = said[mistake].replace(str(path), '…')
    unknown = sorted(set(said) - set(record.mistake))
    if unknown: raise SystemExit(f'not in {file}: {unknown}')
    record['mended'] = [said.get(mistake, 'as before') for mistake in record.mistake]
    with atomic_write(file) as temporary: record.to_csv(temporary, index=False)


if __name__ == '__main__': main()
