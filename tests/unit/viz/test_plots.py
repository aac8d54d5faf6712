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


def history(stages=('rgb-1', 'flow-1', 'rgb-2 cycle 1', 'flow-2 cycle 1'), epochs: int = 3) -> pd.DataFrame:
    rows = [dict(stage=stage, stream=stage.split('-')[0], loss=2. - epoch/4, target_entropy=1., num_prototypes=24,
                 prototypes_in_use=20, agreement=.5)
            for stage in stages for epoch in range(epochs)]
    return pd.DataFrame(rows)


def results() -> pd.DataFrame:
    rows = [('random rgb', 'rgb', .25), ('rgb-1', 'rgb', .35), ('flow-1', 'flow', .65)]
    return pd.DataFrame(rows, columns=['stage', 'stream', 'recall'])


def hard(chosen, prototypes: int = 3) -> np.ndarray:
    return np.eye(prototypes)[chosen]


def every_picture():
    "One small picture of each kind."
    labels, soft = np.array([0, 1, 2, 0, 1, 2]), hard([0, 1, 2, 0, 1, 1])
    yield plots.plot_clips({'RGB': [clip(0), clip(1)], 'flow': [clip(2), clip(3)]}, NAMES[:2])
    yield plots.plot_training_curves(history())
    yield plots.plot_assignments({'one': soft, 'two': soft}, labels, NAMES)
    yield plots.plot_montage([[clip(0), clip(1)], [clip(2)]], [[0, 1], [2]], NAMES, ['p 1', 'p 2'])
    yield plots.plot_montage([[clip(0), clip(1), clip(2)]], [[0, 0, 1]], NAMES, similarities=[[.9, .8]])
    yield plots.plot_recall_bars(results(), .1)
    yield plots.plot_confusion(np.eye(3, dtype=int), NAMES)
    yield plots.plot_dots(pd.DataFrame({'rgb': [1., 2., 3.]}, index=NAMES), 'right [%]')


def test_pictures_leave_settings_and_pyplot_alone():
    before = dict(mpl.rcParams)
    for figure in every_picture():
        assert figure.png().startswith(b'\x89PNG')
        for ax in figure.axes:
            assert not ax.has_data() or ax.images or ax.get_label() == '<colorbar>' or ax.get_ylabel() or ax.get_xlabel()
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


# ── colours and names

def test_colours_are_stable():
    colours = plots.class_colours(NAMES)
    assert colours == plots.class_colours(NAMES[::-1]*2)
    assert colours == {'hug': '#0173b2', 'kick': '#de8f05', 'point': '#029e73'}  # by sorted name, for ever
    assert len(set(plots.STREAM_COLOURS.values())) == 3
    assert len(plots.class_colours([str(number) for number in range(400)])) == 400


# ── clips

def test_film_strip_of_one_frame_and_of_odd_sizes():
    assert plots.film_strip(clip(num_frames=1)).shape == (12, 12, 3)
    assert plots.film_strip(np.zeros((4, 6, 10, 3), np.uint8), shown=2).shape == (6, 21, 3)


def test_strip_ticks_are_the_frame_numbers_of_the_video():
    "Each row that differs from the next has its own."
    figure = plots.plot_clips({'RGB': [clip()]*3}, NAMES, 5, [[0, 2, 4, 6, 8], [0, 3, 6, 9, 12], [0, 3, 6, 9, 12]])
    figure.png()
    ticks = [[text.get_text() for text in ax.get_xticklabels() if text.get_visible()] for ax in figure.axes]
    assert ticks == [['0', '2', '4', '6', '8'], [], ['0', '3', '6', '9', '12']]
    last = plots.plot_clips({'RGB': [clip(num_frames=9)]}, NAMES[:1], shown=3).axes[0]
    assert [text.get_text() for text in last.get_xticklabels()] == ['0', '4', '8']


@pytest.mark.parametrize('frames, message', [
    (np.zeros((5, 12, 12), np.uint8), r'uint8 pixels \[T, H, W, 3\], not uint8 \[5, 12, 12\]'),
    (np.zeros((5, 3, 12, 12), np.uint8), r'not uint8 \[5, 3, 12, 12\]'),
    (np.zeros((5, 12, 12, 3), np.float32), 'not float32'),
    (np.zeros((0, 12, 12, 3), np.uint8), r'\[0, 12, 12, 3\]')])
def test_wrong_frames_are_refused(frames, message):
    for call in (plots.time_overlay, plots.film_strip, lambda frames: plots.plot_clips({'RGB': [frames]}, ['a'])):
        with pytest.raises(ValueError, match=message): call(frames)


def test_every_row_needs_a_clip_and_a_label():
    with pytest.raises(ValueError): plots.plot_clips({'RGB': [clip()]}, NAMES)
    with pytest.raises(ValueError): plots.plot_montage([[clip(), clip()]], [[1]], NAMES)
    with pytest.raises(ValueError): plots.plot_montage([[clip(), clip()]], [[1, 1]], NAMES, similarities=[[.1, .2]])


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

