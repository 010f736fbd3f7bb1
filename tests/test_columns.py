"""A column reaches the model as `torch.tensor` of its rows; an output comes back as columns.

Other columns are refused: the error has the name, the dtype and a fix.
"""

import json
import math
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from exact import assert_exact
from ray_zerocopy.batches.columns import (
    argument,
    columns_of,
    floats_of,
    from_json,
    outputs,
    to_json,
)
from ray_zerocopy.errors import InputError, OutputError
from torch import nn
from transformers.modeling_outputs import BaseModelOutput


def objects(*rows):
    column = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        column[index] = row
    return column


# --- from columns to tensors ----------------------------------------------------------------------

NUMBERS = {
    "bool": [True, False],
    "int": [1, 2],
    "float": [1.0, 2.5],
    "ids": [[1, 2, 3], [4, 5, 6]],
    "images": [[[0.0, 1.0], [2.0, 3.0]]] * 3,
    "empty rows": [[], []],
}


@pytest.mark.parametrize("rows", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(
    "way",
    {
        "array": np.array,
        "list of lists": lambda rows: objects(*rows),
        "list of arrays": lambda rows: objects(*map(np.array, rows)),
        "JSON": lambda rows: from_json(json.loads(json.dumps({"x": rows})))["x"],
        "DataFrame": lambda rows: columns_of(pd.DataFrame({"x": rows}))["x"],
        "Series": lambda rows: pd.Series(rows),
        "Table": lambda rows: columns_of(pa.table({"x": rows}))["x"],
    }.items(),
    ids=lambda way: way[0],
)
def test_numbers_are_what_torch_makes_of_their_rows(rows, way):
    found = argument("x", way[1](rows), None, None)
    expected = torch.tensor(rows)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "float16", "float32"]
)
def test_a_dtype_that_torch_computes_in_stays(dtype):
    column = np.arange(3).astype(dtype)
    assert_exact(torch.from_numpy(column), argument("x", column, None, None))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", ">i8", ">u2"])
def test_one_that_it_does_not_becomes_int64(dtype):
    found = argument("x", np.arange(3).astype(dtype), None, None)
    assert_exact(torch.arange(3), found)
    assert nn.Embedding(3, 2)(found).shape == (3, 2)


@pytest.mark.parametrize("floats", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("column", ["float16", "float32", "float64", "longdouble", ">f4", ">f8"])
def test_floats_have_the_dtype_of_the_model(column, floats):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(floats)
    numbers = np.array([0.1, -3.0]).astype(column)
    found = argument("x", numbers, floats_of(model), None)
    assert_exact(torch.from_numpy(numbers.astype("float64")).to(floats), found)


def test_what_a_model_computes_in():
    assert floats_of(nn.ReLU()) is None
    assert floats_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())) is None
    assert floats_of(object()) is None
    assert floats_of(torch.jit.script(nn.Linear(2, 2).double())) is torch.float64
    stored = nn.Linear(2, 2).bfloat16()
    stored.weight = nn.Parameter(stored.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert floats_of(stored) is torch.bfloat16
    scaled = nn.Module()
    scaled.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
    assert floats_of(scaled) is torch.float64


@pytest.mark.parametrize(
    "column",
    {
        "read-only": np.frombuffer(bytes(8), "float32"),
        "backwards": np.arange(3.0)[::-1],
        "strided": np.arange(6.0).reshape(2, 3).T,
        "broadcast": np.broadcast_to(np.float32(1), (3, 2)),
    }.values(),
)
def test_a_tensor_is_the_models_own(column):
    found = argument("x", column, torch.float64, None)
    assert_exact(torch.tensor(column.tolist(), dtype=torch.float64), found.clone())
    assert found.is_contiguous()
    before = column.copy()
    found.add_(1)
    assert np.array_equal(column, before)


class Image:
    """A value that numpy would turn into an array."""

    __array_interface__ = np.zeros((2, 2), "uint8").__array_interface__


@pytest.mark.parametrize(
    "column",
    [
        np.array(["a", "bc"]),
        objects("a", "bc"),
        objects("a", None),
        objects(None, None),
        objects(b"a"),
        objects({"boxes": [1, 2]}),
        objects([{"role": "user"}], [{"role": "user"}, {"role": "model"}]),
        objects(["a", "b"], ["c"]),
        objects(Image(), Image()),
        objects(date(2026, 1, 1)),
        objects(Decimal(1)),
        objects(),
        ["a", "list"],
        None,
    ],
)
def test_text_and_objects_stay_what_they_are(column):
    assert argument("x", column, torch.float32, None) is column


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (np.array(["2026-01-01"], "datetime64[ns]"), r"column 'x' is datetime64\[ns\], which no"),
        (np.array([1], "timedelta64[s]"), r"column 'x' is timedelta64\[s\], which no tensor"),
        (np.zeros(2, [("a", int)]), "column 'x' is .*, which no tensor holds"),
        (np.array([2**63], "uint64"), "column 'x' is uint64 with numbers beyond int64"),
        (objects([1, 2], [3]), r"'x' \(object\) holds rows of 1 to 2 items: pad them"),
        (objects([1], 2), r"'x' \(object\) holds rows of 1 to 1 items|unequal shapes"),
        (objects([[1, 2]], [[3]]), r"'x' \(object\) holds rows of unequal shapes"),
        (objects(np.zeros((2, 3)), np.zeros((2, 4))), "holds rows of unequal shapes"),
        (objects(1.5, None), r"'x' \(object\) holds None beside numbers: fill it"),
        (objects([1, None], [2, 3]), r"'x' \(object\) holds None beside numbers"),
        (objects(2**70, 1), "integers beyond 64 bits"),
    ],
)
def test_what_no_tensor_holds_is_refused_by_name_dtype_and_way_out(column, told):
    with pytest.raises(InputError, match=told) as caught:
        argument("x", column, torch.float32, None)
    assert "preprocess=" in str(caught.value) or "beyond int64" in str(caught.value)


