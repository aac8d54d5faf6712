"Classifiers: killed and resumed, two processes, ten crops by hand, the released code's habits, labels."
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator

from helpers import Unplugged, unplug
from vicc.augment import ViewSettings, apply_view, center_crop, random_view_params
from vicc.compare.finetune import (FINE_TUNING, LINEAR_PROBE, TRAINING_VIEWS, Classifier, LabelledClips, accuracy,
                                   best_epoch, train_and_test_classifier, late_fusion, iter_test_crops,
                                   keep_middle_clips, predict, predictions_table,
                                   split_validation, train_classifier)
from vicc.data import TestClips, training_loader
from vicc.engine.fit import RunConfig, TIMING
from vicc.evaluation import extract_features
from vicc.fast.layers import inference_copy
from vicc.protocols import released_jitter_params
from vicc.recipe import Recipe
from vicc.streams import Stream
from vicc.video import VideoError, clip_indices, random_clip_start

VIEWS = replace(TRAINING_VIEWS, size=16, area=(.5, 1))
TINY = replace(FINE_TUNING, epochs=4, milestones=(3,), batch_size=8, dropout=.5, learning_rate=.05,
               validation_fraction=.25)
PROBE = replace(TINY, backbone_lr_scale=0., normalise=True, dropout=0.)
UNVALIDATED = replace(TINY, validation_fraction=0.)

class MadeUpStore:
    "A store in memory: bright videos are class 1, and brightness is all there is."
    settings, path = SimpleNamespace(hash='made-up'), Path('made-up')

    def __init__(self, count: int, seed: int = 0):
        rng, rows, self.pixels = np.random.default_rng(seed), [], {}
        for number in range(count):
            height, width = (24, 32) if number % 3 else (28, 24)
            rows.append(dict(video=f'v{number}.mp4', label=number % 2, class_name=('dark', 'bright')[number % 2],
                             group=f'g{number//2}', num_frames=7 + number % 3, fps=10., width=width, height=height))
        self.manifest = pd.DataFrame(rows)
        for row in rows:
            noise = rng.integers(0, 128, (row['num_frames'], row['height'], row['width'], 3), np.uint8)
            self.pixels[row['video']] = noise + np.uint8(100*row['label'])

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
    options = {'width': 4, 'multipliers': [1, 2], 'spatial_strides': [2, 2], 'temporal_strides': [1, 1]}
    return Stream('small', 4, 8, options)

def new_classifier(config=TINY) -> Classifier: return Classifier.from_stream(new_stream(), 2, config)

def clips_of(store, rows=None, stream='rgb'):
    return TestClips(store, store.manifest if rows is None else rows, stream, 4, 2, 5)

def training_sets(store, config):
    train, held_out = split_validation(store.manifest, config)
    training = LabelledClips(store, train, 2, 'rgb', 4, views=VIEWS, seed=config.seed)
    return training, None if held_out is None else keep_middle_clips(clips_of(store, held_out))

def same(first: dict, second: dict) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())

def silent(line: str) -> None: pass

@pytest.mark.parametrize('config', [TINY, PROBE, UNVALIDATED], ids=['fine-tuning', 'probe', 'no validation'])
def test_killed_and_resumed_ends_with_the_same_weights(store, cpu, config, tmp_path):
    def run(folder, stop_at=None, save_every_steps=0):
        training, validation = training_sets(store, config)
        if stop_at is not None: unplug(training.frames, stop_at)
        classifier = new_classifier(config)
        history = train_classifier('x', classifier, training, validation, config, tmp_path/folder, None, cpu,
                                   log=lines.append, run_config=RunConfig(save_every_steps=save_every_steps))
        return classifier.state_dict(), history.drop(columns=list(TIMING))
    lines = []
    weights, history = run('unbroken')
    steps = 2 if config.validation_fraction else 3  # an epoch
    for folder, save_every_steps in (('at the end of an epoch', 0), ('within an epoch', 1)):
        torch.manual_seed(99)  # what others do with torch's generator must not matter
        with pytest.raises(Unplugged): run(folder, 2*8*steps + 11, save_every_steps)
        torch.rand(7)
        lines.clear()
        again, history_again = run(folder, save_every_steps=save_every_steps)
        assert lines[0] == f'x: going on after epoch 2{" and 1 steps"*save_every_steps} of 4'
        assert same(weights, again) and history.equals(history_again) and len(history) == 4
    kept = sorted(path.name for path in (tmp_path/'at the end of an epoch').iterdir())
    assert kept == [f'step-{steps*epoch:09d}' for epoch in (3, 4)]
    if not config.validation_fraction: assert history.best_epoch.iloc[-1] == 4

