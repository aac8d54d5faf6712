"""Files, folders and tables of other people: what is right, and what came.

python tests/robustness/odd_inputs.py nbs/results/inputs.csv

A case is a small function under `@case(kind, what, source)`: it gets an empty folder, makes an input, and returns what
is right and what came; a `says(pattern)` is right if the error or warning that came matches. Add one to this file or
to a module that imports `case`. Cases that are tests already are listed in TESTS, and run by pytest.
`holds` is False for a wrong value. tests/unit/test_odd_tables.py runs the cases of this file with the suite.
"""
import argparse
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import torch

from vicc import manifests
from vicc.compare.finetune import label_tensor
from vicc.data import TestClips
from vicc.engine.io import read_yaml
from vicc.evaluation import quick_probe
from vicc.manifests import folder_manifest, read_manifest, write_manifest
from vicc.prepare import prepare, PrepareSettings, Store
from vicc.video import probe, read_frames, write_video

UNIT = Path(__file__).parents[1]/'unit'
CASES = []  # (kind, case, source, function)


def case(kind, what, source=''):
    "Register a function of an empty folder that returns what is right and what came."
    def register(function):
        CASES.append((kind, what, source, function))
        return function
    return register


def says(pattern):
    "The right answer is a sentence that matches."
    return re.compile(pattern)


def message(function, *arguments, **options):
    "What a call says: its error, else its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: function(*arguments, **options)
        except (ValueError, OSError) as error: return str(error)
    return '; '.join(str(warning.message) for warning in caught) or 'nothing is said'


def check(function, folder):
    "Right, came, and whether they agree."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        right, came = function(folder)
    holds = bool(right.search(str(came))) if isinstance(right, re.Pattern) else right == came
    return f'says: {right.pattern}' if isinstance(right, re.Pattern) else str(right), str(came), holds


def touch(folder, *names):
    "Empty files."
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    return folder


