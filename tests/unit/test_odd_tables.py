"Folders, tables and names of other people: each case of tests/robustness/odd_inputs.py, against the right value."
import pytest
from odd_inputs import CASES, check


@pytest.mark.parametrize('kind, what, source, function', CASES, ids=[f'{kind}: {what}'[:60] for kind, what, *_ in CASES])
def test_case(tmp_path, kind, what, source, function):
    right, came, holds = check(function, tmp_path)
    assert holds, f'right: {right}; came: {came}'
