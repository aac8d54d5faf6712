"Classifiers: killed and resumed, two processes, ten crops by hand, the released code's habits, labels."
import json
import os
from pathlib import Path
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator

from helpers import Unplugged, unplug
from vicc.augment import apply_view, crop_boxes, crop_views, draw_view
from vicc.compare.finetune import (FINE_TUNING, LINEAR_PROBE, TRAINING_VIEWS, Classifier, LabelledClips, accuracy, cached_predict, classify, confusion, crop_choices, fuse, is_best,
                                 middle_clips, per_class_accuracy, predict, predictions_table, split_validation, train_classifier)
from vicc.data import TestClips, sample_generator, set_epoch, training_loader
from vicc.evaluation import evaluation_copy, extract_features
from vicc.streams import Stream
from vicc.video import VideoError, clip_indices, random_clip_start

VIEWS = replace(TRAINING_VIEWS, size=16, area=(.5, 1))
TINY = replace(FINE_TUNING, epochs=4, drops=(3,), batch_size=8, dropout=.5, learning_rate=.05, validation_fraction=.25)

class MadeUpStore:
    "A store in memory: bright videos are class 1, and brightness is all there is."
    settings, path = SimpleNamespace(hash='made-up'), Path('made-up')
    def __init__(self, count: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        sizes = [(24, 32) if number % 3 else (28, 24) for number in range(count)]
        self.manifest = pd.DataFrame([dict(video=f'v{number}.mp4', label=number % 2, class_name='dark bright'.split()[number % 2], group=f'g{number//2}', num_frames=7 + number % 3,
                                           fps=10., width=width, height=height) for number, (height, width) in enumerate(sizes)])
        self.pixels = {row.video: rng.integers(0, 128, (row.num_frames, row.height, row.width, 3), np.uint8) + np.uint8(100*row.label) for row in self.manifest.itertuples()}

    def file(self, video, stream): return Path(__file__)  # this file makes the pixels

    def read(self, video, stream, indices=None):
        frames = self.pixels[video][..., :2 if stream == 'flow' else 3]
        return frames if indices is None else frames[indices]

@pytest.fixture(scope='module')
def store(): return MadeUpStore(24)

@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)

def new_stream() -> Stream:
    torch.manual_seed(0)
    return Stream('small', 4, 8, {'width': 4, 'multipliers': [1, 2], 'spatial_strides': [2, 2], 'temporal_strides': [1, 1]})

def clips_of(store, rows=None, stream='rgb'): return TestClips(store, store.manifest if rows is None else rows, stream, 4, 2, 5)

def parts(store, settings):
    train, held_out = split_validation(store.manifest, settings)
    return LabelledClips(store, train, 2, 'rgb', 4, views=VIEWS, seed=settings.seed), middle_clips(clips_of(store, held_out))

def same(first: dict, second: dict) -> bool: return all(torch.equal(value, second[name]) for name, value in first.items())

@pytest.mark.parametrize('settings', [TINY, replace(TINY, backbone_rate=0., normalise=True, dropout=0.), replace(TINY, validation_fraction=0.)], ids=['fine-tuning', 'probe', 'no validation'])
def test_killed_and_resumed_ends_with_the_same_weights(store, cpu, settings, tmp_path):
    def run(folder, stop_at=None):
        training, validation = parts(store, settings) if settings.validation_fraction else (LabelledClips(store, store.manifest, 2, 'rgb', 4, views=VIEWS), None)
        if stop_at is not None: unplug(training.frames, stop_at)
        classifier = Classifier.from_stream(new_stream(), 2, settings)
        history = train_classifier('x', classifier, training, validation, settings, tmp_path/folder, None, cpu, log=lambda line: None)
        return classifier.state_dict(), history.drop(columns='clips_per_second')
    weights, history = run('unbroken')
    torch.manual_seed(99)  # what others do with torch's generator must not matter
    with pytest.raises(Unplugged): run('broken', stop_at=2*16 + 11)
    torch.rand(7)
    again, history_again = run('broken')
    assert same(weights, again) and history.equals(history_again) and len(history) == 4
    assert sorted(path.name.split('-')[0] for path in (tmp_path/'broken').iterdir()) == ['best', 'epoch']
    if not settings.validation_fraction: assert history.best_epoch.iloc[-1] == 4

