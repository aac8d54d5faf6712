"Manifests against the official split lists (skipped where they are not), and tables that are wrong."
import csv
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vicc import manifests, video

root = Path(__file__).parents[2]
shared = Path(__file__).parents[3]/'shared'/'data'
needs_splits = pytest.mark.skipif(not (shared/'splits').is_dir(), reason='the official split lists are not here')
needs_samples = pytest.mark.skipif(not (shared/'official_samples').is_dir(), reason='the official sample videos are not here')


def ucf101_lists(split):
    "Paths of the official lists of one split: {subset: set of Class/name}."
    return {subset: {line.split()[0] for line in (shared/'splits'/'ucf101_splits'/f'{subset}list0{split}.txt').read_text().splitlines() if line.strip()}
            for subset in ('train', 'test')}


def stand_ins(folder, names):
    "Empty files with these paths."
    for parent in sorted({name.rsplit('/', 1)[0] for name in names}): (folder/parent).mkdir()
    for name in names: os.close(os.open(f'{folder}/{name}', os.O_CREAT))
    return folder


@pytest.fixture(scope='module')
def ucf101(tmp_path_factory):
    "All 13,320 clips as empty files, in class folders as in the archive."
    folder = tmp_path_factory.mktemp('ucf101')
    lists = ucf101_lists(1)
    return stand_ins(folder, sorted(lists['train'] | lists['test']))


@pytest.fixture(scope='module')
def hmdb51(tmp_path_factory):
    "All 6,766 clips as empty files."
    folder = tmp_path_factory.mktemp('hmdb51')
    return stand_ins(folder, [f"{path.name[:-len('_test_split1.txt')]}/{line.rsplit(maxsplit=1)[0]}" for path in sorted((shared/'splits'/'hmdb51_splits').glob('*_test_split1.txt'))
                              for line in path.read_text().splitlines() if line.strip()])


@needs_splits
@pytest.mark.parametrize('split', [1, 2, 3])
def test_ucf101(ucf101, split):
    parts = {}
    for subset, count in manifests.UCF101_COUNTS[split].items():
        parts[subset] = manifests.ucf101_manifest(ucf101, split, subset)
        assert len(parts[subset]) == count and set(parts[subset].video) == ucf101_lists(split)[subset]
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # siblings on both sides would warn
        manifests.check_train_test(parts['train'], parts['test'])
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
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # siblings stay together in the official splits
        manifests.check_train_test(parts['train'], parts['test'])
    assert parts['train'].group.nunique() < len(parts['train'])/2


@needs_splits
def test_hmdb51_one_missing(hmdb51, tmp_path):
    copy = tmp_path/'copy'
    copy.mkdir()
    for folder in hmdb51.iterdir(): (copy/folder.name).symlink_to(folder, target_is_directory=True)
    (copy/'wave').unlink()
    with pytest.raises(ValueError, match=r'HMDB51 split 1 train must have 3570 videos, found 3500 \(wave/21_wave_u_nm_np1_fr_goo_5.avi, wave/.* … not there\)'):
        manifests.hmdb51_manifest(copy, shared/'splits'/'hmdb51_splits')
    with pytest.warns(UserWarning, match='70 of 3570 videos are left out'):
        some = manifests.hmdb51_manifest(copy, shared/'splits'/'hmdb51_splits', check_counts=False)
    assert len(some) == 3500 and {problem.split('/')[0] for problem in some.attrs['problems']} == {'wave'}


def copied_lists(name, tmp_path, change):
    "The official lists of a data set, one of them changed: (file, function of its text)."
    folder = tmp_path/'lists'
    shutil.copytree(shared/'splits'/name, folder)
    path, edit = folder/change[0], change[1]
    path.write_text(edit(path.read_text()))
    return folder


