"""What ray-zerocopy raises and warns of; everything raised has one base class."""


class RayZeroCopyError(Exception):
    """Base of everything that ray-zerocopy raises."""


class PublishError(RayZeroCopyError):
    """An object cannot be published: a part of it, named by its path, does not pickle."""


class StoreFullError(RayZeroCopyError):
    """The object store has no room for a block."""


class ClientError(RayZeroCopyError):
    """Ray Client has no object store on its side, so there is nothing to share."""


class NotABlockError(RayZeroCopyError):
    """A reference does not hold what `put` stores."""


class BlockError(RayZeroCopyError, ValueError):
    """A block or its table is damaged, truncated or another object's, or cannot be laid out."""


class MismatchError(RayZeroCopyError, ValueError):
    """A skeleton and tensors that do not belong together."""


class IsolationWarning(UserWarning):
    """Weights are not isolated as asked: a write in one process would be seen by others."""


class HostCopyWarning(UserWarning):
    """Tensors of another device travel through host memory and are loaded on the CPU."""
