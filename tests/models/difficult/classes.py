"""Classes that say themselves what is pickled, or hide it behind slots and properties."""

import threading
from collections.abc import Callable

import torch
from torch import nn

from models.case import Case, entry
from models.difficult.modules import Holder

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


class Locked(Holder):
    """Drops its lock when pickled and makes a new one when unpickled."""

    def __init__(self):
        super().__init__(lock=threading.Lock())

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


@_difficult
def custom_state():
    return Case(Locked(), (torch.randn(3, 8),))


class Slotted(nn.Module):
    """A module with a slot beside its dict; torch's own pickling would drop the slot."""

    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = torch.randn(8)

    def forward(self, x):
        return self.linear(x) * self.scale

    def __getstate__(self):
        return {**self.__dict__, "scale": self.scale}

    def __setstate__(self, state):
        self.scale = state.pop("scale")
        super().__setstate__(state)


class Shadowed(nn.Module):
    """Properties of its class lie over what is in its dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.__dict__["scale"] = 3.0

    @property
    def scale(self):
        return -self.__dict__["scale"]

    @property
    def training(self):
        return self.__dict__["training"]

    @training.setter
    def training(self, mode):
        self.__dict__["training"] = mode
        self.__dict__["switched"] = self.__dict__.get("switched", 0) + 1

    def forward(self, x):
        return self.linear(x) * self.scale


class Named:
    """A mixin with a property, as of the many that libraries put after `nn.Module`."""

    @property
    def name(self):
        return self.__dict__["name"]


class NamedModule(nn.Module, Named):
    """Its dict holds what a property of a later base would not let anyone set."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.__dict__["name"] = "linear"

    def forward(self, x):
        return self.linear(x)


@_difficult
def property_of_a_later_base():
    return Case(NamedModule(), (torch.randn(3, 8),))


class SelfReducing(nn.Module):
    """Says itself how it is made and what it is made with."""

    def __init__(self, width, state=None):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.load_state_dict(state or self.state_dict())

    def forward(self, x):
        return self.linear(x)

    def __reduce__(self):
        return type(self), (self.linear.in_features, self.state_dict())


@_difficult
def custom_reduce():
    return Case(SelfReducing(8), (torch.randn(3, 8),))


@_difficult
def shadowed_state():
    return Case(Shadowed(), (torch.randn(3, 8),))


@_difficult
def slotted_module():
    return Case(Slotted(), (torch.randn(3, 8),))


class SlottedPipeline:
    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, x):
        return self.second(self.first(x))


@_difficult
def slotted_pipeline():
    return Case(SlottedPipeline(nn.Linear(8, 8), nn.Linear(8, 4)), (torch.randn(3, 8),))
