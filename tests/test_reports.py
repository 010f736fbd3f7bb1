"""Problems that users of Ray and torch reported when they shared models do not occur here.

Each test is one public report. Its docstring names the source and the correct behaviour.
"""

import asyncio
import copy
import copyreg
import gc
import json
import pickletools
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import safetensors.torch
import torch
from exact import assert_exact
from models import ARCHITECTURES
from ray_zerocopy.objects import bytecode
from ray_zerocopy.objects.skeleton import split
from torch import multiprocessing, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx
from torch.nn.functional import linear
from torch.optim.swa_utils import AveragedModel
from torch.utils import dlpack


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Linear(256, 256)


@pytest.fixture(scope="module")
def ref(cluster, model):
    return rzc.put(model)


def overwrite(nbytes=200_000_000):
    """Fill all free memory of the store with other data for a moment."""
    return [ray.put(np.full(10_000_000, 7, np.uint8)) for _ in range(nbytes // 10_000_000)]


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
    """The exception of a signal handler."""


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
@pytest.mark.parametrize("way", ["put", "build", "enable"])
def test_an_interrupted_put_raises_what_interrupts_it(ref, model, raised, way):
    """ray #3797, #3209: Ctrl-C and alarms reach the caller as themselves; then all goes on."""

    def interrupt(*_):
        raise raised("by a signal")

    made = {"part": Interrupts(), "weights": torch.zeros(100_000)}
    ways = {"put": rzc.put, "build": lambda made: rzc.build(lambda: made), "enable": ray.put}
    before = signal.signal(signal.SIGUSR1, interrupt)
    if way == "enable":
        rzc.enable()
    try:
        with pytest.raises(raised, match="by a signal"):
            ways[way](made)
    finally:
        rzc.disable()
        signal.signal(signal.SIGUSR1, before)
    assert gc.isenabled()
    assert_exact(model, ray.get(ref))
    assert_exact(model, ray.get(rzc.put(model)))


def test_a_compiled_model_is_stored(cluster):
    """ray #35001, pytorch #101107: what is compiled travels as its source, and compiles there."""
    model, x = torch.compile(nn.Linear(8, 8), backend="aot_eager"), torch.randn(2, 8)
    assert torch.equal(model(x), ray.get(rzc.put(model))(x))
    model = nn.Linear(8, 8)
    model.compile(backend="eager")
    assert torch.equal(model(x), ray.get(rzc.put(model))(x))


def test_an_autograd_function_may_be_an_attribute(cluster):
    """ray #42295, pytorch #116589: `Function.apply` as an attribute of a model is stored."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return 2 * x

        @staticmethod
        def backward(context, gradient):
            return 2 * gradient

    class Model(nn.Linear):
        def forward(self, x):
            return self.double(super().forward(x))

    model, x = Model(3, 3), torch.randn(2, 3)
    model.double = Double.apply
    assert torch.equal(model(x), ray.get(rzc.put(model))(x))


def test_random_generators_go_on_where_they_were(cluster):
    """FLAML #379, numpy #14210: generators of torch and numpy keep their state."""
    draws = {
        "torch": (torch.Generator().manual_seed(3), lambda g: torch.rand(5, generator=g).tolist()),
        "numpy": (np.random.default_rng(3), lambda g: g.random(5).tolist()),
        "legacy": (np.random.RandomState(3), lambda g: g.random_sample(5).tolist()),
    }
    loaded = ray.get(rzc.put({name: generator for name, (generator, _) in draws.items()}))
    for name, (generator, draw) in draws.items():
        assert draw(loaded[name]) == draw(generator)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_is_being_quantized_is_stored(cluster):
    """pytorch #57352, #51216: prepared for QAT by fx, and converted, models give the same."""
    x, mapping = torch.randn(4, 8), get_default_qat_qconfig_mapping("x86")
    source = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).train()
    prepared = quantize_fx.prepare_qat_fx(source, mapping, (x,))
    prepared(x)
    for model in (prepared.eval(), quantize_fx.convert_fx(copy.deepcopy(prepared))):
        assert torch.equal(model(x), ray.get(rzc.put(model))(x))


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantized_weights_are_shared(cluster, name):
    """gemlite #28, diffusers-torchao #32: quantized weights of torchao load exactly, unpacked."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(256, 256)).eval(), torch.randn(4, 256)
    quantization.quantize_(model, getattr(quantization, name)())
    ref = rzc.put(model)
    assert torch.equal(model(x), ray.get(ref)(x))
    assert rzc.inspect(ref).unshared_nbytes == 0


def test_what_is_nested_too_deeply_is_an_error(cluster):
    """ray #497, #2493: as deep as with Ray; beyond that an error with the path, never a crash."""

    def nested(depth):
        model = nn.Linear(2, 2)
        for _ in range(depth):
            model = nn.Sequential(model)
        return model

    def is_stored(put, depth):
        try:
            put(nested(depth))
        except Exception:
            return False
        return True

    depth = max(depth for depth in range(150, 260, 5) if is_stored(ray.put, depth))
    assert isinstance(ray.get(rzc.put(nested(depth))), nn.Sequential)
    with pytest.raises(rzc.PublishError, match=r"Sequential\.0\.0.*recursion"):
        rzc.put(nested(1000))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_that_torch_cannot_load_again_is_refused(cluster):
    """pytorch #62706, #69608: `put` refuses the result of `optimize_for_inference`."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    frozen, x = torch.jit.freeze(torch.jit.script(net)), torch.randn(1, 3, 8, 8)
    optimized = torch.jit.optimize_for_inference(torch.jit.script(net))
    with pytest.raises(rzc.PublishError, match=r"ScriptModule.*optimize_for_inference"):
        rzc.put(optimized)
    assert torch.equal(frozen(x), ray.get(rzc.put(frozen))(x))


@ray.remote
class Answers:
    """An actor that answers."""

    def answer(self):
        return 7


def test_references_and_handles_inside_live_with_the_object(cluster):
    """ray #17553, #18751, #6878: objects that an object refers to live as long as it does."""
    part = ray.put(np.full(200_000, 7))
    actor = Answers.options(num_cpus=0).remote()
    ref = rzc.put({"model": nn.Linear(64, 64), "part": part, "actor": actor})
    del part, actor
    gc.collect()
    loaded = ray.get(ref)
    del ref
    gc.collect()
    assert ray.get(loaded["part"], timeout=30)[0] == 7
    assert ray.get(loaded["actor"].answer.remote(), timeout=30) == 7


def test_empty_arrays_name_nothing_that_an_older_numpy_lacks(cluster):
    """numpy #28340, ray #48053: empty arrays are stored like others, with only our own names."""
    arrays = {"c": np.zeros((0, 3)), "f": np.zeros((0, 3), order="F"), "kind": np.zeros(0, "f4,i8")}
    skeleton = split(arrays).skeleton
    names = [name for _, name, _ in pickletools.genops(skeleton) if isinstance(name, str)]
    assert "numpy._core.numeric" not in names
    assert_exact(arrays, ray.get(rzc.put(arrays)))


def test_code_by_value_is_refused_by_another_python(cluster, tmp_path, monkeypatch):
    """cloudpickle #293, #564, stable-baselines3 #171: never a crash, but both Pythons by name.

    Python 3.12 ends with SIGSEGV when it runs a method of 3.11.
    """

    class Local(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    path = tmp_path / "local.rzc"
    rzc.save(Local(3, 3), path)
    assert type(rzc.get(rzc.restore(path))).__name__ == "Local"
    there = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setattr(bytecode, "_PYTHON", (3, 99))
    with pytest.raises(rzc.VersionError, match=rf"Python {there}, and this is Python 3\.99"):
        rzc.get(rzc.restore(path))


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


def test_loading_warns_of_nothing(ref, model):
    """ray #25106, #12344: no "array is not writable", in any way of loading."""
    arrays = {"array": np.zeros(9999), "model": model, "storage": torch.zeros(9).untyped_storage()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for isolation in ("private", "shared", "copy"):
            rzc.get(ref, isolation=isolation)
        torch.from_numpy(ray.get(rzc.put(arrays))["array"]).zero_()


class Statespace:
    """As in statsmodels: it writes its arrays, through buffers, when it is unpickled."""

    def __init__(self):
        self.array = np.zeros(9999)

    def __setstate__(self, state):
        self.__dict__.update(state)
        memoryview(self.array)[0] = 1.0


@pytest.mark.parametrize("isolation", ["private", "copy"])
def test_arrays_can_be_written_from_the_start(cluster, isolation):
    """ray #52571, raven #1896: Cython's "buffer source array is read-only" does not come."""
    loaded = rzc.get(rzc.put([Statespace(), np.zeros(9999)]), isolation=isolation)
    assert loaded[0].array[0] == 1.0
    assert not memoryview(loaded[1]).readonly


def _zero(model, seen):
    seen.put(model.weight.tolist())
    with torch.no_grad():
        model.weight.zero_()


def test_what_a_spawned_process_writes_stays_between_the_two(ref, model):
    """pytorch #86467, lightning #18238: torch moves its copy to shared memory, and no other."""
    spawn = multiprocessing.get_context("spawn")
    seen, loaded = spawn.Queue(), ray.get(ref)
    process = spawn.Process(target=_zero, args=(loaded, seen))
    process.start()
    assert seen.get(timeout=100) == model.weight.tolist()
    process.join(30)
    assert process.exitcode == 0
    assert_exact(model, ray.get(ref))


def test_adapters_are_merged_and_unmerged_in_private(cluster):
    """peft #2018, trl #2873: no other process sees a merge's writes to the base."""
    peft = pytest.importorskip("peft")
    case = ARCHITECTURES["bert"]()
    ref = rzc.put(case.model.eval())
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(ray.get(ref), config).eval()
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert_exact(case.model, ray.get(ref))
    assert_exact(merged, ray.get(rzc.put(merged)))


def test_copies_are_independent(ref, model):
    """ray-legacy #266: a deep copy or an average of a loaded model is private."""
    loaded = ray.get(ref)
    for copied in (copy.deepcopy(loaded), AveragedModel(loaded).module):
        with torch.no_grad():
            copied.weight.zero_()
    assert_exact(model, loaded)
    assert_exact(model, ray.get(ref))


def test_putting_and_loading_again_and_again_takes_nothing(cluster):
    """ray #30615, #12317: private memory, mappings and threads stay what they are."""

    def held():
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        [anonymous] = [line.split()[1] for line in status if line.startswith("RssAnon")]
        mappings = Path("/proc/self/maps").read_text().count("\n")
        return int(anonymous) >> 10, mappings, threading.active_count()

    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    for _ in range(20):
        ray.get(rzc.put(net))
    before = held()
    for _ in range(100):
        ray.get(rzc.put(net))
    grown = [after - held for after, held in zip(held(), before, strict=True)]
    assert grown[0] < 8
    assert grown[1] < 50
    assert grown[2] <= 1


def test_garbage_is_collected_in_a_loop_that_loads(ref):
    """cpython #98801, pytorch #95462: cycles that were alive during a load are freed later.

    A load moves them to the oldest generation, and Python's own counts start anew.
    """

    class Garbage:
        def __init__(self):
            self.itself, self.parts = self, [[] for _ in range(500)]

    alive, most = weakref.WeakSet(), 0
    gc.collect()
    for _ in range(1000):
        new = Garbage()
        alive.add(new)
        ray.get(ref)
        kept = new  # drops the one of the last round
        most = max(most, len(alive))
    assert kept in alive
    assert most < 500


def test_views_of_what_was_dropped_keep_its_memory(cluster):
    """ray-legacy #331: arrays, capsules and storages made of a loaded tensor hold the block."""
    source = torch.randn(1024, 1024)
    loaded = [ray.get(rzc.put(source)) for _ in range(3)]
    array = memoryview(loaded[0].numpy())
    capsule = dlpack.to_dlpack(loaded[1])
    storage = loaded[2].untyped_storage()
    del loaded
    gc.collect()
    held = overwrite()
    assert np.array_equal(np.asarray(array), source.numpy())
    assert torch.equal(dlpack.from_dlpack(capsule), source)
    assert torch.equal(torch.empty(0).set_(storage), source.flatten())
    del held


DETACHES = """
import sys, ray, ray_zerocopy as rzc, torch
ray.init(address=sys.argv[1], namespace="reports", log_to_driver=False, logging_level="ERROR")
class Holder:
    def __init__(self, model):
        self.model, self.expected = model, model.weight.detach().clone()
    def stands(self):
        return torch.equal(self.model.weight, self.expected)
options = {"name": "holder", "lifetime": "detached", "num_cpus": 0}
holder = ray.remote(Holder).options(**options).remote(rzc.put(torch.nn.Linear(2048, 2048)))
assert ray.get(holder.stands.remote())
"""


def test_a_detached_actor_keeps_its_model_when_the_owner_is_gone(cluster):
    """ray #16951, #12635: a loaded model stays valid, whatever happens to the store's memory."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-W", "ignore", "-c", DETACHES, address]
    subprocess.run(command, check=True, timeout=100)
    held = overwrite()
    holder = ray.get_actor("holder", "reports")
    assert ray.get(holder.stands.remote(), timeout=60)
    ray.kill(holder)
    del held


class Reuses(nn.Module):
    """Returns its one buffer, like models that reuse the outputs of a captured graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("out", torch.zeros(4, 3))

    def forward(self, x):
        return self.out.copy_(2 * x)


def test_an_answer_is_not_the_models_own_buffer(cluster):
    """pytorch #148439: a model that reuses its output buffer does not change earlier answers.

    Ray Data keeps the batches' columns until a block is full, and Serve until it has answered.
    """
    predictor = rzc.data.Predictor(rzc.put(Reuses()))
    columns = [np.full((4, 3), float(number), np.float32) for number in range(3)]
    answers = [predictor.predict({"x": column})["output"] for column in columns]
    for column, answer in zip(columns, answers, strict=True):
        assert np.array_equal(answer, 2 * column)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [4, 8, 16, 36])
def test_outputs_are_those_of_a_model_that_torch_allocated(cluster, nbytes):
    """pytorch #14463: a product depends on the weights' alignment; loaded ones have torch's.

    So all workers agree to the bit, wherever safetensors (for example) mapped the source.
    """
    x, weight = torch.randn(1, 768), torch.randn(512, 768)
    room = np.empty(weight.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + nbytes
    mapped = torch.frombuffer(room, dtype=torch.float32, count=weight.numel(), offset=start)
    mapped = mapped.view(weight.shape).copy_(weight)
    loaded = ray.get(rzc.put(mapped))
    assert mapped.data_ptr() % 64 == nbytes
    assert loaded.data_ptr() % 64 == 0
    assert torch.equal(linear(x, weight), linear(x, loaded))


def test_unaligned_checkpoints_come_aligned(cluster, tmp_path):
    """safetensors #607, #231, pytorch #172440: no operation meets an odd address."""
    weights = {"half": torch.randn(64, 64, dtype=torch.bfloat16), "whole": torch.randn(999)}
    head, data, start = {}, b"", 0
    for name, tensor in weights.items():
        data += tensor.view(torch.uint8).numpy().tobytes()
        kind = "BF16" if tensor.dtype is torch.bfloat16 else "F32"
        offsets = [start, start := len(data)]
        head[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(head).encode()
    header += b" " * (-(8 + len(header)) % 8 + 1)  # as some writers do: at any byte
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    odd = safetensors.torch.load_file(tmp_path / "odd.safetensors")
    loaded = ray.get(rzc.put(odd))
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % 64 == 0


def test_more_elements_than_32_bits_count(cluster):
    """ray #412, numpy #17272: shapes and strides beyond 2^32 elements."""
    wide = torch.arange(4.0).expand(2**31, 4)
    loaded = ray.get(rzc.put({"wide": wide, "other": torch.zeros(3)}))["wide"]
    assert loaded.shape == wide.shape
    assert loaded.stride() == wide.stride()
    assert loaded[2**31 - 1].tolist() == [0, 1, 2, 3]


# --- calls ----------------------------------------------------------------------------------------


class Coroutines:
    """An actor of coroutines."""

    async def loads(self, refs):
        first, second = await refs[0], await refs[0]
        with torch.no_grad():
            first.weight.zero_()
        return first, second

    async def calls(self, shim, x):
        return torch.stack(await asyncio.gather(*[shim.remote(x) for _ in range(5)]))


def test_coroutines_await_models_and_calls(ref, model):
    """ray #41094: each `await ref` gives a model of its own, and shims can be awaited at once."""
    actor = ray.remote(num_cpus=0)(Coroutines).remote()
    written, untouched = ray.get(actor.loads.remote([ref]), timeout=60)
    assert not written.weight.any()
    assert torch.equal(untouched.weight, model.weight)
    x = torch.randn(2, 256)
    outputs = ray.get(actor.calls.remote(rzc.rewrite_pipeline(model), x), timeout=60)
    assert torch.equal(outputs, model(x).detach().expand(5, 2, 256))
    ray.kill(actor)


class Threads:
    """An actor of threads."""

    def load_and_write(self, refs):
        own = rzc.get(refs[0])
        with torch.no_grad():
            own.weight.zero_()
        return rzc.get(refs[0]).weight.detach()


def test_threads_of_an_actor_load_one_model_at_once(ref, model):
    """ray #54007, #3244: gets of several threads neither wait for each other nor mix."""
    actor = ray.remote(num_cpus=0, max_concurrency=8)(Threads).remote()
    for weight in ray.get([actor.load_and_write.remote([ref]) for _ in range(40)], timeout=60):
        assert torch.equal(weight, model.weight)
    ray.kill(actor)


class RefusalError(Exception):
    """Like those of many libraries, it needs more arguments than it keeps in `args`."""

    def __init__(self, code, *, reason):
        super().__init__(code)
        self.reason = reason


class ReadOnlyError(Exception):
    """Like rasterio's, its `args` cannot be set."""

    args = property(lambda self: ("why 42",))


class Raises(nn.Module):
    """Raises what does not pickle, or does not unpickle."""

    def forward(self, kind):
        errors = {
            "arguments": RefusalError(3, reason="why 42"),
            "read-only": ReadOnlyError(),
            "held": ValueError("why 42"),
        }
        if kind == "held":
            errors[kind].lock = threading.Lock()
        raise errors[kind]  # why 42


@pytest.mark.parametrize("kind", ["arguments", "read-only", "held"])
def test_an_exception_that_does_not_pickle_is_told(cluster, kind):
    """ray #20830, #31806, #59437: the text of any exception reaches the caller."""
    with pytest.raises(ray.exceptions.RayError, match="why 42"):
        ray.get(rzc.call_model.remote(rzc.put(Raises()), (kind,)), timeout=60)


def test_tasks_with_several_results_give_parts_of_a_model(ref, model):
    """ray #39113, #25034: weights and models come out of generators and of several returns."""

    @ray.remote(num_cpus=0)
    def yielding(model):
        yield from (model.weight * factor for factor in range(3))

    @ray.remote(num_cpus=0, num_returns=2)
    def returning(model):
        return model.weight, model

    assert torch.equal([ray.get(part) for part in yielding.remote(ref)][2], model.weight * 2)
    weight, whole = ray.get(returning.remote(ref))
    assert torch.equal(weight, model.weight)
    assert_exact(model, whole)


class Asks(nn.Module):
    """Its methods are coroutines, or give several results."""

    async def ask(self, x):
        return 2 * x

    def forward(self, x):
        return x, 2 * x


def test_a_method_that_is_a_coroutine_is_awaited_in_the_task(cluster):
    """ray #13687: it returns its result, or an error that names it: never "cannot pickle"."""
    call = rzc.call_model.remote(rzc.put(Asks()), (torch.ones(3),), method_name="ask")
    assert ray.get(call, timeout=60).tolist() == [2, 2, 2]


@pytest.mark.parametrize("count", [10, 200_000])
def test_a_call_may_have_several_results(cluster, count):
    """ray #60251, #16100: `num_returns=2` splits a model's outputs, small or large."""
    call = rzc.call_model.options(num_returns=2)
    first, second = ray.get(call.remote(rzc.put(Asks()), (torch.ones(count),)), timeout=60)
    assert torch.equal(2 * first, second)
