"""An interpreter with torch imported, which takes 1.5 s, and forked for whoever needs one.

    pytest ─ a test's script ─┐              ┌─▶ keeper ─▶ the script
                              ├─▶ template ──┤
    raylet ─ a worker ────────┘              └─▶ keeper ─▶ Ray's default_worker.py

What is forked has one thread and has not imported Ray: Ray reads the environment when it is, and
the fork has that of who asks. It ends as any interpreter does, and its keeper tells how.

For a raylet this file is what `setup_worker_path` names. Workers are forked, but those with a
runtime environment are started, as every worker of a user is.
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

_NAME = "RZC_TEMPLATE"  # of its socket, for raylets
_MESSAGE_NBYTES = 2**20
# Also what Ray imports, a third of its own 0.3 s.
_IMPORTED = ("torch", "pytest", "google.protobuf", "jsonschema", "msgpack", "requests", "yaml")

# --- who asks -------------------------------------------------------------------------------------


def start():
    """Have a template, which ends with the process that first asked for one."""
    if _NAME in os.environ:
        return
    name = f"rzc-template-{os.getpid()}"
    alive, _ = os.pipe()  # whose other end closes with this process
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
    """Have code run in a fork; gives its process id, and what waits for its exit code."""
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
    """Be the process that a raylet has started, until the worker ends."""
    if any(argument.startswith("--serialized-runtime-env-context") for argument in arguments):
        setup = os.path.join(os.path.dirname(script), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, setup, script, *arguments])
    arguments = [argument for argument in arguments if not argument.startswith("--language")]
    with open(script) as file:
        _, wait = fork(file.read(), [script, *arguments], group=True)
    sys.exit(wait() % 256)


# --- the template ---------------------------------------------------------------------------------


def serve(listening, alive):
    """Fork for each who asks, and give its code in the fork, which runs it at its top.

    In the template it is nothing, once the process that started it is gone.
    """
    for name in _IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would be without the other threads"
    gc.freeze()  # or a collection here writes to each page that the forks share
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
    gc.unfreeze()  # loads ask whether someone has frozen what there is
    atexit.register(gc.freeze)  # or the last collection, through all of torch, takes 0.7 s
    if group:
        os.setpgid(0, 0)
    return compile(code, argv[0], "exec")


if __name__ == "__main__":
    _be_worker(*sys.argv[1:])