def test_the_best_epoch_is_kept_and_other_settings_are_refused(store, cpu, tmp_path):
    settings = replace(TINY, epochs=6, drops=())
    training, validation = parts(store, settings)
    classifier = Classifier.from_stream(new_stream(), 2, settings)
    history = train_classifier('x', classifier, training, validation, settings, tmp_path, None, cpu, log=lambda line: None)
    labels = validation.kept_rows().label.to_numpy()
    best = history.iloc[history.best_epoch.iloc[-1] - 1]
    assert best.validation_accuracy == history.validation_accuracy.max()
    assert accuracy(predict(classifier, validation, 'centre', None, 16), labels) == pytest.approx(best.validation_accuracy)
    for changed, words in ((dict(seed=1), 'seed was 0, is 1'), (dict(weight_decay=.5), 'weight_decay was 0.001, is 0.5')):
        other = replace(settings, **changed)
        with pytest.raises(ValueError, match=words): train_classifier('x', Classifier.from_stream(new_stream(), 2, other), training, validation, other, tmp_path, None, cpu)
    with pytest.raises(ValueError, match='start was'):
        train_classifier('x', Classifier.from_stream(Stream('small', 4, 8, {'width': 8}), 2, settings), training, validation, settings, tmp_path, None, cpu)

def test_ten_crops_are_the_mean_of_ten_passes_for_each_size(store):
    classifier = Classifier.from_stream(new_stream(), 2, TINY).eval()
    for stream in ('rgb', 'flow'):
        clips = clips_of(store, store.manifest[:3], stream)
        answer = predict(classifier, clips, 'ten', 20, 16, batch_size=4)
        for video, row in enumerate(clips.rows.itertuples()):
            raw = torch.from_numpy(np.stack([clips[number][stream] for number, (own, _) in enumerate(clips.clips) if own == video]))
            views = crop_views(raw, *crop_boxes(row.height, row.width, 20), 16, stream)
            with torch.no_grad(): by_hand = classifier(views.flatten(0, 1)).softmax(1).mean(0)
            torch.testing.assert_close(answer[video], by_hand, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='does not fit'): predict(classifier, clips_of(store), 'ten', 30, 16)

@pytest.mark.parametrize('stream', ['rgb', 'flow'])
def test_views_of_a_batch_are_those_of_a_plain_reader(store, stream):
    clips = LabelledClips(store, store.manifest, 2, stream, 4, views=VIEWS, seed=3)
    loader = training_loader(clips, 24)
    set_epoch(loader, 2)
    [batch] = loader
    made = apply_view(batch[stream][:, 0], batch['views'][0], VIEWS, stream)
    for place, sample in enumerate(batch['sample'].tolist()):
        row, rng = store.manifest.iloc[sample], sample_generator(3, 2, sample)
        view = {name: torch.from_numpy(value)[None] for name, value in draw_view(VIEWS, row.height, row.width, True, rng).items()}
        indices = clip_indices(row.num_frames, 4, random_clip_start(row.num_frames, 4, rng))
        plain = apply_view(torch.from_numpy(store.read(row.video, stream, indices))[None], view, VIEWS, stream)[0]
        torch.testing.assert_close(made[place], plain, atol=1e-4, rtol=0)
    assert batch['label'].tolist() == store.manifest.label.to_numpy()[batch['sample']].tolist()

