"""Reduce TorchScript modules and torch.export programs to code and tensors.

Neither pickles like other objects. Each becomes an archive of its code, which torch writes, and its
tensors, which are stored like all tensors. Loading gives torch the archive and the tensors over the
block, without a copy.

The protocol of `torch.package` writes TorchScript's archive: it omits storages that have a number
already, and the reader finds them by number. It only reads the module, so other threads may run it
meanwhile. We call the functions beneath `torch.jit.save` and `torch.jit.load`, because those two
warn of deprecation. (torch 2.15)
"""

from __future__ import annotations

import io
import itertools
import re
import types
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from ray_zerocopy.objects import torch_inside as inside
from ray_zerocopy.pickled import named

PROGRAMS = (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch.export.ExportedProgram)

# The tensors that are attributes of a module, and the same for its submodules.
Slots = tuple[dict[str, torch.Tensor], dict[str, Any]]


def reduce(program: Any) -> Any:
    """Reduce one of `PROGRAMS` for a pickler that takes tensors out."""
    if isinstance(program, torch.jit.ScriptModule):
        parts = program.named_modules()
        attributes = {path: own for path, part in parts if (own := _python_attributes(part))}
        made = (script_module, _split(inside.compiled(program)))
        return (*made, attributes or None, None, None, set_script_attributes)
    if isinstance(program, torch.jit.ScriptFunction):
        return _reduce_function(program)
    return _reduce_exported(program)


def _split(module: Any) -> tuple[bytes, dict[int, torch.Tensor], Slots]:
    """Split a TorchScript module into its code, its storages by number, and its slots.

    Any tensor over a storage represents it. This takes out tensors in attributes, in lists, tuples
    and dicts there, and in constants of the code: in a frozen or traced module the weights are
    constants. The archive keeps tensors of script classes and results of `__getstate__`, such as
    the packed weights of quantized layers.
    """
    slots = _slots(module)
    file = io.BytesIO()
    writer = inside.PyTorchFileWriter(file)
    serializer = inside.ScriptModuleSerializer(writer)
    context = serializer.storage_context()
    storages: dict[int, torch.Tensor] = {}
    for tensor in _tensors(module, slots):
        storage = tensor.untyped_storage()
        number = context.get_or_add_storage(storage)
        if number not in storages:
            storages[number] = _whole(tensor, storage)
    serializer.serialize(module, 0)
    serializer.write_files()
    writer.write_end_of_file()
    return file.getvalue(), storages, slots


def _join(archive: bytes, storages: dict[int, torch.Tensor], slots: Slots) -> Any:
    """Rebuild a TorchScript module around its storages; the inverse of `_split`.

    Reading makes a new tensor over each storage. The slots then get the tensors from the pickle:
    the rest of the object graph holds these, and they are parameters if the source's were. torch
    reads the archive on the CPU, whatever device the tensors are for.
    """
    reader = inside.PyTorchFileReader(io.BytesIO(archive))
    context = inside.DeserializationStorageContext()
    device = torch.device("cpu")
    for number, tensor in storages.items():
        device = tensor.device
        context.add_storage(f"{number}.storage", tensor.cpu())
    unit = inside.CompilationUnit()
    with torch.inference_mode(False):
        module = inside.import_module_from_package(unit, reader, context, device, "0")
    _fill(module, slots)
    return module


def _slots(module: Any) -> Slots:
    attributes = ((name, module.getattr(name)) for name in inside.attribute_names(module))
    tensors = {name: value for name, value in attributes if isinstance(value, torch.Tensor)}
    return tensors, {name: _slots(child) for name, child in _children(module)}


def _fill(module: Any, slots: Slots) -> None:
    tensors, children = slots
    for name, tensor in tensors.items():
        module.setattr(name, tensor)
    for name, child in _children(module):
        _fill(child, children[name])


def _children(module: Any) -> Any:
    return inside.ModuleDict(module).items()


def _tensors(module: Any, slots: Slots) -> Iterator[torch.Tensor]:
    """Yield the tensors whose storage is to be taken out, those in slots first."""
    for tensor in (*_in_slots(slots), *_elsewhere(module)):
        if tensor.layout is torch.strided and not tensor.is_meta and inside.has_storage(tensor):
            yield tensor


def _in_slots(slots: Slots) -> Iterator[torch.Tensor]:
    tensors, children = slots
    yield from tensors.values()
    for child in children.values():
        yield from _in_slots(child)


def _elsewhere(module: Any) -> Iterator[torch.Tensor]:
    for name in inside.attribute_names(module):
        yield from _inside(module.getattr(name))
    for method in inside.methods_of(module):
        # Inlined, because called functions have constants too; kept in a name, because it owns
        # its nodes.
        graph = method.inlined_graph
        if graph.findAllNodes("prim::ConstantMKLDNNTensor"):
            raise TypeError(
                "torch's archives cannot keep the result of torch.jit.optimize_for_inference: "
                "store the original script module, and optimize it after loading"
            )
        for node in graph.findAllNodes("prim::Constant"):
            yield from _inside(node.output().toIValue())
    for _, child in _children(module):
        yield from _elsewhere(child)