def test_the_best_epoch_is_kept_and_other_settings_are_refused(store, cpu, tmp_path):
    config = replace(TINY, epochs=6, milestones=())
    training, validation = training_sets(store, config)
    def train(classifier, config):
        return train_classifier('x', classifier, training, validation, config, tmp_path, None, cpu, log=silent)
    classifier = new_classifier(config)
    history = train(classifier, config)
    best = history.iloc[history.best_epoch.iloc[-1] - 1]
    assert best.validation_accuracy == history.validation_accuracy.max()
    probabilities = predict(classifier, validation, 'centre', None, VIEWS)
    right = accuracy(probabilities, validation.kept_rows().label.to_numpy())
    assert right == pytest.approx(best.validation_accuracy)
    for change, words in (('seed', 'seed was 0, is 1'), ('weight_decay', 'weight_decay was 0.001, is 1')):
        other = replace(config, **{change: 1})
        with pytest.raises(ValueError, match=words): train(new_classifier(other), other)
    wider = Classifier.from_stream(Stream('small', 4, 8, {'width': 8}), 2, config)
    with pytest.raises(ValueError, match='start was'): train(wider, config)

def test_ten_crops_are_the_mean_of_ten_passes_for_each_size(store):
    classifier = new_classifier().eval()
    for stream in ('rgb', 'flow'):
        clips = clips_of(store, store.manifest[:3], stream)
        answer = predict(classifier, clips, 'ten', 20, VIEWS, batch_size=4)
        for video, row in enumerate(clips.rows.itertuples()):
            numbers = [number for number, (own, _) in enumerate(clips.clips) if own == video]
            raw = torch.from_numpy(np.stack([clips[number][stream] for number in numbers]))
            center = center_crop(torch.tensor([[row.height, row.width]]*len(raw)), 20)
            by_hand = []
            down, right = row.height - 20, row.width - 20
            corners = (0, 0), (0, right), (down, 0), (down, right), (down//2, right//2)
            for number in range(10):
                box = torch.tensor([[*corners[number % 5], 20., 20.]]).expand(len(raw), 4)
                choices = {**center, 'box': box, 'flip': torch.full((len(raw),), number > 4)}
                view = apply_view(raw, choices, ViewSettings(size=16), stream)
                with torch.no_grad(): by_hand.append(classifier(view).softmax(1).mean(0))
            torch.testing.assert_close(answer[video], torch.stack(by_hand).mean(0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='does not fit'): predict(classifier, clips_of(store), 'ten', 30, VIEWS)

@pytest.mark.parametrize('stream', ['rgb', 'flow'])
def test_views_of_a_batch_are_those_of_a_plain_reader(store, stream):
    clips = LabelledClips(store, store.manifest, 2, stream, 4, views=VIEWS, seed=3)
    [batch] = training_loader(clips, 24).epoch(2)
    views = apply_view(batch[stream][:, 0], batch['views'][0], VIEWS, stream)
    for place, sample in enumerate(batch['sample'].tolist()):
        row, rng = store.manifest.iloc[sample], np.random.default_rng((3, 2, sample))
        drawn = random_view_params(VIEWS, row.height, row.width, True, rng)
        choices = {name: torch.from_numpy(value)[None] for name, value in drawn.items()}
        indices = clip_indices(row.num_frames, 4, random_clip_start(row.num_frames, 4, rng))
        frames = torch.from_numpy(store.read(row.video, stream, indices))[None]
        torch.testing.assert_close(views[place], apply_view(frames, choices, VIEWS, stream)[0], atol=1e-4, rtol=0)
    assert batch['label'].tolist() == store.manifest.label.to_numpy()[batch['sample']].tolist()

def test_a_video_that_cannot_be_read_is_replaced_and_told(cpu, tmp_path):
    store, config, lines = MadeUpStore(24), replace(UNVALIDATED, epochs=1, milestones=()), []
    training = LabelledClips(store, store.manifest, 2, 'rgb', 4, views=VIEWS)
    read = training.frames.read
    def fails(video: str, *arguments):
        if video == 'v3.mp4': raise VideoError('v3.mp4 is damaged')
        return read(video, *arguments)
    training.frames.read = fails
    item = training[3]
    assert item['label'] == store.manifest.label[item['sample']] and item['sample'] != 3
    assert item['replaced'] == [('v3.mp4', 'v3.mp4 is damaged')]
    train_classifier('x', new_classifier(config), training, None, config, tmp_path, None, cpu, log=lines.append)
    assert any('v3.mp4: v3.mp4 is damaged' in line for line in lines)

def test_a_copy_for_inference_gives_the_same_features(store):
    stream, clips = new_stream().train(), clips_of(store)
    with torch.no_grad(): stream.features(torch.randn(8, 3, 4, 16, 16))  # statistics of its own
    stream.eval()
    networks = (stream, inference_copy(stream))
    plain, fast = (extract_features(network.features, clips, 16, 20) for network in networks)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)

def test_flow_as_image_keeps_the_sign_of_flipped_flow(store):
    classifier, clips = new_classifier().eval(), clips_of(store, store.manifest[:2], 'flow')
    def ask(views, flow_as_image): return predict(classifier, clips, views, 20, replace(VIEWS, flow_as_image=flow_as_image))
    assert not torch.allclose(ask('ten', False), ask('ten', True), atol=1e-6)
    torch.testing.assert_close(ask('five', False), ask('five', True))

def test_a_classifier_sees_flow_as_its_stream_did(store, cpu, tmp_path):
    config, asked = replace(TINY, epochs=1, milestones=()), {}
    for channels in ('uv', 'vu'):
        stream = new_stream()
        stream.trained_on = stream.trained_on.model_copy(update=dict(flow_channels=channels))
        asked[channels], _ = train_and_test_classifier('x', stream, store, store.manifest[:16],
                                      clips_of(store, store.manifest[16:], 'flow'), 2, config, tmp_path/channels,
                                      4, training_views=VIEWS, crop=20, min_frames=5, accelerator=cpu, log=silent)
    assert not torch.equal(asked['uv'], asked['vu'])

def test_exact_paper_jitters_from_a_seed(store):
    classifier, clips = new_classifier().eval(), clips_of(store)
    def ask(**options): return predict(classifier, clips, 'centre', 20, VIEWS, **options)
    jittered = ask(jitter_seed=5)
    assert torch.equal(jittered, ask(jitter_seed=5)) and not torch.equal(jittered, ask())
    torch.testing.assert_close(jittered, ask(jitter_seed=5, batch_size=7), atol=1e-5, rtol=0)
    assert not torch.allclose(jittered, ask(jitter_seed=6), atol=1e-6)
    train, validation = split_validation(store.manifest[:16], replace(TINY, exact_paper=True), store.manifest[16:])
    assert len(train) == 16 and set(validation.video) <= set(store.manifest.video[16:]) and len(validation) == 2

def test_released_jitter_has_the_released_distribution():
    drawn = [released_jitter_params(0, video, crop) for video in range(1000) for crop in range(4)]
    factors = torch.cat([choices['factors'] for choices in drawn])
    jittered = (factors != torch.tensor([1., 1, 1, 0])).any(1)
    assert jittered.float().mean().item() == pytest.approx(.3, abs=.03)
    for column, (low, high) in enumerate([(.8, 1.2)]*3 + [(-.1, .1)]):  # uniform: mean, spread, nothing outside
        values = factors[jittered, column]
        assert low <= values.min() < low + .01*(high - low) and high - .01*(high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high)/2, abs=.03*(high - low))
        assert values.std().item() == pytest.approx((high - low)/12**.5, rel=.05)
    orders = torch.cat([choices['order'] for choices in drawn])[jittered]
    assert len(orders.unique(dim=0)) == 24

