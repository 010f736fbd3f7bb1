"""Objects that hold models: pipelines, containers, dataclasses, an optimizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.case import Case, entry, mlp
from models.difficult.weights import channels_last

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


class Pipeline:
    """Two models and a vocabulary in a plain class."""

    def __init__(self, encoder, head):
        self.encoder, self.head, self.vocabulary = encoder, head, {"a": 0, "b": 1}

    def __call__(self, x):
        return self.head(self.encoder(x))


@_difficult
def pipeline():
    return Case(Pipeline(mlp(8, 8, 8), nn.Linear(8, 4)), (torch.randn(3, 8),))


@_difficult
def dict_of_models():
    models = {"first": nn.Linear(8, 8), "second": nn.Linear(8, 4), "threshold": 0.5}
    return Case(models, (torch.randn(3, 8),), call=lambda m, x: m["second"](m["first"](x)))


@_difficult
def list_of_models():
    return Case(
        [nn.Linear(8, 8), (nn.Linear(8, 4),)],
        (torch.randn(3, 8),),
        call=lambda m, x: m[1][0](m[0](x)),
    )


@dataclass
class Ensemble:
    members: list
    weight: torch.Tensor


@_difficult
def dataclass_of_models():
    return Case(
        Ensemble([nn.Linear(8, 4), nn.Linear(8, 4)], torch.randn(2)),
        (torch.randn(3, 8),),
        call=lambda e, x: sum(w * member(x) for w, member in zip(e.weight, e.members, strict=True)),
    )


@_difficult
def one_model_two_names():
    model = nn.Linear(8, 8)
    return Case(
        {"student": model, "teacher": model},
        (torch.randn(3, 8),),
        call=lambda m, x: m["teacher"](x),
    )


@_difficult
def submodule_twice():
    block = nn.Linear(8, 8)
    return Case(nn.Sequential(block, nn.ReLU(), block), (torch.randn(3, 8),))


@_difficult
def state_dict():
    return Case(channels_last().model.state_dict(), call=None)


@_difficult
def class_by_value():
    class Local(nn.Module):
        """Importable from nowhere, so its code travels too."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu()

    return Case(Local(), (torch.randn(3, 8),))


@_difficult
def model_with_optimizer():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Case(
        {"model": model, "optimizer": optimizer},
        (torch.randn(3, 8),),
        call=lambda m, x: m["model"](x),
    )
