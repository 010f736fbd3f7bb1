"""A digest depends on weights and structure, and is the same in every process."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from weakref import WeakSet

import pytest
import torch
from models import ARCHITECTURES, DIFFICULT, LAYOUTS, simple
from ray import cloudpickle
from ray_zerocopy.store.envelope import Parts, Shared
from torch import nn


def digest(obj):
    return Parts.of(obj).digest()


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def changed(change):
    """The digest of a model after a change in place, or of the change's result."""
    model = base()
    return digest(change(model) or model)


def scripted(*strides):
    """A script whose class is new each time, with another number in TorchScript."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(*(nn.Conv1d(1, 1, 1, stride=stride) for stride in strides))

        def forward(self, x):
            return self.convs(x)

    torch.manual_seed(0)
    return torch.jit.script(Net())


def test_a_script_has_one_digest_whatever_was_scripted_before():
    assert digest(scripted(1, 2)) == digest(scripted(1, 2))
    assert digest(scripted(1, 2)) != digest(scripted(2, 1))


# --- the same in every process --------------------------------------------------------------------


def digests(seed=None):
    """The digests of all models of the suite, made in the seed's order, and of a script."""
    made = ARCHITECTURES | DIFFICULT | LAYOUTS | SETS
    made["script"] = lambda: torch.jit.script(simple().model)
    names = sorted(made)
    if seed is not None:
        random.Random(seed).shuffle(names)
    found = {}
    for name in names:
        torch.manual_seed(0)
        obj = made[name]()
        found[name] = digest(getattr(obj, "model", obj))
    return found


def test_equal_objects_have_one_digest_in_every_process():
    """For any hash seed and any earlier work: architectures, their configs, layouts."""
    code = "import json, conftest, test_digest; print(json.dumps(test_digest.digests(1)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    there, here = json.loads(done.stdout.splitlines()[-1]), digests()
    assert len(here) > 170
    assert {name for name in here if here[name] != there[name]} == set()


class Tags(set):
    pass


class FrozenTags(frozenset):
    pass


class Tag:
    def __init__(self, name, other=None):
        self.name, self.other = name, other


def _of_a_class_of_their_own():
    model = base()
    model.tags, model.frozen, model.weak = Tags("abcd"), FrozenTags("efgh"), WeakSet(model)
    model.tags.source = {"somewhere", "else"}
    return model


def _of_objects():
    first, second = Tag("same", Tag("one")), Tag("same", Tag("another"))
    first.other.other = first
    return [{first, second, Tag("c"), Tag("d")}, base(), {("a", 1), ("b", second)}, second]


def _in_a_class():
    class Net(nn.Linear):
        names = {"alpha", "beta", "gamma"}  # noqa: RUF012 - what a user may write

        def forward(self, x):
            return super().forward(x) if x in {"delta", "epsilon", "zeta"} else torch.relu(x)

    torch.manual_seed(0)
    return Net(3, 3)


SETS = {
    "sets of a class of their own": _of_a_class_of_their_own,
    "sets of objects": _of_objects,
    "sets in a class": _in_a_class,
}


# --- equal objects --------------------------------------------------------------------------------


def test_what_is_interned_counts_for_nothing():
    def same(value):
        return lambda model: model.__dict__.update(a=value(), b=value())

    def once(value):
        one = value()
        return lambda model: model.__dict__.update(a=one, b=one)

    for value in (lambda: "".join(["ab", "c"]), lambda: (1, "x".upper()), lambda: bytes(range(9))):
        assert changed(same(value)) == changed(once(value))
    assert changed(same(lambda: [1])) != changed(once(lambda: [1]))


def test_ids_of_hooks_count_for_nothing_but_their_order():
    def hooked(*hooks, kept=None):
        def change(model):
            handles = [model.register_forward_hook(hook, with_kwargs=True) for hook in hooks]
            model.handle = kept if kept is None else handles[kept]

        return change

    assert changed(hooked(len, repr)) == changed(hooked(len, repr))
    told = [hooked(len, repr), hooked(repr, len), hooked(len), hooked(len, repr, kept=0)]
    told = [changed(hook) for hook in [*told, hooked(len, repr, kept=1)]]
    assert len(set(told)) == len(told)


def test_a_class_that_is_pickled_by_value_is_itself_again():
    model = _in_a_class()
    assert digest(model) == digest(_in_a_class())
    assert digest(cloudpickle.loads(cloudpickle.dumps(model))) == digest(model)


@pytest.mark.parametrize("name", SETS)
def test_what_was_loaded_has_the_digest_of_its_source(name):
    source = SETS[name]()
    assert digest(pickle.loads(pickle.dumps(Shared(source), 5))) == digest(source)


# --- others ---------------------------------------------------------------------------------------


def _tie(model):
    model[1].weight = model[0].weight


def _tie_the_storage(model):
    model[1].weight = nn.Parameter(model[0].weight.data)


def _another_weight(model):
    model[0].weight.data[0, 0] += 1


CHANGES = {
    "nothing": lambda model: None,
    "a weight": _another_weight,
    "a dtype": lambda model: model.double(),
    "a mode": lambda model: model.eval(),
    "a flag": lambda model: model.requires_grad_(False),
    "an order": lambda model: nn.Sequential(*reversed(model)),
    "one twice": lambda model: nn.Sequential(model[0], model[0]),
    "one and its copy": lambda model: nn.Sequential(model[0], copy.deepcopy(model[0])),
    "a tied parameter": _tie,
    "a shared storage": _tie_the_storage,
}
VALUES = (
    *("x", "y", b"x", True, 1.0, -0.0, None),
    *(0, 1, -1, 255, 256, -256, 65535, 2**31, 2**80, -(2**80)),
    *({"a", "b"}, {"a", "c"}, frozenset("ab"), Tags("ab"), ["a", "b"], ["b", "a"], ("a", "b"), ()),
    *({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}, [[]], [()], {"hooks": {3: 1}}),
    *({"hooks": {5: 1}}, len, max, Tag("a"), Tag("b"), {Tag("a"), Tag("b")}, {Tag("a"), Tag("c")}),
)
CHANGES |= {
    f"attribute {index}: {value!r}": lambda model, value=value: setattr(model, "tag", value)
    for index, value in enumerate(VALUES)
}


def test_what_differs_has_another_digest():
    told = {name: changed(change) for name, change in CHANGES.items()}
    assert told == {name: changed(change) for name, change in CHANGES.items()}
    for name, one in told.items():
        assert [other for other in told if told[other] == one] == [name]


def test_what_a_method_does_counts():
    def twice(factor):
        class Net(nn.Linear):
            def forward(self, x):
                return factor * x

        torch.manual_seed(0)
        return Net(3, 3)

    assert digest(twice(2)) == digest(twice(2)) != digest(twice(3))