def test_curves_mark_ln_k_the_floor_and_the_stages():
    figure = plots.plot_training_curves(history())
    loss, in_use, agreement = figure.axes
    texts = [text.get_text() for text in loss.texts]
    assert 'ln K = 3.18 (no learning)' in texts and 'K = 24' in [text.get_text() for text in in_use.texts]
    assert {'rgb-1', 'flow-1', 'rgb-2\ncycle 1', 'flow-2\ncycle 1'} <= set(texts)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['floor: entropy of the targets']
    assert np.isclose(loss.lines[-1].get_ydata()[0], np.log(24)) and loss.get_ylim()[1] > np.log(24)
    assert agreement.get_xlabel() == 'epochs in total' and agreement.get_xlim() == (.5, 12.5)
    colours = [mpl.colors.to_hex(line.get_color()) for line in in_use.lines[:2]]
    assert colours == [plots.STREAM_COLOURS['rgb'], plots.STREAM_COLOURS['flow']]


# ── assignments

@pytest.mark.parametrize('seed', range(3))
def test_rows_of_the_matrix_sum_to_one(seed):
    rng = np.random.default_rng(seed)
    labels, soft = rng.integers(0, 4, 60), rng.dirichlet(np.full(9, .3), 60).astype(np.float32)
    matrix = plots.assignment_matrix(torch.from_numpy(soft), torch.from_numpy(labels), 5)
    np.testing.assert_allclose(matrix[:4].sum(1), 1, rtol=1e-5)
    assert np.isnan(matrix[4]).all()  # no clip of this class: unknown, not zero


def test_purity_by_hand():
    #           prototype 0: a a b      prototype 1: b      prototype 2: c c a
    assert plots.prototype_purity([0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2, 0])[0] == 5/7
    assert plots.prototype_purity([0, 0, 0, 0], [0, 1, 2, 3]) == (.25, .25)
    one_each = np.arange(50)  # the trap
    assert plots.prototype_purity(one_each, one_each % 2) == (1., 1.)


def test_heat_map_axes_and_titles():
    left, right, bar = plots.plot_assignments({'toy': hard([3, 0, 1, 1], 5), 'other': hard([0, 0, 0, 0], 2)},
                                              [0, 1, 2, 2], NAMES).axes
    assert left.get_title().startswith('toy\npurity 100 %') and 'NMI 1.00' in left.get_title()
    assert [text.get_text() for text in left.get_yticklabels()] == NAMES
    # by main class; unused ones belong to the first
    assert [text.get_text() for text in left.get_xticklabels()] == ['3', '2', '4', '0', '1']
    assert '(3 of 5 in use)' in left.get_xlabel() and bar.get_ylabel() == 'share of the class [%]'
    assert left.collections[0].get_clim() == right.collections[0].get_clim() == (0, 100)
    many = plots.plot_assignments({'many': hard(np.arange(120) % 60, 60)}, np.arange(120) % 3, NAMES)
    assert many.axes[0].get_xticks().size == 0  # sixty numbers would not be legible


@pytest.mark.parametrize('labels', [[0], [0, 3], [0, -1], [0., .5]])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match='labels must be 2 numbers of classes, 0 to 2'):
        plots.plot_assignments({'toy': hard([0, 1])}, labels, NAMES)


# ── montage, neighbours

def test_montage_accepts_ragged_rows_and_still_images():
    still = clip()[0]
    figure = plots.plot_montage([[still, still], [still]], [[0, 1], [2]], NAMES, ['p 5', 'p 7'])
    assert len(figure.axes) == 4  # no key to time colours where there are no clips
    assert [ax.get_title() for ax in figure.axes] == ['kick', 'hug', 'point', '']
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ['p 5', 'p 7']
    for ax, name in zip(figure.axes, NAMES):
        assert mpl.colors.to_hex(ax.spines['top'].get_edgecolor()) == plots.class_colours(NAMES)[name]


def test_long_class_names_are_cut_to_their_tile():
    names = ['HandstandPushups'*3]
    figure = plots.plot_montage([[clip()[0]]*9], [[0]*9], names, ['p'])
    assert all(len(ax.get_title()) < 14 and ax.get_title().endswith('…') for ax in figure.axes)


def test_retrieval_marks_right_and_wrong():
    axes = plots.plot_montage([[clip(), clip(1), clip(2)]], [[1, 1, 0]], NAMES, similarities=[[.9, .81]]).axes[:3]
    assert [ax.get_title() for ax in axes] == ['query: hug', '✓ 0.90 hug', '✗ 0.81 kick']
    frames = [mpl.colors.to_hex(ax.spines['top'].get_edgecolor()) for ax in axes[1:]]
    assert frames == [plots.RIGHT, plots.WRONG]


# ── results

