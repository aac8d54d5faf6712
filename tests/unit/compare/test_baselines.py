"InfoNCE, UberNCE and CoCLR: the loss against loops, what a step may change, killed runs, two processes."
import copy
import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from helpers import DEMO, Unplugged, shapes_store, unplug
from vicc.alternation import alternate
from vicc.augment import ViewSettings
from vicc.compare.baselines import (
    TRAINING_METHODS, ContrastiveTrainer, create_method, multi_positive_nce, recording_ids, train_with_control,
)
from vicc.data import TwoStreamDataset, collate
from vicc.manifests import read_manifest
from vicc.trainer import StageConfig, Trainer, train_stage
from vicc.streams import Stream, load_stream
from vicc.engine.fit import TIMING

VALUES = dict(key_queue_length=12, key_momentum=.9, temperature=.1)
SETTINGS = StageConfig(epochs=4, schedule_epochs=None, batch_size=8, optimizer='adamw', learning_rate=2e-3,
                       final_learning_rate=1e-5, queue_length=0)
unit = lambda rows: nn.functional.normalize(rows, dim=-1)

@pytest.fixture(scope='module')
def store(tmp_path_factory): return shapes_store(tmp_path_factory.mktemp('shapes'))

@pytest.fixture(scope='module')
def cpu(): return Accelerator(cpu=True)

def stream(seed=0):
    torch.manual_seed(seed)
    return Stream('small', 6, 8, {'width': 4})

def clips(store, rows=None):
    return TwoStreamDataset(store, rows, clip_length=8, views=ViewSettings(size=32, area=(.6, 1)))

def new_stage(store, cpu, name='infonce', teacher=None, rows=None, **values):
    method = create_method(name, **{**VALUES, **values})
    stage = method.trainer('rgb', stream(), SETTINGS, clips(store, rows), cpu, teacher, **method.values)
    stage.model.train()
    return stage

def steps(stage, count, metrics=None):
    "Train on samples 0–7, 8–15, 0–7, …"
    for number in range(count):
        stage.dataset.epoch = number
        stage.step(collate([stage.dataset[sample] for sample in range(8*(number % 2), 8*(number % 2) + 8)]),
                   0, metrics or stage.create_metrics())

# The loss

def slow_nce(query, keys, queue, positive, ignored, temperature, own_key=True, mean_of_logs=False):
    "Loops over single numbers."
    losses = []
    for q, k, positives, ignores in zip(query.tolist(), keys.tolist(), positive.tolist(), ignored.tolist()):
        below = math.exp(sum(a*b for a, b in zip(q, k))/temperature)
        shares = [below] if own_key or not any(positives) else []
        for row, is_positive, is_ignored in zip(queue.tolist(), positives, ignores):
            similarity = math.exp(sum(a*b for a, b in zip(q, row))/temperature)
            if is_positive: shares.append(similarity)
            below += similarity*(is_positive or not is_ignored)
        if mean_of_logs: losses.append(-sum(math.log(share/below) for share in shares)/len(shares))
        else: losses.append(-math.log(sum(shares)/below))
    return sum(losses)/len(losses)

