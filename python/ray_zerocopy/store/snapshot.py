"""Snapshots: an object as a file, saved from the store and restored into it.

ref or object ─ save ─▶ head + block ═ file ═▶ restore ─▶ room in the store ─▶ ref

The head has the skeleton and the table; docs/reference/format.md has the format. `restore` compares
each span with its checksum as it reads it.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import ray
from tqdm import tqdm

from ray_zerocopy import _core, metrics
from ray_zerocopy.errors import BlockError, PublishError, SaveError
from ray_zerocopy.store import ray_inside, references
from ray_zerocopy.store.description import Info, describe_file
from ray_zerocopy.store.envelope import Parts, anchor, reading, references_in, without

if TYPE_CHECKING:
    from ray_zerocopy.store.references import Base

# Bytes per read and write of a file.
_CHUNK_NBYTES = 8 * 2**20

Path = str | os.PathLike[str]


def save(obj: Any, path: Path) -> None:
    """Write an object, or the object behind a reference, to one file: a snapshot.

    The file appears under its name only when complete and synced. A stored object is written from
    the store without loading it; any other object is not put into the store. With `fsspec`
    installed, `path` may be a URL such as `s3://`, `gs://` or `memory://`.

    Raises:
        PublishError: the object does not pickle, or holds an ObjectRef or an actor, which end with
            their cluster; the message gives the path to it.
        SaveError: the file cannot be written, for example because the disk is full.
        NotABlockError: the reference does not come from `put`.
        BlockError: the block in the store is damaged.

    """
    stored = isinstance(obj, ray.ObjectRef)
    saved = references.parts_of(obj) if stored else Parts.of(obj)
    if ray_inside.holds_references(saved.skeleton):
        held = references_in(references.get(obj) if stored else obj)
        raise PublishError(
            f"{held} cannot be saved: references and actors end with their cluster; remove it"
        )
    if stored:
        references.describe(obj, verify=True)
    with _writing(os.fspath(path)) as file:
        for chunk in _progress(_chunks(saved), saved.nbytes, "save"):
            file.write(chunk)


def restore(path: Path, *, base: Base | Sequence[Base] | None = None) -> ray.ObjectRef:
    """Store the object of a snapshot as `put` would, at the speed of the disk.

    Several threads read the file directly into the store, and compare each span with its checksum.
    With `fsspec` installed, `path` may be a URL, which is read as a stream.

    Processes that load the object unpickle it: as with any pickle, load only files you trust.
    `inspect(path)` unpickles nothing.

    Args:
        path: a file that `save` wrote.
        base: as for `put`: tensors whose bytes are in a base are not stored again. To compare them,
            `restore` reads the file into memory of this process first.

    Raises:
        BlockError: the file is damaged, truncated or not a snapshot; the message names the span and
            its tensor. Nothing is left in the store.
        BaseLostError, NotABlockError, UnknownVersionError: about bases, as from `put`.
        StoreFullError: the store has no room; the message gives the bytes it takes.
        ClientError: this process is a Ray Client, which has no local object store.

    """
    references.refuse_client()
    path, bases = os.fspath(path), references.bases_of(base)
    with opened(path) as file:
        snapshot = _head(file)
        fill = partial(_fill, snapshot, path, file)
        head, start = (snapshot.skeleton, snapshot.buffers), bytes(_core.HEADER_NBYTES)

        def in_memory() -> Any:
            memory = np.empty(snapshot.nbytes, np.uint8)
            fill(memory, memory)
            return memory

        if not bases:
            stored = Parts(*head, snapshot.table, [start], anchored=True)
            return _stored(stored, snapshot.nbytes, path, fill, lambda: [in_memory()])
        block = _core.Block(snapshot.table, [in_memory()], "shared")
        whole = _core.Gather.of_blocks([(block, range(block.view_count))])
        own, numbers, held = without(whole, bases)
        stored = Parts(*head, own.table, [start], True, numbers, held)
        return _stored(stored, own.nbytes, path, own.write, own.segments)


def _stored(
    parts: Parts,
    nbytes: int,
    path: str,
    fill: Callable[[Any, Any], None],
    segments: Callable[[], list[Any]],
) -> ray.ObjectRef:
    """Store an object: `fill` writes its block, or Ray the `segments`, if it makes no room."""
    with references.telling_if_full(lambda: len(parts.skeleton) + nbytes, path):
        placed = ray_inside.put(parts, lambda: nbytes, reading(anchor))
        if placed is None:
            head = parts.skeleton, parts.buffers, parts.table
            return ray.put(Parts(*head, segments(), False, parts.numbers, parts.bases))
    fill(placed.start, placed.memory)
    references.warn_if_on_disk(placed.start, nbytes, path)
    metrics.record("rzc_published_bytes", nbytes)
    return placed.ref


def describe(path: Path, *, verify: bool = False) -> Info:
    """Describe a snapshot without unpickling it; `verify` reads the whole file."""
    with opened(os.fspath(path)) as file:
        snapshot = _head(file)

        def read(offset: int, nbytes: int) -> bytes:
            file.seek(snapshot.offset + offset)
            return file.read(nbytes)

        if verify:
            snapshot.verify(read)
        checksums = snapshot.checksums(read(0, snapshot.start_nbytes))
        return describe_file(snapshot, os.fspath(path), checksums, verify)


def digest(path: Path) -> str:
    """Return the digest of a snapshot's object; reads only the bytes before its weights."""
    with opened(os.fspath(path)) as file:
        snapshot = _head(file)
        file.seek(snapshot.offset)
        start = file.read(snapshot.start_nbytes)
        return Parts(snapshot.skeleton, snapshot.buffers, snapshot.table, [start]).digest()


