"""After any loss, a published name works: loaded models stay valid, and every node can load.

The rows of the table of losses, in one cluster of three nodes and more; see `losses.py`.
"""

import sys
from pathlib import Path

import pytest
from fresh import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from losses import ROWS


@pytest.fixture(scope="module")
def rows():
    return rows_of(Path(__file__).with_name("losses.py"), timeout=500)


@pytest.mark.parametrize("name", ROWS)
def test_after_a_loss(rows, name):
    assert rows[name] == "stands"