def table(folder, text, name='m.csv'):
    "A manifest with this text, read."
    (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(folder/name)


def rows(manifest, *columns):
    "Cells of a manifest, as plain values."
    return manifest[list(columns or ('video', 'label'))].to_numpy().tolist()


def picture(number, size=(48, 64)):
    "A grey picture whose level tells its number."
    return np.full((*size, 3), 10*number, np.uint8)


def pictures(folder, *names, size=(48, 64)):
    "PNG files: the picture of a name's number."
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: cv2.imwrite(str(folder/name), picture(int(re.findall(r'\d+', name)[-1]), size))


def levels(path):
    "Numbers of a video's pictures."
    return [round(frame.mean()/10) for frame in read_frames(path)]


# --- folders

WRITTEN_AS = {  # suffix → FFmpeg's container, codec
    '.wmv': ('asf', 'wmv2'), '.asf': ('asf', 'wmv2'), '.flv': ('flv', 'flv1'), '.f4v': ('f4v', 'libx264'), '.3gp': ('3gp', 'h263'),
    '.3g2': ('3g2', 'mpeg4'), '.mts': ('mpegts', 'mpeg2video'), '.m2ts': ('mpegts', 'mpeg2video'), '.ts': ('mpegts', 'libx264'),
    '.m2t': ('mpegts', 'mpeg2video'), '.mpg': ('mpeg', 'mpeg1video'), '.mpe': ('mpeg', 'mpeg1video'), '.vob': ('vob', 'mpeg2video'),
    '.m1v': ('mpeg1video', 'mpeg1video'), '.m2v': ('mpeg2video', 'mpeg2video'), '.ogv': ('ogg', 'libvpx'), '.divx': ('avi', 'mpeg4'), '.qt': ('mov', 'mpeg4'),
    '.m4v': ('mp4', 'mpeg4'), '.h264': ('h264', 'libx264'), '.hevc': ('hevc', 'libx265'), '.gif': ('gif', 'gif')}


def make_suffix(path, container_format, codec):
    "Ten pictures in a container of this kind."
    with av.open(str(path), 'w', format=container_format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 176, 144
        stream.pix_fmt = 'rgb8' if codec == 'gif' else 'yuv420p'
        if codec == 'libx265': stream.codec_context.options = {'x265-params': 'log-level=error'}
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((144, 176, 3), 20*number, np.uint8), format='rgb24')
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def suffix_case(suffix, container_format, codec):
    "A class whose only video has this suffix, beside .mp4."
    @case('folder', f'a class has only {suffix} files', 'chen0040/keras-video-classifier#2')
    def of_suffix(folder):
        touch(folder, f'a/1{suffix}', 'b/1.mp4')
        make_suffix(folder/'a'/f'1{suffix}', container_format, codec)
        write_video(folder/'b'/'1.mp4', [picture(number) for number in range(10)])
        return [[f'a/1{suffix}', 0, 176], ['b/1.mp4', 1, 64]], [[*row, probe(folder/row[0]).width] for row in rows(folder_manifest(folder))]


for suffix, written_as in WRITTEN_AS.items(): suffix_case(suffix, *written_as)


@case('folder', 'a class has only .y4m files, which are not read', 'jlesage/docker-handbrake#166')
def unread_kind(folder):
    return says(r'not read: 2 .y4m \(convert videos among them to .mp4, .*\); without any video: walk'), message(folder_manifest, touch(folder, 'walk/1.y4m', 'walk/2.y4m', 'run/1.mp4'))


@case('folder', 'nothing but .mxf files')
def only_unread(folder):
    return says(r'holds no video that can be used \(2 .mxf\): .* convert them to .mp4'), message(folder_manifest, touch(folder, 'a/1.mxf', 'b/1.mxf'))


@case('folder', 'root/train/<class> and root/val/<class>', 'huggingface/datasets#4015')
def subsets(folder):
    return says("has the folders train, val, which are subsets and not classes: .* subset='train'"), message(folder_manifest, touch(folder, 'train/a/1.mp4', 'train/b/2.mp4', 'val/a/3.mp4'))


@case('folder', 'a subset that lacks a class: labels are those of the other subset', 'ultralytics/ultralytics#13936')
def subset_labels(folder):
    touch(folder, 'train/0/1.mp4', 'train/180/2.mp4', 'train/90/3.mp4', 'val/0/4.mp4', 'val/90/5.mp4')
    return [['val/0/4.mp4', 0], ['val/90/5.mp4', 2]], rows(folder_manifest(folder, subset='val'))


@case('folder', 'a folder too many above the class folders')
def one_folder_too_many(folder):
    return says("the one folder UCF-101: give .*UCF-101 as root, or classes="), message(folder_manifest, touch(folder, 'UCF-101/YoYo/1.mp4', 'UCF-101/Punch/2.mp4'))


@case('folder', 'a class that is called train')
def class_train(folder):
    return [['ship/1.mp4', 0], ['train/1.mp4', 1]], rows(folder_manifest(touch(folder, 'train/1.mp4', 'ship/1.mp4')))


@case('folder', 'JPEG frames instead of videos', 'tensorpack/tensorpack#887')
def frame_folders(folder):
    return says(r'holds no video but pictures \(2 .jpg\): .*convert_frame_folders'), message(folder_manifest, touch(folder, 'a/1/1.jpg', 'a/1/2.jpg'))


@case('folder', 'frames without zeros in front: 1, 2, 10', 'open-mmlab/mmflow#109')
def frames_in_order(folder):
    pictures(folder/'in'/'run'/'a.b', *(f'img_{number}.png' for number in range(1, 13)))
    written = manifests.convert_frame_folders(folder/'in', folder/'out', fps=10)
    return (['run/a.b.mp4'], list(range(1, 13)), 10), (written, levels(folder/'out'/written[0]), probe(folder/'out'/written[0]).fps)


@case('folder', 'frames of an odd height')
def odd_frames(folder):
    pictures(folder/'in'/'a', '01.png', '02.png', '03.png', size=(47, 63))
    name, = manifests.convert_frame_folders(folder/'in', folder/'out')
    return (3, 47, 63, 3), read_frames(folder/'out'/name).shape


@case('folder', 'frames and flow pictures in one folder, as dense_flow writes them', 'yjxiong/caffe#30')
def frames_and_flow(folder):
    for kind in ('img', 'flow_x', 'flow_y'): pictures(folder/'in'/'a', *(f'{kind}_{number:05}.png' for number in range(1, 6)))
    said = message(manifests.convert_frame_folders, folder/'in', folder/'out')
    return ([1, 2, 3, 4, 5], True), (levels(folder/'out'/'a.mp4'), '10 flow pictures' in said and 'prepare computes flow' in said)


@case('folder', 'nothing but flow pictures, in folders u and v', 'torchvideo/torchvideo#12')
def only_flow(folder):
    for kind in 'uv': pictures(folder/kind, 'frame000001.png', 'frame000002.png')
    return says('4 pictures, none of them an RGB frame: .* let prepare compute the flow'), message(manifests.convert_frame_folders, folder, folder/'out')


@case('folder', 'a frame is missing')
def missing_frame(folder):
    pictures(folder/'a', '1.png', '2.png', '4.png')
    return says('/a: the pictures are not one series of numbers without gaps'), message(manifests.convert_frame_folders, folder, folder/'out')


@case('folder', 'a preview picture beside the frames')
def preview(folder):
    pictures(folder/'a', '0.png', '1.png', '2.png')
    cv2.imwrite(str(folder/'a'/'preview.png'), picture(9))
    return says('/a: the pictures are not one series of numbers without gaps'), message(manifests.convert_frame_folders, folder, folder/'out')


@case('folder', 'frames of two cameras in one folder')
def two_cameras(folder):
    pictures(folder/'a', 'left_0.png', 'left_1.png', 'right_2.png', 'right_3.png')
    return says('/a: the pictures are not one series of numbers without gaps'), message(manifests.convert_frame_folders, folder, folder/'out')


@case('folder', 'a subset two folders down')
def deep_subset(folder):
    return says("subset='videos/train' is no single folder: take the one above as root"), message(folder_manifest, touch(folder, 'videos/train/a/1.mp4'), subset='videos/train')


@case('folder', 'hidden files of macOS beside the videos')
def hidden_files(folder):
    return [['a/1.mp4', 0]], rows(folder_manifest(touch(folder, 'a/1.mp4', 'a/._1.mp4', '.Trashes/2.mp4')))


@case('folder', 'suffixes in capitals', 'SubtitleEdit/subtitleedit#10838')
def capitals(folder):
    return [['a/1.AVI', 0], ['a/2.MP4', 0]], rows(folder_manifest(touch(folder, 'a/1.AVI', 'a/2.MP4')))


# --- tables

@case('table', 'labels, and an empty column class_name')
def empty_names(folder):
    return [['a.mp4', 3, '3'], ['b.mp4', 5, '5']], rows(table(folder, 'video,label,class_name\na.mp4,3,\nb.mp4,5,\n'), 'video', 'label', 'class_name')


@case('table', 'the name of a class in one of its rows only')
def some_names(folder):
    return ['run', 'run', ''], table(folder, 'video,label,class_name\na.mp4,3,\nb.mp4,3,run\nc.mp4,,\n').class_name.tolist()


@case('table', 'names of classes and no labels')
def only_names(folder):
    return [1, 0, 1, -1], table(folder, 'video,class_name\na.mp4,run\nb.mp4,jump\nc.mp4,run\nd.mp4,\n').label.tolist()


@case('table', 'names in the column of labels')
def names_as_labels(folder):
    return says("row 2, column label: 'run' is not a whole number .*put names into class_name"), message(table, folder, 'video,label\na.mp4,run\n')


@case('table', 'a misspelt column')
def misspelt_column(folder):
    return says(r'm.csv: columns that are not used: Lable \(did you mean label\?\)$'), message(table, folder, 'video,Lable,mine\na.mp4,1,x\n')


@case('table', 'class for label, beside class_name')
def class_for_label(folder):
    return says(r'm.csv: columns that are not used: class \(did you mean label\?\)$'), message(table, folder, 'video,class,class_name\na.mp4,1,run\nb.mp4,0,walk\n')


@case('table', 'a row without a label, of a class that has one')
def label_of_the_class(folder):
    return [['a.mp4', 3], ['b.mp4', 3], ['c.mp4', -1]], rows(table(folder, 'video,label,class_name\na.mp4,3,run\nb.mp4,,run\nc.mp4,,walk\n'))


@case('table', 'a comment in front of the header')
def comment_first(folder):
    return says("row 2: has 2 cells, the header '# my videos' has 1: .* or correct the header"), message(table, folder, '# my videos\nvideo,label\na.mp4,1\n')


@case('table', 'a row that lacks a cell')
def cell_missing(folder):
    return says("row 3: has 1 cells, the header 'video,label' has 2: fill in cells that are missing"), message(table, folder, 'video,label\na.mp4,1\nb.mp4\n')


@case('table', 'a header with commas and rows with semicolons')
def two_separators(folder):
    return says("row 2: has 1 cells, the header 'video,label' has 2: .* separate cells by ','"), message(table, folder, 'video,label\na.mp4;1\n')


@case('table', 'a quote that is not closed')
def open_quote(folder):
    return says('or close a quote'), message(table, folder, 'video,label\n"a.mp4,1\nb.mp4,1\n"c.mp4,1\n')


@case('folder', 'a folder that is called like a video')
def folder_as_video(folder):
    (folder/'a.mp4').mkdir()
    return says(r'a.mp4 \(row 2\) is a folder'), message(manifests.require_videos, pd.DataFrame(dict(video=['a.mp4'])), folder)


@case('folder', 'a folder of frames listed as a video')
def frames_as_video(folder):
    touch(folder, 'run/1/img_00001.jpg')
    return says(r'run/1 \(row 2\) is a folder of pictures \(vicc.manifests.convert_frame_folders .* write run/1.mp4\)'), message(manifests.require_videos, pd.DataFrame(dict(video=['run/1'])), folder)


@case('table', 'paths without the ending .mp4')
def no_suffix(folder):
    return says(r'run/1 \(row 2\) is not there, but run/1.mp4 is: write that'), message(manifests.require_videos, pd.DataFrame(dict(video=['run/1'])), touch(folder, 'run/1.mp4'))


@case('table', 'labels 200000 … 900000', 'zylo117/Yet-Another-EfficientDet-Pytorch#344')
def label_gaps(folder):
    train, test, names = manifests.number_classes(table(folder, 'video,label\na.mp4,900000\nb.mp4,200000\n'), table(folder, 'video,label,class_name\nc.mp4,300000,run\n'))
    return ([2, 0], [1], ['200000', 'run', '900000']), (train.label.tolist(), test.label.tolist(), names)


@case('table', 'the probe on labels 200000 and 900000: two outputs, as with 0 and 1')
def probe_gaps(folder):
    features, labels = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]*4)
    plain, gaps = (quick_probe(features, own, features, own, 5) for own in (labels, labels*700_000 + 200_000))
    return (plain[0], [8, 2], True), (gaps[0], list(gaps[1].shape), torch.equal(plain[1], gaps[1]))


