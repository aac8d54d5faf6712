"""vicc.viz.plots: odd inputs, large class counts, settings left alone, files whole or absent."""
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from vicc.viz import plots

NAMES = ['kick', 'hug', 'point']


def clip(seed: int = 0, num_frames: int = 5, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, size, size, 3), np.uint8)


def history(stages=(('rgb-1', 0), ('flow-1', 0), ('rgb-2', 1), ('flow-2', 1)), epochs: int = 3,
            **columns) -> pd.DataFrame:
    rows = [dict(stage=stage, cycle=cycle, epoch=epoch, loss=2. - epoch / 4, num_prototypes=24, **columns)
            for stage, cycle in stages for epoch in range(epochs)]
    return pd.DataFrame(rows)


def results(**columns) -> pd.DataFrame:
    rows = [(stage, stream, k, recall + .01 * k) for stage, stream,
            recall in [('random encoder', 'rgb', .2), ('rgb-1', 'rgb', .3), ('flow-1', 'flow', .6)]
            for k in (1, 5)]
    return pd.DataFrame(rows, columns=['stage', 'stream', 'k', 'recall']).assign(**columns)


def every_picture():
    "One small picture of each kind."
    labels = np.array([0, 1, 2, 0, 1, 2])
    chosen = np.array([0, 1, 2, 0, 1, 1])
    yield plots.plot_clip(clip())
    yield plots.plot_clips([clip(0), clip(1)], flow=[clip(2), clip(3)], title='two clips')
    yield plots.plot_views({'view 1': clip()[None], 'view 2': clip(1)[None]})
    yield plots.plot_training_curves(history(prototypes_in_use=20, assignment_entropy=3., agreement=.5),
                                     title='history')
    yield plots.plot_assignments(chosen, labels, NAMES)
    yield plots.compare_assignments(chosen, labels, labels, NAMES)
    yield plots.plot_prototype_montage([[clip(0), clip(1)], [clip(2)]], [[0, 1], [2]], NAMES, title='montage')
    yield plots.plot_retrieval([clip(0)], [[clip(1), clip(2)]], [0], [[0, 1]], NAMES)
    yield plots.plot_embedding(np.random.default_rng(0).normal(size=(6, 2)), labels, NAMES)
    yield plots.plot_recall_bars(results(), chance=.1)
    yield plots.plot_confusion(np.eye(3, dtype=int), NAMES)


def test_pictures_leave_settings_and_pyplot_alone():
    before, figures = dict(mpl.rcParams), []
    for figure in every_picture():
        assert isinstance(figure, mpl.figure.Figure)
        assert figure.png().startswith(b'\x89PNG')
        figures.append(figure)
    assert len(figures) == 11
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_every_axes_with_numbers_is_labelled():
    for figure in every_picture():
        for ax in figure.axes:
            if ax.axison and len(ax.get_xticklabels()) and ax.get_label() != '<colorbar>' and not ax.images:
                shared = ax.get_shared_x_axes().get_siblings(ax)
                assert any(a.get_xlabel() for a in shared) or [t.get_text() for t in ax.get_xticklabels()] != []
                assert ax.get_ylabel()


@pytest.mark.parametrize('draw', [
    lambda ax: plots.plot_clip(clip(), ax=ax),
    lambda ax: plots.plot_assignments([0, 1, 1], [0, 1, 2], NAMES, ax=ax),
    lambda ax: plots.plot_embedding(np.zeros((3, 2)), [0, 1, 2], NAMES, ax=ax),
    lambda ax: plots.plot_recall_bars(results(), ax=ax),
    lambda ax: plots.plot_confusion(np.eye(3), NAMES, ax=ax)])
def test_draws_on_the_axes_given(draw):
    figure, axes = plt.subplots(1, 2)
    assert draw(axes[1]) is figure
    assert axes[1].has_data() or axes[1].images
    assert not axes[0].has_data()
    plt.close(figure)


# ── colours

def test_colours_are_stable_and_are_seaborns():
    import seaborn
    assert list(plots.PALETTE) == seaborn.color_palette('colorblind').as_hex()
    colours = plots.class_colours(NAMES)
    assert colours == plots.class_colours(iter(NAMES[::-1] * 2))
    assert colours == {'hug': '#0173b2', 'kick': '#de8f05', 'point': '#029e73'}  # by sorted name, for ever
    assert {'rgb', 'flow'} <= set(plots.STREAM_COLOURS) and len(set(plots.STREAM_COLOURS.values())) == 3
    assert plots.class_colours([]) == {}


