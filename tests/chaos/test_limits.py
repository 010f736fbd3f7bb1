"""At a limit, a load is exact by another way and says so, or is refused with the numbers.

The rows are in `limits.py`; all share one process.
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from limits import ROWS


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("limits.py"))


@pytest.mark.parametrize("name", ROWS)
def test_at_a_limit(rows, name):
    assert rows[name] == "stands"
