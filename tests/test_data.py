"""A pool of actors adds the same columns as one local model, and all share one model."""

import os
import time
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray_zerocopy as rzc
import torch
from models import large, simple
from ray_zerocopy.data import Predictor, map_batches
from ray_zerocopy.wrappers import ModelWrapper
from test_memory_footprint import WORKERS, Growing, assert_each_costs_nothing
from torch import nn

ROWS = 64


@pytest.fixture(scope="module", autouse=True)
def quiet(cluster):
    ray.data.DataContext.get_current().enable_progress_bars = False


def test_actors_run_a_variant():
    torch.manual_seed(0)
    trunk = nn.Linear(512, 512).eval()
    head = nn.Sequential(nn.Linear(16, 512), trunk).eval()
    ref = rzc.put(head, base=rzc.put(trunk))
    assert rzc.inspect(ref).base_nbytes > 0
    found = collected(map_batches(rows(16), ref, actors=1, batch_size=8, num_cpus=0.1))
    with torch.no_grad():
        assert np.array_equal(found["output"], head(torch.tensor(found["data"])).numpy())


def rows(width, count=ROWS, blocks=8):
    torch.manual_seed(0)
    return ray.data.from_numpy(list(torch.randn(count, width).numpy().reshape(blocks, -1, width)))


def collected(dataset):
    """All rows as columns, in one order."""
    taken = dataset.take_all()
    columns = {name: np.stack([row[name] for row in taken]) for name in taken[0]}
    order = np.lexsort(columns["data"].T)
    return {name: column[order] for name, column in columns.items()}


class Gate:
    """Counts the processes that have arrived."""

    def __init__(self):
        self.pids = set()

    def arrive(self, pid):
        self.pids.add(pid)
        return len(self.pids)


class Together(Growing, Predictor):
    """A predictor whose actors start together, and report their process and its growth."""

    def __init__(self, model, gate, actors):
        super().__init__(model)
        while ray.get(gate.arrive.remote(os.getpid())) < actors:
            time.sleep(0.05)

    def __call__(self, batch):
        batch, count = super().__call__(batch), len(batch["data"])
        tell = {"pid": os.getpid(), "loaded": self.loaded, "called": self.grown()}
        return batch | {name: np.full(count, value) for name, value in tell.items()}


def together(dataset, model, actors, gate):
    return dataset.map_batches(
        Together,
        fn_constructor_kwargs={"model": model, "gate": gate, "actors": actors},
        batch_size=2,
        num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )


class PlainWay:
    """The code of a user who only needs `rzc.get`."""

    def __init__(self, ref):
        self.model = rzc.get(ref)

    def __call__(self, batch):
        with torch.no_grad():
            batch["output"] = self.model(torch.tensor(batch["data"])).numpy()
        batch["pid"] = np.full(len(batch["data"]), os.getpid())
        return batch


def local(model, data, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(data), **kwargs).numpy()


# --- the pool -------------------------------------------------------------------------------------


def test_one_line(cluster):
    model = simple().model
    found = collected(
        map_batches(rows(16), model, actors=2, batch_size=8, num_cpus=0.1, postprocess=torch.exp)
    )
    assert set(found) == {"data", "output"}
    np.testing.assert_allclose(found["output"], np.exp(local(model, found["data"])), rtol=1e-5)


