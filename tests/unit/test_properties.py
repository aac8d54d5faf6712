"Laws that the numbers obey for any input: property-based tests, degenerate batches, finite differences."
import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from vicc import flow, video
from vicc.augment import ViewSettings
from vicc.data import TwoStreamDataset, training_loader
from vicc.losses import pair_losses, swapped_prediction_loss, view_assignments
from vicc.manifests import read_manifest
from vicc.engine.optim import cosine_schedule
from vicc.prepare import STREAMS, PrepareSettings, prepare
from vicc.prototypes import ProjectionQueue, Prototypes, cosine_scores, normalize_rows, sinkhorn
from vicc.evaluation import cosine_similarity, recall_at_k
from vicc.synthetic import make_moving_shapes

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
lawful = settings(max_examples=15, derandomize=True, deadline=None, database=None)
numbers = lambda low, high: st.floats(low, high, allow_subnormal=False)

@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def tables(largest: float = 1., views: int | None = None, most: int = 8) -> st.SearchStrategy[Tensor]:
    "Scores [N, K], or [V, N, K], of any size up to `most` and any value up to `largest`, in float64."
    sides = st.tuples(*[st.integers(1, most)]*2)
    shapes = sides if views is None else sides.map(lambda sides: (views, *sides))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape,
                                               elements=numbers(-largest, largest))).map(torch.from_numpy)

def close(ours: Tensor, expected: Tensor | float, within: float = 1e-10) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype).expand_as(ours), atol=within,
                               rtol=0)

def compute_dtype(tensor: Tensor) -> torch.dtype:
    "Half types are computed in float32; float64 stays float64."
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

def entropy(rows: Tensor) -> Tensor: return torch.special.entr(rows).sum(1).mean()

# --- Sinkhorn

@lawful
@given(tables(1e4), st.sampled_from(KINDS), st.sampled_from([.005, .05, 1.]), st.integers(0, 5))
def test_rows_sum_to_one_whatever_the_scores(scores, kind, epsilon, iterations):
    assignments = sinkhorn(scores.to(kind), epsilon, iterations)
    assert assignments.dtype == (torch.float64 if kind == torch.float64
                                 else torch.float32) == compute_dtype(scores.to(kind))
    assert assignments.isfinite().all() and (assignments >= 0).all()
    close(assignments.sum(1), 1., 1e-5)

@lawful
@given(tables())
def test_columns_approach_equal_shares(scores):
    "Every round brings the totals nearer to N/K, and they arrive."
    share = len(scores)/scores.shape[1]
    distance = [(sinkhorn(scores, .5, rounds).sum(0) - share).abs().sum() for rounds in (1, 2, 3, 10, 400)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(distance)) and distance[-1] < 1e-6

@lawful
@given(tables(), st.randoms(use_true_random=False))
def test_order_of_clips_and_prototypes_does_not_matter(scores, chance):
    clips, columns = (chance.sample(range(side), side) for side in scores.shape)
    close(sinkhorn(scores[clips][:, columns]), sinkhorn(scores)[clips][:, columns])

@lawful
@given(tables(), numbers(.01, 100.), st.integers(0, 4))
def test_only_scores_over_epsilon_count(scores, factor, iterations):
    close(sinkhorn(factor*scores, factor*.05, iterations), sinkhorn(scores, .05, iterations))

@lawful
@given(tables().flatmap(lambda scores: st.tuples(st.just(scores),
                                                 arrays(np.float64, scores.shape[1],
                                                        elements=numbers(-10, 10)))), st.integers(1, 4))
def test_popularity_does_not_matter(drawn, iterations):
    "A number added to a whole column is divided out by the first round, and is not without rounds."
    scores, added = drawn
    close(sinkhorn(scores + torch.from_numpy(added), .05, iterations), sinkhorn(scores, .05, iterations))
    close(sinkhorn(torch.zeros(2, 2, dtype=torch.float64) + torch.tensor([1., -1.]), .05, 0)[:, 0], 1.)

