"""The oracle: two object graphs are exact copies when their descriptions are equal.

A description maps the path of each node of a graph to the properties that must survive: class, keys
in order, and for tensors dtype, shape, strides, flags and a digest of the bytes. A node that occurs
again is described by its first path, and a storage by the path and address of its first tensor, so
a description contains ties and shared storages. It is plain data: a worker can send it to the
driver, which compares it.
"""

import enum
import functools
import hashlib
import itertools
import sys
import types
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type(...)),
    *(
        enum.Enum,
        types.ModuleType,
        np.generic,
        np.dtype,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.layout,
    ),
)
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values", "is_coalesced"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def describe(obj) -> dict[str, object]:
    """{path: properties that must survive}, for every node of the object graph."""
    walk = _Walk()
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        walk.visit("", obj)
    return walk.found


def storage_partition(obj) -> frozenset[frozenset[str]]:
    """The tensors of `obj`, by path, in groups that share a storage."""
    groups = defaultdict(set)
    for path, node in describe(obj).items():
        if path.endswith("|storage"):
            groups[node[0]].add(path.removesuffix("|storage"))
    return frozenset(map(frozenset, groups.values()))


def assert_exact(source, loaded):
    """`loaded` equals `source` to the bit, ties, storages, flags and attributes included."""
    assert_same_description(describe(source), describe(loaded))


def assert_same_output(case, source, loaded):
    """The case's call returns the same bits on both."""
    assert_same_description(describe(case.run(source)), describe(case.run(loaded)))


def assert_same_description(expected: dict, actual: dict):
    differences = [
        f"{path or 'the object'}: expected {expected.get(path)}, got {actual.get(path)}"
        for path in expected | actual
        if expected.get(path) != actual.get(path)
    ]
    shown = "\n".join(differences[:10])
    assert not differences, f"{len(differences)} differences, the first ones:\n{shown}"


class _Walk:
    """One traversal. It keeps all nodes alive, so that no id is reused."""

    def __init__(self):
        self.found, self.met, self.storages, self.alive = {}, {}, {}, []

    def visit(self, path, node):
        if isinstance(node, _PLAIN) or _importable(node):
            self.found[path] = (type(node).__name__, _name(node))
        elif id(node) in self.met:
            self.found[path] = ("same as", self.met[id(node)])
        else:
            self.met[id(node)] = path
            self.alive.append(node)
            self.found[path], children = _parts(node)
            if isinstance(node, torch.UntypedStorage):
                self.found[f"{path}|storage"] = self.place(path, node, node)
            elif _has_bytes(node):
                self.found[f"{path}|storage"] = self.place(path, node, node.untyped_storage())
            for suffix, child in children:
                self.visit(path + suffix, child)

    def place(self, path, node, storage):
        """(path of the first node in this storage, bytes from its start to this one's)."""
        self.alive.append(storage)
        first, address = self.storages.setdefault(storage._cdata, (path, node.data_ptr()))
        return first, node.data_ptr() - address


def _name(node):
    qualname = getattr(node, "__qualname__", None)
    return f"{node.__module__}.{qualname}" if qualname else repr(node)


def _importable(node):
    """A class or function that is importable by name: each copy must be the same object."""
    found = sys.modules.get(getattr(node, "__module__", None))
    for part in (getattr(node, "__qualname__", None) or "?").split("."):
        found = getattr(found, part, None)
    return found is node


def _class(node):
    """The class. One pickled by value keeps its module and name, but not its qualname."""
    cls = type(node)
    return _name(cls) if _importable(cls) else (cls.__module__, cls.__name__, "by value")


def _parts(node):
    """The properties of `node` alone, and its children as (suffix of the path, child)."""
    match node:
        case torch.Tensor():
            return _tensor_parts(node)
        case nn.Module():
            return _module_parts(node)
        case np.ndarray():
            array = node.tolist() if node.dtype.hasobject else _digest(node)
            order = np.empty_like(np.asarray(node)).strides  # its own order, without gaps
            # a memory map's attributes describe its file
            attributes = [] if isinstance(node, np.memmap) else _attributes(node)
            return (_class(node), str(node.dtype), node.shape, order, array), attributes
        case torch.fx.Graph():  # each node refers to the next: too deep to follow
            nodes = [
                (node.op, node.name, node.format_node(), _name(node.target)) for node in node.nodes
            ]
            return (_class(node), nodes), [(f"[{n.name!r}].meta", n.meta) for n in node.nodes]
        case torch.fx.Node():
            return (_class(node), node.name), [(".graph", node.graph)]
        case dict():
            pairs = enumerate(node.items())
            children = [pair for i, (k, v) in pairs for pair in _item_parts(i, k, v)]
            return (_class(node), len(node)), children + _attributes(node)
        case list() | tuple():
            children = [(f"[{i}]", child) for i, child in enumerate(node)]
            return (_class(node), len(node)), children + _attributes(node)
        case set() | frozenset():
            return (_class(node), sorted(map(repr, node))), []
        case weakref.ref():
            return _class(node), [("()", node())]
        case functools.partial():
            return _class(node), [(f".{k}", getattr(node, k)) for k in ("func", "args", "keywords")]
        case types.MethodType():
            return _class(node), [(".__func__", node.__func__), (".__self__", node.__self__)]
        case types.FunctionType():
            cells = [cell.cell_contents for cell in node.__closure__ or ()]
            children = [(".__closure__", cells), (".__defaults__", node.__defaults__)]
            return (_name(node), _digest(node.__code__.co_code)), children
        case torch.ScriptObject():
            return _class(node), [(".__getstate__()", node.__getstate__())]
        case type():
            return (node.__module__, node.__name__, "by value"), []
        case torch.UntypedStorage():
            return (_class(node), node.nbytes(), _digest(_storage_bytes(node))), []
        case torch.SymInt():  # each process numbers ragged sizes itself
            return _class(node), []
        case _ if type(node).__getstate__ is not object.__getstate__:
            return _class(node), [(".__getstate__()", node.__getstate__())]
        case _:
            children = _attributes(node)
            return (_class(node), [suffix for suffix, _ in children]), children