def test_a_video_that_cannot_be_read_is_replaced_and_told(cpu, tmp_path):
    store, settings, lines = MadeUpStore(24), replace(TINY, epochs=1, drops=(), validation_fraction=0.), []
    training = LabelledClips(store, store.manifest, 2, 'rgb', 4, views=VIEWS)
    read = training.frames.read
    def fails(video: str, *arguments):
        if video == 'v3.mp4': raise VideoError('v3.mp4 is damaged')
        return read(video, *arguments)
    training.frames.read = fails
    item = training[3]
    assert item['label'] == store.manifest.label[item['sample']] and item['sample'] != 3 and item['replaced'] == [('v3.mp4', 'v3.mp4 is damaged')]
    train_classifier('x', Classifier.from_stream(new_stream(), 2, settings), training, None, settings, tmp_path, None, cpu, log=lines.append)
    assert any('v3.mp4: v3.mp4 is damaged' in line for line in lines)

def test_a_copy_for_evaluation_gives_the_same_features(store):
    stream, clips = new_stream().train(), clips_of(store)
    with torch.no_grad(): stream.features(torch.randn(8, 3, 4, 16, 16))  # statistics of its own
    stream.eval()
    plain, fast = (extract_features(encoder, clips, 16, 20) for encoder in (stream.features, evaluation_copy(stream).features))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)
    rough = extract_features(evaluation_copy(stream).features, clips, 16, 20, precision='bf16')
    assert not torch.equal(rough, fast) and (rough - plain).abs().max() < .02
    with pytest.raises(ValueError, match="precision='half' is not one of"): extract_features(stream.features, clips, precision='half')

def test_flow_as_image_keeps_the_sign_of_flipped_flow(store):
    classifier = Classifier.from_stream(new_stream(), 2, TINY).eval()
    clips = clips_of(store, store.manifest[:2], 'flow')
    assert not torch.allclose(predict(classifier, clips, 'ten', 20, 16), predict(classifier, clips, 'ten', 20, 16, flow_as_image=True), atol=1e-6)
    torch.testing.assert_close(predict(classifier, clips, 'five', 20, 16), predict(classifier, clips, 'five', 20, 16, flow_as_image=True))

def test_exact_paper_jitters_from_a_seed(store):
    classifier = Classifier.from_stream(new_stream(), 2, TINY).eval()
    clips = clips_of(store)
    ask = lambda **options: predict(classifier, clips, 'centre', 20, 16, **options)
    assert torch.equal(ask(), ask(seed=5))
    assert torch.equal(ask(exact_paper=True, seed=5), ask(exact_paper=True, seed=5))
    torch.testing.assert_close(ask(exact_paper=True, seed=5), ask(exact_paper=True, seed=5, batch_size=7), atol=1e-5, rtol=0)
    assert not torch.allclose(ask(exact_paper=True, seed=5), ask(exact_paper=True, seed=6), atol=1e-6)
    generators = [np.random.default_rng((0, clip)) for clip in range(400)]
    choices = crop_choices(torch.full((400, 2), 24), 'centre', 20, generators)[0]
    share = (choices['factors'] != torch.tensor([1., 1, 1, 0])).any(1).float().mean().item()
    assert .22 < share < .38 and (choices['grey'] == -1).all() and (choices['sigma'] == 0).all() and not choices['flip'].any()
    train, validation = split_validation(store.manifest[:16], replace(TINY, exact_paper=True), store.manifest[16:])
    assert len(train) == 16 and set(validation.video) <= set(store.manifest.video[16:]) and len(validation) == 2

def test_validation_holds_out_whole_groups(store):
    train, held_out = split_validation(store.manifest, TINY)
    assert not set(train.group) & set(held_out.group) and len(train) + len(held_out) == 24

