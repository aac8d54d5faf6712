"Manifests against the official split lists (skipped where they are not), and what a notebook should not carry."
import csv
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vicc import manifests, video

root = Path(__file__).parents[1]
shared = Path(__file__).parents[2]/'shared'/'data'
needs_splits = pytest.mark.skipif(not (shared/'splits').is_dir(), reason='the official split lists are not here')
needs_samples = pytest.mark.skipif(not (shared/'official_samples').is_dir(), reason='the official sample videos are not here')


def ucf101_lists(split):
    "Paths of the official lists of one split: {subset: set of Class/name}."
    return {subset: {line.split()[0] for line in (shared/'splits'/'ucf101_splits'/f'{subset}list0{split}.txt').read_text().splitlines() if line.strip()}
            for subset in ('train', 'test')}


@pytest.fixture(scope='module')
def ucf101(tmp_path_factory):
    "All 13,320 clips as empty files, in class folders as in the archive."
    folder = tmp_path_factory.mktemp('ucf101')
    lists = ucf101_lists(1)
    for name in sorted(lists['train'] | lists['test']):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).touch()
    return folder


@pytest.fixture(scope='module')
def hmdb51(tmp_path_factory):
    "All 6,766 clips as empty files."
    folder = tmp_path_factory.mktemp('hmdb51')
    for path in sorted((shared/'splits'/'hmdb51_splits').glob('*_test_split1.txt')):
        (folder/path.name[:-len('_test_split1.txt')]).mkdir()
        for line in path.read_text().splitlines():
            if line.strip(): (folder/path.name[:-len('_test_split1.txt')]/line.rsplit(maxsplit=1)[0]).touch()
    return folder


@needs_splits
@pytest.mark.parametrize('split', [1, 2, 3])
def test_ucf101(ucf101, split):
    parts = {}
    for subset, count in manifests.UCF101_COUNTS[split].items():
        by_rule = manifests.ucf101_manifest(ucf101, split, subset)
        by_list = manifests.ucf101_manifest(ucf101, split, subset, split_files=shared/'splits'/'ucf101_splits')
        pd.testing.assert_frame_equal(by_rule, by_list)
        assert len(by_rule) == count and set(by_rule.video) == ucf101_lists(split)[subset]
        parts[subset] = by_rule
    assert not set(parts['train'].group) & set(parts['test'].group)
    train = parts['train']
    labels = dict(line.split() for line in (shared/'splits'/'ucf101_splits'/f'trainlist0{split}.txt').read_text().splitlines() if line.strip())
    assert {row.video: row.label + 1 for row in train.itertuples()} == {name: int(label) for name, label in labels.items()}
    assert train.class_name.nunique() == 101 and (train.video.str.split('/').str[0] == train.class_name).all()


@needs_splits
def test_ucf101_classes():
    lines = (shared/'splits'/'ucf101_splits'/'classInd.txt').read_text().split()
    assert lines[1::2] == manifests.UCF101_CLASSES


@needs_splits
def test_ucf101_incomplete(ucf101, tmp_path):
    (tmp_path/'flat').mkdir()
    for name in ('v_HandstandPushups_g08_c01.avi', 'v_YoYo_g08_c01.avi', 'v_YoYo_g01_c01.avi', 'stranger.avi'): (tmp_path/'flat'/name).touch()
    with pytest.raises(ValueError, match='must have 9537 videos, found 2'): manifests.ucf101_manifest(tmp_path/'flat')
    some = manifests.ucf101_manifest(tmp_path/'flat', check_counts=False)
    assert some.video.tolist() == ['v_HandstandPushups_g08_c01.avi', 'v_YoYo_g08_c01.avi'] and some.label.tolist() == [36, 100]
    with pytest.warns(UserWarning, match='9535 of 9537 videos are left out'):
        listed = manifests.ucf101_manifest(tmp_path/'flat', split_files=shared/'splits'/'ucf101_splits', check_counts=False)
    pd.testing.assert_frame_equal(listed, some, check_flags=False)
    assert len(listed.attrs['problems']) == 9535


@needs_splits
@pytest.mark.parametrize('split', [1, 2, 3])
def test_hmdb51(hmdb51, split):
    parts = {subset: manifests.hmdb51_manifest(hmdb51, shared/'splits'/'hmdb51_splits', split, subset) for subset in ('train', 'test')}
    for subset, mark, each in (('train', '1', 70), ('test', '2', 30)):
        expected = {f"{path.name.split('_test_split')[0]}/{line.rsplit(maxsplit=1)[0]}"
                    for path in (shared/'splits'/'hmdb51_splits').glob(f'*_test_split{split}.txt')
                    for line in path.read_text().splitlines() if line.rstrip().endswith(mark) and line.strip()}
        assert set(parts[subset].video) == expected
        assert (parts[subset].groupby('class_name').size() == each).all() and parts[subset].label.nunique() == 51
    assert not set(parts['train'].group) & set(parts['test'].group)  # siblings stay together in the official splits
    assert parts['train'].group.nunique() < len(parts['train'])/2


@needs_splits
def test_hmdb51_one_missing(hmdb51, tmp_path):
    copy = tmp_path/'copy'
    copy.mkdir()
    for folder in hmdb51.iterdir(): (copy/folder.name).symlink_to(folder, target_is_directory=True)
    (copy/'wave').unlink()
    with pytest.raises(ValueError, match='HMDB51 split 1 train must have 3570 videos, found 3500'):
        manifests.hmdb51_manifest(copy, shared/'splits'/'hmdb51_splits')