# --- from JSON ------------------------------------------------------------------------------------


def test_json_keeps_what_is_no_number_as_objects():
    found = from_json({"text": ["a", "bc"], "ragged": [[1], [2, 3]], "mixed": [1, "a"]})
    assert found["text"].tolist() == ["a", "bc"]
    assert found["ragged"].tolist() == [[1], [2, 3]]
    assert found["mixed"].tolist() == [1, "a"]


def test_json_keeps_the_precision_of_a_float64_model():
    found = argument("x", from_json({"x": [0.1]})["x"], torch.float64, None)
    assert found.tolist() == [0.1]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ([1, 2], "the body is a list, not a JSON object of columns"),
        (None, "the body is a NoneType"),
        ({"x": 1}, "column 'x' is a int, not a list of rows"),
        ({"x": "abc"}, "column 'x' is a str, not a list of rows"),
        ({"x": {"y": [1]}}, "column 'x' is a dict, not a list of rows"),
        ({"x": [1], "y": [1, 2]}, "unequal numbers of rows: {'x': 1, 'y': 2}"),
    ],
)
def test_a_body_that_is_no_columns_is_refused(body, told):
    with pytest.raises(InputError, match=told):
        from_json(body)


# --- from outputs to columns ----------------------------------------------------------------------


class Named(NamedTuple):
    logits: torch.Tensor
    labels: list


@dataclass
class Detection:
    scores: torch.Tensor


def seen(output):
    return {name: (column.dtype.kind, column.tolist()) for name, column in outputs(output).items()}