def _inside(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _inside(part)


def _whole(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a tensor over all of a storage: this one, if it is.

    A span with a single view loads faster.
    """
    if tensor.nbytes == storage.nbytes() and tensor.is_contiguous():
        return tensor
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@named
def script_module(*parts: Any) -> torch.jit.ScriptModule:
    """Unpickle a `ScriptModule` from archive, storages and slots."""
    return inside.wrap_cpp_module(_join(*parts))


def _python_attributes(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """Return Python attributes of a module, such as a config; `torch.jit.save` drops them."""
    usual = vars(inside.wrap_cpp_module(inside.compiled(module)))
    methods = (inside.ScriptMethod, types.MethodType)
    return {
        name: value
        for name, value in vars(inside.outer(module)).items()
        if name not in usual and not isinstance(value, methods)
    }


@named
def set_script_attributes(
    module: torch.jit.ScriptModule, attributes: dict[str, dict[str, Any]]
) -> None:
    """Set the Python attributes of a script module and its submodules, by path."""
    parts: dict[str, torch.nn.Module] = dict(module.named_modules())
    for path, own in attributes.items():
        vars(parts[path]).update(own)


def _reduce_function(function: Any) -> Any:
    """Reduce a scripted or traced function as a module with it as its method.

    Raises `TypeError` if an argument has a default: torch's archive cannot keep it.
    """
    if any(argument.has_default_value() for argument in function.schema.arguments):
        raise TypeError(
            f"torch's archives cannot keep the argument defaults of {function.schema}: script a "
            "function without defaults, or a module"
        )
    archive, unit = function.save_to_buffer(), inside.CompilationUnit()
    cpu = torch.device("cpu")
    module = inside.import_module_from_buffer(unit, archive, cpu, {}, False)
    return script_function, (function.name, *_split(module))


@named
def script_function(name: str, *parts: Any) -> Any:
    """Unpickle a `ScriptFunction` from its name and the parts of a module."""
    (forward,) = inside.methods_of(_join(*parts))
    graph = forward.graph.copy()
    graph.eraseInput(0)  # self
    return inside.create_function_from_graph(name, graph)


def _reduce_exported(program: Any) -> Any:
    """Reduce an exported program to its graph, as `torch.export.save` writes it, and its tensors.

    Plain pickle loses the graph's metadata of each value, so that `.module()` raises `KeyError`
    after loading. (torch 2.15)
    """
    graph = inside.program_graph(program)
    return inside.exported_program, (
        graph,
        program.state_dict,
        program.constants,
        program.example_inputs,
    )


def plain(archive: bytes) -> bytes:
    """Normalise an archive for the digest: equal programs give equal bytes in every process.

    TorchScript writes constants in the order of a set, and a hash of the archive at its end. Its
    debug information names files. It numbers types of the same name in the order in which the
    process made them. Archives of other kinds stay as they are. (torch 2.15)
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        names = [name for name in file.namelist() if not name.endswith(_COUNTS_FOR_NOTHING)]
        if not any("/code/" in name for name in names):
            return archive
        members = {name: file.read(name) for name in names}
    data, code = [], []
    for name, text in members.items():
        scope = name.partition("/code/")[2].removesuffix(".py").replace("/", ".").encode()
        if scope:
            code.append(_DEFINED.sub(rb"\1 %b.\2" % scope, _in_order(text)))
        else:
            data.append(name.encode() + b"\n" + _GLOBAL.sub(rb"\1.\2\n", text))
    known: dict[bytes, dict[bytes, int]] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        bare = _NUMBER.sub(b"", found[0])
        same = known.setdefault(bare, {})
        return b"%b#%d" % (bare, same.setdefault(found[0], len(same)))

    data, code = ([_TYPE.sub(numbered, text) for text in texts] for texts in (data, code))
    return b"".join((*data, *sorted(code)))


_DEFINED = re.compile(rb"^(class|def) (\w+)", re.M)
_GLOBAL = re.compile(rb"c(__torch__[\w.]*)\n(\w+)\n")
_TYPE = re.compile(rb"__torch__(?:\.\w+)*")
_NUMBER = re.compile(rb"\.___torch_mangle_\d+")
_COUNTS_FOR_NOTHING = ("/serialization_id", ".debug_pkl")


def _in_order(code: bytes) -> bytes:
    """Sort the lines of each run of constants."""
    lines = code.splitlines(keepends=True)
    runs = itertools.groupby(lines, lambda line: b" : Final[" in line)
    return b"".join(b"".join(sorted(run) if final else run) for final, run in runs)