def test_many_classes_stay_apart_by_colour_and_marker():
    names = [f'{i:03d}' for i in range(110)]
    colours, markers = plots.class_colours(names), plots.class_markers(names)
    assert len({(colours[n], markers[n]) for n in names}) == 110
    assert len(plots.class_colours(map(str, range(400)))) == 400


def test_the_legend_shows_the_colour_of_the_class():
    figure = plots.plot_embedding(np.arange(6.).reshape(3, 2), [2, 0, 2], NAMES)
    legend = figure.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ['kick', 'point']
    shown = [mpl.colors.to_hex(h.get_facecolor()[0]) for h in figure.axes[0].collections]
    assert shown == [plots.class_colours(NAMES)[n] for n in ('kick', 'point')]


# ── clips

def test_film_strip_of_one_frame_and_of_odd_sizes():
    assert plots.film_strip(clip(num_frames=1)).shape == (12, 12, 3)
    assert plots.film_strip(clip(), shown=3, gap=0).shape == (12, 36, 3)
    wide = np.zeros((4, 6, 10, 3), np.uint8)
    assert plots.film_strip(wide, shown=2, gap=1).shape == (6, 21, 3)
    with pytest.raises(ValueError, match='at least 1'): plots.film_strip(clip(), shown=0)


def test_strip_ticks_are_the_frame_numbers():
    ax = plots.plot_clip(clip(num_frames=9), shown=3).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ['0', '4', '8']


def test_clips_by_name_find_their_flow():
    figure = plots.plot_clips({'a': clip(0), 'b': clip(1)}, flow={'b': clip(3), 'a': clip(2)})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ['RGB', 'flow', '', '']
    assert (figure.axes[1].images[0].get_array()[:, :12] == clip(2)[0]).all()
    with pytest.raises(ValueError, match="flow has"): plots.plot_clips({'a': clip()}, flow={'b': clip()})


@pytest.mark.parametrize('frames, message', [
    (np.zeros((5, 12, 12), np.uint8), r'must have shape \[T, H, W, 3\], not \[5, 12, 12\]'),
    (np.zeros((5, 3, 12, 12), np.uint8), 'move the channels last'),
    (np.zeros((5, 12, 12, 3), np.float32), 'uint8'),
    (np.zeros((0, 12, 12, 3), np.uint8), 'empty')])
def test_wrong_frames_are_refused(frames, message):
    for call in (plots.plot_clip, plots.time_overlay, plots.clip_summary, plots.film_strip,
                 lambda f: plots.plot_clips([f])):
        with pytest.raises(ValueError, match=message): call(frames)


def test_views_need_the_same_samples():
    with pytest.raises(ValueError, match='empty'): plots.plot_views({})
    with pytest.raises(ValueError, match=r'view 1 must have shape \[N, T, H, W, 3\]'):
        plots.plot_views({'view 1': clip()})
    figure = plots.plot_views({'view 1': torch.from_numpy(np.stack([clip(i) for i in range(6)]))}, samples=2)
    assert [ax.get_ylabel() for ax in figure.axes] == ['sample 0', 'sample 1']


def test_time_overlay_shows_order_and_ignores_noise():
    moving = np.full((5, 1, 5, 3), 200, np.uint8)
    for t in range(5): moving[t, 0, t] = 20
    overlay = plots.time_overlay(moving)[0].astype(int)
    assert (np.diff(overlay[:, 0]) > 0).all()  # red grows from first to last frame
    assert overlay[0, 2] > overlay[-1, 2]  # blue falls
    noisy = 100 + np.random.default_rng(0).integers(-8, 8, (9, 6, 6, 3))
    assert np.ptp(plots.time_overlay(noisy.astype(np.uint8)).astype(int), axis=-1).max() == 0  # grey: no motion
    assert plots.time_overlay(clip(num_frames=1)).shape == (12, 12, 3)


# ── curves

def test_curves_mark_ln_k_and_the_stages():
    figure = plots.plot_training_curves(history(prototypes_in_use=20))
    loss, in_use = figure.axes
    texts = [t.get_text() for t in loss.texts]
    assert 'ln K = 3.18 (no learning)' in texts
    assert {'rgb-1', 'flow-1', 'rgb-2\ncycle 1', 'flow-2\ncycle 1'} <= set(texts)
    assert len(loss.lines) == 4 + 1 and np.isclose(loss.lines[-1].get_ydata()[0], np.log(24))
    assert in_use.get_xlabel() == 'epochs in total' and in_use.get_xlim() == (.5, 12.5)
    assert loss.get_ylim()[1] > np.log(24)
    first, second = (mpl.colors.to_hex(line.get_color()) for line in loss.lines[:2])
    assert (first, second) == (plots.STREAM_COLOURS['rgb'], plots.STREAM_COLOURS['flow'])