ROWS = torch.tensor([[1.0], [2.0]])
LISTS = ("f", [[1.0], [2.0]])


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ROWS, {"output": LISTS}),
        (ROWS.numpy(), {"output": LISTS}),
        (ROWS.tolist(), {"output": LISTS}),
        (list(ROWS), {"output": LISTS}),
        ((ROWS, ROWS), {"output_0": LISTS, "output_1": LISTS}),
        ({"x": ROWS}, {"x": LISTS}),
        (Named(ROWS, ["a", "b"]), {"logits": LISTS, "labels": ("U", ["a", "b"])}),
        (ROWS.max(1), {"values": ("f", [1.0, 2.0]), "indices": ("i", [0, 0])}),
        (Detection(ROWS), {"scores": LISTS}),
        (BaseModelOutput(last_hidden_state=ROWS), {"last_hidden_state": LISTS}),
        ([{"x": ROWS[0]}, {"x": ROWS[1]}], {"x": LISTS}),
        (["a", "bc"], {"output": ("U", ["a", "bc"])}),
        ([], {"output": ("f", [])}),
        (torch.zeros(0, 3), {"output": ("f", [])}),
        (["a", 1], {"output": ("O", ["a", 1])}),
        (["a\0", "b"], {"output": ("O", ["a\0", "b"])}),
        ([b"a\0", b"b"], {"output": ("O", [b"a\0", b"b"])}),
        ([b"a", 1], {"output": ("O", [b"a", 1])}),
        ([None, 1.0], {"output": ("O", [None, 1.0])}),
        ({"x": [{"y": 1}, {}]}, {"x": ("O", [{"y": 1}, {}])}),
        (ROWS.bfloat16(), {"output": LISTS}),
        (ROWS.to(torch.float8_e4m3fn), {"output": LISTS}),
        (ROWS.to(torch.complex32), {"output": ("c", [[1.0], [2.0]])}),
        (ROWS.to_sparse(), {"output": LISTS}),
        (torch.quantize_per_tensor(ROWS, 1.0, 0, torch.quint8), {"output": LISTS}),
        (ROWS.requires_grad_(), {"output": LISTS}),
        (torch.tensor([1 - 2j]).conj(), {"output": ("c", [1 + 2j])}),
    ],
    ids=lambda case: type(case).__name__,
)
def test_outputs_become_columns(output, expected):
    assert seen(output) == expected


@pytest.mark.parametrize(
    "output",
    [
        [torch.zeros(1, 4), torch.zeros(3, 4)],
        [np.zeros((1, 4)), np.zeros((3, 4))],
        [{"output": torch.zeros(1, 4)}, {"output": torch.zeros(3, 4)}],
        torch.nested.nested_tensor([torch.zeros(1, 4), torch.zeros(3, 4)]),
    ],
    ids=["tensors", "arrays", "mappings", "nested"],
)
def test_rows_of_unequal_shapes_are_a_column_of_objects(output):
    (column,) = outputs(output).values()
    assert column.dtype == object
    assert [row.shape for row in column] == [(1, 4), (3, 4)]


def test_columns_are_in_memory_of_their_own():
    for kept in (torch.zeros(3), np.zeros(3)):
        (column,) = outputs(kept).values()
        kept += 1
        assert column.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "model returned None for 'output'; expected one row per input row"),
        (torch.tensor(1.0), "model returned a scalar for 'output'"),
        ((ROWS, None), "model returned None for 'output_1'"),
        ({"past": object()}, "model returned a object for 'past'"),
        ("text", "model returned a str for 'output'"),
        ((i for i in range(2)), "model returned a generator for 'output'"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_has_no_rows_is_refused_by_name(output, told):
    with pytest.raises(OutputError, match=rf"{told}.*\(use postprocess=\)|{told}"):
        outputs(output)


# --- to JSON --------------------------------------------------------------------------------------


def test_json_is_valid_and_null_stands_for_what_it_lacks():
    columns = outputs(
        {
            "floats": torch.tensor([[1.0, math.nan], [math.inf, -math.inf]]),
            "ints": torch.tensor([1, 2]),
            "bools": torch.tensor([True, False]),
            "text": ["a", "b"],
            "ragged": [torch.tensor([math.nan]), torch.tensor([1.0, 2.0])],
            "objects": [{"score": np.float32(math.inf), "box": torch.ones(2)}, None],
        }
    )
    assert json.loads(json.dumps(to_json(columns), allow_nan=False)) == {
        "floats": [[1.0, None], [None, None]],
        "ints": [1, 2],
        "bools": [True, False],
        "text": ["a", "b"],
        "ragged": [[None], [1.0, 2.0]],
        "objects": [{"score": None, "box": [1.0, 1.0]}, None],
    }


@pytest.mark.parametrize(
    "output", [torch.tensor([1j]), [b"a"], np.array(["2026"], "datetime64[s]")]
)
def test_what_json_has_no_form_of_is_refused_by_name(output):
    with pytest.raises(OutputError, match=r"'output' holds .*, which JSON lacks \(use postprocess"):
        to_json(outputs(output))
