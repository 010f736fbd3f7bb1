"""What runs in an interpreter of its own is told, whatever becomes of it."""

import signal

import pytest
from fresh import execute, run


def raises():
    x = 1
    raise KeyError(x)


def kills_itself():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSEGV)


def never_ends():
    import time

    time.sleep(1000)


def test_what_it_raises_is_shown_with_its_line():
    line = raises.__code__.co_firstlineno + 2
    with pytest.raises(AssertionError, match=rf'test_fresh.py", line {line}, in <module>\n.*KeyE'):
        run(raises)


def test_one_that_is_killed_or_takes_too_long_has_failed_and_the_next_one_runs():
    with pytest.raises(AssertionError):
        run(kills_itself)
    with pytest.raises(TimeoutError):
        run(never_ends, timeout=0.1)
    assert execute("import os; os.abort()").returncode == -signal.SIGABRT
    assert execute("import sys; print(sys.argv[1:])", 1, "a").stdout == "['1', 'a']\n"


def test_it_is_new_and_has_no_ray_yet():
    @run
    def alone():
        import os
        import sys

        import ray

        assert not ray.is_initialized()
        assert len(os.listdir("/proc/self/task")) == 1
        assert "pytest" in sys.modules  # of the template
        assert not {name for name in globals() if name not in vars(sys.modules["__main__"])}
        assert __name__ == "__main__"


def test_ray_starts_in_it_as_the_environment_of_now_says(monkeypatch):
    """Also what the template did not know of when it imported Ray: here, to ask for a token."""
    execute("")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    done = execute("""
        import ray
        ray.init("local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
        print(ray.cluster_resources()["CPU"])
    """)
    assert done.stdout == "1.0\n", done.stderr


def test_it_ends_as_an_interpreter_does():
    done = execute("import atexit; atexit.register(print, 'the end'); raise SystemExit(3)")
    assert (done.returncode, done.stdout) == (3, "the end\n")


def test_without_privileges_it_and_what_it_starts_have_none():
    def unprivileged():
        import subprocess
        from pathlib import Path

        cat = ["cat", "/proc/self/status"]
        child = subprocess.run(cat, capture_output=True, text=True, check=True).stdout
        for status in (Path("/proc/self/status").read_text(), child):
            for name in ("CapEff", "CapPrm", "CapBnd"):
                capabilities = int(status.split(f"{name}:")[1].split()[0], 16)
                assert capabilities & (1 << 21 | 1 << 40) == 0

    run(unprivileged, unprivileged=True)
