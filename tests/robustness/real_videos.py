"""All videos of a folder, of whatever kind, without help by hand: a manifest of those that open, and a store of all of them.

python tests/robustness/real_videos.py VIDEOS OUT.json [--short-side 120] [--flow-method dis] [--workers N]

Videos that cannot be opened, or decoded to the end, are counted with the reason; `max_failed` is 1, so that nothing stops.
"""
import argparse
import json
import os
import platform
import re
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd

from vicc.engine.io import IsolatedCall, write_text
from vicc.manifests import folder_manifest
from vicc.prepare import PrepareSettings, prepare
from vicc.video import probe

def reason(problem: str) -> str:
    "The kind of a problem, for counting: without the file, and with N for numbers."
    text = re.sub(r'^.*\.\w+(?=[ :])', '', problem.split('. ')[0])
    return re.sub(r'\d+', 'N', text).strip(' :')


def real_videos(videos: Path, store: Path, settings: PrepareSettings, workers: int | None) -> dict:
    "What happened to the videos of a folder."
    start, careful = time.monotonic(), IsolatedCall(probe)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        manifest = folder_manifest(videos, labelled=False)  # all that have a video's name
    opened = []
    for video in manifest.video:
        try: opened.append(careful(videos/video).codec)
        except ValueError as error: opened.append(f'cannot be opened: {reason(str(error))}'[:90])
    careful.close()
    seconds = dict(probe=round(time.monotonic() - start, 1))
    stems = manifest.video.str.rsplit('.', n=1).str[0]
    wanted = manifest[~stems.duplicated()]  # a.avi and a.mp4 would share a name in the store
    made = prepare(wanted, videos, store, settings, workers=workers, max_failed=1.)
    problems = pd.read_csv(store/'problems.csv')
    return dict(videos=len(manifest), endings=manifest.video.str.rsplit('.', n=1).str[1].str.lower().value_counts().to_dict(), opened=dict(Counter(opened).most_common()),
                left_out_because_of_equal_names=int(stems.duplicated().sum()), settings=dict(short_side=settings.short_side, flow_method=settings.flow_method), report=made.report | dict(set_aside=Counter(map(reason, problems.problem))),
                set_aside=[dict(video=row.video, problem=row.problem.replace(str(videos), '…')) for row in problems.itertuples()],
                notes=Counter(reason(note) for note in made.manifest.note if note).most_common() if 'note' in made.manifest else [], checksums_wrong=len(made.check()),
                seconds=seconds | dict(prepare=made.report['seconds']))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('videos', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--short-side', type=int, default=120)
    parser.add_argument('--flow-method', default='dis')
    parser.add_argument('--workers', type=int)
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = real_videos(values.videos, Path(name)/'store', PrepareSettings(values.short_side, values.flow_method), values.workers)
    result['machine'] = f'{os.cpu_count()} CPU cores, {platform.machine()}'
    write_text(values.out, json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