@needs_splits
@pytest.mark.parametrize('edit, message', [
    (lambda text: text + text.splitlines()[0] + '\n', "wave_test_split1.txt: row [0-9]+, column video: '.*avi' is there twice, or has no number"),
    (lambda text: text.replace(' 1', ' 3', 1), "wave_test_split1.txt: row [0-9]+, column video: '.*avi' is there twice, or has no number from 0 to 2"),
    (lambda text: text.replace(' 1', ' 0', 1), 'HMDB51 split 1 train must have 3570 videos, found 3569')], ids=['twice', 'mark', 'short'])
def test_hmdb51_changed_list(hmdb51, tmp_path, edit, message):
    lists = copied_lists('hmdb51_splits', tmp_path, ('wave_test_split1.txt', edit))
    with pytest.raises(ValueError, match=message): manifests.hmdb51_manifest(hmdb51, lists)
    (lists/'wave_test_split1.txt').rename(lists/'waving_test_split1.txt')
    with pytest.raises(FileNotFoundError, match='wave_test_split1.txt does not exist'): manifests.hmdb51_manifest(hmdb51, lists)


@needs_splits
def test_converted_copies(tmp_path):
    "Another ending and one flat folder change nothing but the paths."
    names = [line.split()[0] for line in (shared/'splits'/'ucf101_splits'/'testlist02.txt').read_text().splitlines() if 'YoYo' in line]
    names += [line.rsplit(maxsplit=1)[0] for line in (shared/'splits'/'hmdb51_splits'/'wave_test_split2.txt').read_text().splitlines() if line.strip().endswith('2')]
    for name in names: (tmp_path/Path(name).with_suffix('.mp4').name).touch()
    by_rule = manifests.ucf101_manifest(tmp_path, 2, 'test', check_counts=False)
    assert by_rule.video.tolist() == sorted(path.name for path in tmp_path.glob('v_*.mp4')) and set(by_rule.label) == {100}
    with pytest.warns(UserWarning, match='1500 of 1530 videos are left out'): waves = manifests.hmdb51_manifest(tmp_path, shared/'splits'/'hmdb51_splits', 2, 'test', check_counts=False)
    assert len(waves) == 30 and set(waves.class_name) == {'wave'} and all(name.endswith('.mp4') for name in waves.video)