@pytest.mark.parametrize('own_key, mean_of_logs', [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize('batch, length, dim, temperature', [(1, 1, 2, 1.), (5, 9, 4, .5), (3, 30, 16, .07)])
def test_loss_is_the_equation(batch, length, dim, temperature, own_key, mean_of_logs):
    g = torch.Generator().manual_seed(batch)
    query, keys, queue = (unit(torch.randn(rows, dim, generator=g)) for rows in (batch, batch, length))
    positive, ignored = (torch.rand(batch, length, generator=g) < .4 for _ in range(2))
    query.requires_grad_(True)
    others = keys, queue, positive, ignored, temperature, own_key, mean_of_logs
    loss, hits = multi_positive_nce(query, *others)
    assert loss.item() == pytest.approx(slow_nce(query, *others), rel=1e-5)
    assert torch.equal(hits, multi_positive_nce(query, *others[:5])[1])  # the accuracy counts the own key
    loss.backward()
    for place in ((0, 0), (batch - 1, dim - 1)):  # against differences
        moved = [query.detach().double().clone() for _ in range(2)]
        for sign, values in zip((1, -1), moved): values[place] += sign*1e-5
        high, low = (slow_nce(values, *others) for values in moved)
        assert query.grad[place].item() == pytest.approx((high - low)/2e-5, rel=1e-3, abs=1e-4)

def test_loss_is_exact_under_autocast_and_extreme():
    g = torch.Generator().manual_seed(0)
    query, keys, queue = (unit(torch.randn(rows, 8, generator=g)) for rows in (4, 4, 20))
    nothing = torch.zeros(4, 20, dtype=torch.bool)
    plain = multi_positive_nce(query, keys, queue, nothing, nothing)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(multi_positive_nce(query, keys, queue, nothing, nothing)[0], plain)
    everything = ~nothing
    query.requires_grad_(True)
    for masks, expected in (((nothing, everything), 0), ((everything, nothing), 0),
                            ((everything, everything), 0)):
        loss, hits = multi_positive_nce(query, keys, queue, *masks, 1e-3)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-4) and hits.all() and query.grad.isfinite().all()

# A step

def test_only_backbone_and_head_learn(store, cpu):
    teacher = stream(1).eval()
    stage = new_stage(store, cpu, 'coclr', teacher=teacher)
    before, taught = copy.deepcopy(stage.stream.state_dict()), copy.deepcopy(teacher.state_dict())
    steps(stage, 3)
    changed = {name.split('.')[0] for name, value in stage.stream.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {'backbone', 'head'}
    assert all(torch.equal(value, taught[name]) for name, value in teacher.state_dict().items())
    assert stage.reference_loss == pytest.approx(math.log(13))
    assert not any(parameter.requires_grad for parameter in stage.key_encoder.parameters())
    assert stage.key_encoder.training

def test_key_encoder_follows(store, cpu):
    stage = new_stage(store, cpu)
    expected = [parameter.clone() for parameter in stage.key_encoder.parameters()]
    for _ in range(3):
        # as they are before the step
        queries = [parameter.detach().clone() for parameter in stage.model.parameters()]
        expected = [.9*key + .1*query for key, query in zip(expected, queries)]
        steps(stage, 1)
    for key, value in zip(stage.key_encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(key, value)
    frozen = stage.key_encoder.state_dict()
    own = stage.model.state_dict()
    names = [name for name in own if name.endswith('running_mean')]
    # statistics of its own views
    assert names and all(not torch.equal(frozen[name], own[name]) for name in names)

def test_queue_holds_the_keys_of_view_2(store, cpu):
    teacher = stream(1).eval()
    # momentum 0: before a step, the key encoder is the query encoder
    stage = new_stage(store, cpu, 'coclr', teacher=teacher, key_momentum=0.)
    batch = collate([stage.dataset[sample] for sample in range(8)])
    with torch.no_grad():
        expected = copy.deepcopy(stage.model).train()(stage.views(batch, 'rgb')[1])
        others = teacher.embed(stage.views(batch, 'flow')[1])
    stage.step(batch, 0, stage.create_metrics())
    torch.testing.assert_close(stage.queue.keys, expected)
    torch.testing.assert_close(stage.queue.teacher_keys, others)
    assert stage.queue.samples.tolist() == list(range(8)) and not stage.queue.full

def test_siblings_and_the_video_itself_are_no_negatives(store, cpu):
    rows = store.manifest.assign(group=['park']*2 + ['']*6 + ['park'] + [f'g{number}' for number in range(7)])
    stage = new_stage(store, cpu, rows=rows)
    steps(stage, 2)
    queued = stage.queue.samples.tolist()
    assert queued == [*range(8, 16), *range(4)]  # the newest batch first
    positive, ignored, same_class = stage.masks(torch.tensor([0, 2, 9]), torch.zeros(3, 0))
    assert not positive.any()
    assert [[queued[column] for column in row.nonzero().flatten()]
            for row in ignored] == [[8, 0, 1], [2], [9]]
    assert [[queued[column] for column in row.nonzero().flatten()]
            for row in same_class] == [[8, 0], [10, 2], [9, 1]]

def test_siblings_change_nothing_but_the_denominator(store, cpu):
    "With every video from one recording there are no negatives, so there is no loss and nothing to learn."
    stage = new_stage(store, cpu, rows=store.manifest.assign(group='one'))
    metrics = stage.create_metrics()
    before = copy.deepcopy(list(stage.model.parameters()))
    steps(stage, 1, metrics)
    stage.optimizer.zero_grad()
    steps(stage, 3, metrics)
    assert metrics.compute(cpu)['loss'] == pytest.approx(0, abs=1e-6)
    drift = max((now - then).abs().max().item() for now, then in zip(stage.model.parameters(), before))
    assert drift < 1e-6

def test_labels_are_positives(store, cpu):
    stage = new_stage(store, cpu, 'ubernce')
    steps(stage, 2)
    positive, ignored, same_class = stage.masks(torch.tensor([3]), torch.zeros(1, 0))
    assert torch.equal(positive, same_class) and {stage.queue.samples[column].item()
                                                  for column in positive[0].nonzero().flatten()} == {3, 11}
    unlabelled = store.manifest.assign(label=[-1] + store.manifest.label.tolist()[1:])
    with pytest.raises(ValueError, match='1 of 16 have none'):
        new_stage(store, cpu, 'ubernce', rows=unlabelled)
    stage = new_stage(store, cpu, 'infonce', rows=store.manifest.assign(label=-1))  # others do not care
    metrics = stage.create_metrics()
    steps(stage, 2, metrics)
    assert math.isnan(metrics.compute(cpu)['positives_right'])

def test_mines_only_from_a_full_queue_and_in_the_other_stream(store, cpu):
    teacher = stream(1).eval()
    stage = new_stage(store, cpu, 'coclr', teacher=teacher, top_k=2)
    counts = []
    for _ in range(3):
        metrics = stage.create_metrics()
        steps(stage, 1, metrics)
        counts.append(metrics.compute(cpu)['positives'])
    assert counts == [1, 1, 3]  # 8 of 12 keys, then full, then mining
    teacher_keys = stage.queue.all_teacher_keys[:3] + 0
    positive, siblings, _ = stage.masks(stage.queue.samples[:3], teacher_keys)
    similarity = (teacher_keys@stage.queue.teacher_keys.T).masked_fill(siblings, -2)
    mined = torch.zeros_like(positive).scatter(1, similarity.topk(2).indices, True)
    assert torch.equal(positive, mined | siblings) and siblings.any(1).all() and not (mined & siblings).any()
    alone = new_stage(store, cpu, 'coclr')  # without a teacher
    metrics = alone.create_metrics()
    steps(alone, 4, metrics)
    assert metrics.compute(cpu)['positives'] == 1

def test_coclr_takes_no_step_before_its_queue_is_full(store, cpu):
    stage, stepped = new_stage(store, cpu, 'coclr', teacher=stream(1).eval()), []
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in stage.model.parameters()]
        steps(stage, 1)
        stepped.append(any(not torch.equal(old, new) for old, new in zip(before, stage.model.parameters())))
    assert stepped == [False, False, True, True]  # 8 keys a step for a queue of 12
    with pytest.raises(ValueError, match='64 clips for a queue of 64'):
        new_stage(store, cpu, 'coclr', teacher=stream(1).eval(), key_queue_length=64)

def test_the_own_key_is_a_positive_in_a_tenth_of_the_steps(store, cpu):
    stage = new_stage(store, cpu, 'coclr', teacher=stream(1).eval())
    def share(count=2000):
        drawn = []
        for _ in range(count):
            stage.queue.pushed += 8
            drawn.append(stage.own_key())
        return sum(drawn)/count
    assert .08 < share() < .12
    for wanted in (0., 1.):
        stage.contrast = stage.contrast.model_copy(update=dict(own_key_share=wanted))
        assert share(50) == wanted
    for name in ('infonce', 'ubernce', 'coclr'):  # CoCLR without a teacher: nothing is mined
        assert all(new_stage(store, cpu, name).own_key() for _ in range(30))

# Killed and started again

def run(store, cpu, folder, method, other, stop_at=None, lines=None):
    data, trained = clips(store), stream()
    if stop_at is not None: unplug(data.frames, stop_at)
    history = train_stage('rgb-2', 'rgb', trained, data, SETTINGS, folder, other, cpu,
                          log=(lines if lines is not None else []).append, method=method)
    return trained.state_dict(), history.drop(columns=list(TIMING))

@pytest.mark.parametrize('name', ['infonce', 'coclr'])
def test_a_killed_run_goes_on_bit_for_bit(store, cpu, tmp_path, name):
    method, other = create_method(name, **VALUES), stream(1) if name == 'coclr' else None
    weights, history = run(store, cpu, tmp_path/'unbroken', method, other)
    # in the third epoch
    with pytest.raises(Unplugged): run(store, cpu, tmp_path/'broken', method, other, stop_at=2*2*16 + 20)
    lines = []
    again, resumed = run(store, cpu, tmp_path/'broken', method, other, lines=lines)
    assert 'going on after epoch 2' in lines[0]
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert history.equals(resumed) and (history.loss > 0).all()
    with pytest.raises(ValueError, match="'temperature': 0.1.*'temperature': 0.2"):
        run(store, cpu, tmp_path/'broken', create_method(name, **{**VALUES, 'temperature': .2}), other)

# Two processes

class Flat(nn.Module):
    "A backbone without batch norm, so that two halves of a batch can be compared with the whole."
    num_features = 6
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3*4*6*6, 6)

    def forward(self, x): return self.layer(nn.functional.adaptive_avg_pool3d(x, (4, 6, 6)).flatten(1))

class FakeStage(ContrastiveTrainer):
    "Views come with the batch."
    def views(self, batch, name): return batch[name]

def flat_stream(seed):
    result = stream(seed)
    torch.manual_seed(seed)
    result.backbone, result.head = Flat(), nn.Linear(6, 8)
    return result

def trained_flat(accelerator, positives, part):
    "Four steps on made-up views; `part` of each batch of 8."
    rows = pd.DataFrame(dict(video=[f'v{number}' for number in range(20)],
                             label=[number % 3 for number in range(20)],
                             group=[f'g{number//2}' for number in range(20)]))
    other = flat_stream(1) if positives == 'mined' else None
    stage = FakeStage('rgb', flat_stream(0), replace(SETTINGS, optimizer='sgd', learning_rate=.1),
                      SimpleNamespace(rows=rows, seed=0), accelerator, other, positives=positives, top_k=2, **VALUES)
    stage.model.train()
    g, metrics = torch.Generator().manual_seed(3), stage.create_metrics()
    for _ in range(4):
        samples = torch.randperm(20, generator=g)[:8]
        views = {name: [torch.randn(8, 3, 4, 8, 8, generator=g) for _ in range(2)]
                 for name in ('rgb', 'flow')}
        stage.step({'sample': samples[part], **{name: [view[part] for view in both] for name,
                                                both in views.items()}}, 0, metrics)
    return dict(numbers=metrics.compute(accelerator), samples=stage.queue.samples, keys=stage.queue.keys,
                teacher_keys=stage.queue.teacher_keys, weights=stage.stream.state_dict(),
                key_encoder=stage.key_encoder.state_dict())

def work(rank, folder):
    "What each of the two processes does; results go to a file."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=open(f'{folder}/port').read(), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.save({positives: trained_flat(accelerator, positives, slice(4*rank, 4*rank + 4))
                for positives in ('instance', 'label', 'mined')}, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_are_one(tmp_path, cpu):
    import socket
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0)); (tmp_path/'port').write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path/f'{rank}.pt', weights_only=True) for rank in range(2)]
    for positives in halves[0]:
        whole = trained_flat(cpu, positives, slice(None))
        assert len(whole['samples']) == 12
        assert whole['numbers']['positives'] > (1 if positives == 'instance' else 1.2) - 1e-6
        for half in halves:
            assert half[positives]['samples'].tolist() == whole['samples'].tolist()
            assert half[positives]['numbers'] == pytest.approx(whole['numbers'], rel=1e-4, nan_ok=True)
            for name in ('keys', 'teacher_keys', 'weights', 'key_encoder'):
                torch.testing.assert_close(half[positives][name], whole[name], atol=1e-5, rtol=1e-4)
        assert torch.equal(halves[0][positives]['keys'], halves[1][positives]['keys'])