@lawful
@given(tables())
def test_soft_and_hard_limits(scores):
    close(sinkhorn(scores, 1e8), 1/scores.shape[1], 1e-6)
    assert entropy(sinkhorn(scores, 1e8)) >= entropy(sinkhorn(scores, .05)) - 1e-6
    # without balance: the best score
    assert ((scores.amax(1) - (sinkhorn(scores, 1e-4, 0)*scores).sum(1)).abs() < 1e-3).all()

def test_hard_limit_of_balance():
    "With a small epsilon the balanced choice is a matching, as good as the best of the 120 of five clips."
    for seed in range(5):
        scores, epsilon = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed),
                                     dtype=torch.float64), .01
        best = max(scores[range(5), order].sum() for order in permutations(range(5)))
        assignments = sinkhorn(scores, epsilon, 1000)
        close(assignments.sum(0), 1., .01)
        assert abs((assignments*scores).sum() - best) < 5*epsilon*math.log(5)

@pytest.mark.parametrize('kind', KINDS)
@lawful
@given(st.integers(1, 9), st.integers(1, 9), numbers(-1e4, 1e4))
def test_degenerate_batches_are_uniform(kind, clips, count, value):
    "All equal; one clip; identical clips: whatever the values."
    row = torch.linspace(-1, 1, count)*value
    for scores in (torch.full((clips, count), value), row[None], row.expand(clips, count)):
        assignments = sinkhorn(scores.to(kind))
        close(assignments, 1/count, 1e-5)
        close(swapped_prediction_loss([torch.zeros_like(scores).to(kind)]*2, [assignments]*2),
              math.log(count), 1e-5)

@lawful
@given(tables(most=6))
def test_more_prototypes_than_clips(scores):
    assert sinkhorn(scores, .5,
                    400).max() <= len(scores)/scores.shape[1] + 1e-6 or len(scores) > scores.shape[1]
    # one prototype
    assert torch.equal(sinkhorn(scores[:, :1]), torch.ones(len(scores), 1, dtype=torch.float64))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_bad_clip(kind, bad):
    scores = (2*torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) - 1).to(kind)
    scores[2, 1] = bad
    assignments = sinkhorn(scores)
    if bad == -math.inf:  # this clip never gets that prototype
        close(assignments.sum(1), 1., 1e-5)
        assert assignments[2, 1] == 0
    else: assert assignments.isnan().all()  # never finite rows that look healthy

def test_zeros_in_the_queue_switch_the_balance_off():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1., 0, 0, 0])
    close(sinkhorn(torch.cat([scores, torch.zeros(10**5, 4)]), 1.)[:6], scores.softmax(1), 1e-3)
    queue = ProjectionQueue(1, 3, 4)  # so it is left out until it is full
    assert torch.equal(view_assignments([scores], queue, torch.eye(4))[0], sinkhorn(scores))

# --- Projections, prototypes, queue

@lawful
@given(tables(1e4), st.sampled_from(KINDS))
def test_projections_prototypes_and_queue_at_any_size(vectors, kind):
    vectors = vectors.to(kind)
    unit = normalize_rows(vectors)
    length = unit.norm(dim=1)
    assert unit.isfinite().all() and unit.dtype == compute_dtype(vectors)
    assert (((length - 1).abs() < 1e-5) | (vectors.norm(dim=1) < 1e-6)).all()
    prototypes = Prototypes(3, vectors.shape[1], torch.Generator().manual_seed(0))
    assert prototypes(vectors).isfinite().all() and prototypes(unit).abs().max() <= 1 + 1e-5
    assert prototypes(vectors).dtype == unit.dtype and prototypes.double()(vectors).dtype == torch.float64
    queue = ProjectionQueue(1, len(vectors), vectors.shape[1])
    queue.push(vectors[None])
    older = cosine_scores(queue.projections[0], prototypes.float().weight)
    close(older, prototypes(vectors).detach().float(), 1e-1)

# --- Loss