def test_recall_bars_group_streams_and_show_chance():
    ax = plots.plot_recall_bars(results().assign(epochs=[0, 4, 12]), .25).axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ['random', 'single-stream']
    heights = [bar.get_height() for bars in ax.containers for bar in bars if bar.get_height() > 0]
    assert heights == [25., 35., 65.]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {'rgb', 'flow', 'chance 25.0 %'}
    texts = [text.get_text() for text in ax.texts]
    assert sorted(filter(None, texts)) == ['25.0', '35.0\n4 epochs', '65.0\n12 epochs']
    ax = plots.plot_recall_bars(results().assign(low=[.2, .3, np.nan], high=[.32, .45, np.nan]), .25).axes[0]
    drawn = [ends[:, 1].tolist() for lines in ax.collections for ends in lines.get_segments() if len(ends) and np.isfinite(ends).all()]
    np.testing.assert_allclose(drawn, [[20, 32], [30, 45]])
    assert ax.get_ylim()[1] > 65


def test_tables_fill_gaps_and_print_the_best_in_bold():
    rows = ['random encoder', 'rgb-1', 'flow-1']
    table = pd.DataFrame({'R@1 [%]': [21., 31., 61.], 'R@5 [%]': [25., 35., np.nan]},
                         index=pd.Index(rows, name='stage'))
    page = plots.format_table(table, best=True).to_html()
    assert page.count('bold') == 1 and '–' in page and 'bold' not in plots.format_table(table).to_html()
    ends = table.assign(**{'R@1 [%] low': [15., 25., np.nan], 'R@1 [%] high': [27.04, 37., np.nan]})
    page = plots.format_table(ends).to_html()
    assert '21.0 (15.0–27.0)' in page and '>61.0<' in page and ' low' not in page


def test_confusion_with_a_class_without_videos():
    ax = plots.plot_confusion([[3, 1, 0], [0, 0, 0], [1, 0, 3]], NAMES, title='probe').axes[0]
    assert ax.get_title() == 'probe\naccuracy 75.0 %, mean over classes 75.0 %'
    assert [text.get_text() for text in ax.texts if text.get_text()] == ['75', '25', '25', '75']
    big = plots.plot_confusion(np.eye(101), [f'class {i}' for i in range(101)])
    assert not big.axes[0].texts
    assert not big.axes[0].get_xticks().size  # ten thousand numbers would not be legible


def test_dots_stand_in_the_order_of_the_table_with_their_errors():
    index = pd.MultiIndex.from_tuples([('crop', 112), ('crop', 128), ('clips', 1)])
    table = pd.DataFrame({'R@1': [30., 32., np.nan], 'rgb': [20., 25., 10.]}, index=index)
    errors = pd.DataFrame({'R@1': [2., 1., np.nan], 'rgb': [np.nan, np.nan, 1.]}, index=index)
    ax = plots.plot_dots(table, 'R@1 [%]', errors, ('chance', 10.)).axes[0]
    labels = {tick: text.get_text() for tick, text in zip(ax.get_yticks(), ax.get_yticklabels())}
    assert labels == {2: 'crop = 112', 1: 'crop = 128', 0: 'clips = 1'}  # the first row above
    for (line, _, (bars,)), name in zip(ax.containers, table):
        np.testing.assert_equal(line.get_xydata(), np.transpose([table[name], [2, 1, 0]]))
        drawn = {int(ends[0, 1]): ends[:, 0] for ends in bars.get_segments() if len(ends)}
        for row, (value, half) in enumerate(zip(table[name], errors[name])):
            if np.isfinite(value + half): np.testing.assert_allclose(drawn[2 - row], [value - half, value + half])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ['chance', 'R@1', 'rgb']
    assert mpl.colors.to_hex(ax.containers[1][0].get_color()) == plots.STREAM_COLOURS['rgb']
    lines = [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1 and list(line.get_xdata()) == [0, 1]]
    assert lines == [.5]  # between the switches


# ── files, notebooks

def test_save_is_whole_or_absent(tmp_path):
    figure = plots.plot_recall_bars(results(), .1)
    path = plots.save_figure(figure, str(tmp_path/'a'/'clip.png'))
    old = path.read_bytes()
    assert old.startswith(b'\x89PNG') and [p.name for p in path.parent.iterdir()] == ['clip.png']

    class Broken(plots.Picture):
        def draw(self, renderer): raise RuntimeError('killed')
    with pytest.raises(RuntimeError, match='killed'): plots.save_figure(Broken(), path)
    assert path.read_bytes() == old and len(list(path.parent.iterdir())) == 1
    with pytest.raises(ValueError, match='tiff_'): plots.save_figure(figure, tmp_path/'clip.tiff_')
    assert plots.save_figure(figure, tmp_path/'clip.pdf').read_bytes().startswith(b'%PDF')
    plots.save_figure(plt.figure(), tmp_path/'other.png')
    assert plt.get_fignums() == []


def test_large_pictures_shrink_for_notebooks():
    figure = plots.new_figure(4, 4)
    figure.subplots().imshow(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8),
                             interpolation='nearest')
    assert len(figure.png(largest=1000)) < .6*len(figure.png(largest=10**7))


def test_module_imports_nothing_of_ours_and_no_torch():
    code = ("import sys; import vicc.viz.plots;"
            "ours = [m for m in sys.modules if m.startswith('vicc.') and not m.startswith('vicc.viz')];"
            "assert not ours, ours; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)
