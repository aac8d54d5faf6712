"""What a training sample costs the CPU: python tests/system/profile_loader.py STORE [OUT.csv] [--name after].

Adds its rows (name, frame size, part, CPU milliseconds a sample) to OUT.csv. The parts overlap: `sample`
holds `decode`, `batch` holds `sample`. `through a worker` is CPU time of both processes."""
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
from vicc.data import TestClips, TestClipsByVideo, TwoStreamDataset, collate, training_loader
from vicc.prepare import Store


def cpu_seconds() -> float:
    "Of this process and of its children that have ended."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def milliseconds(call, count: int, repeats: int = 5) -> float:
    "CPU time of a call that handles `count` samples: the least of some repeats."
    call()
    times = []
    for _ in range(repeats):
        start = cpu_seconds()
        call()
        times.append(cpu_seconds() - start)
    return 1e3*min(times)/count

def profile(store: Store, batch: int = 8, clip_length: int = 32) -> dict[str, float]:
    rows = store.manifest.iloc[np.arange(4*batch) % len(store.manifest)].reset_index(drop=True)
    dataset = TwoStreamDataset(store, rows, clip_length=clip_length, views=ViewSettings(), cache_gib=0)
    alone = {}
    for stream in ('rgb', 'flow'):
        alone[stream] = TwoStreamDataset(store, rows, (stream,), clip_length, cache_gib=0)
    def opened() -> None:
        for row in rows.itertuples():
            for stream in ('rgb', 'flow'): av.open(str(store.file(row.video, stream))).close()
    costs = dict(open=milliseconds(opened, len(rows)))
    for stream, single in alone.items():
        costs[f'read {stream}'] = milliseconds(lambda: [single[number] for number in range(2*batch)], 2*batch)
    items = [dataset[number] for number in range(batch)]
    costs['sample'] = milliseconds(lambda: [dataset[number] for number in range(2*batch)], 2*batch)
    costs['collate'] = milliseconds(lambda: collate(items), batch)
    def served() -> None:
        for _ in training_loader(dataset, batch, 1): pass
    costs['through a worker'] = milliseconds(served, len(rows), 3)
    one = collate(items)
    test = TestClips(store, store.manifest, clip_length=clip_length, cache_gib=0)
    def each() -> None:
        for number in range(len(test)): test[number]
    costs['test clip, read one by one'] = milliseconds(each, len(test), 2)
    runs = TestClipsByVideo(test, None)
    def by_video() -> None:
        for number in range(len(runs)): runs[number]
    costs['test clip, read by video'] = milliseconds(by_video, len(test), 2)
    costs['MB a sample'] = sum(one[stream].data.nbytes for stream in ('rgb', 'flow'))/batch/1e6
    return costs

if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('store')
    parser.add_argument('output', nargs='?', type=Path)
    parser.add_argument('--name', default='after')
    values = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(values.store)
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    models = [line for line in lines if line.startswith('model name')]
    cpu = models[0].split(':')[1].strip() if models else platform.processor()
    shared = dict(version=values.name, frames=f'{store.manifest.width[0]}x{store.manifest.height[0]}')
    rows = []
    for name, value in profile(store).items():
        unit = 'MB' if name.startswith('MB') else 'ms of CPU'
        rows.append(dict(shared, part=name, value=round(value, 2), unit=unit))
    table = pd.DataFrame(rows)
    table = table.assign(machine=f'{cpu}, {os.cpu_count()} cores', date=time.strftime('%Y-%m-%d'))
    print(table.to_string(index=False))
    if values.output:
        before = pd.read_csv(values.output) if values.output.is_file() else pd.DataFrame()
        pd.concat([before, table], ignore_index=True).to_csv(values.output, index=False)
