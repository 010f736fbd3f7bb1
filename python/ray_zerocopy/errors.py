"""What ray-zerocopy raises and warns of; everything raised has one base class."""


class RayZeroCopyError(Exception):
    """Base of everything that ray-zerocopy raises."""


class PublishError(RayZeroCopyError):
    """An object cannot be published: a part of it, named by its path, does not pickle."""


class StoreFullError(RayZeroCopyError):
    """The object store has no room for a block."""


class SaveError(RayZeroCopyError, OSError):
    """A snapshot cannot be written: the disk is full, or its folder is not there."""


class ClientError(RayZeroCopyError):
    """Ray Client has no object store on its side, so there is nothing to share."""


class DeviceError(RayZeroCopyError, RuntimeError):
    """Tensors cannot lie on a device: there is none, or this process may not use it."""


class NotABlockError(RayZeroCopyError):
    """A reference does not hold what `put` stores."""


class BlockError(RayZeroCopyError, ValueError):
    """Bytes are wrong: a block, table or snapshot is damaged, truncated or another object's."""


class BaseLostError(RayZeroCopyError):
    """The object that has tensors of a variant is gone: lost, or its process has ended."""


class ResourceError(RayZeroCopyError):
    """A limit of this process or machine: memory, descriptors, threads, mappings. It is named."""


class VersionError(RayZeroCopyError, ImportError):
    """A torch, Ray or ray-zerocopy is older than what is asked of it, or than what it reads."""


class MismatchError(RayZeroCopyError, ValueError):
    """A skeleton and tensors that do not belong together."""


class InputError(RayZeroCopyError, ValueError):
    """A batch that a model cannot take: a column is missing, or of another kind or shape."""


class OutputError(RayZeroCopyError, ValueError):
    """A model's output that does not become columns: it has no row for each input row."""


class CatalogError(RayZeroCopyError):
    """The catalog of published models does not answer, or cannot do what was asked of it."""


class UnknownVersionError(RayZeroCopyError, LookupError):
    """Nothing is published under a name or number."""


class LostVersionError(RayZeroCopyError):
    """The block of a published version is gone, and could not be made again."""


class IsolationWarning(UserWarning):
    """Weights are not isolated as asked: a write in one process would be seen by others."""


class NoValuesWarning(UserWarning):
    """Some tensors of an object lie on the meta device: they are stored without values."""


class OnDiskWarning(UserWarning):
    """The object store has no room for a block, which lies on disk: loads read it from there."""


class StoredAgainWarning(UserWarning):
    """A model is stored anew by each call that takes it; `put` stores it once."""


class NotABlockWarning(UserWarning):
    """`enable` left an object to Ray's own pickle: `put` refuses it."""


class HostCopyWarning(UserWarning):
    """Tensors of another device travel through host memory and are loaded on the CPU."""
