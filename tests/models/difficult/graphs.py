"""What torch makes of a module: quantized, or traced into a graph."""

from collections.abc import Callable

import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

from models.case import Case, entry

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


@_difficult
def quantized_dynamic():
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    return Case(torch.ao.quantization.quantize_dynamic(net, {nn.Linear}), (torch.randn(3, 8),))


class Branching(nn.Module):
    """Arguments of every kind, for a graph."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x, power=2, *, shift=None):
        y = torch.relu(self.linear(x)) ** power
        return {"sum": y.sum(dim=-1), "parts": [y[:, 1:3], torch.add(y, self.scale, alpha=0.5)]}


@_difficult
def traced_graph():
    traced = torch.fx.symbolic_trace(Branching())
    x = torch.randn(3, 8)
    ShapeProp(traced).propagate(x, 2)
    traced.meta["output"] = next(iter(reversed(traced.graph.nodes)))
    dead = traced.graph.call_function(torch.ops.aten.add.Tensor, (1, 2))  # code would not trace it
    dead.meta["why"] = "a pass left it"
    traced.recompile()
    return Case(traced, (x, 2))


@_difficult
def quantized_convolution():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)).eval()
    net = torch.ao.quantization.QuantWrapper(net)
    net.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(net)
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    return Case(torch.ao.quantization.convert(prepared), (x,))
