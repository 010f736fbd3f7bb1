"""NumPy's arrays on a module: of any class, order and dtype, and mapped from a file."""

import tempfile
from collections.abc import Callable

import numpy as np
import torch

from models.case import Case, entry
from models.difficult.modules import Holder

TABLE: dict[str, Callable[[], Case]] = {}
_difficult = entry(TABLE)


@_difficult
def numpy_attributes():
    rng = np.random.default_rng(0)
    model = Holder(
        small=rng.random(8, np.float32), large=rng.random((500, 500)), scalar=np.float64(0.1)
    )
    model.record = np.array([(1, 2.5)], dtype=[("index", "i4"), ("value", "f8")])
    model.fortran, model.strided = np.asfortranarray(rng.random((90, 80))), rng.random(9000)[::3]
    model.objects, model.alias = np.array([None, "a", 1.5], dtype=object), model.large
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) + torch.tensor(m.small))


class Measured(np.ndarray):
    """An array that knows its unit, as numpy's guide to subclassing has it."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", None)


@_difficult
def array_subclasses():
    rng = np.random.default_rng(0)
    model = Holder(
        matrix=rng.random((90, 80)).view(np.matrix),
        masked=np.ma.masked_less(rng.random((90, 80)), 0.5),
        record=np.rec.fromarrays([rng.random(900), np.arange(900)], names="value,index"),
        small=np.ones(3).view(Measured),
        large=rng.random((30, 40, 50)).transpose(2, 0, 1).view(Measured),
        dates=np.arange("2000-01", "2100-01", dtype="datetime64[M]"),
        text=np.array(["a", "bcd"] * 900),
    )
    model.small.unit, model.large.unit = "metre", torch.randn(3)
    model.reversed, model.broadcast = (
        model.large[::-1, ::2],
        np.broadcast_to(np.arange(9.0), (99, 9)),
    )
    return Case(model, (torch.randn(3, 8),))


@_difficult
def memory_maps():
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:  # mapped, it needs no name any more
        np.save(file, np.random.default_rng(0).random((90, 80)).T)
        file.flush()
        model = Holder(read=np.load(file.name, mmap_mode="r"), copied=np.load(file.name, "c"))
    model.copied[3] = 0
    model.rows = model.read[5:50]
    return Case(model, (torch.randn(3, 8),))
