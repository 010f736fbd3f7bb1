"""Find the part of an object graph that cannot be stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ray_zerocopy import _core
from ray_zerocopy.objects.skeleton import split
from ray_zerocopy.objects.torch_inside import REGISTRIES


def culprit(obj: object, accepts: Callable[[bytes], bool] = bool) -> str:
    """Return the path to the innermost part of an object graph that cannot be stored.

    `accepts` can reject further parts by their skeleton.
    """
    path, seen = type(obj).__name__, set()
    while id(obj) not in seen:
        seen.add(id(obj))
        for step, part in _parts_of(obj):
            if id(part) not in seen and not can_be_published(part, accepts):
                path, obj = path + step, part
                break
    return f"{path} ({type(obj).__name__})"


def way_out(reason: str) -> str:
    """Return advice for an object that does not pickle for this reason, if we know any."""
    if "ConfigModuleInstance" in reason:  # torch's settings, in a function of dynamo's (torch 2.15)
        return (
            ": torch compiled it, or made its guards, for this process only; store the module or "
            "exported program it came from, and compile it, or call `.module()`, when loaded"
        )
    return ""


def paths_to(obj: object, wanted: Callable[[object], bool]) -> Iterator[str]:
    """Yield the paths to all parts of an object graph that are `wanted`."""
    waiting, seen = [(type(obj).__name__, obj)], set()
    while waiting:
        path, obj = waiting.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if wanted(obj):
            yield path
        waiting += reversed([(path + step, part) for step, part in _parts_of(obj)])


def can_be_published(obj: object, accepts: Callable[[bytes], bool] = bool) -> bool:
    """Whether an object can be split, and `accepts` returns True for its skeleton."""
    try:
        parts = split(obj)
        _core.Gather(parts.sources)  # plans the block
    except Exception:
        return False
    return accepts(parts.skeleton)


def _parts_of(obj: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of an object, each with its accessor, such as `.name` or `[0]`."""
    if isinstance(obj, dict):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, list | tuple | set | frozenset):
        yield from ((f"[{index}]", value) for index, value in enumerate(obj))
    else:
        attributes = dict(getattr(obj, "__dict__", {}))
        if isinstance(obj, torch.nn.Module):
            for registry in REGISTRIES:
                attributes |= attributes.pop(registry, {})
        yield from ((f".{name}", value) for name, value in attributes.items())