def test_curves_with_little_in_the_table():
    bare = pd.DataFrame({'stage': ['rgb-1'], 'loss': [5.]})
    figure = plots.plot_training_curves(bare, num_prototypes=300)
    assert len(figure.axes) == 1 and 'ln K = 5.70 (no learning)' in [t.get_text() for t in figure.axes[0].texts]
    gaps = history(prototypes_in_use=np.nan)
    gaps.loc[1, 'loss'] = np.nan
    assert len(plots.plot_training_curves(gaps).axes) == 1  # an empty column draws nothing
    with pytest.raises(ValueError, match=r"lacks the columns \['loss'\]"):
        plots.plot_training_curves(bare[['stage']], 3)
    with pytest.raises(ValueError, match='give num_prototypes='): plots.plot_training_curves(bare)
    with pytest.raises(ValueError, match=r'K = \[24, 300\]'):
        plots.plot_training_curves(pd.concat([history(), history().assign(num_prototypes=300)]))
    with pytest.raises(ValueError, match='no rows'): plots.plot_training_curves(history()[:0])


def test_stage_names_with_and_without_cycles():
    spans = plots.stage_spans(history([('rgb-1', np.nan), ('rgb-2', 1), ('flow-2', 1), ('rgb-2', 2)], epochs=2))
    assert list(spans['name']) == ['rgb-1', 'rgb-2 cycle 1', 'flow-2 cycle 1', 'rgb-2 cycle 2']
    assert list(spans['stream']) == ['rgb', 'rgb', 'flow', 'rgb']
    assert list(zip(spans['first'], spans['last'])) == [(1, 2), (3, 4), (5, 6), (7, 8)]
    named = pd.DataFrame({'stage': ['rgb-2 cycle 2'], 'cycle': [2]})
    assert list(plots.stage_names(named)) == ['rgb-2 cycle 2']


# ── assignments

@pytest.mark.parametrize('seed', range(3))
def test_rows_sum_to_one_and_order_is_a_permutation(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, 60)
    soft = generator.dirichlet(np.full(9, .3), 60).astype(np.float32)
    matrix = plots.assignment_matrix(torch.from_numpy(soft), torch.from_numpy(labels), 4)
    np.testing.assert_allclose(matrix.sum(1), 1)
    order = plots.order_prototypes(matrix)
    assert sorted(order) == list(range(9))
    assert (np.diff(matrix[:, order].argmax(0)) >= 0).all()  # dominant classes in order
    hard = plots.assignment_matrix(soft.argmax(1), labels, 4, 9)
    np.testing.assert_allclose(hard.sum(1), 1)


def test_soft_and_hard_assignments_agree():
    chosen, labels = np.array([0, 2, 2, 1]), np.array([0, 1, 1, 0])
    soft = np.eye(3)[chosen]
    np.testing.assert_array_equal(plots.assignment_matrix(soft, labels),
                                  plots.assignment_matrix(chosen, labels))
    np.testing.assert_array_equal(plots.nearest_prototype(soft), chosen)
    assert plots.prototype_purity(soft, labels) == plots.prototype_purity(chosen, labels) == 1.
    # any scale of rows
    np.testing.assert_array_equal(plots.assignment_matrix(7 * soft, labels),
                                  plots.assignment_matrix(soft, labels))


def test_purity_by_hand():
    #           prototype 0: a a b      prototype 1: b      prototype 2: c c a
    assert plots.prototype_purity([0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2, 0]) == 5 / 7
    assert plots.prototype_purity([0, 0, 0, 0], [0, 1, 2, 3]) == .25
    assert plots.prototype_nmi([0, 0, 0, 0], [0, 1, 2, 3]) == 0
    one_each = np.arange(50)
    # the trap
    assert plots.prototype_purity(one_each, one_each % 2) == plots.shuffled_purity(one_each, one_each % 2) == 1.


def test_heat_map_axes_and_titles():
    labels, chosen = [0, 1, 2, 2], [3, 0, 1, 1]
    ax, bar = plots.plot_assignments(chosen, labels, NAMES, title='toy').axes
    assert ax.get_title().startswith('toy\npurity 100 %') and 'NMI 1.00' in ax.get_title()
    assert [t.get_text() for t in ax.get_yticklabels()] == NAMES
    assert [t.get_text() for t in ax.get_xticklabels()] == ['3', '0', '1', '2']
    assert '(3 of 4 in use)' in ax.get_xlabel() and bar.get_ylabel() == 'share of the class [%]'
    many = plots.plot_assignments(np.arange(120) % 60, np.arange(120) % 3, NAMES)
    assert many.axes[0].get_xticks().size == 0  # sixty numbers would not be legible