@lawful
@given(tables(1e4, views=2), st.sampled_from(KINDS))
def test_loss_and_gradients_are_finite(scores, kind):
    views = [view.to(kind).requires_grad_() for view in scores]
    loss = swapped_prediction_loss(views, view_assignments(views))
    assert loss.isfinite() and loss >= 0 and loss.dtype == compute_dtype(views[0])
    assert loss <= 2e4/.1 + math.log(scores.shape[2]) + 1
    for gradient in torch.autograd.grad(loss, views):
        assert gradient.isfinite().all() and gradient.dtype == kind
        assert gradient.abs().max() <= 1.01/(2*scores.shape[1]*.1)

@lawful
@given(st.integers(2, 4).flatmap(lambda views: tables(views=views)), numbers(.05, 2.))
def test_loss_is_at_least_the_entropy_of_the_teachers(scores, temperature):
    assignments = view_assignments(list(scores))
    pairs, bound = pair_losses(list(scores), assignments,
                               temperature), torch.stack([entropy(q) for q in assignments])
    leaves = [view.clone().requires_grad_() for view in scores]
    loss = swapped_prediction_loss(leaves, assignments, temperature)
    assert (pairs >= bound[:, None] - 1e-9).all() and loss >= bound.mean() - 1e-9
    close(loss, (pairs.sum() - pairs.trace())/(len(scores)*(len(scores) - 1)))  # never of a view with itself
    gradient = torch.autograd.grad(loss, leaves)
    close(torch.stack(gradient).sum(2), 0.)  # a softmax does not see a number added to a row

@lawful
@given(tables(views=3))
def test_uniform_scores_cost_ln_k(scores):
    loss = swapped_prediction_loss([torch.full_like(view, 0.3) for view in scores],
                                   view_assignments(list(scores)))
    close(loss, math.log(scores.shape[2]))

@lawful
@given(tables(views=3), st.permutations(range(3)))
def test_order_of_views_does_not_matter(scores, order):
    loss = lambda views: swapped_prediction_loss(views, view_assignments(views))
    close(loss([scores[v] for v in order]), loss(list(scores)))

@pytest.mark.parametrize('views, clips, count, dim', [(2, 1, 3, 2), (4, 2, 3, 3), (2, 3, 1, 4)])
def test_gradients_against_finite_differences(views, clips, count, dim):
    g = torch.Generator().manual_seed(views + clips)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    raw, weight, prototypes = draw(views, clips, dim), draw(count, dim), Prototypes(count, dim)
    scores_of = lambda raw, weight: [functional_call(prototypes, {'weight': weight}, (normalize_rows(z),))
                                     for z in raw]
    teachers = view_assignments(scores_of(raw, weight))
    assert gradcheck(lambda *scores: swapped_prediction_loss(scores, teachers),
                     tuple(draw(views, clips, count)))
    assert gradcheck(lambda raw, weight: torch.stack(scores_of(raw, weight)), (raw, weight))
    assert gradcheck(lambda raw, weight: swapped_prediction_loss(scores_of(raw, weight), teachers),
                     (raw, weight))

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_bad_clip_shows_in_the_loss(bad):
    views = list(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))
    views[1][0, 0] = bad
    assert swapped_prediction_loss(views, view_assignments(views)).isnan()

def test_shapes_that_differ_are_refused():
    q = [torch.full((4, 3), 1/3)]*2
    for scores in ([torch.zeros(4, 3)], [torch.zeros(4, 3), torch.zeros(1, 3)], [torch.zeros(4, 3)]*3):
        with pytest.raises(ValueError, match='same 2 or more views'): swapped_prediction_loss(scores, q)

