"The table of moving shapes that lies in data_manifests belongs to the videos that the library draws."
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vicc.manifests import read_manifest
from vicc.synthetic import CLASSES, TINTED_CLASSES, ShapesSettings, random_scene, make_moving_shapes, render
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

def test_tint_is_in_the_frames_and_not_in_the_grey_levels():
    "The second half of a tinted class: seen by RGB alone. The plain set stays as it is."
    scenes = [random_scene(name, np.random.default_rng(3)) for name in ('rotate', 'rotate red', 'rotate blue')]
    plain, red, blue = map(render, scenes)
    assert np.abs(red.astype(int) - blue).max() > 80 and not (plain == red).all()
    assert np.abs(cv2.cvtColor(red[0], cv2.COLOR_RGB2GRAY).astype(int) - cv2.cvtColor(blue[0], cv2.COLOR_RGB2GRAY)).max() <= 2
    assert all((one.x == two.x).all() and (one.angle == two.angle).all() for one, two in zip(scenes[0].shapes, scenes[1].shapes))

def test_tinted_files_have_their_labels(tmp_path):
    made = make_moving_shapes(tmp_path, 16, 1, classes=TINTED_CLASSES)
    rows = read_manifest(made['train'])
    assert rows.sort_values('label').class_name.tolist() == list(TINTED_CLASSES)
    before = made['train'].stat().st_mtime_ns
    assert make_moving_shapes(tmp_path, 16, 1, classes=TINTED_CLASSES)['train'].stat().st_mtime_ns == before
    assert read_manifest(make_moving_shapes(tmp_path, 16, 1)['train']).class_name.nunique() == 8  # another set is made anew
