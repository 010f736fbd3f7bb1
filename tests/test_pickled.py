"""Pickles refer only to `ray_zerocopy.pickled` in our package, so stored ones load for ever.

`data/*.rzc` were saved before the modules moved to their folders. They must always load.
"""

import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from models import ARCHITECTURES, DIFFICULT, LAYOUTS, simple
from ray_zerocopy import pickled
from ray_zerocopy.registry.follower import Live
from ray_zerocopy.registry.records import Plan, Version
from ray_zerocopy.rewrite import extract_tensors

DATA = Path(__file__).parent / "data"


def names(pickle: bytes) -> set[tuple[str, str]]:
    """The (module, name) of everything that a pickle names, and the pickles inside it."""
    found, memo, strings, last = set(), [], [], None
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "MEMOIZE":
            memo.append(last)
            continue
        last = argument if isinstance(argument, str | bytes) else None
        if opcode.name in ("BINGET", "LONG_BINGET"):
            last = memo[argument]
        elif opcode.name == "STACK_GLOBAL":
            found.add((strings[-2], strings[-1]))
        if isinstance(last, str):
            strings.append(last)
        elif isinstance(last, bytes) and last[:1] == b"\x80" and last[-1:] == b".":
            found |= names(last)
    return found


def ours(obj) -> set[tuple[str, str]]:
    """The names of our package in an object's pickle."""
    if isinstance(obj, bytes):
        named = names(obj)
    else:
        _, (head, *_) = rzc.Shared(obj).__reduce_ex__(5)
        named = names(head["skeleton"]) | {(rzc.Shared(obj).__reduce_ex__(5)[0].__module__, "load")}
    return {(module, name) for module, name in named if module.split(".")[0] == "ray_zerocopy"}


def assert_only_pickled(obj):
    for module, name in ours(obj):
        assert module == "ray_zerocopy.pickled", f"{module}.{name} is named by a pickle"
        assert name in pickled.HOMES


SOURCES = {
    **{name: lambda make=make: make().model for name, make in (DIFFICULT | ARCHITECTURES).items()},
    **LAYOUTS,
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_skeleton_names_is_in_one_module(name):
    assert_only_pickled(SOURCES[name]())


def test_programs_and_graphs_name_that_module_alone():
    model = simple().model
    graph = torch.fx.symbolic_trace(model)
    for source in (
        torch.jit.script(model),
        torch.jit.trace(model, simple().args),
        torch.jit.script(_twice),
        torch.export.export(model, simple().args),
        graph,
        graph.graph,
        next(iter(graph.graph.nodes)),
    ):
        assert_only_pickled(source)


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_what_stands_for_a_model_names_that_module_alone(cluster):
    model = simple().model
    shim = rzc.rewrite_pipeline({"model": model}, num_cpus=0)["model"]
    for standing in (
        rzc.ModelWrapper.from_model(model),
        rzc.ModelWrapper.from_model({"model": model}, mode="task"),
        rzc.JITModelWrapper.from_model(torch.jit.script(model)),
        shim,
        shim.__class__.__mro__[1](shim.ref, "forward", rzc.call_model),
        rzc.call_model.options(num_cpus=2),
        extract_tensors(model)[1],
    ):
        assert_only_pickled(ray.cloudpickle.dumps(standing))
        loaded = ray.cloudpickle.loads(ray.cloudpickle.dumps(standing))
        assert type(loaded) is type(standing)


def test_what_is_published_names_that_module_alone():
    plan = Plan("make", "node", make=b"pickled")
    version = Version("name", 1, None, 9, "digest", "make", True, "live", 1.0)
    for standing in (plan, version, rzc.ModelWrapper.from_model(version), Live("name", {})):
        assert_only_pickled(ray.cloudpickle.dumps(standing))
        assert type(pickle.loads(pickle.dumps(standing))) is type(standing)


def test_every_name_has_a_home():
    for name in pickled.HOMES:
        function = getattr(pickled, name)
        assert (function.__module__, function.__name__) == ("ray_zerocopy.pickled", name)


def test_an_object_of_a_newer_version_is_refused(cluster):
    load, (head, *segments) = rzc.Shared(torch.ones(3)).__reduce_ex__(5)
    with pytest.raises(rzc.VersionError, match=r"newer ray_zerocopy.*'colour'"):
        load(head | {"colour": 3}, *(segment.raw() for segment in segments))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.rzc")), ids=lambda path: path.stem)
def test_what_was_saved_before_the_files_moved_loads(path, cluster):
    loaded = rzc.get(rzc.restore(path))
    assert torch.equal(loaded["model"](loaded["x"]), loaded["y"])
    assert isinstance(loaded["array"], np.ndarray)


def test_such_a_file_is_there_for_each_kind():
    assert {path.stem for path in DATA.glob("*.rzc")} >= {"modules", "parametrized", "script", "fx"}