@case('table', 'labels with gaps given to fine-tuning')
def classifier_gaps(folder):
    return says(r'1 of 2 training videos have no label from 0 to 1 \(b.mp4: 900000\): .*vicc.manifests.number_classes'), message(label_tensor, table(folder, 'video,label\na.mp4,0\nb.mp4,900000\n'), 2)


@case('table', 'labels that start with 1', 'open-mmlab/mmaction2#1238')
def labels_from_one(folder):
    one = table(folder, 'some/path/000.mp4 1\nsome/path/001.mp4 1\nsome/path/002.mp4 2\n')
    return [0, 0, 1], manifests.number_classes(one, one)[0].label.tolist()


@case('table', 'one row without a label, where labels are needed', 'open-mmlab/mmaction2#1901')
def one_unlabelled(folder):
    one = table(folder, 'video,label\na.mp4,1\nb.mp4,\n')
    return says(r'1 of 4 videos have no label \(the cell is empty, or -1\), such as b.mp4'), message(manifests.number_classes, one, table(folder, 'video,label\nc.mp4,1\nd.mp4,2\n'))


@case('table', 'one row without a label, in a split')
def unlabelled_in_split(folder):
    one = table(folder, 'video,label\n' + ''.join(f'{n}.mp4,{n % 2}\n' for n in range(20)) + 'x.mp4,\n')
    train, test = manifests.split_manifest(one, 0.2)
    return (21, True, {0, 1}), (len(train) + len(test), 'x.mp4' in train.video.tolist(), set(test.label))


