"""Errors of flow on a benchmark of true flow: python tests/system/flow_errors.py FOLDER OUT.json [--device cuda].

FOLDER (Middlebury, Flying Chairs) holds, for each pair, two pictures and one .flo file in one folder, or with one start
of the name (0001-img0.ppm, 0001-img1.ppm, 0001-gt.flo). Adds a row a method and pair to OUT.json, which `vicc bench flow
--output OUT.json` may have written: the tables of fast/tvl1 are made from such files."""
import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vicc.bench import bench_row, available_flow_methods, describe_machine
from vicc.engine.io import write_text
from vicc.flow import end_point_error, grey


def flow_errors(folder: Path, device: str = 'cpu') -> Iterator[dict]:
    "Mean end-point error in pixels of each method; unknown pixels do not count."
    files = sorted(Path(folder).rglob('*.flo'))
    if not files: raise ValueError(f'{folder} holds no .flo files')
    for file in files:
        pictures = sorted(path for path in file.parent.iterdir() if path.suffix in ('.png', '.ppm', '.jpg'))
        alike = [path for path in pictures if path.name.split('-')[0] == file.name.split('-')[0]] or pictures
        if len(alike) != 2: raise ValueError(f'{file} needs two pictures beside it, and there are {len(alike)}')
        frames = [grey(np.asarray(Image.open(path).convert('RGB'))[None]) for path in alike]
        pair, truth = file.relative_to(folder).with_suffix('').as_posix(), cv2.readOpticalFlow(str(file))
        if truth is None or not truth.size: raise ValueError(f'{file}: no Middlebury flow file, or a cut one')
        for name, (method, used) in available_flow_methods(device).items():
            error = np.nanmean(end_point_error(method(*frames), truth.transpose(2, 0, 1)[None]))
            yield bench_row('error', f'{name}, {pair}', error, 'px', method=name, pair=pair, device=used)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--device', default='cpu')
    values = parser.parse_args(arguments)
    results = dict(machine=describe_machine(values.device), rows=[])
    if values.output.is_file(): results = json.loads(values.output.read_text())
    for row in flow_errors(values.folder, values.device):
        results['rows'].append(row)
        write_text(values.output, json.dumps(results, indent=2))


if __name__ == '__main__': main()
