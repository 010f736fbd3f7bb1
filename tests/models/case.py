"""A model with one call of it, and how a table of such is made: each entry by the same seed."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def _call(model, *args, **kwargs):
    return model(*args, **kwargs)


@dataclass
class Case:
    """A model and one call of it; `call` is None where there is nothing to call."""

    model: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    call: Callable | None = _call

    def run(self, model=None):
        """The output of the call on `model`, by default the case's own; one seed, no autograd."""
        torch.manual_seed(0)
        with torch.no_grad():
            return self.call(self.model if model is None else model, *self.args, **self.kwargs)


def seeded(factory):
    @functools.wraps(factory)
    def build():
        torch.manual_seed(0)
        return factory()

    return build


def entry(table):
    def register(factory):
        table[factory.__name__] = seeded(factory)
        return table[factory.__name__]

    return register


def mlp(*widths, **kwargs):
    layers = [nn.Linear(*pair, **kwargs) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