def test_test_jitter_is_drawn_once_for_a_video_and_a_crop(store):
    clips, settings = clips_of(store, store.manifest[:6]), ViewSettings(size=16)
    plain = iter_test_crops(clips, 'ten', 20, settings)
    changed = {}
    for number, ((view, video), (jittered, _)) in enumerate(
            zip(plain, iter_test_crops(clips, 'ten', 20, settings, jitter_seed=1))):
        changed.setdefault(video, []).append(not torch.equal(view, jittered))
    for video, flags in changed.items():
        drawn = [not torch.equal(released_jitter_params(1, video, crop)['factors'], torch.tensor([[1., 1, 1, 0]]))
                 for crop in range(10)]
        per_crop = len(flags)//10
        assert per_crop > 1 and flags == [flag for flag in drawn for _ in range(per_crop)]
    assert 0 < sum(map(sum, changed.values())) < sum(map(len, changed.values()))/2

def test_a_grid_is_chosen_from_on_training_videos(store, cpu, tmp_path):
    config = replace(TINY, epochs=2, milestones=(), grid=((1e-9, 0.), (TINY.learning_rate, 1e-3)))
    def run(config, folder, test_rows=store.manifest[16:]):
        return train_and_test_classifier('x', new_stream(), store, store.manifest[:16], clips_of(store, test_rows), 2, config,
                        tmp_path/folder, 4, training_views=VIEWS, crop=20, min_frames=5, accelerator=cpu,
                        log=silent)
    probabilities, history = run(config, 'grid')
    singles = [run(replace(config, learning_rate=rate, weight_decay=decay, grid=()), f'{rate}')
               for rate, decay in config.grid]
    best = max((0, 1), key=lambda number: singles[number][1].validation_accuracy.max())
    assert torch.equal(probabilities, singles[best][0]) and history.weight_decay[0] == config.grid[best][1]
    for wrong in (dict(validation_fraction=0.), dict(exact_paper=True)):
        with pytest.raises(ValueError, match='held-out training videos'): replace(config, **wrong)

