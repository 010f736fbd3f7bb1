"""`use(ref)` lends the result of `load(ref)`: loaded once while kept, and kept while in use."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray_zerocopy.calls.cache import Cache
from torch import nn

IDLE_S = 0.5


class Ref:
    def __init__(self, name):
        self.name = name

    def binary(self):
        return self.name.encode()


class Loaded(nn.Module):
    """A module with a part that only the cyclic collector takes away."""

    def __init__(self, name):
        super().__init__()
        self.name, self.part = name, nn.Identity()
        self.part.itself = [self.part]


class Loader:
    """Loads when the test allows it, and counts."""

    def __init__(self):
        self.loads, self.may_load, self.loaded = [], threading.Event(), weakref.WeakSet()
        self.may_load.set()

    def __call__(self, ref):
        self.loads.append(ref.name)
        if ref.name.startswith("slow"):
            self.may_load.wait(10)
        if ref.name.startswith("bad"):
            raise KeyError(ref.name)
        loaded = Loaded(ref.name)
        self.loaded.add(loaded.part)
        return loaded


@pytest.fixture
def loader():
    return Loader()


@pytest.fixture
def cache(loader):
    return Cache(loader, count=3, idle_s=IDLE_S)


def use(cache, name):
    with cache.use(Ref(name)) as loaded:
        return loaded.name


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_what_is_kept_is_not_loaded_again(cache, loader):
    assert [use(cache, name) for name in "abaab"] == list("abaab")
    assert loader.loads == ["a", "b"]


def test_those_who_ask_at_once_share_one_load(cache, loader):
    loader.may_load.clear()
    with ThreadPoolExecutor(8) as pool:
        users = [pool.submit(use, cache, "slow") for _ in range(8)]
        wait_until(lambda: loader.loads)
        loader.may_load.set()
        assert {user.result() for user in users} == {"slow"}
    assert loader.loads == ["slow"]


def test_a_load_keeps_nobody_else_waiting(cache, loader):
    loader.may_load.clear()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(use, cache, "slow")
        wait_until(lambda: loader.loads)
        assert use(cache, "quick") == "quick"
        assert not slow.done()
        loader.may_load.set()


def test_the_one_used_longest_ago_makes_room(cache, loader):
    for name in "abcad":
        use(cache, name)
    assert len(cache) == 3
    loader.loads.clear()
    for name in "adcb":
        use(cache, name)
    assert loader.loads == ["b"]


def test_what_is_idle_goes_and_the_thread_with_it(cache, loader):
    before = threading.enumerate()
    use(cache, "a")
    use(cache, "b")
    (thread,) = set(threading.enumerate()) - set(before)
    assert len(loader.loaded) == 2
    gc.disable()  # so that only the cache collects
    try:
        wait_until(lambda: not loader.loaded)
    finally:
        gc.enable()
    assert len(cache) == 0
    wait_until(lambda: not thread.is_alive())
    use(cache, "a")
    assert loader.loads == ["a", "b", "a"]


def test_what_made_room_goes_as_well(cache, loader):
    for name in "abcdef":
        use(cache, name)
    wait_until(lambda: not loader.loaded)


def test_what_is_in_use_is_not_idle(cache, loader):
    with cache.use(Ref("a")):
        time.sleep(2 * IDLE_S)
        use(cache, "a")
        assert loader.loads == ["a"]
        time.sleep(2 * IDLE_S)
    use(cache, "a")
    assert loader.loads == ["a"]


def test_no_reference_is_kept(cache):
    ref = Ref("a")
    gone = weakref.ref(ref)
    with cache.use(ref):
        pass
    del ref
    assert gone() is None
    assert len(cache) == 1


def test_an_error_is_the_users_and_the_next_tries_again(cache, loader):
    for _ in range(2):
        with pytest.raises(KeyError, match="bad"):
            use(cache, "bad")
    assert loader.loads == ["bad", "bad"]
    wait_until(lambda: len(cache) == 0)


def test_an_error_in_use_passes_through(cache, loader):
    with pytest.raises(ZeroDivisionError), cache.use(Ref("a")):
        raise ZeroDivisionError
    wait_until(lambda: len(cache) == 0)
    wait_until(lambda: not loader.loaded)