def kinetics_csv(path, names, clips=1, **extra):
    "A table of Kinetics: some clips of each class."
    rows = [dict(label=name, youtube_id=f'{number:06}_{clip:04}'[-11:], time_start=clip, time_end=clip + 10, split='train', **extra) for number, name in enumerate(names) for clip in range(clips)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return pd.DataFrame(rows)


def test_kinetics(tmp_path):
    names = [row['class_name'] for row in csv.DictReader((root/'data_manifests'/'kinetics400_classes.csv').open(encoding='utf-8'))]
    table = kinetics_csv(tmp_path/'train.csv', reversed(names), 3, is_cc=0)
    (tmp_path/'videos').mkdir()
    for clip in table[::2].itertuples(): (tmp_path/'videos'/f'{clip.youtube_id}_{clip.time_start:06}_{clip.time_end:06}.mp4').touch()
    with pytest.warns(UserWarning, match='600 of 1200 videos are left out'): manifest = manifests.kinetics_manifest(tmp_path/'videos', tmp_path/'train.csv')
    assert len(manifest) == 600 and len(manifest.attrs['problems']) == 600
    assert all(names[row.label] == row.class_name for row in manifest.itertuples()) and manifest.label.is_monotonic_increasing
    assert {problem.split('/')[1] for problem in manifest.attrs['problems']} == {f'{clip.youtube_id}_{clip.time_start:06}_{clip.time_end:06}.mp4' for clip in table[1::2].itertuples()}
    kinetics_csv(tmp_path/'part.csv', names[-2:], 1)
    (tmp_path/'videos'/'000001_0000.mp4').touch()
    part = manifests.kinetics_manifest(tmp_path/'videos', tmp_path/'part.csv')
    assert part.label.tolist() == [398, 399] and part.class_name.tolist() == names[-2:]  # a part has the labels of the whole
    kinetics_csv(tmp_path/'other.csv', [*names[:-1], 'Zumba'], 1)
    with pytest.raises(ValueError, match="other.csv: row 401, column label: 'Zumba' is not one of the 400 classes"):
        manifests.kinetics_manifest(tmp_path/'videos', tmp_path/'other.csv')
    for file in ('none.csv', 'empty.csv'):
        if file == 'empty.csv': (tmp_path/file).touch()
        with pytest.raises((FileNotFoundError, ValueError), match=file): manifests.kinetics_manifest(tmp_path/'videos', tmp_path/file)


def test_kinetics_addresses_know_capitals(tmp_path):
    for name in ('abcdefghijk.mp4', 'ABCDEFGHIJK.mp4'): (tmp_path/name).touch()
    if len(list(tmp_path.iterdir())) < 2: pytest.skip('this file system does not know capitals')
    (tmp_path/'k.csv').write_text('label,youtube_id,time_start,time_end,split\nb,abcdefghijk,0,10,val\na,ABCDEFGHIJK,0,10,val\n')
    manifest = manifests.kinetics_manifest(tmp_path, tmp_path/'k.csv', 'val', classes=['a', 'b'])
    assert dict(zip(manifest.video, manifest.label)) == {'ABCDEFGHIJK.mp4': 0, 'abcdefghijk.mp4': 1}


def probed(manifest, videos):
    "A manifest with what is in the files."
    infos = [video.probe(videos/name, count=True) for name in manifest.video]
    return manifest.assign(**{name: [getattr(info, name) for info in infos] for name in ('num_frames', 'fps', 'width', 'height')})


@needs_samples
@needs_splits
@pytest.mark.filterwarnings('ignore:.*are left out')
def test_builders_on_real_clips(tmp_path):
    "The official builders on the real files: labels, siblings, and what is in the files."
    clips, lists = shared/'official_samples', shared/'splits'
    ucf = probed(manifests.ucf101_manifest(clips/'ucf101', 1, 'train', check_counts=False), clips/'ucf101')
    assert set(ucf.video) <= {name.split('/')[1] for name in ucf101_lists(1)['train']} | ucf101_lists(1)['train']
    assert ucf.width.tolist() == [320]*2 and ucf.height.tolist() == [240]*2 and all(abs(fps - 29.97) < 0.01 for fps in ucf.fps) and (ucf.num_frames > 100).all()
    parts = {}
    for subset in ('train', 'test'):
        try: parts[subset] = manifests.hmdb51_manifest(clips/'hmdb51', lists/'hmdb51_splits', 1, subset, check_counts=False)
        except ValueError: continue  # none of the four is in this part
    hmdb = pd.concat(parts.values())
    marks = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in (lists/'hmdb51_splits'/'wave_test_split1.txt').read_text().splitlines() if line.strip()}
    for subset, part in parts.items():
        for row in part[part.class_name == 'wave'].itertuples(): assert marks[row.video.split('/')[1]] == {'train': '1', 'test': '2'}[subset] and row.label == 50
    waves = probed(hmdb[hmdb.class_name == 'wave'].reset_index(drop=True), clips/'hmdb51')
    assert len(waves) and set(waves.num_frames) <= {72, 74, 48} and set(waves.fps) == {30.0}
    (tmp_path/'k.csv').write_text('label,youtube_id,time_start,time_end,split\nzumba,R6llTwEh07w,1,11,train\nabseiling,SOX5yA1l24A,2,12,train\nabseiling,gone,2,12,train\n')
    kinetics = probed(manifests.kinetics_manifest(clips/'kinetics', tmp_path/'k.csv', classes=['abseiling', 'zumba']), clips/'kinetics')
    assert kinetics.video.tolist() == ['SOX5yA1l24A.mp4', 'R6llTwEh07w.mp4'] and (kinetics.num_frames > 0).all() and (kinetics.width > 0).all()
    assert list(kinetics.attrs['problems']) == ['abseiling/gone_000002_000012.mp4']
    for name, manifest in dict(ucf=ucf, waves=waves, kinetics=kinetics).items():
        manifests.write_manifest(manifest, tmp_path/f'{name}.csv')
        pd.testing.assert_frame_equal(manifests.read_manifest(tmp_path/f'{name}.csv'), manifest, check_flags=False)