def test_validation_holds_out_whole_groups(store):
    train, held_out = split_validation(store.manifest, TINY)
    assert not set(train.group) & set(held_out.group) and len(train) + len(held_out) == 24

def test_classify_goes_on_and_caches(store, cpu, tmp_path):
    lines, rows = [], store.manifest[16:]
    def run(test_rows=rows, folder=tmp_path):
        return train_and_test_classifier('x', new_stream(), store, store.manifest[:16], clips_of(store, test_rows), 2, TINY, folder,
                        4, training_views=VIEWS, crop=20, min_frames=5, accelerator=cpu, log=lines.append)
    probabilities, history = run()
    assert len(lines) == 4 and (tmp_path/'classifier'/'config.json').is_file()
    assert len(pd.read_csv(tmp_path/'history.csv')) == 4
    [file] = (tmp_path/'probabilities').rglob('*.safetensors')
    file.write_bytes(b'nonsense')
    again, _ = run()
    assert torch.equal(again, probabilities) and len(lines) == 4
    table = predictions_table(rows, probabilities, ['dark', 'bright'])
    assert list(table.columns) == ['video', 'true', 'predicted', 'right', 'p(dark)', 'p(bright)']
    assert table.right.mean() == pytest.approx(accuracy(probabilities, rows.label.tolist()))
    with pytest.raises(ValueError, match='test videos have no label from 0 to 1'):
        run(test_rows=store.manifest.assign(label=2), folder=tmp_path/'other')
    assert not (tmp_path/'other').exists()

def test_chunks_give_the_same_answer(store, cpu, tmp_path, monkeypatch):
    def run(folder):
        return train_and_test_classifier('x', new_stream(), store, store.manifest[:16], clips_of(store, store.manifest[16:]), 2,
                        replace(TINY, epochs=1, milestones=()), tmp_path/folder, 4, training_views=VIEWS, views='five',
                        crop=20, min_frames=5, accelerator=cpu, log=silent)[0]
    whole = run('whole')
    monkeypatch.setattr('vicc.compare.finetune.CHUNK_CLIPS', 5)
    torch.testing.assert_close(run('chunks'), whole, atol=1e-6, rtol=0)
    assert len(list((tmp_path/'chunks'/'probabilities').rglob('*.safetensors'))) > 1

@pytest.mark.parametrize('label', [-1, 2, 1.5, None])
def test_labels_are_checked(store, label):
    rows = store.manifest.astype({'label': object})
    rows.loc[3, 'label'] = label
    with pytest.raises(ValueError, match=r'1 of 24 training videos have no label from 0 to 1 \(v3.mp4'):
        LabelledClips(store, rows, 2)

def test_config():
    assert [LINEAR_PROBE.learning_rate_at(epoch) for epoch in (59, 60, 99)] == pytest.approx([.1, .01, .001])
    assert (FINE_TUNING.epochs, FINE_TUNING.milestones) == (500, (200, 300, 400, 450))
    assert (FINE_TUNING.dropout, FINE_TUNING.batch_size) == (.9, 128)
    for values, words in ((dict(milestones=(80, 60)), 'must rise'), (dict(dropout=1.), 'dropout'),
                          (dict(batch_size=0), 'batch_size'), (dict(learning_rate=0), 'learning_rate')):
        with pytest.raises(ValueError, match=words): replace(LINEAR_PROBE, **values)