def test_the_plain_way(cluster):
    model = simple().model
    dataset = rows(16).map_batches(
        PlainWay,
        fn_constructor_kwargs={"ref": rzc.put(model)},
        batch_size=8,
        zero_copy_batch=False,
        num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    found = collected(dataset)
    np.testing.assert_allclose(found["output"], local(model, found["data"]), rtol=1e-5)
    assert os.getpid() not in found["pid"]


def test_actors_share_one_model(start):
    """All N actors work, and together they grow by less than a model."""
    model = large().model
    ref, growths = rzc.put(model), {}
    for count in WORKERS:
        (gate,) = start(Gate)
        found = collected(together(rows(2048), ref, count, gate))
        np.testing.assert_allclose(found["output"], local(model, found["data"]), atol=1e-4)
        pids = np.unique(found["pid"])
        assert len(pids) == count
        each = [found["pid"] == pid for pid in pids]
        growths[count] = [
            [int(found[moment][own].max()) for own in each] for moment in ("loaded", "called")
        ]
    assert_each_costs_nothing("data actor", "batch", growths)


# --- columns --------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Takes two columns of numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, a, b):
        return self.linear(torch.stack([a, b], 1))


FLOATS = [[float(i), 1 / 3] for i in range(ROWS)]
IDS = [[i, 1, 2] for i in range(ROWS)]
FRAME = pd.DataFrame(FLOATS, columns=["a", "b"])


def from_parquet(folder, **columns):
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return ray.data.read_parquet(str(folder / "x.parquet"))


def of_floats(_):
    return ray.data.from_items([{"data": row} for row in FLOATS])


def of_frame(_):
    return ray.data.from_pandas(FRAME)


@pytest.mark.parametrize(
    ("dataset", "model", "dtype", "options"),
    [
        (of_floats, nn.Linear(2, 3), "float32", {}),
        (of_floats, nn.Linear(2, 3).double(), "float64", {}),
        (of_floats, nn.Linear(2, 3).bfloat16(), "bfloat16", {}),
        (of_floats, nn.Linear(2, 3), "float32", {"batch_format": "pandas"}),
        (of_floats, nn.Linear(2, 3), "float32", {"batch_format": "pyarrow"}),
        (of_frame, Stacked(), "float32", {}),
        (of_frame, Stacked(), "float32", {"batch_format": "pandas"}),
        (of_frame, Stacked(), "float32", {"batch_format": "pyarrow"}),
        (lambda folder: from_parquet(folder, ids=IDS), nn.Embedding(ROWS, 4), "int64", {}),
        (
            lambda folder: from_parquet(folder, ids=pa.array(IDS, pa.list_(pa.uint16()))),
            nn.Embedding(ROWS, 4),
            "int64",
            {"batch_format": "pandas"},
        ),
    ],
)
def test_columns_of_any_source_reach_the_model(dataset, model, dtype, options, cluster, tmp_path):
    source = IDS if isinstance(model, nn.Embedding) else FLOATS
    tensor = torch.tensor(source, dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected = model(*tensor.T) if isinstance(model, Stacked) else model(tensor)
    found = map_batches(dataset(tmp_path), model, actors=1, num_cpus=0.1, **options).take_all()
    got = np.array(sorted(row["output"].tolist() for row in found))
    np.testing.assert_allclose(got, sorted(expected.double().tolist()), rtol=1e-5)
    assert set(found[0]) == {*dataset(tmp_path).columns(), "output"}


def detect(output):
    """Return as many boxes for each row as it has tens."""
    return [
        {"boxes": row.expand(1 + int(row[0]) // 10, 4), "label": str(int(row[0]))} for row in output
    ]


def test_rows_of_unequal_shapes_are_columns(cluster):
    data = np.arange(ROWS, dtype="float32")[:, None]
    dataset = ray.data.from_numpy(list(data.reshape(8, -1, 1)))
    dataset = map_batches(dataset, nn.Identity(), actors=1, num_cpus=0.1, postprocess=detect)
    for row in dataset.materialize().take_all():
        assert row["boxes"].shape == (1 + row["data"][0] // 10, 4)
        assert set(np.ravel(row["boxes"])) == {row["data"][0]}
        assert row["label"] == str(int(row["data"][0]))


def test_no_rows_give_no_rows(cluster):
    for empty in (rows(16).filter(lambda row: False), rows(16).limit(0)):
        assert map_batches(empty, nn.Linear(16, 4), actors=1, num_cpus=0.1).take_all() == []


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"data": [1.0] * 3}, r"model refused 'data' \(float32\[\d+, 3\]\): RuntimeError: .*mat1"),
        ({"data": [1, 2]}, r"model refused 'data' \(int64\[\d+, 2\]\): RuntimeError: .*mat1"),
        ({"data": "text"}, r"model refused 'data' \((object|<U4)\[\d+\]\): TypeError: "),
        ({"data": datetime(2026, 1, 1)}, r"column 'data' is datetime64\[s\], which no tensor"),
        ({"a": 1.0, "b": 2.0}, r"model refused 'a' \(float32\[\d+\]\), 'b' .*: TypeError: "),
    ],
    ids=str,
)
def test_what_the_model_cannot_take_is_told_by_column_dtype_and_way_out(item, told, cluster):
    dataset = map_batches(ray.data.from_items([item] * 4), nn.Linear(2, 3), actors=1, num_cpus=0.1)
    with pytest.raises(Exception, match=rf"(?s)InputError.*{told}.*preprocess="):
        dataset.take_all()


# --- one predictor --------------------------------------------------------------------------------


class Two(nn.Module):
    """Takes two arguments and returns the requested output."""

    def forward(self, left, right, kind=("tensor",)):
        total = left + right
        outputs = {"sum": total, "rows": list(range(len(total))), "half": total.bfloat16()}
        return {"tensor": total, "tuple": (left, right), "dict": outputs, "none": None}[kind[0]]

    def negative(self, left):
        return -left


BATCH = {"left": np.arange(3.0, dtype="float32"), "right": np.ones(3, "float32")}


@pytest.fixture(scope="module")
def two(cluster):
    return ModelWrapper.from_model(Two())


@pytest.mark.parametrize(
    "inputs", [None, ["left", "right"], {"right": "right", "left": "left"}], ids=str
)
def test_columns_become_arguments(inputs, two):
    found = Predictor(two, inputs=inputs)(BATCH)
    assert found["output"].tolist() == [1, 2, 3]
    assert list(found) == ["left", "right", "output"]


def test_one_column_is_the_only_argument(two):
    assert Predictor(two, method_name="negative").predict({"any": BATCH["left"]})
    assert Predictor(two, method_name="negative", inputs="left").predict(BATCH)


def test_a_missing_column_is_named(two):
    told = r"model takes column 'wrong'; the batch has \['left', 'right'\]"
    with pytest.raises(rzc.InputError, match=told):
        Predictor(two, inputs="wrong")(BATCH)


def test_outputs_become_columns(two):
    def predict(kind):
        return Predictor(two, preprocess=lambda batch: batch | {"kind": np.array([kind])})(BATCH)

    assert predict("tuple")["output_1"].tolist() == [1, 1, 1]
    found = predict("dict")
    assert found["sum"].tolist() == found["half"].tolist() == [1, 2, 3]
    assert found["rows"].tolist() == [0, 1, 2]
    with pytest.raises(rzc.OutputError, match="model returned None for 'output'; expected one row"):
        predict("none")


def test_another_number_of_rows_is_refused_where_columns_are_added(two):
    predictor = Predictor(two, postprocess=lambda total: total[:2])
    assert predictor.predict(BATCH)["output"].tolist() == [1, 2]
    with pytest.raises(rzc.OutputError, match="model returned 2 rows for 'output'; expected 3"):
        predictor(BATCH)


class Failing(nn.Module):
    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), OSError("no"), rzc.BlockError("no"), RecursionError()]
)
def test_an_error_that_columns_are_not_to_blame_for_stays_itself(error, cluster):
    predictor = Predictor(Failing())
    predictor.model.error = error
    with pytest.raises(type(error)) as caught:
        predictor.predict({"x": np.ones(3)})
    assert caught.value is error


def test_a_batch_that_is_read_only_is_not_written(two):
    left = np.zeros(3, "float32")
    left.flags.writeable = False
    found = Predictor(two, method_name="forward", postprocess=lambda x: x.add_(1))(
        {"left": left, "right": left}
    )
    assert found["left"].tolist() == [0, 0, 0]
    assert found["output"].tolist() == [1, 1, 1]


def test_columns_go_to_the_device_of_the_model(two):
    devices = []
    with pytest.raises(NotImplementedError, match="meta"):  # its tensors have no bytes
        Predictor(two, device="meta", postprocess=lambda x: devices.append(x.device) or x)(BATCH)
    assert devices == [torch.device("meta")]


def test_a_reference_runs_in_the_mode_it_was_stored_in_all_else_in_eval_mode(cluster):
    model = nn.Dropout()
    assert Predictor(rzc.put(model)).model.training
    assert not Predictor(model).model.training
