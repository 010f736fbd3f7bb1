"""Whatever is lost, a published name stands: views in hands, and loads on every node.

The rows of the table of losses, in one cluster of three nodes and more; see `losses.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from losses import ROWS


@pytest.fixture(scope="module")
def rows():
    """What became of each row, by name; what was said in the end, of those not come to."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("losses.py")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("row\t")]
    told = {name: told.replace("\\n", "\n") for _, name, told in lines}
    return dict.fromkeys(ROWS, done.stderr[-4000:]) | told


@pytest.mark.parametrize("name", ROWS)
def test_after_a_loss(rows, name):
    assert rows[name] == "stands"