@needs_samples
def test_folder_of_real_clips(tmp_path):
    clips = shared/'official_samples'
    hmdb = probed(manifests.folder_manifest(clips/'hmdb51'), clips/'hmdb51')
    assert hmdb.class_name.tolist() == ['cartwheel'] + ['wave']*3
    assert hmdb.num_frames.tolist() == [83, 72, 74, 48] and hmdb.height.tolist() == [240]*4 and hmdb.fps.tolist() == [30.0]*4
    ucf = manifests.ucf101_manifest(clips/'ucf101', 1, 'train', check_counts=False)
    assert ucf.group.tolist() == ['SoccerJuggling_g23', 'SoccerJuggling_g24'] and ucf.label.tolist() == [83, 83]
    manifests.require_videos(hmdb, clips/'hmdb51')
    manifests.write_manifest(hmdb, tmp_path/'hmdb.csv')
    pd.testing.assert_frame_equal(manifests.read_manifest(tmp_path/'hmdb.csv'), hmdb)


def test_what_is_left_out_is_listed(tmp_path):
    for name in ('a/good.mp4', 'b/also.mp4', 'loose.mp4'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    with pytest.warns(UserWarning, match='1 of 3 videos are left out .*loose.mp4: lies beside the class folders'): manifest = manifests.folder_manifest(tmp_path)
    assert manifest.video.tolist() == ['a/good.mp4', 'b/also.mp4'] and list(manifest.attrs['problems']) == ['loose.mp4']
    pd.concat([manifest, manifest])  # the list of problems must not be in the way


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='the superuser reads every folder')
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    for name in ('a/1.mp4', 'b/2.mp4'):
        (tmp_path/name).parent.mkdir()
        (tmp_path/name).touch()
    (tmp_path/'b').chmod(0)
    try:
        with pytest.raises(PermissionError, match=str(tmp_path/'b')): manifests.folder_manifest(tmp_path)
    finally: (tmp_path/'b').chmod(0o700)


def test_folders(tmp_path):
    for name in ('walk/1.mp4', 'walk/10.AVI', 'jump/deep/er/1.mkv', 'jump/.hidden.mp4', '.cache/3.mp4', 'jump/notes.txt'):
        (tmp_path/'toy'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'toy'/name).touch()
    (tmp_path/'toy'/'circle').symlink_to(tmp_path/'toy', target_is_directory=True)
    toy = manifests.folder_manifest(tmp_path/'toy')
    assert toy.video.tolist() == ['jump/deep/er/1.mkv', 'walk/1.mp4', 'walk/10.AVI'] and toy.label.tolist() == [0, 1, 1]
    assert manifests.folder_manifest(tmp_path/'toy', classes=['walk', 'jump']).label.tolist() == [1, 0, 0]  # the order given
    assert manifests.folder_manifest(tmp_path/'toy', classes=['walk']).class_name.tolist() == ['walk']*2
    assert manifests.folder_manifest(tmp_path/'toy', labelled=False).label.tolist() == [-1]*3
    assert manifests.folder_manifest(tmp_path/'toy', group=r'(\d+)\.').group.tolist() == ['1', '1', '10']
    for options, message in ((dict(group=r'g(\d+)'), "'jump/deep/er/1.mkv' has no group"), (dict(group=r'\d'), 'no capture groups'),
                             (dict(classes=['walk', 'run']), 'class folders jump, walk, wanted are walk, run: sort')):
        with pytest.raises(ValueError, match=message): manifests.folder_manifest(tmp_path/'toy', **options)
    (tmp_path/'empty').mkdir()
    for name, message in (('toy/walk', 'use labelled=False'), ('empty', 'holds no video'), ('nowhere', 'No such file')):
        with pytest.raises((ValueError, FileNotFoundError), match=message): manifests.folder_manifest(tmp_path/name)


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
    monkeypatch.setattr(Path, 'replace', lambda *args: (_ for _ in ()).throw(OSError('disk full')))
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
    tables = {name: list(csv.DictReader((folder/f'{name}_classes.csv').open(encoding='utf-8'))) for name in ('ucf101', 'hmdb51', 'kinetics400')}
    assert [row['class_name'] for row in tables['ucf101']] == manifests.UCF101_CLASSES and [row['class_name'] for row in tables['hmdb51']] == manifests.HMDB51_CLASSES
    kinetics = [row['class_name'] for row in tables['kinetics400']]
    assert len(set(kinetics)) == 400 and kinetics == sorted(kinetics)
    for rows in tables.values(): assert [int(row['label']) for row in rows] == list(range(len(rows)))
    assert len(tables['hmdb51']) == 51 and [row['class_name'] for row in tables['hmdb51']] == sorted(row['class_name'] for row in tables['hmdb51'])
    for name in ('ucf101', 'hmdb51', 'kinetics400', 'ut_interaction', 'miracl_lips', 'moving_shapes'):
        about = manifests.DATASET_INFO[name]
        assert {'title', 'page', 'licence', 'layout', 'siblings', 'make', 'videos', 'classes', 'splits', 'format'} <= set(about)
        if 'class_names' in about: assert len((folder/about['class_names']).read_text(encoding='utf-8').splitlines()) == about['classes'] + 1


