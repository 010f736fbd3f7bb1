"""The result of a separate interpreter is reported, however it ends."""

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
    with pytest.raises(AssertionError, match=r"killed after 0\.1 s"):
        run(never_ends, timeout=0.1)
    assert execute("import os; os.abort()").returncode == -signal.SIGABRT
    assert execute("import sys; print(sys.argv[1:])", 1, "a").stdout == "['1', 'a']\n"


def test_it_is_new_and_has_not_imported_ray():
    @run
    def alone():
        import os
        import sys

        assert "torch" in sys.modules
        assert not {"ray", "ray_zerocopy"} & set(sys.modules)
        assert len(os.listdir("/proc/self/task")) == 1
        assert globals() is vars(sys.modules["__main__"])
        assert __name__ == "__main__"


def test_it_ends_as_an_interpreter_does():
    done = execute("import atexit; atexit.register(print, 'the end'); raise SystemExit(3)")
    assert (done.returncode, done.stdout) == (3, "the end\n")