@case('table', 'a class with a single group')
def single_group(folder):
    one = table(folder, 'video,label,group\na.mp4,0,x\nb.mp4,0,x\nc.mp4,1,y\nd.mp4,1,z\n')
    return says(r'class 0 has a single group \(x\), .* or give test_groups \(or a test_manifest\)'), message(manifests.split_manifest, one)


@case('table', 'semicolons between the cells', 'asreview/asreview#302')
def semicolons(folder):
    return [['a,b.mp4', 3]], rows(table(folder, 'video;label;class_name\na,b.mp4;3;run\n'))


@case('table', 'tabs between the cells')
def tabs(folder):
    return [['a b.mp4', 3, 'run']], rows(table(folder, 'video\tlabel\tclass_name\na b.mp4\t3\trun\n'), 'video', 'label', 'class_name')


@case('table', 'blank lines', 'apache/arrow#2883')
def blank_lines(folder):
    return [['a.mp4', 1], ['b.mp4', 2]], rows(table(folder, '\nvideo,label\n\na.mp4,1\n,\n\nb.mp4,2\n\n'))


@case('table', 'a mistake after blank lines is in the row that a spreadsheet shows')
def row_after_blank_lines(folder):
    return says("row 5, column label: 'x'"), message(table, folder, 'video,label\n\na.mp4,1\n\nb.mp4,x\n')


@case('table', 'spaces after the commas')
def spaces(folder):
    return [['a.mp4', 1, 'run, fast'], ['b.mp4', 2, 'jump']], rows(table(folder, 'video, label, class_name\na.mp4, 1, "run, fast"\nb.mp4 , 2, jump \n'), 'video', 'label', 'class_name')


@case('table', 'spaces after the commas, and paths in the last column')
def spaces_before_paths(folder):
    return [['a.mp4', 1]], rows(table(folder, 'label,video\n1, a.mp4\n'))


@case('table', 'a mark for the byte order, and line ends of Windows')
def spreadsheet(folder):
    return [['é.mp4', 1]], rows(table(folder, '\ufeffvideo,label\r\né.mp4,1\r\n\r\n'))


@case('table', 'empty columns behind the last', 'phitronio/Python-for-ML#2')
def empty_columns(folder):
    return [['a.mp4', 1]], rows(table(folder, 'video,label,,\na.mp4,1,,\n'))


@case('table', 'UTF-16, as spreadsheets call Unicode')
def utf16(folder):
    said = {message(table, folder, 'video,label\na.mp4,1\n'.encode(code)) for code in ('utf-16', 'utf-16-le', 'utf-16-be')}  # with a mark, and without
    return says("m.csv is not UTF-8 text [^;]*: it is UTF-16: save it as UTF-8[^;]*$"), '; '.join(said)


@case('table', 'Latin-1')
def latin1(folder):
    return says('m.csv is not UTF-8 text .*: a letter of line 3 has another code'), message(table, folder, 'video,label\na.mp4,1\nzürich.mp4,2\nb.mp4,1\n'.encode('latin-1'))