@needs_splits
def test_hmdb51_class_table():
    names = sorted((shared/'splits'/'hmdb51_splits'/'class_list.txt').read_text().split())
    assert manifests.HMDB51_CLASSES == names


def test_large_table_is_quick(tmp_path):
    rows = pd.DataFrame({'video': [f'c{n % 400}/{n}.mp4' for n in range(20_000)], 'label': [n % 400 for n in range(20_000)]})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        manifests.write_manifest(rows, tmp_path/'big.csv')
        assert len(manifests.read_manifest(tmp_path/'big.csv')) == 20_000


# --- tables that are wrong, and what is said


@pytest.mark.parametrize('columns, message', [
    *((dict(video=['a.mp4', path]), 'row 3, column video: .* is no plain path') for path in ('', '.', '/data/a.mp4', 'C:/a.mp4', 'run/../../a.mp4', '..', 'run\\a.mp4', 'run//a.mp4', './b.mp4', 'run/')),
    (dict(video=['a.mp4', 'a.mp4'], label=[0, 1]), "row 3, column video: 'a.mp4' is there twice, with another label"),
    (dict(video=['a.mp4', 'a.mp4\0.txt']), 'row 3, column video: .* has a character that cannot be printed'),
    (dict(video=['a.mp4', 'b.mp4'], label=['0', 'run']), "row 3, column label: 'run' is not a whole number"),
    (dict(video=['a.mp4', 'b.mp4'], label=['0', '0.5']), "row 3, column label: '0.5' is not a whole number"),
    (dict(video=['a.mp4', 'b.mp4'], label=['-2', '0']), "row 2, column label: '-2' is not a whole number from -1 to 1000000"),
    (dict(video=['a.mp4', 'b.mp4'], label=['1e12', '0']), "row 2, column label: '1e12' is not a whole"),
    (dict(video=['a.mp4', 'b.mp4'], fps=['inf', '0']), "row 2, column fps: 'inf' is not a number from 0"),
    (dict(video=['a.mp4', 'b.mp4'], label=[0, 0], class_name=['run', 'Run']), "row 3, column class_name: label 0 is 'Run' here, and 'run' in an earlier row: make them the same"),
    (dict(video=['a.mp4', 'b.mp4'], label=[0, 1], class_name=['run', 'run']), "row 3, column label: class_name 'run' is 1 here, and 0 in an earlier row"),
    (dict(path=['a.mp4']), r'no column video \(but path\)'), (dict(Video=['a.mp4'], label=[0]), r'no column video \(but Video \(did you mean video\?\), label\): name'), (dict(video=[]), 'has no rows')])