def test_measures():
    probabilities, labels = torch.tensor([[.7, .2, .1], [.1, .5, .4], [.2, .5, .3]]), [0, 1, 2]
    assert accuracy(probabilities, labels) == pytest.approx(2/3) and accuracy(probabilities, labels, 2) == 1
    assert late_fusion(probabilities, probabilities.flip(1))[0].tolist() == pytest.approx([.4, .2, .4])
    with pytest.raises(ValueError, match='sum to 1'): late_fusion(torch.ones(2, 3))

def test_which_epoch_is_best():
    history = []
    rows = [(.5, 1., 1), (.4, .5, 1), (.5, .9, 3), (.5, .9, 3), (.6, 2., 5)]
    for epoch, (share, loss, best) in enumerate(rows, 1):
        history.append(dict(epoch=epoch, validation_accuracy=share, validation_loss=loss))
        assert best_epoch(history) == best
    assert best_epoch([dict(epoch=1), dict(epoch=2)]) == 2  # without validation the last one counts

def work(rank: int, processes: int, folder: str) -> None:
    "One process of a training; the result goes to a file."
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT='29591',
                          MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo', ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    accelerator, store = Accelerator(cpu=True), MadeUpStore(24)
    config = replace(TINY, epochs=2, milestones=(), backbone_lr_scale=0., dropout=0.)
    training, validation = training_sets(store, config)
    classifier = new_classifier(config)
    history = train_classifier('x', classifier, training, validation, config, f'{folder}/{processes}', 20,
                               accelerator, log=silent)
    probabilities = predict(classifier, clips_of(store), 'five', 20, VIEWS, accelerator=accelerator)
    result = dict(weights=classifier.state_dict(), probabilities=probabilities,
                  history=history.drop(columns=list(TIMING)).to_dict('list'))
    torch.save(result, f'{folder}/{processes}-{rank}.pt')
    if processes > 1: torch.distributed.destroy_process_group()

def test_two_processes_compute_what_one_does(tmp_path):
    work(0, 1, str(tmp_path))
    mp.spawn(work, (2, str(tmp_path)), 2)
    paths = [tmp_path/f'{name}.pt' for name in ('1-0', '2-0', '2-1')]
    one, first, second = (torch.load(path, weights_only=True) for path in paths)
    assert same(first['weights'], second['weights'])
    assert torch.equal(first['probabilities'], second['probabilities'])
    for name, value in one['weights'].items():
        torch.testing.assert_close(first['weights'][name], value, atol=1e-5, rtol=0)
    torch.testing.assert_close(first['probabilities'], one['probabilities'], atol=1e-5, rtol=0)
    assert first['history']['loss'] == pytest.approx(one['history']['loss'], abs=1e-5)
    assert first['history']['validation_accuracy'] == one['history']['validation_accuracy']

def run_cells(notebook, **values):
    "Run a notebook with these parameters in this process, without the time that another takes to start: its names."
    space = dict(In=[''])
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == 'code': exec(cell.source, space)
        if 'parameters' in cell.metadata.get('tags', []): space |= values
    return space

@pytest.mark.timeout(300)
def test_run_evaluate_from_saved_streams_and_again(tmp_path):
    import papermill as pm
    from vicc.streams import save_stream
    from vicc.synthetic import make_moving_shapes
    root, shapes = Path(__file__).parents[3], make_moving_shapes(tmp_path/'shapes', 16, 8)
    for name in ('rgb', 'flow'): save_stream(new_stream(), tmp_path/name)
    paths = dict(rgb=tmp_path/'rgb', flow=tmp_path/'flow', recipe=root/'nbs'/'recipes'/'demo.yaml',
                 manifest=shapes['train'], test_manifest=shapes['test'], videos=shapes['videos'],
                 output=tmp_path/'out')
    values = dict({name: str(path) for name, path in paths.items()}, linear_epochs=2, tuning_epochs=2,
                  batch_size=8, crops='five')
    notebook, rare = root/'nbs'/'run_evaluate.ipynb', dict(validation_fraction=0.0, random_weights=False)
    def metrics(): return json.loads((tmp_path/'out'/'metrics.json').read_text())
    pm.execute_notebook(notebook, tmp_path/'out.ipynb', values | rare, progress_bar=False, cwd=root)
    first = metrics()
    both = ['rgb', 'flow', 'rgb + flow']
    assert set(first['retrieval']) == {'chance', *both, *(f'random {name}' for name in both)}
    titles = [f'{protocol}, pretrained {name}' for protocol in ('linear probe', 'fine-tuning')
              for name in ('rgb', 'flow', 'rgb + flow')]
    assert set(first['classifiers']) == set(titles)
    assert len(list((tmp_path/'out'/'predictions').glob('*.csv'))) == 6
    assert len(list((tmp_path/'out'/'pictures').glob('*.png'))) == 4
    run_cells(notebook, **values, more=rare, fine_tuning=False)
    again = metrics()
    assert again['retrieval'] == first['retrieval']
    assert all(first['classifiers'][title] == row for title, row in again['classifiers'].items())
    with pytest.raises(ValueError, match='linear_epochs is 2, not 3'): run_cells(notebook, **values | dict(linear_epochs=3), more=rare)
    claims_beside_the_paper(tmp_path, root, first)