def json_case(what, text):
    "A file of JSON that is called .csv."
    @case('table', f'{what} in a file that is called .csv')
    def of_json(folder):
        return says('m.csv: is JSON: save it as CSV'), message(table, folder, text)


for what, text in {'a list of records, as pandas writes it,': '[{"video":"a.mp4","label":0},{"video":"b.mp4","label":1}]', 'a list of paths': '[\n  "a.mp4",\n  "b.mp4"\n]\n',
                   'a line of JSON for each video': '{"video": "a.mp4", "label": 0}\n{"video": "b.mp4", "label": 1}\n'}.items(): json_case(what, text)


NAMES = 'run', 'walk', 'jump', 'turn'


def counted(first, names=NAMES, side='train'):
    "A manifest of four classes in their folders, numbered from `first`; names=(): without names."
    labels = range(first, first + 4)
    columns = dict(video=[f'{name}/{side}.mp4' for name in NAMES], label=list(labels)) | (dict(class_name=list(names)) if names else {})
    return pd.DataFrame(columns)


def against(*options):
    "What is said of a training table from 0 and another table."
    other = manifests.check_manifest(counted(*options, side='test'))
    manifests.check_train_test(manifests.check_manifest(counted(0, () if len(options) > 1 and not options[1] else NAMES)), other)


@case('table', 'a training table that counts from 0, a test table that counts from 1')
def counted_from_one(folder):
    return says("row 2, column class_name: label 1 is 'run' here, and 'walk' in the training manifest: number the classes alike. Does one of the tables count from 1"), message(against, 1)


@case('table', 'the same, without names of the classes')
def counted_without_names(folder):
    return says('videos of the folder jump have label 2 in the training manifest, 3 in the test manifest: number the classes alike'), message(against, 1, ())


@case('table', 'the same, and the names of the test table were changed to fit')
def renamed(folder):
    return says(r'3 videos lie in a folder that has the name of another class, such as walk/test.mp4 \(class_name jump\)'), message(against, 1, ('walk', 'jump', 'turn', 'more'))


@case('table', 'classes in their folders: nothing is said')
def classes_in_folders(folder):
    return 'nothing is said', message(against, 0)


@case('table', 'group is the class in every row')
def group_is_class(folder):
    return says('group is the class in every row, so no class can be divided'), message(table, folder, 'video,label,class_name,group\na.mp4,0,run,run\nb.mp4,0,run,run\nc.mp4,1,jump,jump\n')


@case('table', 'no header: "path label" with spaces in the path', 'facebookresearch/SlowFast#94')
def path_label(folder):
    return [['run/a b.mp4', 0], ['jump/c 2.avi', 7]], rows(table(folder, 'run/a b.mp4 0\njump/c 2.avi 7\n', 'train.csv'))


@case('table', 'no header: "path,label"', 'facebookresearch/SlowFast#158')
def path_comma_label(folder):
    return [['run/a,b.mp4', 0], ['jump/c.avi', 7]], rows(table(folder, 'run/a,b.mp4,0\njump/c.avi, 7\n', 'train.csv'))


@case('table', 'no header: paths only, as the test lists of UCF101')
def only_paths(folder):
    return [['YoYo/v_YoYo_g01_c01.avi', -1]], rows(table(folder, 'YoYo/v_YoYo_g01_c01.avi\r\n', 'testlist01.txt'))


@case('table', 'a list of frame folders: "folder frames label"', 'zhang-can/PAN-PyTorch#4')
def rawframes_list(folder):
    return says(r'no column video \(but v_ApplyEyeMakeup_g01_c01 163 1\): name the column of paths so'), message(table, folder, 'v_ApplyEyeMakeup_g01_c01 163 1\n')


@case('table', 'a list with several labels in a row')
def several_labels(folder):
    return says(r"row 2: 'b.mp4 1 2' is not the path of a video and its label"), message(table, folder, 'a.mp4 1\nb.mp4 1 2\n')


@case('table', 'absolute paths', 'facebookresearch/SlowFast#119')
def absolute_paths(folder):
    return says("row 1, column video: '/data/a.mp4' is no plain path .*: write it relative"), message(table, folder, '/data/a.mp4 1\n')


@case('table', 'the column of paths has another name')
def other_header(folder):
    return says(r'no column video \(but path, label\): name the column of paths so'), message(table, folder, 'path,label\na.mp4,1\n')


@case('table', 'classes called NA, null and None, and groups 01 and 1')
def names_stay_text(folder):
    return [['NA', '01'], ['null', '1'], ['None', '001']], rows(table(folder, 'video,label,class_name,group\na.mp4,0,NA,01\nb.mp4,1,null,1\nc.mp4,2,None,001\n'), 'class_name', 'group')


@case('table', 'labels as 3.0, as pandas writes them beside an empty cell')
def float_labels(folder):
    return [3, -1], table(folder, 'video,label\na.mp4,3.0\nb.mp4,\n').label.tolist()


