"""Runs a function in an interpreter of its own, for what needs another Ray than the suite's."""

import ctypes
import inspect
import os
import subprocess
import sys
import textwrap
import time
import traceback
from collections import defaultdict

import pytest

_PR_CAPBSET_DROP = 24
_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE = 21, 40


def run(function, *, unprivileged=False, timeout=150):
    """Run the body of a function without arguments or closures; what it raises fails the test.

    Ray starts by itself there, whichever clusters the machine has.

    `unprivileged` takes away what only root may: to open `/proc/self/map_files`.
    """
    lines = inspect.getsourcelines(function)[0]
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def ")) + 1
    body = textwrap.dedent("".join(lines[start:]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", body],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"RAY_ADDRESS": "local"},
        preexec_fn=_drop_capabilities if unprivileged else None,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows_of(script, *arguments, timeout=300):
    """What became of each row of a script that ends with `tell`, by name.

    Of those that it did not come to: what it said in the end.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("row\t")]
    rows = {name: told.replace("\\n", "\n") for _, name, told in lines}
    return defaultdict(lambda: done.stderr[-4000:], rows)


def tell(rows, names):
    """Run rows one after the other, and tell `rows_of` what became of each."""
    for name in names:
        start_s = time.monotonic()
        try:
            rows[name]()
            told = "stands"
        except (Exception, pytest.fail.Exception):  # told, and the next one has its turn
            told = traceback.format_exc().replace("\n", "\\n")
        print(f"row\t{name}\t{told}", flush=True)
        print(f"{name}: {time.monotonic() - start_s:.1f} s", file=sys.stderr, flush=True)


def _drop_capabilities():
    libc = ctypes.CDLL(None)
    for capability in (_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
