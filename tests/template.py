"""An interpreter that has imported torch (1.5 s), and is forked for each process of the tests.

    pytest ─ a test's script ─┐              ┌─▶ keeper ─▶ the script
                              ├─▶ template ──┤
    raylet ─ a worker ────────┘              └─▶ keeper ─▶ Ray's default_worker.py

The template has one thread and has not imported Ray, because Ray reads the environment on import,
and a fork gets the environment of its requester. A fork ends like any interpreter, and its keeper
reports the exit code.

Raylets run this file as `setup_worker_path`. Workers are forked, but those with a runtime
environment are started normally, as for users.
"""

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys

_NAME = "RZC_TEMPLATE"  # names its socket, for raylets
_MESSAGE_NBYTES = 2**20
# Also the modules that Ray imports: a third of Ray's own 0.3 s.
_IMPORTED = ("torch", "pytest", "google.protobuf", "jsonschema", "msgpack", "requests", "yaml")

# --- the requester --------------------------------------------------------------------------------


def start():
    """Start a template, which ends with the process that first requested one."""
    if _NAME in os.environ:
        return
    name = f"rzc-template-{os.getpid()}"
    alive, _ = os.pipe()  # its other end closes with this process
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"\0{name}")
        listening.listen(128)
        given = [listening.fileno(), alive]
        command = f"exec(__import__('template').serve{tuple(given)})"
        path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", command],
            pass_fds=given,
            env=os.environ | {"PYTHONPATH": path} | one_thread,
        )
    os.close(alive)
    os.environ[_NAME] = name


def fork(code, argv, outputs=(1, 2), **how):
    """Run code in a fork. Returns its process id, and a function that waits for its exit code."""
    asked = {"code": code, "argv": argv, "environment": dict(os.environ), "folder": os.getcwd()}
    asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asking.connect(f"\0{os.environ[_NAME]}")
    socket.send_fds(asking, [json.dumps(asked | how).encode()], outputs)
    pid = int(asking.recv(_MESSAGE_NBYTES))

    def wait(timeout=None):
        asking.settimeout(timeout)
        return int(asking.recv(_MESSAGE_NBYTES))

    return pid, wait


def _be_worker(script, *arguments):
    """Stand in for the worker that a raylet has started, until the worker ends."""
    if any(argument.startswith("--serialized-runtime-env-context") for argument in arguments):
        setup = os.path.join(os.path.dirname(script), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, setup, script, *arguments])
    arguments = [argument for argument in arguments if not argument.startswith("--language")]
    with open(script) as file:
        _, wait = fork(file.read(), [script, *arguments], group=True)
    sys.exit(wait() % 256)


# --- the template ---------------------------------------------------------------------------------


def serve(listening, alive):
    """Fork for each request. Returns the requested code in the fork, to be run at top level.

    Returns nothing in the template, once the process that started it has ended.
    """
    for name in _IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would be without the other threads"
    gc.freeze()  # else a collection writes to each page that the forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    listening = socket.socket(fileno=listening)
    while alive not in select.select([listening, alive], [], [])[0]:
        asking, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            os.close(alive)
            return _keep(asking)
        asking.close()
    return ""


def _keep(asking):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, outputs, *_ = socket.recv_fds(asking, _MESSAGE_NBYTES, 2)
    if (pid := os.fork()) == 0:
        asking.close()
        return _become(outputs, **json.loads(message))
    for output in (*outputs, 1, 2):
        os.close(output)
    asking.send(str(pid).encode())
    _, status = os.waitpid(pid, 0)
    asking.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(outputs, code, argv, environment, folder, group=False):
    for output, standard in zip(outputs, (1, 2), strict=True):
        os.dup2(output, standard)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    sys.modules["__main__"].__file__ = argv[0]
    gc.unfreeze()  # loads check whether anything is frozen
    atexit.register(gc.freeze)  # else the last collection, through all of torch, takes 0.7 s
    if group:
        os.setpgid(0, 0)
    return compile(code, argv[0], "exec")


if __name__ == "__main__":
    _be_worker(*sys.argv[1:])
