"Two tests run at a time (see pyproject.toml), so each must keep to one thread: threads that wait for each other's cores are far slower than none."
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items):
    "Tests marked `gpu` are skipped where there is no GPU."
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('gpu'): item.add_marker(pytest.mark.skip(reason='no CUDA device'))
