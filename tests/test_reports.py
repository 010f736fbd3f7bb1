"""What others met when they shared models among Ray's workers does not happen here.

Each test is one public report: its docstring names the source and says what is right.
"""

import gc

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from torch import nn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Linear(256, 256)


@pytest.fixture(scope="module")
def ref(cluster, model):
    return rzc.put(model)


# --- pickling -------------------------------------------------------------------------------------


class Fetched:
    """A part that is fetched when it is pickled."""

    def __init__(self, ref):
        self.ref = ref

    def __reduce__(self):
        return list, ([ray.get(self.ref)],)


class Reference:
    """A part that is fetched when it is unpickled."""

    def __init__(self, ref):
        self.ref = ref

    def __reduce__(self):
        return ray.get, (self.ref,)


def test_a_part_is_fetched_while_it_is_pickled(ref, model):
    """ray #16792: `ray.get` beneath a pickler gives the object, of whatever is being put."""
    [fetched] = ray.get(rzc.put({"part": Fetched(ref), "own": nn.Linear(2, 2)}))["part"]
    assert_exact(model, fetched)


@pytest.mark.parametrize("isolation", ["private", "shared", "copy"])
def test_a_part_is_fetched_while_it_is_unpickled(ref, model, isolation):
    """ray #16792: `ray.get` beneath an unpickler gives the object, and the outer one is whole."""
    outer = {"part": Reference(ref), "own": nn.Linear(2, 2)}
    loaded = rzc.get(rzc.put(outer), isolation=isolation)
    assert_exact({"part": model, "own": outer["own"]}, loaded)


def test_what_garbage_gets_when_it_goes_is_whole(ref, model):
    """ray #39113: a `__del__` may use Ray, and the collector may run it in the middle of a put."""
    seen = []

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            seen.append(type(ray.get(ref)))

    gc.collect()
    Garbage()
    rzc.put(model)
    gc.collect()
    assert seen == [nn.Linear]


# --- memory ---------------------------------------------------------------------------------------


# --- numbers --------------------------------------------------------------------------------------


# --- calls ----------------------------------------------------------------------------------------