def test_wrong_tables(columns, message):
    with pytest.raises(ValueError, match=message): manifests.check_manifest(pd.DataFrame(columns))


def test_names_with_dots_are_plain(): manifests.check_manifest(pd.DataFrame(dict(video=['...', '.a/..b/c...mp4'])))


def test_a_table_is_filled_in():
    given = pd.DataFrame({'video': ['a.mp4', 'b.mp4', 'c.mp4', 'd.mp4'], 'label': ['3', ' 4', '', '-1'], 'fps': ['29.97', 'nan', None, 25], 'mine': list('wxyz')})
    table = manifests.check_manifest(given[::-1])
    assert list(table.columns) == [*manifests.COLUMNS, 'mine'] and list(table.index) == [0, 1, 2, 3]
    assert table.label.tolist() == [-1, -1, 4, 3] and table.class_name.tolist() == ['', '', '4', '3'] and table.fps.tolist() == [25, 0, 0, 29.97]
    manifests.check_manifest(pd.DataFrame({'video': ['a.mp4', 'b.mp4', 'c.mp4'], 'label': [-1, -1, 0], 'class_name': ['', 'run', 'run']}))  # without a label any name will do
    named = manifests.check_manifest(pd.DataFrame({'video': ['a.mp4', 'b.mp4', 'c.mp4'], 'label': -1, 'class_name': ['walk', '', 'run']}))
    assert named.label.tolist() == [1, -1, 0]  # names were written into a manifest without labels


@pytest.mark.parametrize('text, message', [
    ('', 'wrong.csv: is empty'), ('video,label\n', 'wrong.csv: has no rows'), ('name,label\na.mp4,1\n', 'no column video'), ('video,video\na.mp4,b.mp4\n', 'appears twice'),
    ('video,label\na.mp4,1\nb,c.mp4,2\n', "row 3: has 3 cells, the header 'video,label' has 2: quote a name"), ('video,label\na.mp4\n', "row 2: has 1 cells, the header 'video,label' has 2: fill in"),
    ('video,label\na.mp4,one\n', "row 2, column label: 'one' is not a whole"), (b'video\nR\xe9sum\xe9.mp4\n', 'not UTF-8')])