def test_compare_shares_one_scale_and_takes_other_samples():
    figure = plots.compare_assignments([0, 0, 0, 0, 1], [0, 1, 2], [0, 1, 2, 0, 1], NAMES,
                                       labels_after=[0, 1, 2])
    left, right = figure.axes[:2]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 100)
    assert len(left.get_xticks()) == 2 and len(right.get_xticks()) == 3


@pytest.mark.parametrize('assignments, labels, message', [
    ([0, 1], [0], 'labels has 1 entries where 2'),
    ([0, 1], [0, 3], 'holds 3, but classes are numbered 0 to 2'),
    ([0, -1], [0, 1], 'holds -1'),
    ([0., 1.], [0, 1], 'whole numbers'),
    ([[0., 0.], [1., 0.]], [0, 1], 'positive sum a row'),
    ([[np.nan, 0.]], [0], 'finite'),
    (np.zeros((1, 2, 3)), [0], r'must have shape \[N, K\]')])
def test_wrong_assignments_are_refused(assignments, labels, message):
    with pytest.raises(ValueError, match=message): plots.plot_assignments(assignments, labels, NAMES)


# ── montage, neighbours

def test_montage_accepts_ragged_rows_and_still_images():
    still = clip()[0]
    figure = plots.plot_prototype_montage([[still, still], [still]], [[0, 1], [2]], NAMES,
                                          titles=['p 5', 'p 7'])
    assert len(figure.axes) == 1  # no key to time colours where there are no clips
    assert [t.get_text() for t in figure.axes[0].texts] == ['kick', 'hug', 'point']
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ['p 5', 'p 7']
    canvas = figure.axes[0].images[0].get_array()
    for name in NAMES:
        colour = np.round(255 * np.array(mpl.colors.to_rgb(plots.class_colours(NAMES)[name])))
        assert (canvas == colour.astype(np.uint8)).all(-1).any(), name
    with pytest.raises(ValueError, match='titles has 1'):
        plots.plot_prototype_montage([[still], [still]], [[0], [1]], NAMES, titles=['p'])
    with pytest.raises(ValueError, match='at least one image'):
        plots.plot_prototype_montage([[]], [np.zeros(0, int)], NAMES)
    with pytest.raises(ValueError, match='one size'):
        plots.plot_prototype_montage([[still, still[:4]]], [[0, 0]], NAMES)


def test_long_class_names_are_cut_to_their_tile():
    names = ['HandstandPushups' * 3]
    texts = plots.plot_prototype_montage([[clip()[0]] * 9], [[0] * 9], names).axes[0].texts
    assert all(t.get_text().startswith('Handstand') and t.get_text().endswith('…') for t in texts)


def test_retrieval_marks_right_and_wrong():
    figure = plots.plot_retrieval([clip()], [[clip(1), clip(2)]], [1], [[1, 0]], NAMES,
                                  similarities=[[.9, .81]])
    texts = figure.axes[0].texts
    assert [t.get_text() for t in texts] == ['query: hug', '✓ 0.90 hug', '✗ 0.81 kick']
    assert [t.get_color() for t in texts[1:]] == [plots.RIGHT, plots.WRONG]
    with pytest.raises(ValueError, match='one row a query'): plots.plot_retrieval([clip()], [], [1], [], NAMES)
    with pytest.raises(ValueError, match='similarities of query 0'):
        plots.plot_retrieval([clip()], [[clip()]], [1], [[1]], NAMES, [[.1, .2]])


# ── results

def test_recall_bars_group_streams_and_show_chance():
    ax = plots.plot_recall_bars(results(), k=5, chance=.25).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ['random encoder', 'single-stream']
    assert [round(bar.get_height(), 1) for bars in ax.containers for bar in bars] == [25., 35., 65.]
    assert ax.containers[0][0].get_hatch() and not ax.containers[1][0].get_hatch()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['rgb', 'flow', 'chance 25.0 %']
    assert ax.get_ylabel() == 'R@5 [%]'
    centre = ax.containers[0][0].get_x() + ax.containers[0][0].get_width() / 2
    assert np.isclose(centre, 0)  # one bar stands over its label


