"""Runs a function or a script in an interpreter of its own, for what needs another Ray than ours.

    pytest ── socket ──▶ template ── fork ──▶ the interpreter of one test
                         has imported torch, Ray and the package, and has one thread

What is forked has everything imported, which takes 2 s, and has not touched a Ray. It ends as any
interpreter does.
"""

import ctypes
import functools
import gc
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

_PR_CAPBSET_DROP = 24
_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE = 21, 40
_MESSAGE_NBYTES = 2**20


def run(function, *, unprivileged=False, timeout=150):
    """Run the body of a function without arguments or closures; what it raises fails the test.

    Ray starts by itself there, whichever clusters the machine has.

    `unprivileged` takes away what only root may: to open `/proc/self/map_files`.
    """
    lines, first = inspect.getsourcelines(function)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def ")) + 1
    body = "\n" * (first + start - 1) + textwrap.dedent("".join(lines[start:]))
    here = {"RAY_ADDRESS": "local"}
    done = _fork(body, [inspect.getsourcefile(function)], timeout, unprivileged, here)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def execute(code, *arguments, timeout=150):
    """Run code with these arguments; gives its `returncode`, and its `stdout` and `stderr`."""
    return _fork(textwrap.dedent(code), ["-c", *map(str, arguments)], timeout)


def rows_of(script, *arguments, timeout=300):
    """What became of each row of a script that ends with `tell`, by name.

    Of those that it did not come to: what it said in the end.
    """
    done = _fork(Path(script).read_text(), [str(script), *map(str, arguments)], timeout)
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


# --- the template ---------------------------------------------------------------------------------


def _fork(code, argv, timeout, unprivileged=False, environment=()):
    """Run code as `__main__` in a fork of the template; tells how it ended and what it wrote."""
    asked = {
        "code": code,
        "argv": argv,
        "unprivileged": unprivileged,
        "environment": os.environ | dict(environment),
        "folder": os.getcwd(),
    }
    template, _ = _template()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        socket.send_fds(template, [json.dumps(asked).encode()], [out.fileno(), err.fileno()])
        pid = int(template.recv(_MESSAGE_NBYTES))
        template.settimeout(timeout)
        try:
            returncode = int(template.recv(_MESSAGE_NBYTES))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            template.settimeout(None)
            template.recv(_MESSAGE_NBYTES)
            raise
        finally:
            template.settimeout(None)
            out.seek(0)
            err.seek(0)
            told, said = (file.read().decode(errors="replace") for file in (out, err))
        return SimpleNamespace(returncode=returncode, stdout=told, stderr=said)


@functools.cache
def _template():
    """The socket of this process's template, which ends with this process, and the template."""
    ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with its:
        command = f"exec(__import__('fresh').forked({its.fileno()}))"
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start threads
        template = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", command],
            pass_fds=[its.fileno()],
            env=environment,
        )
    return ours, template


def forked(descriptor):
    """Fork for each code that is asked for, and give it in the fork, which runs it at its top.

    In the template it is nothing, once there is nobody any more to ask.
    """
    import ray_zerocopy  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork would be without the other threads"
    gc.freeze()  # or to collect all that once more, at its end, costs each fork 0.7 s
    asking = socket.socket(fileno=descriptor)
    while True:
        message, outputs, *_ = socket.recv_fds(asking, _MESSAGE_NBYTES, 2)
        if not message:
            return ""
        if (pid := os.fork()) == 0:
            asking.close()
            return _become(outputs, **json.loads(message))
        for descriptor in outputs:
            os.close(descriptor)
        asking.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        asking.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(outputs, code, argv, unprivileged, environment, folder):
    for output, standard in zip(outputs, (1, 2), strict=True):
        os.dup2(output, standard)
        os.close(output)
    from ray._raylet import Config

    os.environ.clear()
    os.environ.update(environment)
    Config.initialize("")  # Ray took what it reads of it when the template was made
    os.chdir(folder)
    sys.argv = argv
    sys.modules["__main__"].__file__ = argv[0]
    if unprivileged:
        _drop_capabilities()
    return compile(code, argv[0], "exec")


def _drop_capabilities():
    """Of this process, and of whatever it starts."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the third version, and this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the upper halves
    assert libc.capget(header, sets) == 0
    for capability in (_CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE):
        assert libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
        for index in range(3):
            sets[index + 3 * (capability // 32)] &= ~(1 << capability % 32)
    assert libc.capset(header, sets) == 0