def test_classify_goes_on_and_caches(store, cpu, tmp_path):
    run = lambda log: classify('x', new_stream(), 'rgb', store, store.manifest[:16], clips_of(store, store.manifest[16:]), 2, TINY, tmp_path, 4, training_views=VIEWS, crop=20, min_frames=5,
                               accelerator=cpu, log=log)
    lines = []
    probabilities, history = run(lines.append)
    assert len(lines) == 4 and (tmp_path/'classifier'/'config.json').is_file() and len(pd.read_csv(tmp_path/'history.csv')) == 4
    [file] = (tmp_path/'probabilities').rglob('*.safetensors')
    file.write_bytes(b'nonsense')
    again, _ = run(lines.append)
    assert torch.equal(again, probabilities) and len(lines) == 4
    table = predictions_table(store.manifest[16:], probabilities, ['dark', 'bright'])
    assert list(table.columns) == ['video', 'true', 'predicted', 'right', 'p(dark)', 'p(bright)'] and table.right.mean() == pytest.approx(accuracy(probabilities, store.manifest.label[16:].tolist()))
    with pytest.raises(ValueError, match="of the stream 'rgb', not 'flow'"):
        classify('x', new_stream(), 'flow', store, store.manifest, clips_of(store), 2, TINY, tmp_path/'other')
    with pytest.raises(ValueError, match='test videos have no label from 0 to 1'):
        classify('x', new_stream(), 'rgb', store, store.manifest, clips_of(store, store.manifest.assign(label=2)), 2, TINY, tmp_path/'other')
    assert not (tmp_path/'other').exists()

def test_parts_give_the_same_answer(store, tmp_path):
    classifier, clips = Classifier.from_stream(new_stream(), 2, TINY).eval(), clips_of(store)
    torch.testing.assert_close(cached_predict(classifier, clips, tmp_path, 'five', 20, 16, part_clips=5), predict(classifier, clips, 'five', 20, 16), atol=1e-6, rtol=0)
    assert len(list(tmp_path.rglob('*.safetensors'))) > 3

@pytest.mark.parametrize('label', [-1, 2, 1.5, None])
def test_labels_are_checked(store, label):
    rows = store.manifest.astype({'label': object})
    rows.loc[3, 'label'] = label
    with pytest.raises(ValueError, match=r'1 of 24 training videos have no label from 0 to 1 \(v3.mp4'): LabelledClips(store, rows, 2)

def test_settings():
    assert [LINEAR_PROBE.rate(epoch) for epoch in (59, 60, 99)] == pytest.approx([.1, .01, .001])
    assert (FINE_TUNING.epochs, FINE_TUNING.drops, FINE_TUNING.dropout, FINE_TUNING.batch_size) == (500, (200, 300, 400, 450), .9, 128)
    for values, words in ((dict(drops=(80, 60)), 'must rise'), (dict(dropout=1.), 'dropout=1.0'), (dict(batch_size=0), 'batch_size=0'), (dict(learning_rate=0), 'learning_rate=0')):
        with pytest.raises(ValueError, match=words): replace(LINEAR_PROBE, **values)

def test_measures():
    probabilities, labels = torch.tensor([[.7, .2, .1], [.1, .5, .4], [.2, .5, .3]]), [0, 1, 2]
    assert accuracy(probabilities, labels) == pytest.approx(2/3) and accuracy(probabilities, labels, 2) == 1
    assert confusion(probabilities, labels).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]] and per_class_accuracy(probabilities, labels).tolist() == [1, 1, 0]
    assert fuse(probabilities, probabilities.flip(1))[0].tolist() == pytest.approx([.4, .2, .4])
    with pytest.raises(ValueError, match='sum to 1'): fuse(torch.ones(2, 3))

def test_which_epoch_is_best():
    history = []
    for epoch, (share, loss, best) in enumerate([(.5, 1., 1), (.4, .5, 1), (.5, .9, 3), (.5, .9, 3), (.6, 2., 5)], 1):
        row = dict(epoch=epoch, validation_accuracy=share, validation_loss=loss)
        history.append({**row, 'best_epoch': epoch if is_best(row, history) else history[-1]['best_epoch']})
        assert history[-1]['best_epoch'] == best
    assert is_best(dict(epoch=6), history)  # without validation the last one counts

