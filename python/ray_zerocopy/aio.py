"""The blocking functions as coroutines: same arguments, each call runs in a thread.

>>> version = await rzc.aio.publish("bert", make=load_bert)
>>> live = await rzc.aio.follow("bert")         # live() never blocks: call it as it is
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from ray_zerocopy.registry import broadcast, follower, publication
from ray_zerocopy.store import references

__all__ = [
    *("follow", "get", "load", "prefetch", "promote", "publish", "published", "put", "retire"),
    "versions",
]

P = ParamSpec("P")
T = TypeVar("T")


def _awaitable(verb: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    @functools.wraps(verb)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(verb, *args, **kwargs)

    return call


put = _awaitable(references.put)
get = _awaitable(references.get)
publish = _awaitable(publication.publish)
load = _awaitable(publication.load)
follow = _awaitable(follower.follow)
versions = _awaitable(publication.versions)
published = _awaitable(publication.published)
promote = _awaitable(publication.promote)
retire = _awaitable(publication.retire)
prefetch = _awaitable(broadcast.prefetch)