@needs_samples
def test_folder_of_real_clips(tmp_path):
    clips = shared/'official_samples'
    hmdb = manifests.folder_manifest(clips/'hmdb51', probe=lambda path: video.probe(path, count=True))
    assert hmdb.class_name.tolist() == ['cartwheel'] + ['wave']*3
    assert hmdb.num_frames.tolist() == [83, 72, 74, 48] and hmdb.height.tolist() == [240]*4 and hmdb.fps.tolist() == [30.0]*4
    ucf = manifests.ucf101_manifest(clips/'ucf101', 1, 'train', check_counts=False)
    assert ucf.group.tolist() == ['SoccerJuggling_g23', 'SoccerJuggling_g24'] and ucf.label.tolist() == [83, 83]
    manifests.require_videos(hmdb, clips/'hmdb51')
    assert len(manifests.check_videos(hmdb, clips/'hmdb51', probe=video.probe)) == 0
    manifests.write_manifest(hmdb, tmp_path/'hmdb.csv')
    pd.testing.assert_frame_equal(manifests.read_manifest(tmp_path/'hmdb.csv'), hmdb)


def test_broken_files_are_listed(tmp_path):
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    for name in ('a', 'b'): (tmp_path/name).mkdir()
    video.write_video(tmp_path/'a'/'good.mp4', frames)
    (tmp_path/'a'/'empty.mp4').touch()
    (tmp_path/'b'/'text.mp4').write_text('no video')
    (tmp_path/'loose.mp4').touch()
    with pytest.warns(UserWarning, match='3 of 4 videos are left out'):
        manifest = manifests.folder_manifest(tmp_path, probe=video.probe)
    assert manifest.video.tolist() == ['a/good.mp4'] and manifest.num_frames.tolist() == [5]
    assert {problem['video'] for problem in manifest.attrs['problems']} == {'a/empty.mp4', 'b/text.mp4', 'loose.mp4'}
    with pytest.raises(ValueError, match='none of 1 videos can be used'): manifests.folder_manifest(tmp_path/'b', labelled=False, probe=video.probe)
    pd.concat([manifest, manifest])  # the list of problems must not be in the way


def test_names_that_are_not_text(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'good.mp4').touch()
    try: open(os.fsencode(tmp_path/'a') + b'/r\xe9sum\xe9.mp4', 'wb').close()
    except OSError: pytest.skip('this file system refuses such names')
    with pytest.warns(UserWarning, match='1 of 2 videos'): manifest = manifests.folder_manifest(tmp_path)
    manifests.write_manifest(manifest, tmp_path/'m.csv')
    assert manifests.read_manifest(tmp_path/'m.csv').video.tolist() == ['a/good.mp4']


def test_order_does_not_depend_on_the_disk(tmp_path):
    for name in ('b/2.mp4', 'a/9.mp4', 'b/10.mp4', 'a-b/1.mp4'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    assert manifests.folder_manifest(tmp_path).video.tolist() == sorted(['b/2.mp4', 'a/9.mp4', 'b/10.mp4', 'a-b/1.mp4'])


def test_interrupted_write_keeps_the_old_table(tmp_path, monkeypatch):
    old = pd.DataFrame({'video': ['a.mp4']})
    manifests.write_manifest(old, tmp_path/'m.csv')
    before = (tmp_path/'m.csv').read_bytes()
    monkeypatch.setattr(manifests.os, 'replace', lambda *args: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): manifests.write_manifest(pd.DataFrame({'video': ['b.mp4']}), tmp_path/'m.csv')
    assert (tmp_path/'m.csv').read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ['m.csv']


@pytest.mark.parametrize('seed', range(5))
def test_split_keeps_siblings_together(seed):
    rng = np.random.default_rng(seed)
    rows = [{'video': f'{n}.mp4', 'label': n % 4, 'class_name': str(n % 4), 'group': f'film{rng.integers(30)}'} for n in range(400)]  # films reach into all classes
    train, test = manifests.split_manifest(pd.DataFrame(rows), 0.3, rng=rng)
    assert not set(train.group) & set(test.group) and len(train) + len(test) == 400
    assert 0.15 < len(test)/400 < 0.45
    assert train.label.nunique() == test.label.nunique() == 4


def test_class_tables_and_descriptions():
    folder = root/'data_manifests'
    tables = {name: list(csv.DictReader((folder/f'{name}_classes.csv').open(encoding='utf-8'))) for name in ('ucf101', 'hmdb51')}
    assert [row['class_name'] for row in tables['ucf101']] == manifests.UCF101_CLASSES
    for rows in tables.values(): assert [int(row['label']) for row in rows] == list(range(len(rows)))
    assert len(tables['hmdb51']) == 51 and [row['class_name'] for row in tables['hmdb51']] == sorted(row['class_name'] for row in tables['hmdb51'])
    for name in ('ucf101', 'hmdb51', 'kinetics400', 'ut_interaction', 'moving_shapes'):
        about = manifests.dataset_description(name, folder)
        assert {'title', 'page', 'licence', 'layout', 'siblings', 'make'} <= set(about)
    assert manifests.dataset_description('hmdb51')['splits'] == manifests.HMDB51_COUNTS


@needs_splits
def test_hmdb51_class_table():
    names = sorted((shared/'splits'/'hmdb51_splits'/'class_list.txt').read_text().split())
    assert [row['class_name'] for row in csv.DictReader((root/'data_manifests'/'hmdb51_classes.csv').open())] == names


def test_large_table_is_quick(tmp_path):
    rows = pd.DataFrame({'video': [f'c{n % 400}/{n}.mp4' for n in range(20_000)], 'label': [n % 400 for n in range(20_000)]})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        manifests.write_manifest(rows, tmp_path/'big.csv')
        assert len(manifests.read_manifest(tmp_path/'big.csv', num_classes=400)) == 20_000
