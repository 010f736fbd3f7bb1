"""The ways people share a model between Ray workers, each behind the same four verbs.

    prepare(model) -> ready      not timed
    publish(ready) -> handle     once, in the process that has the model
    load(handle)   -> model      in every worker; a handle holds ObjectRefs and is passed in a list
    withdraw(handle)             frees what Ray's reference counting does not

Every rival loads in the fastest way that its documentation gives.
"""

import copy
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
import torch
from torch import nn

ALIGN = 64
FILES = Path("/dev/shm")  # files in memory: the best case for rivals that load files


class Rival:
    """One way to share a model. `loses` says what it does not preserve."""

    name: str
    loses: str
    needs: tuple[str, ...] = ()
    """The modules that a load imports."""

    def prepare(self, model):
        return model

    def publish(self, ready):
        raise NotImplementedError

    def load(self, handle):
        raise NotImplementedError

    def withdraw(self, handle):
        """Delete files. Objects are freed with their last reference."""


class Floor(Rival):
    """Not a model: one array in the store, and for each tensor a bare Parameter over it."""

    name = "floor"
    loses = "everything but the weights: it returns a list of Parameters"

    def prepare(self, model):
        tensors = [*model.parameters(), *model.buffers()]
        offsets = np.cumsum([0] + [-(-t.nbytes // ALIGN) * ALIGN for t in tensors]).tolist()
        flat = np.zeros(offsets[-1], np.uint8)
        spans = []
        for offset, tensor in zip(offsets, tensors, strict=False):
            plain = tensor.detach().contiguous()
            flat[offset : offset + plain.nbytes] = plain.reshape(-1).view(torch.uint8).numpy()
            # numpy has no bfloat16: use an integer of the same width
            via = torch.int16 if plain.dtype == torch.bfloat16 else plain.dtype
            dtype = plain.view(via).numpy().dtype
            retype = None if via == plain.dtype else plain.dtype
            spans.append((offset, tuple(plain.shape), dtype, retype, tensor.requires_grad))
        return flat, spans

    def publish(self, ready):
        flat, spans = ready
        return ray.put(flat), spans

    def load(self, handle):
        ref, spans = handle
        flat = ray.get(ref)
        parameters = []
        for offset, shape, dtype, retype, requires_grad in spans:
            tensor = torch.from_numpy(np.ndarray(shape, dtype, flat, offset))
            if retype is not None:
                tensor = tensor.view(retype)
            parameters.append(nn.Parameter(tensor, requires_grad))
        return parameters


class Ours(Rival):
    name = "ray_zerocopy"
    loses = "nothing that pickle keeps, as far as known"
    needs = ("ray_zerocopy",)

    def publish(self, ready):
        import ray_zerocopy as rzc

        return rzc.put(ready)

    def load(self, handle):
        return ray.get(handle)


class Opened(Ours):
    """A snapshot, which needs no Ray."""

    name = "ray_zerocopy, open"
    needs = ("ray_zerocopy.store.opening",)

    def publish(self, ready):
        import ray_zerocopy as rzc

        path = new_file(".rzc")
        rzc.save(ready, path)
        return path

    def load(self, handle):
        import ray_zerocopy as rzc

        return rzc.open(handle)

    def withdraw(self, handle):
        handle.unlink()


class Enabled(Ours):
    """`ray.put` after `enable`."""

    name = "ray_zerocopy, enable"

    def publish(self, ready):
        import ray_zerocopy as rzc

        rzc.enable()
        try:
            return ray.put(ready)
        finally:
            rzc.disable()


class NotPrefaulted(Ours):
    name = "ray_zerocopy, prefault=False"

    def load(self, handle):
        import ray_zerocopy as rzc

        return rzc.get(handle, prefault=False)


class PlainWay(Ours):
    """The fallback code: a torch older than 2.10, and a Ray whose private parts are unknown."""

    name = "ray_zerocopy, portable path"

    def publish(self, ready):
        with plain_way():
            return super().publish(ready)

    def load(self, handle):
        with plain_way():
            return super().load(handle)


@contextmanager
def plain_way():
    from ray_zerocopy.objects import tensors
    from ray_zerocopy.store import ray_inside

    best = tensors.way, ray_inside.way
    tensors.way, ray_inside.way = "from_numpy", "ray.put"
    try:
        yield
    finally:
        tensors.way, ray_inside.way = best


class PlainRay(Rival):
    name = "Ray"
    loses = "memory (each worker has a private copy) and shared storages"

    def publish(self, ready):
        return ray.put(ready)

    def load(self, handle):
        return ray.get(handle)


class RayFlag(Rival):
    """Ray started with RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1.

    The flag only registers a reducer for `torch.Tensor` when a worker starts. Registering it around
    the put gives the same bytes, in a session without the flag.
    """

    name = "Ray's flag"
    loses = "isolation, strides and shared storages"
    needs = ("ray._private.tensor_serialization_utils",)

    def publish(self, ready):
        with ray_flag_on():
            return ray.put(ready)

    def load(self, handle):
        return ray.get(handle)


@contextmanager
def ray_flag_on():
    from ray._private import tensor_serialization_utils as flag

    context = ray._private.worker.global_worker.get_serialization_context()
    context._register_cloudpickle_reducer(torch.Tensor, flag.zero_copy_tensors_reducer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", flag.ZeroCopyTensorsWarning)
            yield
    finally:
        context._unregister_cloudpickle_reducer(torch.Tensor)


class ZeroCopy(Rival):
    """IBM's package of 2022, `pip install zerocopy`."""

    name = "zerocopy"
    loses = "isolation, ties, shared storages, autograd and flags, and refuses bfloat16"
    needs = ("zerocopy",)

    def publish(self, ready):
        import zerocopy

        return ray.put(zerocopy.extract_tensors(ready))

    def load(self, handle):
        import zerocopy

        skeleton, tensors = ray.get(handle)
        zerocopy.replace_tensors(skeleton, tensors)
        return skeleton


class TorchMmap(Rival):
    name = "torch.load(mmap)"
    loses = "other nodes: someone must place the file on each node, and remove it"

    def publish(self, ready):
        path = new_file(".pt")
        torch.save(ready, path)
        return path

    def load(self, handle):
        return torch.load(handle, mmap=True, weights_only=False)

    def withdraw(self, handle):
        handle.unlink()


class Safetensors(Rival):
    """The weights in a safetensors file; the model without weights (on `meta`) in the store.

    `safetensors.torch.load_model` would copy; `assign=True` uses the mapped tensors.
    """

    name = "safetensors"
    loses = "other nodes (a file, too), ties, strides and shared storages"
    needs = ("safetensors.torch",)

    def publish(self, ready):
        from safetensors.torch import save_model

        path = new_file(".safetensors")
        save_model(ready, str(path))
        state = ready.state_dict(keep_vars=True)
        return ray.put(without_weights(ready, state)), path, aliases(state)

    def load(self, handle):
        from safetensors.torch import load_file

        skeleton, path, tied = ray.get(handle[0]), *handle[1:]
        state = load_file(path)
        for names in tied:
            kept = next(state[name] for name in names if name in state)
            state |= dict.fromkeys(names, kept)
        skeleton.load_state_dict(state, assign=True)
        return skeleton

    def withdraw(self, handle):
        handle[1].unlink()


def without_weights(model, state):
    """A copy of the model whose tensors in `state` are on `meta`. Copies no weight."""
    on_meta = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in state.values()
    }
    return copy.deepcopy(model, on_meta)


def aliases(state):
    """Groups of names that refer to the same tensor in the state dict."""
    names = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def new_file(suffix):
    return FILES / f"ray-zerocopy-bench-{uuid.uuid4().hex}{suffix}"


RIVALS = (PlainRay(), RayFlag(), ZeroCopy(), TorchMmap(), Safetensors())
CONTENDERS = (Floor(), Ours(), *RIVALS)
