"""Errors and warnings of ray-zerocopy."""


class RayZeroCopyError(Exception):
    """Base class of all errors of ray-zerocopy."""


class PublishError(RayZeroCopyError):
    """An object cannot be stored: a part of it does not pickle. The message gives its path."""


class StoreFullError(RayZeroCopyError):
    """The object store has no room for a block."""


class SaveError(RayZeroCopyError, OSError):
    """A snapshot cannot be written: the disk is full, or the folder does not exist."""


class ClientError(RayZeroCopyError):
    """A Ray Client cannot share models: it has no local object store."""


class DeviceError(RayZeroCopyError, RuntimeError):
    """A device does not exist, or this process may not use it."""


class NotABlockError(RayZeroCopyError):
    """A reference points to an object that `put` has not stored."""


class BlockError(RayZeroCopyError, ValueError):
    """A block, table or snapshot is damaged, truncated or belongs to another object."""


class BaseLostError(RayZeroCopyError):
    """A base of a variant is gone: the object was lost, or the process that owns it has ended."""


class ResourceError(RayZeroCopyError):
    """A limit of this process or machine: memory, descriptors, threads or mappings."""


class VersionError(RayZeroCopyError, ImportError):
    """The installed torch, Ray or ray-zerocopy is too old for the call or for the stored object."""


class MismatchError(RayZeroCopyError, ValueError):
    """A skeleton and tensors come from different models."""


class InputError(RayZeroCopyError, ValueError):
    """A batch does not fit the model: a column is missing, or has another type or shape."""


class OutputError(RayZeroCopyError, ValueError):
    """A model's output does not become columns: it does not have one row per input row."""


class CatalogError(RayZeroCopyError):
    """The catalog of published models does not answer, or cannot carry out a request."""


class UnknownVersionError(RayZeroCopyError, LookupError):
    """No version is published under this name or number."""


class LostVersionError(RayZeroCopyError):
    """The block of a published version is gone and could not be rebuilt."""


class IsolationWarning(UserWarning):
    """Loaded without copy-on-write: a write in one process changes the weights of others."""


class NoValuesWarning(UserWarning):
    """Some tensors of an object are stored without values: they are on the meta device."""


class OnDiskWarning(UserWarning):
    """The object store had no room for a block: Ray keeps it on disk, and loads read that file."""


class SnapshotWarning(UserWarning):
    """A published version's snapshot lies in another file than the one asked for."""


class StoredAgainWarning(UserWarning):
    """Each call that takes this model stores it again; `put` stores it once."""


class NotABlockWarning(UserWarning):
    """`enable` cannot store an object as a block; Ray stores it with its own pickle."""


class HostCopyWarning(UserWarning):
    """Tensors on another device are copied through host memory and load on the CPU."""