def test_half_precision_does_not_leak_in():
    g = torch.Generator().manual_seed(0)
    prototypes = Prototypes(300, 128, g)
    z = normalize_rows(prototypes.weight.detach()[:64] + .05*torch.randn(64, 128, generator=g))
    views = [prototypes(z).detach()]*2
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rounded = torch.nn.functional.linear(z, prototypes.weight).float()
        assert torch.equal(prototypes(z), views[0]) and torch.equal(sinkhorn(views[0]), view_assignments(views)[0])
        inside = swapped_prediction_loss(views, view_assignments(views))
    assert torch.equal(inside, swapped_prediction_loss(views, view_assignments(views)))
    assert .001 < (rounded - views[0]).abs().max() < .01  # what a bfloat16 score would be off by

# --- Elsewhere in the package

@lawful
@given(st.integers(2, 500), numbers(1e-6, 10.), numbers(0., 1.))
def test_cosine_schedule_stays_between_its_ends(total, base, ratio):
    final = base*ratio
    rates = [cosine_schedule(step, total, base, final) for step in range(total + 1)]
    assert max(rates) <= base*(1 + 1e-12) and min(rates) >= final*(1 - 1e-12) - 1e-15
    assert rates[0] == pytest.approx(base) and rates[-1] == pytest.approx(final)
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(rates))

@lawful
@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e4, 1e4, width=32)), numbers(.5, 100.))
def test_quantised_flow_comes_back(values, bound):
    step, quantised = 2*bound/255, flow.quantise(values, bound)
    back = flow.dequantise(quantised, bound)
    assert quantised.dtype == np.uint8 and np.abs(back).max() <= bound*(1 + 1e-6)
    assert np.abs(back - values.clip(-bound, bound)).max() <= step/2*(1 + 1e-3)
    assert np.array_equal(flow.quantise(back, bound), quantised)
    order = values.argsort(kind='stable')
    assert (np.diff(quantised[order].astype(int)) >= 0).all()

@lawful
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.integers(1, 40),
       st.integers(0, 2**32 - 1))
def test_frame_numbers_stay_inside_the_video(num_frames, clip_length, stride, step, seed):
    start = video.random_clip_start(num_frames, clip_length, np.random.default_rng(seed), stride)
    for clip in (video.clip_indices(num_frames, clip_length, start, stride),
                 *video.test_clip_indices(num_frames, clip_length, step, 1)):
        assert clip.shape == (clip_length,) and clip.dtype == np.int64 and 0 <= clip.min()
        assert clip.max() < num_frames and (np.diff(clip) >= 0).all()
    for outside in (-1, num_frames):
        with pytest.raises(ValueError, match='cannot start'):
            video.clip_indices(num_frames, clip_length, outside, stride)

@lawful
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_recall_grows_with_k(queries, gallery, classes, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda count: (torch.randn(count, 5, generator=g), torch.randint(classes, (count,), generator=g))
    (query, query_labels), (videos, labels) = draw(queries), draw(gallery)
    recall = list(recall_at_k(cosine_similarity(query, videos), query_labels, labels,
                              ks=(1, 2, 3, 5, gallery + 20)).values())
    assert recall == sorted(recall)
    assert recall[-1] == pytest.approx(torch.isin(query_labels, labels).float().mean().item())

def test_workers_change_no_bit(tmp_path):
    "Every tensor of every batch, with 0, 1 and 2 reading processes."
    shapes = make_moving_shapes(tmp_path/'shapes', 6, 8, threads=1)
    store = prepare(read_manifest(shapes['train']), shapes['videos'], tmp_path/'store',
                    PrepareSettings(48, 'farneback', 5.), workers=0, log=lambda line: None)
    def served(workers):
        loader = training_loader(TwoStreamDataset(store, clip_length=6, views=ViewSettings(size=24),
                                                  cache_gib=0), 2, workers)
        tensors = []
        for batch in loader.epoch(1):
            values = [value for view in batch['views'] for value in view.values()]
            tensors.append([batch['sample'], batch['starts'], *(batch[stream].data for stream in STREAMS),
                            *values])
        return tensors
    alone = served(0)
    assert len(alone) == 3
    for workers in (1, 2):
        for batch, expected in zip(served(workers), alone, strict=True):
            assert all(torch.equal(*pair) for pair in zip(batch, expected, strict=True))
