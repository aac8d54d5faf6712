"The table of moving shapes that lies in data_manifests belongs to the videos that the library draws."
from pathlib import Path

import numpy as np
import pandas as pd

from vicc.manifests import read_manifest
from vicc.synthetic import (
    BACKGROUND_CLASSES, CLASSES, ShapesSettings, make_moving_shapes, random_scene, render,
)
from vicc.video import probe

TABLE = Path(__file__).parents[2]/'data_manifests'/'moving_shapes.csv'

def test_table_belongs_to_the_drawn_videos(tmp_path):
    table = read_manifest(TABLE)
    assert table.video.str.contains('/train_').sum() == 800 and table.video.str.contains('/test_').sum() == 200
    made = make_moving_shapes(tmp_path, 16, 8)
    rows = pd.concat([read_manifest(made['train']), read_manifest(made['test'])], ignore_index=True)
    pd.testing.assert_frame_equal(rows, table[table.video.isin(rows.video)].reset_index(drop=True))
    info = probe(made['videos']/rows.video[0], count=True)
    assert (info.num_frames, info.width, info.height) == tuple(rows.loc[0, ['num_frames', 'width', 'height']])

def test_other_frame_sizes():
    settings = ShapesSettings(num_frames=8, height=32, width=48)
    for name in CLASSES:
        frames = render(random_scene(name, np.random.default_rng(0), settings))
        assert frames.shape == (8, 32, 48, 3) and frames.std() > 5

def test_patterned_background_moves_faintly_behind_the_same_shapes():
    "The half that RGB sees at once, and flow badly. Shapes do not know what is behind them."
    plain, dots, checks = (random_scene(name, np.random.default_rng(3)) for name in ('rotate', 'rotate dots', 'rotate checks'))
    for scene in (dots, checks):
        assert all((one.x == two.x).all() and (one.texture == two.texture).all() for one, two in zip(plain.shapes, scene.shapes[1:], strict=True))
    assert np.abs(render(dots).astype(int) - render(checks)).max() > 80
    stripes, dots, clouds = (random_scene(f'slide_x {name}', np.random.default_rng(3)).shapes[0] for name in ('stripes', 'dots', 'clouds'))
    assert 0 < np.abs(np.diff(stripes.x)).max() < .5 and np.ptp(stripes.y) == 0  # pixels a frame; shapes move 2 to 3
    assert 0 < np.abs(np.diff(dots.y)).max() < .5 and np.ptp(dots.x) == 0
    assert 0 < np.ptp(clouds.scale) < .1 and (clouds.scale > .9).all()  # and it covers the frame: radius 64

def test_files_of_backgrounds_have_their_labels(tmp_path):
    made = make_moving_shapes(tmp_path, 16, 1, classes=BACKGROUND_CLASSES)
    rows = read_manifest(made['train'])
    assert rows.sort_values('label').class_name.tolist() == list(BACKGROUND_CLASSES)
    before = made['train'].stat().st_mtime_ns
    assert make_moving_shapes(tmp_path, 16, 1, classes=BACKGROUND_CLASSES)['train'].stat().st_mtime_ns == before
    assert read_manifest(make_moving_shapes(tmp_path, 16, 1)['train']).class_name.nunique() == 8  # another set is made anew
