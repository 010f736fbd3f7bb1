"""Split a model into skeleton and tensors, for code that moves the two itself.

model ─ extract_tensors ─▶ (skeleton, tensors) ═ ray.put, ray.get ═▶ replace_tensors ─▶ model

`ray.put` stores the pair as one object with one block. To share a whole model,
`ray_zerocopy.put` is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ray_zerocopy.errors import MismatchError
from ray_zerocopy.objects import torch_inside as inside
from ray_zerocopy.objects.modules import make_picklable
from ray_zerocopy.objects.skeleton import join, split
from ray_zerocopy.pickled import named
from ray_zerocopy.store.envelope import Shared

Arrays = dict[str, dict[str, np.ndarray]]
_Path = tuple[Any, ...]  # of a tensor: an attribute's name, then positions in nested containers

# numpy lacks some dtypes: such an array has integers, and its dtype's metadata names the real one.
_DTYPE = "torch.dtype"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Tensors(Sequence[Arrays]):
    """The tensors of a model: one mapping for each module, in `named_modules()` order.

    `tensors[i]` is `{"params": {name: ndarray}, "buffers": {name: ndarray}}`. The arrays share the
    tensors' memory; each access makes them. numpy lacks some dtypes, such as bfloat16: these arrays
    have integers of the same size, and `dtype.metadata["torch.dtype"]` names the real dtype.

    It pickles out of band as one block. Ties, strides, `requires_grad` and further attributes that
    hold the same tensors, such as the flat weights of an LSTM, survive.
    """

    def __init__(self, modules: list[dict[str, dict[Any, Any]]]) -> None:
        self._by_module = modules

    def __len__(self) -> int:
        return len(self._by_module)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        module = self._by_module[index]
        return {
            kind: {name: _array(tensor) for name, tensor in module[kind].items()}
            for kind in ("params", "buffers")
        }

    def __reduce_ex__(self, protocol: Any) -> Any:
        return tensors, (Shared(self._by_module),)


@named
def tensors(modules: list[dict[str, dict[Any, Any]]]) -> Tensors:
    """Unpickle `Tensors`."""
    return Tensors(modules)


def extract_tensors(model: torch.nn.Module) -> tuple[torch.nn.Module, Tensors]:
    """Split a model into skeleton and tensors, without a copy of the tensors.

    Returns the skeleton and its `Tensors`. The skeleton is a copy of the model in eval mode whose
    parameters and buffers are all None; the model does not change. Tensors in plain attributes
    move to the `Tensors` too. Tensors in the closure of a hook stay in the skeleton.
    """
    parts = split(model)
    sources = parts.sources.tensors
    out_of_band = [bytearray(sources[index]) for index in parts.buffers]
    skeleton: torch.nn.Module = join(parts.skeleton, sources, out_of_band)
    extracted: list[dict[str, dict[Any, Any]]] = []
    for module, bare in zip(model.modules(), skeleton.modules(), strict=True):
        others = {
            (name, *path): tensor
            for name, value in module.__dict__.items()
            if name not in inside.REGISTRIES
            for path, tensor in _tensors_in(value)
        }
        parameters, buffers = inside.parameters_of(module), inside.buffers_of(module)
        inside.parameters_of(bare).update(dict.fromkeys(parameters))
        inside.buffers_of(bare).update(dict.fromkeys(buffers))
        _replace_others(bare, dict.fromkeys(others))
        make_picklable(bare)
        extracted.append(
            {
                "params": _present(parameters),
                "buffers": _present(buffers),
                "others": others,
            }
        )
    return skeleton.eval(), Tensors(extracted)


def is_extracted(obj: object) -> bool:
    """Whether this is a pair (skeleton, tensors), and not a pipeline whose class is a tuple.

    `Tensors` identify the pair. A pair with the caller's own arrays is a plain tuple; a pipeline is
    an instance of a subclass.
    """
    if not isinstance(obj, tuple) or len(obj) != 2 or not isinstance(obj[0], torch.nn.Module):
        return False
    return isinstance(obj[1], Tensors) or type(obj) is tuple


def replace_tensors(skeleton: torch.nn.Module, tensors: Sequence[Mapping[str, Any]]) -> None:
    """Put the tensors into a skeleton, in place and without a copy; inverse of `extract_tensors`.

    `tensors` is the result of `extract_tensors`, or any sequence of such mappings of ndarrays.
    Plain arrays lose ties, and every floating or complex parameter gets `requires_grad`.

    Raises:
        MismatchError: the number of mappings is not the skeleton's number of modules.

    """
    for module, entry in _pairs(skeleton, tensors):
        for name, tensor in (entry["params"] | entry["buffers"]).items():
            setattr(module, name, tensor)
        _replace_others(module, entry["others"])


def replace_tensors_direct(skeleton: torch.nn.Module, tensors: Sequence[Mapping[str, Any]]) -> None:
    """Like `replace_tensors`, but faster: it bypasses every module's `__setattr__`."""
    for module, entry in _pairs(skeleton, tensors):
        inside.parameters_of(module).update(entry["params"])
        inside.buffers_of(module).update(entry["buffers"])
        _replace_others(module, entry["others"])


def _pairs(
    skeleton: torch.nn.Module, tensors: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[torch.nn.Module, Mapping[str, Any]]]:
    modules = list(skeleton.modules())
    if len(modules) != len(tensors):
        raise MismatchError(
            f"{type(skeleton).__name__} has {len(modules)} modules, but the tensors are for "
            f"{len(tensors)} modules: use a skeleton and tensors of the same model"
        )
    entries = tensors._by_module if isinstance(tensors, Tensors) else map(_from_arrays, tensors)
    return zip(modules, entries, strict=True)


def _from_arrays(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    def parameter(array: np.ndarray) -> torch.nn.Parameter:
        tensor = _tensor(array)
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        return torch.nn.Parameter(tensor, requires_grad=differentiable)

    return {
        "params": {name: parameter(array) for name, array in arrays["params"].items()},
        "buffers": {name: _tensor(array) for name, array in arrays["buffers"].items()},
        "others": {},
    }


def _replace_others(module: torch.nn.Module, others: Mapping[_Path, Any]) -> None:
    for (name, *path), value in others.items():
        module.__dict__[name] = _with(module.__dict__[name], path, value)
    if isinstance(module, torch.nn.RNNBase):
        inside.renew_flat_weights(module)


def _present(registry: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in registry.items() if tensor is not None}


def _tensors_in(value: Any, *path: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the tensors in containers, each with its path of positions.

    A set with a tensor counts as one.
    """
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        for position, item in enumerate(items):
            yield from _tensors_in(item, *path, position)
    elif isinstance(value, torch.Tensor) or (
        isinstance(value, set) and any(isinstance(item, torch.Tensor) for item in value)
    ):
        yield path, value


def _with(container: Any, path: Sequence[int], value: Any) -> Any:
    """Return nested containers with a value at a path; tuples are made anew."""
    if not path:
        return value
    position, *rest = path
    if isinstance(container, tuple):
        items = list(container)
        items[position] = _with(items[position], rest, value)
        return tuple.__new__(type(container), items)
    key = list(container)[position] if isinstance(container, dict) else position
    container[key] = _with(container[key], rest, value)
    return container


def _array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    try:
        return tensor.numpy()
    except TypeError:  # a dtype that numpy lacks
        array = tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()
        name = str(tensor.dtype).removeprefix("torch.")
        return array.view(np.dtype(array.dtype, metadata={_DTYPE: name}))


def _tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    metadata: Any = array.dtype.metadata or {}
    return tensor.view(getattr(torch, metadata[_DTYPE])) if _DTYPE in metadata else tensor
