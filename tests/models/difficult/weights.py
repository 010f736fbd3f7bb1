"""What a weight may be: any dtype, order in memory, sharing of storage, parametrization."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import utils as nn_utils
from torch.nn.utils import parametrizations

from models.case import Case, entry, mlp
from models.everyday import transformer

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


@_difficult
def tied_weights():
    return transformer()


@_difficult
def bfloat16():
    return Case(mlp(16, 32, 4).to(torch.bfloat16), (torch.randn(3, 16).to(torch.bfloat16),))


@_difficult
def float16():
    return Case(mlp(16, 32, 4).half(), (torch.randn(3, 16).half(),))


@_difficult
def channels_last():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net(torch.randn(4, 3, 8, 8))  # in train mode: no round numbers in the running statistics
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    return Case(net.eval().to(memory_format=torch.channels_last), (x,))


@_difficult
def lstm():
    return Case(nn.LSTM(8, 16, num_layers=2, bidirectional=True), (torch.randn(5, 2, 8),))


@_difficult
def gru():
    return Case(nn.GRU(8, 16, num_layers=2), (torch.randn(5, 2, 8),))


@_difficult
def weight_norm():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))
    return Case(net, (torch.randn(3, 8),))


@_difficult
def orthogonal():
    return Case(parametrizations.orthogonal(nn.Linear(8, 8)), (torch.randn(3, 8),))


@_difficult
def spectral_norm():
    return Case(parametrizations.spectral_norm(nn.Linear(8, 8)).eval(), (torch.randn(3, 8),))


@_difficult
def parametrized_twice():
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrizations.weight_norm(layer, "bias", dim=None)
    return Case(layer, (torch.randn(3, 8),))


@_difficult
def hooked_weight_norm():
    return Case(nn_utils.weight_norm(nn.Linear(8, 8)), (torch.randn(3, 8),))


@_difficult
def hooked_spectral_norm():
    return Case(nn_utils.spectral_norm(nn.Linear(8, 8)).eval(), (torch.randn(3, 8),))


class ScaledParameter(nn.Parameter):
    """A Parameter subclass, as sharding libraries make them."""


@_difficult
def parameter_subclass():
    model = nn.Linear(8, 8)
    model.weight = ScaledParameter(model.weight.detach())
    model.bias = ScaledParameter(model.bias.detach(), requires_grad=False)
    model.bias.world_size = 4
    return Case(model, (torch.randn(3, 8),))


@_difficult
def shared_storage_views():
    model, flat = nn.Linear(8, 8), torch.randn(100)
    model.weight = nn.Parameter(flat[4:68].view(8, 8))
    model.bias = nn.Parameter(flat[60:68])
    model.register_buffer("tail", flat[70:100:3])
    model.transposed = flat[4:68].view(8, 8).t()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def bare_storages():
    model = nn.Linear(8, 8)
    model.storage = model.weight.untyped_storage()
    model.typed = torch.randn(5)._typed_storage()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def in_shared_memory():
    return Case(mlp(8, 16, 4).share_memory(), (torch.randn(3, 8),))


@_difficult
def frozen_parameters():
    model = mlp(8, 16, 4)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def integer_and_complex_parameters():
    model = nn.ParameterDict({"phase": torch.randn(4, dtype=torch.complex64)})
    model["index"] = nn.Parameter(torch.randint(0, 9, (4,)), requires_grad=False)
    return Case(model, call=lambda m: m["phase"][m["index"] % 4])


@_difficult
def meta_model():
    return Case(nn.Linear(8, 8, device="meta"), call=None)