def absolute(path: Path) -> str:
    """Return a path or URL that means the same in every process."""
    path = os.fspath(path)
    return path if _is_url(path) else os.path.abspath(path)


def move(path: str, there: str) -> None:
    """Rename a snapshot, and replace a file of that name; raises `SaveError`."""
    try:
        if not _is_url(path):
            os.replace(path, there)
            return
        import fsspec  # noqa: PLC0415 - where it is installed

        system, name = fsspec.core.url_to_fs(path)
        system.mv(name, fsspec.core.url_to_fs(there)[1])
    except OSError as error:
        raise SaveError(f"{there} cannot be written: {error}") from error


def remove(path: str) -> None:
    """Remove a snapshot, if it exists."""
    with contextlib.suppress(OSError):
        if not _is_url(path):
            os.unlink(path)
            return
        import fsspec  # noqa: PLC0415 - where it is installed

        system, name = fsspec.core.url_to_fs(path)
        system.rm(name)


def _head(file: BinaryIO) -> _core.Snapshot:
    """Read the bytes before the block; never more than the file has, whatever its header says."""
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_core.SNAPSHOT_HEADER_NBYTES)
    needed = _core.snapshot_head_nbytes(start)
    if needed > nbytes:
        raise BlockError(f"snapshot is truncated: {nbytes:,} bytes, its block starts at {needed:,}")
    return _core.Snapshot(start + file.read(needed - len(start)), nbytes)


def _fill(snapshot: _core.Snapshot, path: str, file: BinaryIO, start: Any, memory: Any) -> None:
    """Read the block to the address of `start`; raises `BlockError` if its checksums differ."""
    if not _is_url(path):
        return snapshot.read(file.fileno(), path, start, memory)
    address = np.frombuffer(start, np.uint8).ctypes.data
    at = address - np.frombuffer(memory, np.uint8).ctypes.data
    block = memoryview(memory)[at : at + snapshot.nbytes].cast("B")
    file.seek(snapshot.offset)
    ends = range(_CHUNK_NBYTES, snapshot.nbytes + _CHUNK_NBYTES, _CHUNK_NBYTES)
    chunks = (block[end - _CHUNK_NBYTES : end] for end in ends)
    for chunk in _progress(chunks, snapshot.nbytes, "restore"):
        while chunk and (nbytes := file.readinto(chunk)):  # type: ignore[attr-defined]
            chunk = chunk[nbytes:]
    snapshot.check(start, memory)
    return None


def _chunks(saved: Parts) -> Iterator[Any]:
    """Yield the bytes of the file in order, in bounded chunks."""
    yield _core.snapshot_head(saved.skeleton, saved.table, saved.buffers)
    end = 0
    for segment in saved.segments:
        yield bytes(-end % 64)
        for start in range(0, segment.nbytes, _CHUNK_NBYTES):
            yield segment[start : start + _CHUNK_NBYTES]
        end += -end % 64 + segment.nbytes


def _progress(chunks: Iterator[Any], nbytes: int, what: str) -> Iterator[Any]:
    """Yield the chunks; on a terminal, show a progress bar after one second."""
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc=what, delay=1, disable=None) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _is_url(path: str) -> bool:
    return "://" in path


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a snapshot; add its path to any `BlockError`."""
    try:
        with _open(path) as file:
            yield file
    except BlockError as error:
        raise BlockError(f"{path}: {error}") from error


def _open(path: str) -> Any:
    if not _is_url(path):
        return open(path, "rb")
    import fsspec  # noqa: PLC0415 - where it is installed

    return fsspec.open(path, "rb")


@contextlib.contextmanager
def _writing(path: str) -> Iterator[Any]:
    """Write atomically: the file appears under its name only when complete and synced."""
    try:
        if _is_url(path):
            import fsspec  # noqa: PLC0415 - where it is installed

            system, name = fsspec.core.url_to_fs(path)
            with system.transaction, system.open(name, "wb") as file:
                yield file
            return
        target = os.path.realpath(path)  # keep a symbolic link, replace its target
        folder, name = os.path.split(target)
        with open(os.path.join(folder, f".{name}.{uuid.uuid4().hex}"), "xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # sync the name as well
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error}") from error
