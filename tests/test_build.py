"""`get(build(make))` equals `make()`, and the node never holds the model twice."""

import gc
import io
import itertools
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact, assert_same_description, describe
from footprint import anonymous_memory, inode_beneath, resident_memory, trim, with_peak
from models import DIFFICULT, large, simple, transformer
from ray_zerocopy import _core
from ray_zerocopy.store.loader import following
from safetensors.torch import load_file, save_file
from torch import nn

FACTORIES = {"simple": simple, "large": large, "transformer": transformer, **DIFFICULT}
KEPT = []


class Watched:
    """An arena, and the kernel's view of its file."""

    def __init__(self):
        before = self._files()
        self.lend = _core.Arena().lend  # the bound method keeps the arena
        (self.file,) = self._files() - before

    @staticmethod
    def _files():
        files = Path("/proc/self/fd").iterdir()
        return {f for f in files if f.exists() and "memfd:ray-zerocopy" in str(f.readlink())}

    @property
    def nbytes(self):
        return 512 * self.file.stat().st_blocks

    def __contains__(self, tensor):
        return inode_beneath(tensor.data_ptr()) == self.file.stat().st_ino


def arenas():
    """The arenas that this process has mapped. A cache of torch.fx or a test may hold some."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").open() if "memfd:ray-zerocopy" in line]


@pytest.fixture
def arena():
    return Watched()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert threading.Thread.start.__module__ == "threading"
    KEPT.clear()


class Reader:
    def describe(self, loaded):
        return describe(loaded)


@pytest.fixture(scope="module")
def reader(start):
    return start(Reader)[0]


@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_built_is_what_is_made(name, reader):
    seen = []

    def make():
        model = FACTORIES[name]().model
        seen.append(describe(model))
        return model

    ref, (expected,) = rzc.build(make), seen
    assert_same_description(expected, ray.get(reader.describe.remote(ref)))


# --- plain loading --------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers of a page and more, tied, and a buffer of that size."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("steps", torch.arange(2000))
        self.register_buffer("small", torch.arange(3))


def checkpoint(tmp_path, kind):
    torch.manual_seed(1)
    state = Net().state_dict()
    if kind == "torch":
        torch.save(state, tmp_path / "net.pt")
        return torch.load(tmp_path / "net.pt")
    if kind == "mmap":
        torch.save(state, tmp_path / "net.pt")
        return torch.load(tmp_path / "net.pt", mmap=True)
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, tmp_path / "net.safetensors"
    )

    return load_file(tmp_path / "net.safetensors")


@pytest.mark.parametrize("kind", ["torch", "mmap", "safetensors"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_is_loaded_as_without(kind, device, assign, tmp_path, cluster):
    def make():
        with torch.device(device):
            model = Net()
        state = checkpoint(tmp_path, kind)
        if device == "meta" and not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(state, assign=assign)
        return model.half()

    assert_exact(make(), ray.get(rzc.build(make)))


SOURCES = {
    "ones": lambda: torch.ones(64, 65),
    "empty": lambda: torch.ones(0, 64),
    "transposed": lambda: torch.randn(64, 65).T,
    "channels_last": lambda: torch.randn(8, 16, 8, 9).to(memory_format=torch.channels_last),
    "ambiguous": lambda: torch.randn(64, 64, 1, 1).to(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(64, 130)[:, ::2],
    "expanded": lambda: torch.randn(64, 1).expand(64, 65),
    "complex": lambda: torch.randn(64, 65, dtype=torch.complex64).conj(),
    "parameter": lambda: nn.Parameter(torch.randn(64, 65)),
    "bool": lambda: torch.randn(64, 65) > 0,
}
BIRTHS = {
    "to": lambda x: x.to(torch.bfloat16),
    "to device": lambda x: x.to("cpu", torch.float64),
    "to keyword": lambda x: x.to(device=None, dtype=torch.float16),
    "to other": lambda x: x.to(torch.ones(1, dtype=torch.float64)),
    "to format": lambda x: x.to(torch.float64, memory_format=torch.contiguous_format),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "stack": lambda x: torch.stack([x, x]),
    "stack at the end": lambda x: torch.stack((x, x), dim=-1),
    "cat": lambda x: torch.cat([x, x], 1),
    "cat of two dtypes": lambda x: torch.cat([x, x.to(torch.complex128)]),
}

BORN_IN_ARENA = {
    *(
        ("ones", birth)
        for birth in BIRTHS.keys() - {"to format", "contiguous", "cat of two dtypes"}
    ),
    ("transposed", "contiguous"),
    ("strided", "contiguous"),
    ("bool", "to"),
}


@pytest.mark.parametrize("birth", BIRTHS)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_what_is_cast_and_merged_in_the_arena_is_what_torch_gives(birth, arena):
    torch.manual_seed(0)
    for (name, make), mode in itertools.product(
        SOURCES.items(), (torch.no_grad, torch.enable_grad)
    ):
        source = make()
        with mode():
            expected = BIRTHS[birth](source)
            with following(arena):
                born = BIRTHS[birth](source)
        assert_exact(expected.detach(), born.detach())
        assert expected.requires_grad == born.requires_grad
        assert born in arena or (name, birth) not in BORN_IN_ARENA, name


def test_a_trace_does_not_hold_the_arena(cluster):
    def make():
        return torch.jit.trace(lambda x: x.to(torch.float64).clone() + 1, torch.ones(64, 65))

    assert torch.equal(ray.get(rzc.build(make))(torch.zeros(64, 65)), torch.ones(64, 65).double())


# --- who holds what -------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", ["all", "one layer", "a view", "a numpy array"])
def test_whoever_still_holds_the_loaders_model_finds_its_weights(holds, cluster):
    def make():
        model = large().model
        parts = {
            "all": model,
            "one layer": model[2],
            "a view": model[2].weight.detach()[5:],
            "a numpy array": model[2].weight.detach().numpy(),
        }
        KEPT.append(parts[holds])
        return model

    ref = rzc.build(make)
    source = large().model
    parts = {"all": source, "one layer": source[2], "a view": source[2].weight.detach()[5:]}
    if holds == "a numpy array":
        assert np.array_equal(KEPT[0], source[2].weight.detach().numpy())
    else:
        assert_exact(parts[holds], KEPT[0])
    assert_exact(source, ray.get(ref))


class Scaled(np.ndarray):
    """An array with a tensor as an attribute."""


def test_what_goes_with_another_part_while_it_is_written_is_stored_whole(cluster):
    def make():
        array = Scaled(1 << 22)  # 32 MiB
        array[:] = 0
        array.scale = torch.ones(1 << 22).to(torch.float64)
        return array

    assert bool((rzc.get(rzc.build(make)).scale == 1).all())


def test_a_child_leaves_what_the_parent_keeps_of_the_arena_alone(cluster):
    kept = []

    def make():
        kept.extend(torch.ones(1 << 20).to(torch.float64) for _ in range(2))
        return kept[0]

    rzc.build(make)
    if (child := os.fork()) == 0:
        kept[1].zero_()
        kept.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(bool((tensor == 1).all()) for tensor in kept)


def test_if_make_raises_nothing_is_left(cluster):
    def make():
        model = large().model
        raise ValueError(f"{len(model)} layers are not enough")

    before = arenas()
    with pytest.raises(ValueError, match="7 layers"):
        rzc.build(make)
    assert arenas() == before


def test_once_it_is_built_the_arena_is_gone(cluster):
    before = arenas()
    ref = rzc.build(lambda: large().model)
    assert arenas() == before
    assert_exact(large().model, ray.get(ref))


def test_builds_nest(cluster):
    inner = []

    def make():
        model = large().model
        inner.append(rzc.build(lambda: transformer().model))
        return {"model": model, "after": large().model[0]}

    loaded = ray.get(rzc.build(make))
    assert_exact({"model": large().model, "after": large().model[0]}, loaded)
    assert_exact(transformer().model, ray.get(inner[0]))


def test_a_reference_is_refused(cluster):
    with pytest.raises(TypeError, match="ObjectRef already"):
        rzc.build(lambda: rzc.put(simple().model))


# --- threads --------------------------------------------------------------------------------------


def cast():
    return torch.ones(64, 65).to(torch.float64)


class Sub(threading.Thread):
    def run(self):
        self.cast = cast()


def test_threads_that_the_loader_starts_are_followed(arena):
    casts = []

    def grandchild():
        with ThreadPoolExecutor(1) as pool:
            casts.append(pool.submit(cast).result())

    with following(arena):
        with ThreadPoolExecutor(2) as pool:
            casts.extend(future.result() for future in [pool.submit(cast) for _ in range(4)])
        threads = [threading.Thread(target=grandchild), Sub()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    casts.append(threads[1].cast)
    assert len(casts) == 6
    assert all(cast in arena for cast in casts)


def test_other_threads_are_left_alone(arena):
    begin, casts = threading.Event(), []

    def other():
        begin.wait()
        casts.append(cast())
        with ThreadPoolExecutor(1) as pool:
            casts.append(pool.submit(cast).result())

    thread = threading.Thread(target=other)
    thread.start()
    with following(arena):
        begin.set()
        thread.join()
    assert arena.nbytes == 0


def test_threads_start_though_others_wrap_their_start_meanwhile(arena):
    def wrapper(thread):
        return wrapped(thread)

    def start():
        thread = threading.Thread(target=lambda: casts.append(cast()))
        thread.start()
        thread.join()

    casts = []
    with following(arena):
        wrapped = threading.Thread.start
        threading.Thread.start = wrapper
    start()
    with following(arena):
        start()
    start()
    assert [cast in arena for cast in casts] == [False, True, False]
    threading.Thread.start = wrapped
    with following(arena):
        start()
    assert casts[-1] in arena


def test_a_thread_that_outlives_the_loader_is_let_go(arena):
    with following(arena):
        pool = ThreadPoolExecutor(1)
        pool.submit(cast).result()
    late = pool.submit(cast).result()
    pool.shutdown()
    assert late not in arena


def test_threads_build_beside_each_other_and_beside_those_that_make_modules(cluster):
    def make():
        return nn.Sequential(*[nn.Linear(4, 4).half() for _ in range(50)])

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(make) for _ in range(100)]
        built = [pool.submit(rzc.build, make) for _ in range(24)]
        others += [pool.submit(make) for _ in range(100)]
        assert all(len(other.result()) == 50 for other in others)
        assert all(len(ray.get(ref.result())) == 50 for ref in built)


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_takes_longer_than_a_second_shows_on_a_terminal_how_far_it_is(
    is_terminal, arena, monkeypatch
):
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", screen)
    with following(arena):
        weight = torch.ones(512, 512).to(torch.float16)
        assert not screen.getvalue()
        time.sleep(1.1)
        weight.to(torch.float32)
    shown = re.findall(r"build: ([\d.]+MB) \[[\d:]+, [\d.]+[kM]B/s\]", screen.getvalue())
    assert shown[-1:] == (["1.57MB"] if is_terminal else [])


# --- transformers, and memory ---------------------------------------------------------------------


def save_llama(path, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="20MB")


def save_mixtral(path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=2000,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(path, max_shard_size="20MB")


CHECKPOINTS = {
    "a cast": save_llama,
    "a cast, tied": lambda path: save_llama(path, tied=True),
    "merged experts": save_mixtral,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    CHECKPOINTS[request.param](folder)
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_a_checkpoint_is_built_as_it_is_loaded(folder, reader):
    ref, expected = rzc.build(load, folder), describe(load(folder))
    assert_same_description(expected, ray.get(reader.describe.remote(ref)))


class Builder:
    """Builds, and returns the peak memory as shares of the model."""

    def build(self, make, *args):
        rzc.build(make, *args)  # imports, and Ray's first object
        trim()
        nbytes = rzc.inspect(rzc.build(make, *args)).nbytes
        shares = []
        for measure in (anonymous_memory, resident_memory):
            trim()
            ref, peak = with_peak(lambda: rzc.build(make, *args), measure)
            shares.append(peak / nbytes)
            del ref
        return shares


@pytest.fixture(scope="module")
def builder(start):
    return start(Builder)[0]


def test_the_node_never_holds_a_checkpoint_twice(folder, builder):
    private, node = ray.get(builder.build.remote(load, folder))
    print(f"private {private:.2f}, node {node:.2f} of the model")
    assert private <= 0.2
    assert node <= 1.25


LAYERS, WIDTH = 16, 1536  # 9 MiB each, which glibc keeps when they are freed


def layers(tensor):
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    for index, layer in enumerate(net):
        layer.weight = nn.Parameter(tensor(index))
    return net


def array(index):
    return np.full((WIDTH, WIDTH), index + 0.5, np.float32)


def full(index):
    return torch.full((WIDTH, WIDTH), index + 0.5)


def saved(path):
    torch.save(layers(full), path)
    return lambda: torch.load(path, weights_only=False)


def in_a_cycle():
    net = layers(full)
    net.itself = [net]
    return net


LOADERS = {
    "modules": lambda _: lambda: layers(full),
    "torch.load": lambda path: saved(path),
    "numpy": lambda _: lambda: layers(lambda index: torch.from_numpy(array(index))),
    "arrays": lambda _: lambda: [array(index) for index in range(LAYERS)],
    "a dict of tensors": lambda _: lambda: {index: full(index) for index in range(LAYERS)},
    "a cycle": lambda _: in_a_cycle,
    "one tensor": lambda _: lambda: torch.full((LAYERS, WIDTH, WIDTH), 0.5),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_node_never_holds_a_model_twice(name, builder, tmp_path):
    make = LOADERS[name](tmp_path / "net.pt")
    _, node = ray.get(builder.build.remote(make))
    print(f"{name}: node {node:.2f} of the model")
    assert node <= 1.25


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_let_go_while_it_is_written_is_what_was_made(name, cluster, tmp_path):
    make = LOADERS[name](tmp_path / "net.pt")
    assert_exact(make(), ray.get(rzc.build(make)))


def test_its_own_messages_pass_through(folder, caplog, cluster):
    from transformers.utils import logging

    logging.enable_propagation()
    logging.set_verbosity_warning()
    file = sorted(folder.glob("model*.safetensors"))[-1]
    kept = file.read_bytes()
    state = load_file(file)
    lost = sorted(state)[-1]
    del state[lost]
    try:
        save_file(state, file, metadata={"format": "pt"})
        rzc.build(load, folder)
    finally:
        file.write_bytes(kept)
        logging.disable_propagation()
        logging.set_verbosity_error()
    assert "MISSING" in caplog.text