def claims_beside_the_paper(folder, root, metrics):
    "What run_claims makes of an evaluation, as if it were one of UCF101 with S3D and the paper's recipe."
    metrics['evaluated']['streams'] = {name: f'stages/04-{name}-2-cycle-2/stream' for name in ('rgb', 'flow')}
    metrics['settings']['recipe'] = Recipe.read('ucf101_s3d', seed=3).model_dump(mode='json')
    (folder/'out'/'metrics.json').write_text(json.dumps(metrics | dict(train_videos=9537)))
    notebook = root/'nbs'/'run_claims.ipynb'
    space = run_cells(notebook, runs=dict(UCF101=str(folder/'out')), claims_file=str(folder/'claims'/'claims.csv'))
    numbers = pd.read_csv(folder/'claims'/'paper_tables.csv').set_index(['encoder', 'source', 'data', 'measure']).percent.sort_index()
    for encoder, name in {'RGB-2': 'rgb', 'Flow-2': 'flow', 'R+F-2': 'rgb + flow'}.items():
        mine = numbers[f'ViCC-{encoder}', 'yours', 'UCF101']
        assert set(mine.index) == {'R@1', 'R@5', 'R@10', 'R@20', 'linear probe', 'fine-tuning'}
        assert mine['R@5'] == pytest.approx(100*metrics['retrieval'][name]['R@5'])
        assert mine['fine-tuning'] == pytest.approx(100*metrics['classifiers'][f'fine-tuning, pretrained {name}']['right'])
        random = numbers[f'ViCC-{encoder}', 'random weights', 'UCF101', 'R@1']
        assert random == pytest.approx(100*metrics['retrieval'][f'random {name}']['R@1'])
    claims = pd.read_csv(folder/'claims'/'claims.csv').set_index('claim')
    both, share = claims.loc['ViCC-R+F-2, s3d, UCF101, fine-tuning'], metrics['classifiers']['fine-tuning, pretrained rgb + flow']['right']
    assert both.paper == '90.5 %' and both.ours.startswith(f'{100*share:.1f} (') and both.holds == f'{100*share - 90.5:+.1f} points'
    assert claims.holds['ViCC-RGB-2, s3d, HMDB51, R@1'] == claims.holds['ViCC-RGB-2, r21d, UCF101, R@1'] == 'not run'
    assert 'UCF101 and HMDB51 and at least ' in (needs := claims.ours['ViCC-RGB-2, s3d, HMDB51, R@1']) and 'hours of pretraining on 1 NVIDIA H100' in needs
    assert 'H100' not in claims.ours['ViCC-RGB-2, r21d, UCF101, R@1']  # not measured there
    different = space['compare_settings']('UCF101', space['metrics'])
    ours = 'bf16 (float32 where the device lacks it)'
    assert different == ['linear_epochs: 2, not 100', 'tuning_epochs: 2, not 500', 'crops: five, not ten', 'batch_size: 8, not 128', 'dropout: 0.2, not 0.9',
                         'test videos: 8, not 3783', f'single-stream precision: {ours}, not float32', f'cross-stream precision: {ours}, not fp16',
                         'classifiers are chosen by: the last epoch, not a random 30% of the test videos', 'seed: 3, not 0']
    exact = Recipe.read('ucf101_s3d_released').model_dump()
    assert not [line for line in space['compare_settings']('UCF101', metrics | dict(train_videos=9537, settings=metrics['settings'] | dict(recipe=exact, exact_paper=True))) if 'precision' in line or 'chosen' in line]
    with pytest.raises(FileNotFoundError, match='nowhere/metrics.json does not exist'): run_cells(notebook, runs=dict(UCF101='nowhere'))
    with pytest.raises(ValueError, match='runs has UCF: choose from UCF101, HMDB51'): run_cells(notebook, runs=dict(UCF=''))
