"""The catalog is killed, or the GCS refuses its writes, at each step of a change: names stay whole.

A few changes; `steps.py` does all of them (`make chaos`).
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from steps import SHORT


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("steps.py"), "short", timeout=500)


@pytest.mark.parametrize("name", SHORT)
def test_at_each_step(rows, name):
    assert rows[name] == "stands"