def test_wrong_files(tmp_path, text, message):
    (tmp_path/'wrong.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message): manifests.read_manifest(tmp_path/'wrong.csv')


def test_a_file_of_a_spreadsheet(tmp_path):
    (tmp_path/'m.csv').write_bytes('\ufeffvideo,label\r\na.mp4,1\r\n\r\n'.encode())
    assert len(manifests.read_manifest(tmp_path/'m.csv')) == 1
    with pytest.raises(FileNotFoundError, match='none.csv'): manifests.read_manifest(tmp_path/'none.csv')


def test_missing_videos_and_links(tmp_path):
    (tmp_path/'some').mkdir()
    (tmp_path/'some'/'a.mp4').touch()
    (tmp_path/'other.mp4').touch()
    (tmp_path/'some'/'b.mp4').symlink_to(tmp_path/'other.mp4')  # somebody else's file
    (tmp_path/'same').symlink_to(tmp_path/'some', target_is_directory=True)
    rows = pd.DataFrame({'video': ['a.mp4', 'b.mp4', 'c.mp4']})
    manifests.require_videos(rows[:1], tmp_path/'same')
    manifests.require_videos(rows[:2], tmp_path/'same', follow_links=True)
    with pytest.raises(FileNotFoundError, match=r'2 of 3 videos .*b.mp4 \(row 3\) is reached by a link that leads out.*c.mp4 \(row 4\) is not there'):
        manifests.require_videos(rows, tmp_path/'same')
    with pytest.raises(FileNotFoundError, match='3 of 3 videos cannot be used in .*nowhere'): manifests.require_videos(rows, tmp_path/'nowhere')


@pytest.mark.parametrize('make', [manifests.ucf101_manifest, lambda *arguments: manifests.hmdb51_manifest('none', 'none', *arguments[1:])])
@pytest.mark.parametrize('split, subset', [(4, 'test'), (1, 'val')])
def test_splits_that_are_not_there(make, split, subset):
    with pytest.raises(ValueError, match='choose split 1, 2 or 3'): make('none', split, subset)


def test_two_files_of_one_name(tmp_path):
    (tmp_path/'a').mkdir()
    for name in ('v_YoYo_g01_c01.mp4', 'a/v_yoyo_g01_c01.avi'): (tmp_path/name).touch()
    with pytest.raises(ValueError, match="v_YoYo_g01_c01.mp4' has the same name as an earlier file"): manifests.ucf101_manifest(tmp_path, 1, 'test', check_counts=False)


@pytest.mark.parametrize('rows, message', [
    ('zumba,x,twelve,22,train', "row 2, column time_start: 'twelve' is not a whole number"), ('zumba,,12,22,train', 'row 2, column youtube_id: is empty'),
    ('zumba,x,,22,train', 'row 2, column time_start: is empty'), ('zumba,x,12,22', 'row 2: has 4 cells')])
def test_wrong_kinetics_tables(tmp_path, rows, message):
    (tmp_path/'k.csv').write_text(f'label,youtube_id,time_start,time_end,split\n{rows}\n')
    with pytest.raises(ValueError, match=message): manifests.kinetics_manifest(tmp_path, tmp_path/'k.csv')


def test_splits_by_group():
    own = pd.DataFrame([{'video': f'{c}{r}{k}.mp4', 'label': c, 'class_name': f'c{c}', 'group': f'{c}{r}'} for c in range(3) for r in range(4) for k in range(2)])
    train, test = manifests.split_manifest(own, 0.25)
    assert manifests.split_manifest(own, 0.25)[1].video.tolist() == test.video.tolist()  # the same seed, the same split
    assert manifests.split_manifest(own, test_groups=['03'])[1].group.unique().tolist() == ['03']
    assert manifests.split_manifest(own.assign(group=''), 0.25)[1].groupby('label').size().tolist() == [2]*3  # every video for itself
    for wrong, message in ((dict(test_groups=['99']), r"unknown: \['99'\]"), (dict(test_groups=[]), '0 of 24 videos'), (dict(test_fraction=1.), 'test_fraction=1.0 must be between 0 and 1')):
        with pytest.raises(ValueError, match=message): manifests.split_manifest(own, **wrong)
    with pytest.raises(ValueError, match='class 0 has a single group'): manifests.split_manifest(own[:2])
    for other, message in ((test.assign(class_name='act ' + test.class_name), "test manifest: row 2, column class_name: label 0 is 'act c0' here, and 'c0' in the training manifest: number the classes alike"),
                           (test.assign(label=test.label + 10), "row 2, column label: class_name 'c0' is 10 here, and 0 in the training manifest"), (own, '18 videos are in both manifests')):
        with pytest.raises(ValueError, match=message): manifests.check_train_test(train, other)
    with pytest.warns(UserWarning, match='12 groups have videos in both manifests, such as 00: siblings'): manifests.check_train_test(own[::2], own[1::2])


def test_tables_of_which_one_counts_from_1_are_told_apart_by_their_folders():
    videos = [f'{name}/{number}.mp4' for name in 'abc' for number in range(2)]
    train = manifests.check_manifest(pd.DataFrame(dict(video=videos, label=[0, 0, 1, 1, 2, 2])))
    test = manifests.check_manifest(pd.DataFrame(dict(video=['a/8.mp4', 'b/8.mp4'], label=[1, 2])))  # c is missing: the ranges agree
    with pytest.raises(ValueError, match='folder a have label 0 in the training manifest, 1 in the test manifest.*count from 1'):
        manifests.check_train_test(train, test)
    manifests.check_train_test(train, manifests.check_manifest(test.assign(label=[0, 1], class_name=['0', '1'])))