def test_results_are_checked():
    with pytest.raises(ValueError, match=r'k = 20; it has \[1, 5\]'): plots.plot_recall_bars(results(), k=20)
    draw = plots.plot_recall_bars
    with pytest.raises(ValueError, match='more than once'): draw(pd.concat([results(), results()]))
    with pytest.raises(ValueError, match='not percent'): draw(results(recall=30.))
    with pytest.raises(ValueError, match=r"lacks the columns \['stream'\]"):
        draw(results().drop(columns='stream'))


def test_tables_fill_gaps_and_print_the_best_in_bold():
    rows = ['random encoder', 'rgb-1', 'flow-1']
    table = pd.DataFrame({'R@1 [%]': [21., 31., 61.], 'R@5 [%]': [25., 35., np.nan]},
                         index=pd.Index(rows, name='stage'))
    page = plots.format_table(table, best=True).to_html()
    assert page.count('bold') == 1 and '–' in page and 'bold' not in plots.format_table(table).to_html()
    lines = plots.markdown_table(table).splitlines()
    assert lines[0] == '| stage | R@1 [%] | R@5 [%] |'
    assert lines[-1] == '| flow-1 | 61.0 | – |'


def test_bars_with_cycles_in_a_column_of_their_own():
    rows = pd.DataFrame([dict(stage='rgb-2', cycle=c, stream='rgb', k=1, recall=.5 + c / 10) for c in (1, 2)])
    labels = [t.get_text() for t in plots.plot_recall_bars(rows).axes[0].get_xticklabels()]
    assert labels == ['cross-stream\ncycle 1', 'cross-stream\ncycle 2']


def test_confusion_with_a_class_without_videos():
    ax = plots.plot_confusion([[3, 1, 0], [0, 0, 0], [1, 0, 3]], NAMES, title='probe').axes[0]
    assert ax.get_title() == 'probe\naccuracy 75.0 %, mean over classes 75.0 %'
    assert [t.get_text() for t in ax.texts] == ['75', '25', '25', '75']
    with pytest.raises(ValueError, match=r'must have shape \[3, 3\]'): plots.plot_confusion(np.eye(2), NAMES)
    with pytest.raises(ValueError, match='counts'): plots.plot_confusion(np.zeros((3, 3)), NAMES)
    big = plots.plot_confusion(np.eye(101), [f'class {i}' for i in range(101)])
    assert not big.axes[0].texts
    assert not big.axes[0].get_xticks().size  # ten thousand numbers would not be legible


def test_points_must_be_plane():
    with pytest.raises(ValueError, match=r'points must have shape \[N, 2\], not \[4, 3\]'):
        plots.plot_embedding(np.zeros((4, 3)), [0] * 4, NAMES)


# ── files, notebooks

def test_save_is_whole_or_absent(tmp_path):
    figure = plots.plot_clip(clip())
    path = plots.save_figure(figure, str(tmp_path / 'a' / 'clip.png'))
    old = path.read_bytes()
    assert old.startswith(b'\x89PNG') and [p.name for p in path.parent.iterdir()] == ['clip.png']

    class Broken(plots.Picture):
        def draw(self, renderer): raise RuntimeError('killed')
    with pytest.raises(RuntimeError, match='killed'): plots.save_figure(Broken(), path)
    assert path.read_bytes() == old and len(list(path.parent.iterdir())) == 1
    with pytest.raises(ValueError, match='clip.png'): plots.save_figure(figure, tmp_path / 'clip.tiff_')
    with pytest.raises(ValueError, match='clip.png'): plots.save_figure(figure, tmp_path / 'clip')
    assert plots.save_figure(figure, tmp_path / 'clip.pdf').read_bytes().startswith(b'%PDF')


def test_save_closes_pyplot_figures(tmp_path):
    figure, ax = plt.subplots()
    plots.plot_embedding(np.zeros((2, 2)), [0, 1], NAMES, ax=ax)
    plots.save_figure(figure, tmp_path / 'points.png')
    assert not plt.fignum_exists(figure.number)


def test_large_pictures_shrink_for_notebooks():
    figure = plots.new_figure(4, 4)
    figure.subplots().imshow(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8),
                             interpolation='nearest')
    assert len(figure.png(largest=1000)) < .6 * len(figure.png(largest=10 ** 7))


def test_module_imports_nothing_of_ours_and_no_torch():
    code = ("import sys; import vicc.viz.plots;"
            "ours = [m for m in sys.modules if m.startswith('vicc.') and not m.startswith('vicc.viz')];"
            "assert not ours, ours; assert 'torch' not in sys.modules; assert 'IPython' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)
