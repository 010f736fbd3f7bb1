"""The description of a stored object that `inspect` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ray_zerocopy import _core
from ray_zerocopy.objects import tensors
from ray_zerocopy.objects.skeleton import unshared_nbytes
from ray_zerocopy.store import ray_inside


@dataclass(frozen=True)
class TensorInfo:
    """One view of a block; shape, stride and offset in elements, offset from its span's start."""

    span: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Info:
    """The contents of a stored object, and how this process maps it."""

    nbytes: int
    """Size of the block in bytes."""
    padding: int
    """Bytes of the block outside its spans: header, checksums and alignment."""
    skeleton_nbytes: int
    """Size of the skeleton in bytes: the object minus its tensors."""
    unshared_nbytes: int
    """Bytes of data in the skeleton, which each load copies: weights that an object's
    `__getstate__` packs into `bytes`, as in skorch."""
    spans: list[tuple[int, int]]
    """Offset and bytes of each storage in its block."""
    checksums: list[int]
    """XXH3 of each span, from when it was written."""
    tensors: list[TensorInfo]
    """The views of the spans."""
    where: str
    """`"store"` (shared memory), `"disk"` (Ray's fallback), `"inline"` (in Ray's message), or
    `"file"` (a snapshot)."""
    file: str | None
    """The store's file, as the kernel names it, or the snapshot."""
    inode: int | None
    """Its inode: the same in every process that shares the block."""
    offset: int | None
    """Offset of the block in the file, in bytes."""
    huge_nbytes: int | None
    """Bytes in huge pages of 2 MiB; None if unknown: before Linux 6.7, or pages not private."""
    held: str
    """`"private"` or `"shared"` pages of the store, `"copied"` into private memory, or
    `"not at all"` (a snapshot)."""
    fallback: str | None
    """Why the pages are not private, if they are not."""
    ways: dict[str, str]
    """The code paths in use in this process: see `ways()`."""
    verified: bool = False
    """Whether every byte was compared with the checksums."""
    base_nbytes: int = 0
    """Bytes of a variant's storages that are in blocks of its bases."""
    blocks: list[int] = field(default_factory=list)
    """Block of each storage of a variant: 0 is its own, 1 that of its first base."""

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype."""
        names = [tensor.dtype for tensor in self.tensors]
        return {name: names.count(name) for name in sorted(set(names))}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {name}" for name, count in self.dtypes.items())
        unshared = f", {self.unshared_nbytes:,} of them copied by each load"
        copied = unshared if self.unshared_nbytes else ""
        lines = [
            f"{len(self.tensors)} tensors ({dtypes}) over {len(self.spans)} storages"
            + (f", {self.base_nbytes:,} bytes of them in its base" if self.base_nbytes else ""),
            f"block of {self.nbytes:,} bytes, {self.padding:,} of them padding; "
            f"skeleton of {self.skeleton_nbytes:,}{copied}",
            f"in {self.where}" + (f": {self.file} at byte {self.offset:,}" if self.file else ""),
        ]
        if self.where != "file":
            huge = self.huge_nbytes
            lines += [
                f"held {self.held}"
                + (f", {huge:,} bytes in huge pages" if huge is not None else "")
                + (f": {self.fallback}" if self.fallback else ""),
                "views by {views}, put by {put}, enable is {enable}".format_map(self.ways),
            ]
        if self.verified:
            lines.append("verified: every byte is as it was written")
        return "\n".join(lines)


def ways() -> dict[str, str]:
    """Return the code paths in use in this process; they depend on its torch and Ray.

    `"views"` is `"dlpack"`, or the slower `"from_numpy"`; `"put"` is `"room"`, or the slower
    `"ray.put"`; `"enable"` is `"on"` or `"off"`.
    """
    enabled = "on" if ray_inside.is_hooked() else "off"
    return {"views": tensors.way, "put": ray_inside.way, "enable": enabled}


def describe(
    blocks: Sequence[tuple[_core.Block, Sequence[int]]], skeleton: bytes, verify: bool = False
) -> Info:
    """Describe blocks as this process maps them: an object's own and those of its bases.

    `verify` raises `BlockError` on damage.
    """
    if verify:
        for block, _ in blocks:
            block.verify()
    block = blocks[0][0]
    nbytes, own_nbytes = memoryview(block).nbytes, sum(nbytes for _, nbytes in block.spans)
    file, inode, offset = block.source or (None, None, None)
    spans, sums, of, tensors = list(block.spans), list(block.checksums), [0] * len(block.spans), {}
    for number, tensor in zip(blocks[0][1], _tensors(block), strict=True):
        tensors[number] = tensor
    for index, (base, numbers) in enumerate(blocks[1:], 1):
        its_spans, its_sums, places = base.spans, base.checksums, {}
        for number, tensor in zip(numbers, _tensors(base), strict=True):
            if tensor.span not in places:
                places[tensor.span] = len(spans)
                spans.append(its_spans[tensor.span])
                sums.append(its_sums[tensor.span])
                of.append(index)
            tensors[number] = replace(tensor, span=places[tensor.span])
    return Info(
        nbytes=nbytes,
        padding=nbytes - own_nbytes,
        skeleton_nbytes=len(skeleton),
        unshared_nbytes=unshared_nbytes(skeleton),
        spans=spans,
        checksums=sums,
        tensors=[tensors[number] for number in range(len(tensors))],
        where=_where(file),
        file=file,
        inode=inode,
        offset=offset,
        huge_nbytes=block.huge_nbytes(),
        held=block.held,
        fallback=block.fallback,
        ways=ways(),
        verified=verify,
        base_nbytes=sum(nbytes for _, nbytes in spans) - own_nbytes,
        blocks=of if len(blocks) > 1 else [],
    )


def describe_file(
    snapshot: _core.Snapshot, path: str, checksums: list[int], verified: bool
) -> Info:
    """Describe a snapshot from the bytes before its block."""
    return Info(
        nbytes=snapshot.nbytes,
        padding=snapshot.nbytes - sum(nbytes for _, nbytes in snapshot.spans),
        skeleton_nbytes=len(snapshot.skeleton),
        unshared_nbytes=unshared_nbytes(snapshot.skeleton),
        spans=snapshot.spans,
        checksums=checksums,
        tensors=_tensors(snapshot),
        where="file",
        file=path,
        inode=None,
        offset=snapshot.offset,
        huge_nbytes=None,
        held="not at all",
        fallback=None,
        ways=ways(),
        verified=verified,
    )


def _tensors(block: _core.Block | _core.Snapshot) -> list[TensorInfo]:
    return [
        TensorInfo(span, dtype, shape, stride, offset)
        for span, dtype, _, offset, shape, stride in block.views
    ]


def _where(file: str | None) -> str:
    if file is None:
        return "inline"
    return "store" if ray_inside.is_store(file) else "disk"
