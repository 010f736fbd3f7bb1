"""Runs a function in an interpreter of its own, for what needs another Ray than the suite's."""

import ctypes
import inspect
import subprocess
import sys
import textwrap

_PR_CAPBSET_DROP = 24
_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE = 21, 40


def run(function, *, unprivileged=False, timeout=150):
    """Run the body of a function without arguments or closures; what it raises fails the test.

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
        preexec_fn=_drop_capabilities if unprivileged else None,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _drop_capabilities():
    libc = ctypes.CDLL(None)
    for capability in (_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