@case('table', 'a decimal comma in fps')
def decimal_comma(folder):
    return says("row 2, column fps: '29,97' is not a number"), message(table, folder, 'video;fps\na.mp4;29,97\n')


@case('table', 'one class in two spellings')
def two_spellings(folder):
    return says("row 3, column class_name: label 0 is 'Run' here, and 'run' in an earlier row: make them the same"), message(table, folder, 'video,label,class_name\na.mp4,0,run\nb.mp4,0,Run\n')


@case('table', 'a row twice')
def row_twice(folder):
    text = 'video,label\na.mp4,0\nb.mp4,1\na.mp4,0\n'
    return ([['a.mp4', 0], ['b.mp4', 1]], True), (rows(table(folder, text)), 'm.csv: 1 rows repeat an earlier one' in message(table, folder, text))


@case('table', 'a video twice, with two labels')
def two_labels(folder):
    return says("row 4, column video: 'a.mp4' is there twice, with another label"), message(table, folder, 'video,label\na.mp4,0\nb.mp4,1\na.mp4,1\n')


KINETICS = 'label,youtube_id,time_start,time_end,split\n'


def kinetics(folder, text, *files):
    "The manifest of some Kinetics clips: rows, and problems."
    (folder/'k.csv').write_text(KINETICS + text)
    manifest = manifests.kinetics_manifest(touch(folder/'videos', *files), folder/'k.csv', classes=['jump', 'run'])
    return rows(manifest), list(manifest.attrs['problems'])


@case('table', 'Kinetics files without zeros in front', 'cvdfoundation/kinetics-dataset#3')
def kinetics_plain(folder):
    return ([['jump/x_3_13.mp4', 0], ['run/y_000010_000020.mp4', 1]], []), kinetics(folder, 'jump,x,3,13,train\nrun,y,10,20,train\n', 'jump/x_3_13.mp4', 'run/y_000010_000020.mp4')


@case('table', 'Kinetics: one file for two clips of one class')
def kinetics_same(folder):
    return ([['x.mp4', 0], ['y.mp4', 1]], ['x.mp4']), kinetics(folder, 'jump,x,3,13,train\njump,x,50,60,train\nrun,y,1,11,train\n', 'x.mp4', 'y.mp4')


@case('table', 'Kinetics: one file for clips of two classes')
def kinetics_unclear(folder):
    return ([['y.mp4', 1]], ['x.mp4']), kinetics(folder, 'jump,x,3,13,train\nrun,x,50,60,train\nrun,y,1,11,train\n', 'x.mp4', 'y.mp4')


def prepared(folder, names, table_names, **options):
    "What prepare makes of a table: videos in the store, and those set aside."
    for name in names:
        (folder/'videos'/name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder/'videos'/name, [picture(number) for number in range(5)], preset='ultrafast')
    manifest = pd.DataFrame({'video': table_names, 'label': 0})
    store = prepare(manifest, folder/'videos', folder/'store', PrepareSettings(32, 'farneback'), workers=0, log=str, **options)
    return store.manifest.video.tolist(), pd.read_csv(folder/'store'/'problems.csv').video.tolist()


@case('table', 'a video of the table is missing: set aside and counted', 'facebookresearch/SlowFast#480')
def one_missing(folder):
    return (['a.mp4', 'b.mp4'], ['gone.mp4']), prepared(folder, ['a.mp4', 'b.mp4'], ['a.mp4', 'gone.mp4', 'b.mp4'], max_failed=0.4)


@case('table', 'many videos of the table are missing: said before any work')
def many_missing(folder):
    (folder/'videos').mkdir()
    return says(r'2 of 2 videos cannot be used in .*: a.mp4 \(row 2\) is not there'), message(prepared, folder, [], ['a.mp4', 'b.mp4'])


@case('table', 'a.mp4 and a.mkv would share a name in the store: one is set aside')
def shared_name(folder):
    return (['a.mp4', 'b.mp4'], ['a.mkv']), prepared(folder, ['a.mp4', 'b.mp4', 'a.mkv'], ['a.mp4', 'b.mp4', 'a.mkv'], max_failed=0.4)


# --- commands

@case('commands', 'a share of 5 for 5 %')
def share(folder):
    return says('max_failed=5 is no share from 0 to 1: 5 % is 0.05'), message(prepared, folder, ['a.mp4'], ['a.mp4'], max_failed=5)


@case('commands', 'x264 quality 99')
def quality(folder):
    return says('rgb_quality=99 is not a number from 0 to 51'), message(PrepareSettings, rgb_quality=99)


@case('commands', 'the folder of videos as the store: nothing is written')
def store_is_videos(folder):
    (touch(folder, 'a.mp4')/'manifest.csv').write_text('video\na.mp4\n')
    said = message(prepare, folder/'manifest.csv', folder, folder)
    return (['a.mp4', 'manifest.csv'], True), (sorted(path.name for path in folder.iterdir()), 'is in the folder of videos' in said)


