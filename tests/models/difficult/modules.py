"""What a module may carry: buffers, containers, hooks, attributes, flags, itself."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from models.case import Case, entry

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


class Holder(nn.Module):
    """A linear layer that carries whatever else it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.linear(x)


@_difficult
def non_persistent_buffers():
    model = Holder()
    model.register_buffer("kept", torch.randn(4))
    model.register_buffer("dropped", torch.randn(4), persistent=False)
    model.register_buffer("absent", None)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def buffer_class():
    model = Holder(
        kept=nn.Buffer(torch.randn(4)), dropped=nn.Buffer(torch.randn(4), persistent=False)
    )
    return Case(model, (torch.randn(3, 8),))


@_difficult
def none_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False))
    model.register_module("absent", None)
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m[1](m[0](x)))


@_difficult
def plain_tensor_attributes():
    model = Holder(scale=torch.randn(8), grid=torch.arange(6.0).reshape(2, 3).t())
    model.alias = model.scale
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) * m.alias)


@_difficult
def tensors_in_containers():
    shared = torch.randn(8)
    model = Holder(
        items=[shared, torch.randn(2)],
        table={"a": shared, 3: (torch.randn(1), [torch.randn(2, 2)])},
        nothing=[],
    )
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) + m.table["a"])


@_difficult
def parameter_containers():
    model = Holder(
        plist=nn.ParameterList([torch.randn(8), torch.randn(8)]),
        pdict=nn.ParameterDict({"one": torch.randn(8), "two": nn.Parameter(torch.randn(8))}),
        mdict=nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Identity()}),
    )
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m.mdict["x"](m(x)) + m.plist[1])


def double_output(module, args, output):
    return 2 * output


def negate_input(module, args, kwargs):
    return tuple(-arg for arg in args), kwargs


def add_output(by, module, args, output):
    return output + by


@_difficult
def hooks():
    model, shift = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(8)
    model.register_forward_hook(double_output)
    model.register_forward_pre_hook(negate_input, with_kwargs=True)
    model[0].register_forward_hook(lambda module, args, output: output + shift)
    model[0].register_forward_hook(functools.partial(add_output, shift), always_call=True)
    model[1].register_full_backward_hook(lambda module, grads_in, grads_out: None)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def attributes_on_parameters():
    model = nn.Linear(8, 8)
    model.weight.tag = "frozen by recipe"
    model.weight.statistics = {"mean": torch.randn(8)}
    model.bias.partner = model.weight
    return Case(model, (torch.randn(3, 8),))


@_difficult
def lazy_module():
    return Case(nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()), call=None)


@_difficult
def mixed_training_flags():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.BatchNorm1d(8))
    model[1].eval()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def reference_cycle():
    model = Holder(child=Holder())
    model.child.parents = [model]
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m.child.parents[0](m.child(x)))
