"""What a training sample costs the CPU, part by part, in one process: python tests/profile_loader.py STORE [OUT.csv] [--name after].

Adds its rows (name, frame size, part, CPU milliseconds a sample) to OUT.csv. The parts overlap: `sample` holds `decode`, `batch` holds `sample`. `through a worker` is CPU time of both processes."""
import argparse
import os
import platform
import resource
import time
from pathlib import Path

import av
import numpy as np
import pandas as pd
import torch

from vicc.augment import ViewSettings
from vicc.data import TestClips, TwoStreamClips, collate, training_loader
from vicc.prepare import Store


def cpu_seconds() -> float:
    "Of this process and of its children that have ended."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def milliseconds(call, count: int, repeats: int = 5) -> float:
    "CPU time of a call that handles `count` samples: the least of some repeats, for others use the cores too."
    call()
    times = []
    for _ in range(repeats):
        start = cpu_seconds()
        call()
        times.append(cpu_seconds() - start)
    return 1e3*min(times)/count

def profile(store: Store, batch: int = 8, clip_length: int = 32) -> dict[str, float]:
    rows = store.manifest.iloc[np.arange(4*batch) % len(store.manifest)].reset_index(drop=True)
    dataset = TwoStreamClips(store, rows, clip_length=clip_length, views=ViewSettings(), cache_gib=0)
    alone = {stream: TwoStreamClips(store, rows, (stream,), clip_length, views=ViewSettings(), cache_gib=0) for stream in ('rgb', 'flow')}
    def opened() -> None:
        for row in rows.itertuples():
            for stream in ('rgb', 'flow'): av.open(str(store.file(row.video, stream))).close()
    parts = dict(open=milliseconds(opened, len(rows)))
    for stream, one in alone.items(): parts[f'read {stream}'] = milliseconds(lambda: [one[number] for number in range(2*batch)], 2*batch)
    items = [dataset[number] for number in range(batch)]
    parts['sample'] = milliseconds(lambda: [dataset[number] for number in range(2*batch)], 2*batch)
    parts['collate'] = milliseconds(lambda: collate(items), batch)
    def served() -> None:
        for _ in training_loader(dataset, batch, 1): pass
    parts['through a worker'] = milliseconds(served, len(rows), 3)
    one = collate(items)
    size = lambda clips: clips.data.nbytes if hasattr(clips, 'data') and hasattr(clips, 'clips') else clips.nbytes
    test = TestClips(store, store.manifest, clip_length=clip_length, cache_gib=0)
    parts['test clip, read one by one'] = milliseconds(lambda: [test[number] for number in range(len(test))], len(test), 2)
    try:
        from vicc.data import TestVideos
        runs = TestVideos(test, None)
        parts['test clip, read by video'] = milliseconds(lambda: [runs[number] for number in range(len(runs))], len(test), 2)
    except ImportError: pass  # an older version
    parts['MB a sample'] = sum(size(one[stream]) for stream in ('rgb', 'flow'))/batch/1e6
    return parts

if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('store'); parser.add_argument('output', nargs='?', type=Path); parser.add_argument('--name', default='after')
    values = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(values.store)
    cpu = next((line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')), platform.processor())
    table = pd.DataFrame([dict(version=values.name, frames=f'{store.manifest.width[0]}x{store.manifest.height[0]}', part=part, value=round(value, 2), unit='MB' if part.startswith('MB') else 'ms of CPU',
                               machine=f'{cpu}, {os.cpu_count()} cores', date=time.strftime('%Y-%m-%d')) for part, value in profile(store).items()])
    print(table.to_string(index=False))
    if values.output:
        before = pd.read_csv(values.output) if values.output.is_file() else pd.DataFrame()
        pd.concat([before, table], ignore_index=True).to_csv(values.output, index=False)