def work(rank: int, processes: int, folder: str) -> None:
    "One process of a training; the result goes to a file."
    if processes > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT='29591', GLOO_SOCKET_IFNAME='lo', ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    accelerator, settings, store = Accelerator(cpu=True), replace(TINY, epochs=2, drops=(), backbone_rate=0., dropout=0.), MadeUpStore(24)
    training, validation = parts(store, settings)
    classifier = Classifier.from_stream(new_stream(), 2, settings)
    history = train_classifier('x', classifier, training, validation, settings, f'{folder}/{processes}', 20, accelerator, log=lambda line: None)
    torch.save(dict(weights=classifier.state_dict(), history=history.drop(columns=['clips_per_second']).to_dict('list'), probabilities=predict(classifier, clips_of(store), 'five', 20, 16,
                                                                                                                               accelerator=accelerator)), f'{folder}/{processes}-{rank}.pt')
    if processes > 1: torch.distributed.destroy_process_group()

def test_two_processes_compute_what_one_does(tmp_path):
    work(0, 1, str(tmp_path))
    mp.spawn(work, (2, str(tmp_path)), 2)
    one, first, second = (torch.load(tmp_path/f'{name}.pt', weights_only=True) for name in ('1-0', '2-0', '2-1'))
    assert same(first['weights'], second['weights']) and torch.equal(first['probabilities'], second['probabilities'])
    for name, value in one['weights'].items(): torch.testing.assert_close(first['weights'][name], value, atol=1e-5, rtol=0)
    torch.testing.assert_close(first['probabilities'], one['probabilities'], atol=1e-5, rtol=0)
    assert first['history']['loss'] == pytest.approx(one['history']['loss'], abs=1e-5) and first['history']['validation_accuracy'] == one['history']['validation_accuracy']

@pytest.mark.timeout(300)
def test_run_evaluate_from_saved_streams_and_again(tmp_path):
    import papermill as pm
    from vicc.streams import save_stream
    from vicc.synthetic import make_moving_shapes
    root, made = Path(__file__).parents[1], make_moving_shapes(tmp_path/'shapes', 16, 8)
    for name in ('rgb', 'flow'): save_stream(new_stream(), tmp_path/name)
    values = dict(rgb=str(tmp_path/'rgb'), flow=str(tmp_path/'flow'), recipe=str(root/'nbs'/'recipes'/'demo.yaml'), manifest=str(made['train']), test_manifest=str(made['test']),
                  videos=str(made['videos']), output=str(tmp_path/'out'), linear_epochs=2, tuning_epochs=2, batch_size=8, validation_fraction=0.0, random_weights=False, crops='five')
    execute = lambda **changes: pm.execute_notebook(root/'nbs'/'run_evaluate.ipynb', tmp_path/'out.ipynb', {**values, **changes}, progress_bar=False, cwd=root)
    execute()
    read = lambda: json.loads((tmp_path/'out'/'metrics.json').read_text())
    first = read()
    assert set(first['retrieval']) == {'chance', 'rgb', 'flow', 'rgb + flow'}
    assert set(first['classifiers']) == {f'{protocol}, pretrained {name}' for protocol in ('linear probe', 'fine-tuning') for name in ('rgb', 'flow', 'rgb + flow')}
    assert len(list((tmp_path/'out'/'predictions').glob('*.csv'))) == 6 and len(list((tmp_path/'out'/'pictures').glob('*.png'))) == 4
    execute(fine_tuning=False)
    again = read()
    assert again['retrieval'] == first['retrieval'] and all(first['classifiers'][title] == row for title, row in again['classifiers'].items())
    with pytest.raises(Exception, match='linear_epochs is 2, not 3'): execute(linear_epochs=3)
