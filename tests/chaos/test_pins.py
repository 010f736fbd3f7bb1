"""Mapped models keep their bytes; when they are dropped, the store gets its memory back.

The rows are in `pins.py`; all share one process.
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from pins import ROWS


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("pins.py"))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_mapped_stays(rows, name):
    assert rows[name] == "stands"
