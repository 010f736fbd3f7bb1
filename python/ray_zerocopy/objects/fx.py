"""Reduce graphs of torch.fx, node by node, and their modules.

torch pickles a `GraphModule` as its code and traces it again when it loads: that loses metadata and
all that tracing does not see. We pickle the graph, and make the code from it, as `recompile` does.
Fake tensors and symbolic sizes in the nodes' metadata are dropped: they belong to the trace that
made them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate, map_arg

from ray_zerocopy import _core
from ray_zerocopy.objects import torch_inside as inside
from ray_zerocopy.pickled import named

OPERATORS = (inside.HigherOrderOperator, inside.OpOverload, inside.OpOverloadPacket)
_TRACED = (inside.FakeTensor, torch.SymBool, torch.SymFloat, torch.SymInt)


@dataclass(frozen=True)
class _Node:
    """The index in its graph of a node that is another node's argument."""

    index: int

    def __reduce__(self) -> Any:
        return graph_index, (self.index,)


@named
def graph_index(index: int) -> _Node:
    """Unpickle the index of a node that is another node's argument."""
    return _Node(index)


def module_reducer(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that reduces a `GraphModule` to its dict; None if its class has one."""
    return _reduce_module if kind.__reduce__.__module__.startswith("torch.fx.") else None


def _reduce_module(module: fx.GraphModule) -> Any:
    own, base = type(module).__mro__[:2]  # `GraphModule.__new__` makes a class for each module
    made = (graph_module, (base, own.__name__))
    return (*made, module.__getstate__(), None, None, restore_graph_module)


@named
def graph_module(base: Any, name: str) -> fx.GraphModule:
    """Unpickle a `GraphModule`; its graph comes with its state."""
    module: fx.GraphModule = base.__new__(base)
    type(module).__name__ = name
    return module


@named
def restore_graph_module(module: fx.GraphModule, state: dict[str, Any]) -> None:
    """Set the state of a `GraphModule`, and make its code."""
    _core.note_module(module)
    module.__setstate__(state)
    module.graph = inside.graph_in(state)  # makes the code


def reduce_graph(whole: fx.Graph) -> Any:
    """Reduce a graph to its nodes; each node comes after its arguments."""
    indices = {node: _Node(index) for index, node in enumerate(whole.nodes)}
    nodes = [
        (node.op, node.target, args, kwargs, node.name, node.type)
        for node in whole.nodes
        for args, kwargs in [map_arg((node.args, node.kwargs), indices.__getitem__)]
    ]
    metadata = [
        {key: value for key, value in node.meta.items() if not _is_traced(value)}
        for node in whole.nodes
    ]
    made = (graph, (*inside.graph_makers(whole), nodes))
    return (*made, metadata, None, None, set_graph_metadata)


def _is_traced(value: object) -> bool:
    return any(isinstance(leaf, _TRACED) for leaf in inside.tree_leaves(value))


@named
def graph(tracer: Any, codegen: Any, nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """Unpickle a graph from its nodes, each an `(op, target, args, kwargs, name, type)`."""
    whole = fx.Graph(tracer_cls=tracer)
    made: list[fx.Node] = []
    for op, target, args, kwargs, name, kind in nodes:
        args, kwargs = map_aggregate((args, kwargs), lambda part: _at(part, made))
        made.append(whole.create_node(op, target, args, kwargs, name, kind))
    whole.set_codegen(codegen)
    return whole


def _at(part: Any, made: list[fx.Node]) -> Any:
    return made[part.index] if isinstance(part, _Node) else part


@named
def set_graph_metadata(whole: fx.Graph, metadata: list[dict[str, Any]]) -> None:
    """Set the metadata of a graph's nodes, in order."""
    for node, meta in zip(whole.nodes, metadata, strict=True):
        node.meta = meta


def reduce_node(node: fx.Node) -> Any:
    """Reduce a node that an object outside its graph holds."""
    return graph_node, (node.graph, list(node.graph.nodes).index(node))


@named
def graph_node(whole: fx.Graph, index: int) -> fx.Node:
    """Unpickle the node of a graph."""
    return list(whole.nodes)[index]


def reduce_operator(op: Any) -> Any:
    """Reduce one of `OPERATORS` to its path in `torch.ops`."""
    path = f"higher_order.{op.name()}" if isinstance(op, inside.HigherOrderOperator) else str(op)
    return operator.attrgetter(f"ops.{path}"), (torch,)