@case('commands', "a folder with somebody's own manifest.csv as the store: it stays as it is")
def own_manifest(folder):
    (touch(folder, 'videos/a.mp4', 'mine/manifest.csv')/'mine'/'manifest.csv').write_text('video\na.mp4\n')
    said = message(prepare, folder/'mine'/'manifest.csv', folder/'videos', folder/'mine')
    return ('video\na.mp4\n', True), ((folder/'mine'/'manifest.csv').read_text(), 'holds manifest.csv and is no store' in said)


@case('commands', 'the folder of a run for its store')
def run_for_store(folder):
    return says('run is not a finished store .*: give .*run/store'), message(Store, touch(folder, 'run/store/settings.json')/'run')


@case('commands', "TestClips(stream='RGB')")
def no_stream(folder):
    prepared(folder, ['a.mp4'], ['a.mp4'])
    return says('there is no stream RGB: give rgb or flow'), message(TestClips, Store(folder/'store'), stream='RGB')


@case('commands', 'a recipe with seed:0, without the space')
def no_space(folder):
    (folder/'r.yaml').write_text('short_side: 64\n# of the run\nseed:0\nfps: 2\n')
    return says("r.yaml is not YAML of plain values: line 3, 'seed:0': write a space after the colon"), message(read_yaml, folder/'r.yaml')


# --- names

def odd_name(name, problem):
    "A file with an odd name beside a plain one."
    @case('name', f'{name!r} beside a plain name')
    def of_name(folder):
        manifest = folder_manifest(touch(folder, 'run/plain.mp4', name), labelled=False)
        return (['run/plain.mp4'], [[name, problem]]), (manifest.video.tolist(), [list(entry) for entry in manifest.attrs['problems'].items()])


for name, problem in {'run/a\\b.mp4': 'has a backslash in its name, or a drive: rename it', 'run/a\nb.mp4': 'has a name that is not text: rename it',
                      'A: part 1.mp4': 'has a backslash in its name, or a drive: rename it', 'run/\x1b[31m.mp4': 'has a name that is not text: rename it'}.items():
    odd_name(name, problem)


@case('name', 'a class folder with a backslash: the other classes have labels without gaps')
def odd_class(folder):
    return [['a/1.mp4', 0], ['c/1.mp4', 1]], rows(folder_manifest(touch(folder, 'a/1.mp4', 'b\\x/1.mp4', 'c/1.mp4')))


@case('name', 'names with spaces, quotes, commas, signs and other scripts, written and read again')
def names_survive(folder):
    names = ['a, b.mp4', ' first.mp4', 'x "1".mp4', "it's.mp4", '-n.mp4', '#1.mp4', '100%.mp4', 'NA.mp4', 'ä.mp4', 'a\u0308.mp4', '动作.mp4', '😀.mp4', 'a;b.mp4', '=1+1.mp4', 'dot..mp4', '~x.mp4', '$HOME.mp4',
             '[1].mp4', 'a&b.mp4', '*.mp4', '1.5.mp4']
    touch(folder, *(f'run/{name}' for name in names), *names)
    manifest = folder_manifest(folder, labelled=False)
    write_manifest(manifest, folder/'m.csv')
    again = read_manifest(folder/'m.csv')
    return (sorted([*names, *(f'run/{name}' for name in names)]), {}), (again.video.tolist(), manifests.require_videos(again, folder))


# --- tests that are cases: file → test → kind, case, source, right

