"""Only one file names private parts of torch, and only one those of Ray.

An attribute with an underscore is private to another package if our package does not define it.
Names of Ray without one that only Ray itself uses are listed here.
"""

import ast
import functools
import re
from pathlib import Path

import pytest
import ray_zerocopy

PACKAGE = Path(ray_zerocopy.__file__).parent
RUST = Path(__file__).parent.parent / "rust"

# The files that may use private parts, by package.
INSIDE = {
    "torch": {"objects/torch_inside.py"},
    "ray": {"store/ray_inside.py"},
    "transformers": {"objects/transformers_inside.py"},
    "numpy": {"objects/arrays.py"},
    "copyreg": {"calls/replacement.py"},
}
INSIDE_RUST = {
    "python/sources.rs",
    "python/module.rs",
    "format/digest.rs",
}

OTHERS = {"_can_record_outputs": "transformers", "_CAN_RECORD_REGISTRY": "transformers"}
OTHERS |= {"_mmap": "numpy", "_serialize_to_pickle5": "ray", "_group_": "ray"}
OF_TORCH = {"_buffers", "_grad", "_modules", "_parameters", "_version"}  # in any package
OF_RAY = re.compile(
    r"ray\.(core|internal|worker|util\.client)\b|core_worker|global_worker|internal_kv_\w+"
    r"|get_serialization_context|put_serialized_object\w*|ObjectRef\.nil"
)


def private(name):
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


@functools.cache
def trees():
    paths = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in paths}


@functools.cache
def ours():
    """Every name that the package defines: in modules, in classes, and on `self`."""
    names = {"_core"}
    for node in (node for tree in trees().values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(ast.Name("self" | "cls"), name, ast.Store()):
                names.add(name)
    return names


def imported(tree):
    """The names that imports bind, with the dotted names they stand for."""
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    found[alias.asname or whole] = whole
            case ast.ImportFrom(module=str(module), names=names):
                found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
    return found


def dotted(node, names):
    """The dotted name of an attribute, from the import of its first part. None for a value."""
    match node:
        case ast.Name(name):
            return names.get(name)
        case ast.Attribute(value, attribute):
            start = dotted(value, names)
            return start and f"{start}.{attribute}"
    return None


def named(tree):
    """(package, name) of every private name in a file."""
    names = imported(tree)
    mentioned = [name for name in names.values() if "." in name]
    for node in ast.walk(tree):
        match node:
            case ast.Import(imports):
                mentioned += [alias.name for alias in imports if "." in alias.name]
            case ast.Attribute(ast.Name("self" | "cls"), name) if name in ours():
                pass
            case ast.Attribute(_, name):
                mentioned.append(dotted(node, names) or name)
            case ast.keyword(str(name)) | ast.Constant(str(name)) if private(name):
                mentioned.append(name)
    return {(whose, what) for what in mentioned if (whose := owner(what))}


def owner(what):
    """The package of a private name: the one imported, or torch, whose classes we inspect."""
    package, *rest = what.split(".")
    if OF_RAY.search(what):
        return "ray"
    if rest:
        return package if package in INSIDE and any(map(private, rest)) else None
    if not private(what) or (what in ours() - OF_TORCH):
        return None
    return OTHERS.get(what, "torch")


@pytest.mark.parametrize("path", trees())
def test_a_file_names_nothing_that_is_private_elsewhere(path):
    found = named(trees()[path])
    assert not {(whose, what) for whose, what in found if path not in INSIDE[whose]}


@pytest.mark.parametrize("path", sorted(RUST.rglob("*.rs")), ids=lambda path: path.stem)
def test_rust_names_no_private_attribute_elsewhere(path):
    names = re.findall(r'"(_[A-Za-z]\w*)"', path.read_text())
    assert bool(set(names) - ours()) == (str(path.relative_to(RUST)) in INSIDE_RUST)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch._C._set_neg", {"torch"}),
        ("from torch.nn.utils import parametrize as p\np._inject_new_class", {"torch"}),
        ("from torch._ops import OpOverload", {"torch"}),
        ("import torch._dynamo", {"torch"}),
        ("model._parameters", {"torch"}),
        ("vars(model)['_buffers']", {"torch"}),
        ("f(_internal=True)", {"torch"}),
        ("import ray._private.worker as w", {"ray"}),
        ("from ray import _raylet", {"ray"}),
        ("from ray.core.generated import common_pb2", {"ray"}),
        ("ray_worker.core_worker", {"ray"}),
        ("actor._actor_id", {"torch"}),  # or Ray, as far as can be seen
        ("import torch\ntorch.nn.Linear(3, 3).weight\nself.__dict__", set()),
        ("from ray_zerocopy import _core\n_core.Block", set()),
    ],
)
def test_the_scan_sees(code, found):
    assert {whose for whose, _ in named(ast.parse(code))} == found


@pytest.mark.parametrize("whose", INSIDE)
def test_who_may_does(whose):
    for path, tree in trees().items():
        if path in INSIDE[whose]:
            assert whose in {each for each, _ in named(tree)}, f"{path} needs it no more"
