"""What others met when they shared models among Ray's workers does not happen here.

Each test is one public report: its docstring names the source and says what is right.
"""

import copyreg
import gc
import pickletools
import signal

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact
from ray_zerocopy.objects.skeleton import split
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


class AlarmError(Exception):
    """What a handler of signals raises."""


class Interrupts:
    """A part in which a signal arrives, the first time that it is pickled."""

    def __init__(self):
        self.arrived = False

    def __reduce__(self):
        if not self.arrived:
            self.arrived = True
            signal.raise_signal(signal.SIGUSR1)
        return int, ()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, AlarmError])
@pytest.mark.parametrize("way", ["put", "build"])
def test_an_interrupted_put_raises_what_interrupts_it(ref, model, raised, way):
    """ray #3797, #3209: Ctrl-C and alarms reach the caller as themselves; then all goes on."""

    def interrupt(*_):
        raise raised("by a signal")

    made = {"weights": torch.zeros(1000), "part": Interrupts()}
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(raised, match="by a signal"):
            rzc.put(made) if way == "put" else rzc.build(lambda: made)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert gc.isenabled()
    assert_exact(model, ray.get(ref))
    assert_exact(model, ray.get(rzc.put(model)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_that_torch_cannot_load_again_is_refused(cluster):
    """pytorch #62706, #69608: what `optimize_for_inference` gives is refused when it is put."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    frozen, x = torch.jit.freeze(torch.jit.script(net)), torch.randn(1, 3, 8, 8)
    optimized = torch.jit.optimize_for_inference(torch.jit.script(net))
    with pytest.raises(rzc.PublishError, match=r"ScriptModule.*optimize_for_inference"):
        rzc.put(optimized)
    assert torch.equal(frozen(x), ray.get(rzc.put(frozen))(x))


def test_empty_arrays_name_nothing_that_an_older_numpy_lacks(cluster):
    """numpy #28340, ray #48053: empty arrays are stored like others, by names of ours alone."""
    arrays = {"c": np.zeros((0, 3)), "f": np.zeros((0, 3), order="F"), "kind": np.zeros(0, "f4,i8")}
    skeleton = split(arrays).skeleton
    names = [name for _, name, _ in pickletools.genops(skeleton) if isinstance(name, str)]
    assert "numpy._core.numeric" not in names
    assert_exact(arrays, ray.get(rzc.put(arrays)))


class Wrapped(np.ndarray):
    """An array of a library's own."""


class Marked(torch.Tensor):
    """A tensor of a library's own."""


@pytest.mark.parametrize("kind", [Wrapped, Marked])
@pytest.mark.parametrize("way", ["ray", "copyreg"])
def test_serializers_that_were_registered_are_used(cluster, kind, way):
    """ray #45473, nupic.research #273: `register_serializer` and `copyreg` hold for every class."""
    source = np.zeros(3).view(kind) if kind is Wrapped else torch.zeros(3).as_subclass(kind)
    if way == "ray":
        ray.util.register_serializer(kind, serializer=lambda _: 5, deserializer=lambda five: five)
    else:
        copyreg.pickle(kind, lambda _: (int, (5,)))
    try:
        assert isinstance(ray.get(ray.put(source)), int)
        assert isinstance(ray.get(rzc.put(source)), int)
    finally:
        if way == "ray":
            ray.util.deregister_serializer(kind)
        else:
            del copyreg.dispatch_table[kind]


def test_a_hook_that_is_added_replaces_none(cluster):
    """pytorch #96310, #2847: hooks of a loaded model stay when a fresh process adds one.

    torch numbers hooks by process, from 0, and pickles the numbers.
    """
    numbers = torch.utils.hooks.RemovableHandle
    before, numbers.next_id = numbers.next_id, 0
    try:
        model = nn.Linear(3, 3)
        model.register_forward_hook(_double)
    finally:
        numbers.next_id = before

    @ray.remote(num_cpus=0, max_calls=1)
    def adds(model, x):
        model.register_forward_hook(_increase)
        return model(x)

    x = torch.ones(1, 3)
    assert torch.equal(ray.get(adds.remote(rzc.put(model), x)), model(x) + 1)


def _double(model, args, output):
    return 2 * output


def _increase(model, args, output):
    return output + 1


# --- memory ---------------------------------------------------------------------------------------


# --- numbers --------------------------------------------------------------------------------------


# --- calls ----------------------------------------------------------------------------------------


class Asks(nn.Module):
    """Its methods are coroutines, or give several results."""

    async def ask(self, x):
        return 2 * x

    def forward(self, x):
        return x, 2 * x


def test_a_method_that_is_a_coroutine_is_awaited_in_the_task(cluster):
    """ray #13687: it gives its result, or an error that names it: never "cannot pickle"."""
    call = rzc.call_model.remote(rzc.put(Asks()), (torch.ones(3),), method_name="ask")
    assert ray.get(call, timeout=60).tolist() == [2, 2, 2]


@pytest.mark.parametrize("count", [10, 200_000])
def test_a_call_may_have_several_results(cluster, count):
    """ray #60251, #16100: `num_returns=2` parts a model's outputs, be they small or large."""
    call = rzc.call_model.options(num_returns=2)
    first, second = ray.get(call.remote(rzc.put(Asks()), (torch.ones(count),)), timeout=60)
    assert torch.equal(2 * first, second)