def _item_parts(index, key, value):
    if isinstance(key, _PLAIN):
        return [(f"[{key!r}]", value)]
    return [(f".key[{index}]", key), (f".value[{index}]", value)]


def _attributes(node):
    """Attributes from the dict, in its order, and from slots."""
    slots = itertools.chain.from_iterable(
        [names] if isinstance(names := vars(cls).get("__slots__", ()), str) else names
        for cls in type(node).__mro__
    )
    names = [*getattr(node, "__dict__", ()), *(s for s in slots if not s.startswith("__"))]
    return [(f".{name}", getattr(node, name)) for name in names if hasattr(node, name)]


def _module_parts(module):
    """A parametrised module has a class of its own, so its name must do.

    Where a class brings its own `__setstate__`, as RNNs do, the order of the attributes is its
    affair. The state dict repeats what the attributes say, in the words users and files use.
    """
    children = _attributes(module)
    if type(module).__setstate__ is not nn.Module.__setstate__:
        children.sort(key=lambda child: child[0])
    state = [(key, tuple(getattr(v, "shape", ()))) for key, v in _state(module)]
    return (_class(module), [suffix for suffix, _ in children], state), children


def _state(module):
    return ((k, v) for k, v in module.state_dict().items() if not _uninitialized(v))


def _uninitialized(node):
    return isinstance(node, UninitializedTensorMixin)


def _has_bytes(node):
    """A strided CPU tensor over a storage of its own, of which it uses at least one byte."""
    return (
        isinstance(node, torch.Tensor)
        and not _uninitialized(node)
        and not hasattr(node, "__tensor_flatten__")
        and node.layout == torch.strided
        and node.device.type == "cpu"
        and node.numel() > 0
        and node.untyped_storage().nbytes() > 0
    )


def _tensor_parts(tensor):
    children = [(f".{name}", value) for name, value in vars(tensor).items()]
    kind = (_class(tensor), str(tensor.dtype), str(tensor.device), str(tensor.layout))
    flags = (
        *(f"requires_grad={tensor.requires_grad}", f"is_inference={tensor.is_inference()}"),
        *(f"is_conj={tensor.is_conj()}", f"is_neg={tensor.is_neg()}"),
    )
    if _uninitialized(tensor):
        return (kind, flags), children
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = [(f".{name}", getattr(tensor, name)) for name in names]
        return (kind, flags, repr(context)), dict(children + inner).items()
    if tensor.layout in _SPARSE:
        inner = [(f".{name}()", getattr(tensor, name)()) for name in _SPARSE[tensor.layout]]
        return (kind, flags, tuple(tensor.shape)), children + inner
    if tensor.is_nested:
        names = ("_nested_tensor_size", "_nested_tensor_strides", "_nested_tensor_storage_offsets")
        shape = [getattr(tensor, name)().tolist() for name in names]
        return (kind, flags, shape, _digest(_storage_bytes(tensor.untyped_storage()))), children
    shape = (tuple(tensor.shape), tensor.stride(), tensor.is_quantized and _quantizer(tensor))
    return (kind, flags, shape, _has_bytes(tensor) and _digest(_elements(tensor))), children


def _quantizer(tensor):
    if tensor.qscheme() == torch.per_tensor_affine:
        return tensor.q_scale(), tensor.q_zero_point()
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.q_per_channel_axis(), scales.tolist(), zeros.tolist()


def _storage_bytes(storage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()


def _elements(tensor) -> np.ndarray:
    """The raw elements in logical order, as void: any dtype, any strides, no arithmetic."""
    raw, size = _storage_bytes(tensor.untyped_storage()), tensor.dtype.itemsize
    if tensor.dtype in (torch.quint4x2, torch.quint2x4):  # several elements in a byte
        return raw
    start, strides = tensor.storage_offset() * size, [size * step for step in tensor.stride()]
    return np.ndarray(tensor.shape, f"V{size}", raw, start, strides)


def _digest(data) -> str:
    data = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data
    return hashlib.blake2b(data, digest_size=8).hexdigest()