TESTS = {
    'test_odd_videos.py': {
        'test_eight_orientations': ('video', 'a track matrix that turns or mirrors', 'opencv/opencv#26876, FFMS/ffms2#317', 'upright as players show it, in frames, probe and prepare'),
        'test_a_cover_is_not_the_film': ('video', 'a cover picture as the first stream', 'UltraStar-Deluxe/USDX#948', 'the film: h264, 20 frames'),
        'test_an_ordinary_video_has_no_note': ('video', 'an ordinary video', '', 'no note'),
        'test_pixels_that_are_not_square_are_noted': ('video', 'pixels twice as wide as high', '', 'a note'),
        'test_uneven_times_are_noted': ('video', 'variable frame rate', 'dmlc/decord#54', 'a note'),
        'test_doubled_frames_are_noted': ('video', 'telecine: every fifth frame doubled', '', 'a note'),
        'test_interlaced_video_is_noted': ('video', 'interlaced pictures', '', 'a note'),
        'test_uneven_times_become_even': ('video', 'variable frame rate, --fps', 'dmlc/decord#54', 'the frames shown at even times'),
        'test_the_rate_that_a_file_has_changes_nothing': ('video', '--fps of the rate that the file has', '', 'every frame once, no note'),
        'test_other_rates': ('video', '--fps of another rate', '', 'the frames shown at even times, with a note'),
        'test_telecine': ('video', 'telecine, by flags or doubled frames, --fps 24', '', 'every frame of the film once'),
        'test_a_long_gap_is_closed_with_a_note': ('video', 'a gap of seconds or days between two frames, --fps', '', 'closed, with a note'),
        'test_deinterlacing': ('video', 'interlaced pictures, --deinterlace', '', 'no combing, with a note'),
        'test_deinterlacing_leaves_other_videos_alone': ('video', 'a video that is not interlaced, --deinterlace', '', 'the same bytes')},
    'test_video.py': {
        'test_a_damaged_film_ends_where_prepare_ends': ('video', 'a film that was cut or damaged, read by frames and clips', '', 'the frames before the damage, as prepare takes them, with a warning'),
        'test_clips_of_odd_numbers': ('video', 'clips at stride 0, of -1 frames a second …', '', 'refused with the name of the number')},
    'test_prepare.py': {
        'test_ready_made_flow': ('flow', 'ready-made flow', '', 'stored as it is, the last repeated'),
        'test_ready_made_flow_of_another_size': ('flow', 'ready-made flow at twice the size', '', 'resized, its motion halved'),
        'test_ready_made_flow_that_does_not_fit': ('flow', 'ready-made flow of a wrong count or shape, or none', '', 'set aside with a sentence'),
        'test_ready_made_flow_with_a_gap': ('flow', 'ready-made flow with pictures missing', '', 'set aside with a sentence')},
    'test_streams.py': {
        'test_a_stream_records_what_it_was_trained_on_beside_the_same_weights': ('modality', 'flow weights given as RGB', '', 'refused; weights without a record load')},
    'test_evaluation.py': {
        'test_feature_of_a_film_takes_the_clips_that_the_stream_was_trained_on': ('modality', 'a film shown to a stream of flow', '', 'refused; a stream of RGB takes its own clip length, stride and size'),
        'test_clips_of_the_other_stream_are_refused': ('modality', 'clips of the other modality', '', 'refused'),
        'test_videos_smaller_than_the_crop_are_set_aside': ('evaluation', 'videos smaller than test_crop', '', 'set aside and listed; the others as without them'),
        'test_torchvision_is_not_needed': ('commands', 'torchvision of another PyTorch', 'pytorch/pytorch#122494', 'vicc and its evaluation without torchvision')},
    'test_commands.py': {
        'test_what_the_numbers_cannot_show_is_said': ('evaluation', 'numbers that mean little', '', 'said once, and nothing where all is well'),
        'test_other_clips_than_the_stream_was_trained_on_are_noted': ('evaluation', 'a recipe with other clips than the stream was trained on', '', 'a note'),
        'test_what_does_not_fit_is_refused_in_one_line': ('commands', 'vicc evaluate with what does not fit', '', 'refused in one line before the work'),
        'test_training_that_cannot_start_ends_in_one_line': ('commands', 'vicc train where it cannot start', 'meta-pytorch/torchtune#1025 (port)', 'refused in one line before the work'),
        'test_a_wrong_command_line_ends_in_one_line': ('commands', 'vicc train with a wrong line', '', 'refused in one line before the work')},
    'test_alternation.py': {
        'test_a_begun_stage_becomes_longer_where_its_schedule_permits': ('commands', 'more epochs on resume', 'drprojects/superpoint_transformer#107', 'as if it had had them from the start; else the reason')},
    'test_exact_frames.py': {
        'test_any_frames_of_any_file': ('frames', 'frames by number', 'dmlc/decord#91, gcanat/video_reader-rs#78', 'the frames read in order')}}


def test_rows():
    "Run the tests of TESTS: a row for each, and each of its parameters."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-n', '0', f'--junitxml={report}', *(f'{UNIT/file}::{test}' for file, tests in TESTS.items() for test in tests)]
        subprocess.run(command, cwd=UNIT.parents[1], stdout=subprocess.DEVNULL, check=False)
        for test in ElementTree.parse(report).iter('testcase'):
            name, _, parameters = test.get('name').partition('[')
            about = TESTS[test.get('classname').rpartition('.')[2] + '.py'].get(name)
            if about is None: continue
            problem = next((child.get('message') for child in test if child.tag in ('failure', 'error')), None)
            kind, what, source, right = about
            yield dict(kind=kind, case=what + (f' ({parameters[:-1]})' if parameters else ''), source=source, right=right, came=problem or right, holds=problem is None)


def case_rows():
    "Run the cases of CASES."
    for kind, what, source, function in CASES:
        with tempfile.TemporaryDirectory() as name:
            try: right, came, holds = check(function, Path(name))
            except Exception as error: right, came, holds = 'no error', f'{type(error).__name__}: {error}', False  # noqa: BLE001
            yield dict(kind=kind, case=what, source=source, right=right, came=came.replace(name, '…')[:500], holds=holds)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='CSV file')
    out = parser.parse_args().out
    result = pd.DataFrame([*case_rows(), *test_rows()])
    result.to_csv(out, index=False, lineterminator='\n')
    print(result.groupby('kind').holds.agg(['size', 'sum']))
    if not result.holds.all(): sys.exit(result[~result.holds][['case', 'right', 'came']].to_string())
