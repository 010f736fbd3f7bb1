"""Tensors of every dtype and every odd layout, by name; a factory gives one, or a list of them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.case import entry, seeded

LAYOUTS: dict[str, Callable[[], Any]] = {}
_layout = entry(LAYOUTS)

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def _random_bytes(dtype) -> torch.Tensor:
    """64 random bytes as a tensor of `dtype`, NaNs and all; quantised ones in two rows."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (64,), dtype=torch.uint8)
    if not str(dtype).startswith(("torch.qint", "torch.quint")):
        return raw.view(dtype)
    shape = [2, 32 // dtype.itemsize]
    tensor = torch._empty_affine_quantized(shape, scale=0.25, zero_point=3, dtype=dtype)
    storage = tensor.untyped_storage()
    storage.copy_(raw.untyped_storage()[: storage.nbytes()])  # sub-byte ones take fewer than 64
    return tensor


for _dtype in DTYPES:
    LAYOUTS[str(_dtype).removeprefix("torch.")] = seeded(functools.partial(_random_bytes, _dtype))


@_layout
def channels_last_tensor():
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


@_layout
def transposed():
    return torch.randn(4, 6).t()


@_layout
def expanded():
    return torch.randn(3, 1).expand(3, 1000)


@_layout
def overlapping():
    return torch.randn(40).as_strided((6, 8), (2, 1), 3)


@_layout
def scalar():
    return torch.tensor(3.5, dtype=torch.float64)


@_layout
def empty():
    return torch.empty(0)


@_layout
def empty_with_strides():
    return torch.empty_strided((3, 0, 2), (7, 5, 1))


@_layout
def empty_slice():
    return torch.randn(10)[4:4]


@_layout
def strides_that_lead_nowhere():
    return [torch.randn(5).as_strided((1, 5), (2**40, 1)), torch.empty_strided((0, 3), (2**40, 1))]


@_layout
def slice_of_huge():
    return torch.randn(1_000_000)[500_000:500_010]


@_layout
def slices_of_one():
    base = torch.randn(100)
    return [base[10:20], base[15:25], base[90:], base, base[10:20]]


@_layout
def far_slices_of_one():
    base = torch.randn(1_000_000)
    return [base[:10], base[-10:]]


@_layout
def odd_byte_offset():
    return torch.arange(64, dtype=torch.uint8)[3:40]


@_layout
def two_dtypes_one_storage():
    base = torch.randn(16)
    return [base, base.view(torch.int32), base.view(torch.uint8)[5:9]]


@_layout
def conj_view():
    return torch.randn(5, dtype=torch.complex64).conj()


@_layout
def neg_view():
    return torch.randn(5, dtype=torch.complex64).conj().imag


@_layout
def conj_and_neg_view():
    return torch.randn(5, dtype=torch.complex64).conj()._neg_view()


@_layout
def requires_grad():
    return torch.randn(5, requires_grad=True)


def _masked():
    return torch.randn(8, 8) * (torch.rand(8, 8) > 0.6)


@_layout
def sparse_coo():
    return _masked().to_sparse()


@_layout
def sparse_coo_uncoalesced():
    return torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.randn(3), (4,))


@_layout
def sparse_with_grad():
    return [_masked().to_sparse().requires_grad_(), _masked().to_sparse_csr().requires_grad_()]


@_layout
def sparse_over_dense():
    values = torch.randn(3)
    return [values, torch.sparse_coo_tensor(torch.tensor([[0, 1, 3]]), values, (4,))]


@_layout
def sparse_csr():
    return _masked().to_sparse_csr()


@_layout
def sparse_csc():
    return _masked().to_sparse_csc()


@_layout
def sparse_bsr():
    return _masked().to_sparse_bsr((2, 2))


@_layout
def sparse_bsc():
    return _masked().to_sparse_bsc((2, 2))


@_layout
def nested():
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])


@_layout
def nested_jagged():
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)


@_layout
def quantized_per_tensor():
    return torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 10, torch.quint8).t()


@_layout
def quantized_per_channel():
    scales, zeros = torch.rand(4, dtype=torch.float64) + 0.1, torch.tensor([0, 1, 2, 3])
    return torch.quantize_per_channel(torch.randn(4, 6), scales, zeros, 0, torch.qint8)


@_layout
def quantized_views():
    base = torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 10, torch.quint8)
    return [base, base[2:], base]


class PlainSubclass(torch.Tensor):
    """A tensor subclass with nothing of its own."""


@_layout
def subclass():
    tensor = torch.randn(4).as_subclass(PlainSubclass)
    tensor.unit = "metre"
    return tensor


@_layout
def subclass_parameter():
    return nn.Parameter(torch.randn(4).as_subclass(PlainSubclass))


class StatefulSubclass(torch.Tensor):
    """It makes one of its attributes from its state."""

    def __getstate__(self):
        return self.unit

    def __setstate__(self, unit):
        self.unit, self.plural = unit, f"{unit}s"


@_layout
def subclass_with_setstate():
    tensor = torch.randn(2, 3).as_subclass(StatefulSubclass)
    tensor.unit, tensor.plural = "metre", "metres"
    return tensor


class FunctionSubclass(torch.Tensor):
    """Counts the torch functions called on it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.calls = getattr(args[0], "calls", 0) + 1
        return result


@_layout
def subclass_torch_function():
    return torch.randn(4).as_subclass(FunctionSubclass)


class ScaledTensor(torch.Tensor):
    """A wrapper subclass: int8 values and a scale, no storage of its own."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    def __repr__(self):
        return f"ScaledTensor({self.values!r}, {self.scale!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [a.values * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


@_layout
def subclass_torch_dispatch():
    return ScaledTensor(torch.randint(-128, 127, (3, 4), dtype=torch.int8), torch.rand(3, 1))


@_layout
def subclass_torch_dispatch_parameter():
    tensor = subclass_torch_dispatch()
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(tensor)
    return layer


@_layout
def meta():
    return torch.empty(3, 4, device="meta").t()


@_layout
def padded_rows():
    return nn.functional.pad(torch.randn(5, 7), (0, 1))[:, :7]