# The whole schedule

def test_methods_run_the_plan(store, cpu, tmp_path, monkeypatch):
    recipe = DEMO.replace(single_epochs_rgb=2, single_epochs_flow=1, cross_epochs=2, cycles=1, cross_freeze_prototypes=0,
                          single_batch_size=8, cross_batch_size=8, num_prototypes=6, projection_dim=8,
                     backbone_options={'width': 4})
    quiet = dict(accelerator=cpu, log=lambda line: None)
    histories = {name: alternate(recipe, store, tmp_path/name,
                                 method=create_method(name,
                                                      **(VALUES if name not in ('vicc', 'swav') else {})),
                                 train=('rgb',) if name in ('infonce', 'ubernce') else ('rgb', 'flow'),
                                 **quiet) for name in TRAINING_METHODS}
    for name, history in histories.items():
        rgb = history[history.stream == 'rgb']
        assert rgb.stage.tolist() == ['rgb-1']*2 + ['rgb-2 cycle 1']*2, name
        assert (history.ln_k - math.log(13 if 'accuracy' in history else 6)).abs().max() < 1e-9
    weights = {name: load_stream(tmp_path/name/'stages'/'00-rgb-1'/'stream').state_dict()
               for name in TRAINING_METHODS}
    same = lambda one, two: all(torch.equal(value, weights[two][key]) for key, value in weights[one].items())
    assert same('infonce', 'coclr') and same('vicc', 'swav')
    assert not same('infonce', 'ubernce') and not same('infonce', 'vicc')
    assert histories['coclr'].query('stage == "rgb-2 cycle 1"').positives.iloc[-1] > 5
    lines = []
    alternate(recipe, store, tmp_path/'coclr', method=create_method('coclr', **VALUES), accelerator=cpu,
              log=lines.append)
    assert lines == []
    with pytest.raises(ValueError, match='holds another run .method.yaml is'):
        alternate(recipe, store, tmp_path/'coclr', method=create_method('coclr'), **quiet)
    with pytest.raises(ValueError, match='coclr teaches each stream by the other'):
        alternate(recipe, store, tmp_path/'no', method=create_method('coclr'), train=('rgb',), **quiet)
    # the control takes over the single-stream stages, whenever it is killed, and is SwAV's run bit for bit
    copied = []
    def stops(source, target):
        copied.append(source.name)
        (shutil.copytree(source, target) if len(copied) < 2 else target.mkdir())
        if len(copied) == 2: raise Unplugged
    with monkeypatch.context() as patch:
        patch.setattr('vicc.compare.baselines.shutil', SimpleNamespace(rmtree=shutil.rmtree, copytree=stops))
        with pytest.raises(Unplugged): train_with_control(recipe, store, tmp_path, **quiet)
    assert copied == ['00-rgb-1', '01-flow-1']
    encoders = train_with_control(recipe, store, tmp_path, accelerator=cpu, log=lines.append)
    assert list(encoders) == ['random rgb', 'random flow', 'rgb-1', 'flow-1', 'rgb-2 cycle 1', 'rgb alone',
                              'flow-2 cycle 1', 'flow alone']
    assert len(lines) == 2*2 and all('-2 cycle 1' in line for line in lines)  # no other stage is trained
    files = list((tmp_path/'swav'/'stages').rglob('*.safetensors'))
    assert len(files) == 2 + 4
    for file in files:
        control = load_file(tmp_path/'alone'/file.relative_to(tmp_path/'swav'))
        assert all(torch.equal(value, control[key]) for key, value in load_file(file).items())
    taught, alone = (load_stream(encoders[title][1]).state_dict() for title in ('flow-2 cycle 1', 'flow alone'))
    assert any(not torch.equal(value, alone[key]) for key, value in taught.items())
    shutil.rmtree(tmp_path/'vicc')
    with pytest.raises(ValueError, match='alone holds another run .seed'):
        train_with_control(recipe.replace(seed=1), store, tmp_path, **quiet)
    assert not (tmp_path/'vicc').exists()

