"""Runs a function or a script in a separate interpreter, for a Ray other than the suite's."""

import inspect
import os
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import template


def run(function, *, address="local", timeout=150):
    """Run the body of a function without arguments or closures. An exception in it fails the test.

    There `ray.init` connects to this address. By default it starts a Ray, whichever clusters the
    machine has.
    """
    lines, first = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def ")) + 1
    body = "\n" * (first + start - 1) + textwrap.dedent("".join(lines[start:]))
    here = os.environ | {"RAY_ADDRESS": address}
    script = inspect.getsourcefile(function)
    done = _fork(body, [script], timeout, environment=here)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def execute(code, *arguments, timeout=150):
    """Run code with these arguments. Returns its `returncode`, `stdout` and `stderr`."""
    return _fork(textwrap.dedent(code), ["-c", *map(str, arguments)], timeout)


def rows_of(script, *arguments, timeout=300):
    """The result of each row of a script that ends with `tell`, by name.

    For rows that it did not reach: its last output.
    """
    done = _fork(Path(script).read_text(), [str(script), *map(str, arguments)], timeout)
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("row\t")]
    rows = {name: told.replace("\\n", "\n") for _, name, told in lines}
    return defaultdict(lambda: done.stderr[-4000:], rows)


def tell(rows, names):
    """Run rows one after the other, and print the result of each for `rows_of`."""
    for name in names:
        start_s = time.monotonic()
        try:
            rows[name]()
            told = "stands"
        except (Exception, pytest.fail.Exception):  # report it, and run the next one
            told = traceback.format_exc().replace("\n", "\\n")
        print(f"row\t{name}\t{told}", flush=True)
        print(f"{name}: {time.monotonic() - start_s:.1f} s", file=sys.stderr, flush=True)


def _fork(code, argv, timeout, **how):
    """Run code as `__main__` in a fork of the template. Returns its exit code and its output.

    Kills it after a timeout.
    """
    template.start()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid, wait = template.fork(code, argv, [out.fileno(), err.fileno()], **how)
        try:
            returncode = wait(timeout)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            returncode = wait()
            err.write(f"killed after {timeout} s".encode())
        out.seek(0)
        err.seek(0)
        told, said = (file.read().decode(errors="replace") for file in (out, err))
        return SimpleNamespace(returncode=returncode, stdout=told, stderr=said)