def test_default_is_the_paper():
    vicc, swav = TRAINING_METHODS['vicc'], TRAINING_METHODS['swav']
    assert vicc.trainer is swav.trainer is Trainer
    assert vicc.uses_teacher and not swav.uses_teacher
    for name in ('infonce', 'ubernce', 'coclr'):
        assert {key: TRAINING_METHODS[name].values[key]
                for key in VALUES} == dict(key_queue_length=2048, key_momentum=.999, temperature=.07)
    assert TRAINING_METHODS['coclr'].values['top_k'] == 5

def test_recordings_of_a_manifest(tmp_path):
    (tmp_path/'m.csv').write_text('video,group\na.mp4,park\nb.mp4,\nc.mp4,park\npark,\n')
    assert recording_ids(read_manifest(tmp_path/'m.csv')).tolist() == [0, 1, 0, 2]

@pytest.mark.timeout(300)
def test_run_baselines_gives_every_method_as_many_trials_and_goes_on(tmp_path):
    import papermill as pm
    from pathlib import Path
    root = Path(__file__).parents[3]
    short = dict(single_epochs_rgb=1, single_epochs_flow=1, cross_epochs=1, cross_freeze_prototypes=0, single_batch_size=8,
                 cross_batch_size=8, backbone_options={'width': 4})
    values = dict(seeds=[0], methods=['vicc', 'coclr'], changes=short, search_changes=short, trials=2,
                  key_queue_length=16, num_train_videos=32, num_test_videos=8, output=str(tmp_path))
    def execute():
        pm.execute_notebook(root/'nbs'/'run_baselines.ipynb', tmp_path/'out.ipynb', values, progress_bar=False,
                            cwd=root)
        return [pd.read_csv(tmp_path/name) for name in ('baselines_search.csv', 'baselines.csv')]
    search, table = execute()
    assert search[['method', 'trial']].values.tolist() == [['vicc', 0], ['coclr', 0], ['vicc', 1], ['coclr', 1]]
    drawn = search['values'].map(json.loads)
    assert drawn[0] == drawn[1] == {} and drawn[2]['cross_learning_rate'] == drawn[3]['cross_learning_rate']
    steps = table[table.encoder == 'flow-2 cycle 1'].set_index('method').steps
    assert steps.to_dict() == {'vicc': 8, 'coclr': 8, 'flow-alone': 8}  # equal, the control's too
    again, table_again = execute()
    assert again.equals(search)  # no trial is run twice
    assert table_again.drop(columns='seconds').equals(table.drop(columns='seconds'))
