"""`get(put(x))` equals x: to the bit, with its ties, in every process, by every way of getting.

Tests each source once, and each way to make views. The isolations do not depend on the source, so a
few sources stand for all.
"""

import contextlib
import copy
import gc
import io
import itertools
import json
import threading
import warnings
from dataclasses import replace

import accelerate
import numpy as np
import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact, assert_same_description, assert_same_output, describe
from models import ARCHITECTURES, DIFFICULT, LAYOUTS, Case, large, simple, transformer
from ray_zerocopy import _core
from ray_zerocopy.objects import torch_inside
from safetensors.torch import save_model
from torch import nn
from ways import WAYS, made_by

ISOLATIONS = ("private", "shared", "copy")
GETS = list(itertools.product(WAYS, ISOLATIONS))


def _layout(factory):
    return lambda: Case(factory(), call=None)


SOURCES = {
    "simple": simple,
    **DIFFICULT,
    **{f"layout-{name}": _layout(factory) for name, factory in LAYOUTS.items()},
    **{f"hf-{name}": factory for name, factory in ARCHITECTURES.items()},
}

# One of each kind that reads its pages in its own way: tensors, arrays, bare storages, programs,
# tensors made of others.
FEW = (
    *("simple", "tied_weights", "channels_last", "lstm", "spectral_norm", "pipeline", "meta_model"),
    *("numpy_attributes", "array_subclasses", "memory_maps", "shared_storage_views"),
    *("bare_storages", "quantized_convolution", "traced_graph", "class_by_value"),
    *("layout-expanded", "layout-empty", "layout-conj_view", "layout-far_slices_of_one"),
    *("layout-sparse_csr", "layout-nested_jagged", "layout-quantized_per_channel"),
    *("layout-subclass_torch_dispatch", "hf-gpt2"),
)


def observe(case, loaded):
    """The things to compare: the object as loaded, then its output."""
    return describe(loaded), describe(case.run(loaded)) if case.call else {}


def assert_same(expected, seen):
    for one, other in zip(expected, seen, strict=True):
        assert_same_description(one, other)


class Reader:
    def take(self, loaded, case):
        return observe(case, loaded)

    def fetch(self, refs, case):
        """The object by every way, each from its own block, as a run may write to it."""
        seen = []
        for ref, (way, isolation) in zip(refs, GETS, strict=True):
            with made_by(way):
                loaded = rzc.get(ref, isolation=isolation)
            seen.append(observe(case, loaded))
        return seen

    def publish(self, model):
        return [rzc.put(model)]


@pytest.fixture(scope="module")
def reader(start):
    return start(Reader)[0]


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_put_is_got_here_and_in_a_worker(name, reader):
    case = SOURCES[name]()
    ref = rzc.put(case.model)  # before the source runs: a run changes models in train mode
    expected = observe(case, case.model)
    theirs = reader.take.remote(ref, replace(case, model=None))
    # For its views, an architecture adds nothing to the difficult models and layouts.
    for way in WAYS[:1] if name.startswith("hf-") else WAYS:
        with made_by(way):
            loaded = ray.get(ref)
        assert_same(expected, observe(case, loaded))
    assert_same(expected, ray.get(theirs))


@pytest.mark.parametrize("name", FEW)
def test_every_way_of_getting_gives_what_was_put(name, cluster):
    case = SOURCES[name]()
    refs = [rzc.put(case.model) for _ in GETS]
    expected = observe(case, case.model)
    for seen in Reader().fetch(refs, case):
        assert_same(expected, seen)


@pytest.mark.parametrize("name", ["simple", "tied_weights", "channels_last", "lstm", "pipeline"])
def test_a_worker_gets_it_in_every_way(name, reader):
    case = SOURCES[name]()
    refs = [rzc.put(case.model) for _ in GETS]
    expected = observe(case, case.model)
    for seen in ray.get(reader.fetch.remote(refs, replace(case, model=None))):
        assert_same(expected, seen)


@pytest.mark.parametrize("name", DIFFICULT)
def test_put_leaves_its_source_alone(name, cluster):
    model = DIFFICULT[name]().model
    before = describe(model)
    rzc.put(model)
    assert_same_description(before, describe(model))


def test_several_objects_in_one_graph_keep_their_ties(cluster):
    shared = transformer().model
    source = {"a": shared, "b": [shared.embed.weight, shared.head], "c": shared.embed.weight[3:5]}
    loaded = ray.get(rzc.put(source))
    assert_exact(source, loaded)
    assert loaded["b"][0] is loaded["a"].embed.weight
    assert loaded["b"][1] is loaded["a"].head


def test_what_was_loaded_can_be_put_again(way, cluster):
    case = transformer()
    again = ray.get(rzc.put(ray.get(rzc.put(case.model))))
    assert_exact(case.model, again)
    assert_same_output(case, case.model, again)


@pytest.mark.parametrize("source", [None, "text", {}, [1.5], np.arange(3), nn.Identity()], ids=repr)
def test_what_holds_no_tensor_can_be_put(source, cluster):
    assert_exact(source, ray.get(rzc.put(source)))


def test_a_list_of_references_gives_a_list(cluster):
    models = [simple().model, transformer().model]
    refs = [rzc.put(model) for model in models]
    assert_exact(models, ray.get(refs))
    assert_exact(models, rzc.get(refs, isolation="copy"))


def test_references_inside_stay_references(cluster):
    inside = rzc.put(simple().model)
    loaded = ray.get(rzc.put({"ref": inside, "model": transformer().model}))
    del inside
    gc.collect()
    assert_exact(simple().model, ray.get(loaded["ref"]))


def test_a_worker_can_put(reader):
    source = simple().model
    (ref,) = ray.get(reader.publish.remote(source))
    assert_exact(source, ray.get(ref))


def test_loads_are_independent_objects(cluster):
    ref = rzc.put(simple().model)
    one, other = ray.get(ref), ray.get(ref)
    assert one is not other
    assert one[0].weight is not other[0].weight


def test_a_loaded_model_outlives_its_reference(cluster):
    case = large()
    expected = describe(case.model)
    loaded = ray.get(rzc.put(case.model))
    del case
    gc.collect()
    for _ in range(3):  # memory that the store reuses goes to these
        ray.put(np.full(2**28, 0xFF, np.uint8))
    assert_same_description(expected, describe(loaded))


@ray.remote
def publish_a_small_object():
    return rzc.Shared(DIFFICULT["shared_storage_views"]().model)


def test_a_small_object_comes_inline(way, cluster):
    """A return value below Ray's inline limit does not use the store."""
    ref = publish_a_small_object.remote()
    info = rzc.inspect(ref)
    assert (info.where, info.held) == ("inline", "copied")
    assert_exact(DIFFICULT["shared_storage_views"]().model, ray.get(ref))


def test_a_device_that_is_not_there_is_refused_by_name(cluster):
    ref = rzc.put(torch.ones(3))
    with pytest.raises(rzc.DeviceError, match=r"device='cuda:99'.*num_gpus=1"):
        rzc.get(ref, device="cuda:99")


def test_a_full_store_spills_and_falls_back_exactly(cluster):
    """Unused blocks spill and are restored; if all are in use, new ones fall back to disk."""
    source = large().model
    expected = describe(source)
    refs, in_use = [], []

    def fill():
        for _ in range(12):
            refs.append(rzc.put(source))
            in_use.append(ray.get(refs[-1]))

    with pytest.warns(rzc.OnDiskWarning, match=r"no room for [\d,]+ bytes of Sequential.*on disk"):
        fill()
    assert {rzc.inspect(ref).where for ref in refs} == {"store", "disk"}
    for loaded in (in_use[0], in_use[-1]):
        assert_same_description(expected, describe(loaded))

    with torch.no_grad():
        in_use[-1][0].weight.add_(1)
    assert_same_description(expected, describe(ray.get(refs[-1])))


@pytest.mark.parametrize("name", ["numpy_attributes", "array_subclasses", "memory_maps"])
def test_every_array_lies_on_the_block(name, cluster):
    source = DIFFICULT[name]().model
    ref = rzc.put(source)
    arrays = {name: value for name, value in vars(source).items() if isinstance(value, np.ndarray)}
    names = [name for name, array in arrays.items() if array.nbytes and not array.dtype.hasobject]
    assert names
    loaded, inode = rzc.get(ref, isolation="shared"), rzc.inspect(ref).inode
    for array in (np.asarray(getattr(loaded, name)) for name in names):
        assert _core.source_of(array.ctypes.data)[1] == inode


class Packed:
    """Turns its weights into bytes, as skorch does."""

    def __init__(self, weight):
        self.weight = weight

    def __getstate__(self):
        return {"weight": self.weight.numpy().tobytes()}

    def __setstate__(self, state):
        self.weight = torch.frombuffer(bytearray(state["weight"]), dtype=torch.float32)


def test_inspect_tells_what_is_not_shared(cluster):
    source = {"packed": Packed(torch.randn(5_000)), "model": simple().model, "tag": b"below a page"}
    ref = rzc.put(source)
    info = rzc.inspect(ref)
    assert info.unshared_nbytes == source["packed"].weight.nbytes
    assert "20,000 of them copied by each load" in str(info)
    assert torch.equal(ray.get(ref)["packed"].weight, source["packed"].weight)
    assert rzc.inspect(rzc.put(source["model"])).unshared_nbytes == 0


def test_a_memory_map_comes_back_as_memory(cluster):
    source = DIFFICULT["memory_maps"]().model
    loaded = ray.get(rzc.put(source))
    assert (loaded.read.flags.writeable, loaded.copied.flags.writeable) == (False, True)
    assert loaded.read.filename is None


def test_a_slice_costs_what_it_shows(cluster):
    flat = torch.randn(4_000_000)
    ref = rzc.put(nn.Parameter(flat[1_000_000:1_100_000]))
    assert rzc.inspect(ref).nbytes < 500_000
    assert_exact(flat[1_000_000:1_100_000], ray.get(ref).detach())


# --- loaded tensors are ordinary tensors ----------------------------------------------------------

AMBIENT = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "float64 by default": lambda: _default_dtype(torch.float64),
}


@contextlib.contextmanager
def _default_dtype(dtype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_the_mode_of_the_caller_does_not_matter(ambient, way, cluster):
    """`assert_exact` covers `is_inference`: tensors loaded in inference mode are ordinary ones."""
    names = ("channels_last", "shared_storage_views", "lstm", "parameter_subclass")
    sources = [DIFFICULT[name]().model for name in names]
    for source in (*sources, LAYOUTS["sparse_coo"](), LAYOUTS["sparse_csr"]()):
        with AMBIENT[ambient]():
            ref = rzc.put(source)
            loads = [rzc.get(ref, isolation=isolation) for isolation in ISOLATIONS]
        for loaded in loads:
            assert_exact(source, loaded)


def test_inference_tensors_load_as_ordinary_ones(way, cluster):
    with torch.inference_mode():
        source = simple().model
    loaded = ray.get(rzc.put(source))
    assert all(p.is_inference() for p in source.parameters())
    assert not any(p.is_inference() for p in loaded.parameters())
    assert torch.equal(source[0].weight, loaded[0].weight)


def train(case, model, optimizer):
    optimizer = optimizer(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*case.args).square().sum().backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("factory", [simple, transformer])
def test_training_goes_as_on_the_source(factory, optimizer, way, cluster):
    case = factory()
    ref = rzc.put(case.model)
    loads = [rzc.get(ref, isolation=isolation) for isolation in ("private", "copy")]
    gradients = train(case, case.model, optimizer)
    for loaded in loads:
        assert_exact(gradients, train(case, loaded, optimizer))
        assert_exact(case.model, loaded)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_autograd_runs_through_a_frozen_base(isolation, way, cluster):
    case = simple()
    case.model.requires_grad_(False)
    loaded = rzc.get(rzc.put(case.model), isolation=isolation)
    head = nn.Linear(4, 1)
    head(loaded(*case.args)).sum().backward()
    assert head.weight.grad is not None
    assert all(parameter.grad is None for parameter in loaded.parameters())

    loaded[0].requires_grad_(True)
    loaded(*case.args).sum().backward()
    assert loaded[0].weight.grad is not None
    assert loaded[2].weight.grad is None


# --- files written from loaded tensors ------------------------------------------------------------


@pytest.mark.parametrize("name", ["simple", "hf-bert", "lstm", "channels_last"])
def test_saving_one_tensor_writes_about_its_own_size(name, way, cluster):
    ref = rzc.put(SOURCES[name]().model)
    loads = [rzc.get(ref, isolation=isolation) for isolation in ISOLATIONS]
    for tensor in (tensor for loaded in loads for tensor in loaded.state_dict().values()):
        file = io.BytesIO()
        torch.save(tensor, file)
        assert tensor.nbytes <= file.tell() < tensor.nbytes + 4096
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def saved(model, path):
    """The header and bytes that safetensors writes, or its error."""
    try:
        save_model(model, path)
    except RuntimeError as error:
        return str(error)
    file = path.read_bytes()
    header_ends = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:header_ends]), file[header_ends:]


@pytest.mark.parametrize(
    "name", ["simple", "tied_weights", "shared_storage_views", "channels_last", "hf-gpt2", "hf-t5"]
)
def test_safetensors_writes_what_it_writes_of_the_source(name, way, cluster, tmp_path):
    source = SOURCES[name]().model
    loaded = ray.get(rzc.put(source))
    assert saved(loaded, tmp_path / "loaded") == saved(source, tmp_path / "source")


def test_a_state_dict_travels_between_source_and_loaded(way, cluster):
    source = transformer().model
    loaded = ray.get(rzc.put(source))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    loaded.load_state_dict(source.state_dict())
    assert_exact(source, loaded)


# --- refusals -------------------------------------------------------------------------------------


def test_what_does_not_pickle_is_named(cluster):
    model = simple().model
    model[1].lock = threading.Lock()
    with pytest.raises(rzc.RayZeroCopyError, match="lock"):
        rzc.put(model)


def freed():
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(0)
    return tensor


UNUSUAL = {
    "mkldnn": lambda: torch.randn(4, 4).to_mkldnn(),
    "zero tensor": lambda: torch._efficientzerotensor((4,)),
    "freed": freed,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_the_unusual_is_refused_by_name(kind, cluster):
    with pytest.raises(rzc.RayZeroCopyError, match=r"\['weight'\]"):
        rzc.put({"fine": torch.randn(2), "weight": UNUSUAL[kind]()})


def calibrated(model, x):
    """The output of the first forward, and all buffers after it."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [model(x), *model.state_dict().values()]


def quantisation_aware():
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).train()
    net.qconfig = get_default_qat_qconfig("fbgemm")
    return prepare_qat(net), torch.randn(2, 3, 16, 16)


def observer():
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    return PerChannelMinMaxObserver(ch_axis=0), torch.arange(32.0).reshape(8, 4)


def test_a_loaded_sparse_tensor_is_not_kept_by_torch(cluster):
    """torch keeps those that it unpickles until the next `torch.load`, and so their block."""
    loaded = rzc.get(rzc.put(torch.eye(3).to_sparse()))
    assert loaded.is_sparse
    assert not torch_inside.rebuilt_sparse()


@pytest.mark.parametrize("make", [quantisation_aware, observer])
def test_a_module_that_resizes_its_buffers_does_as_its_source(make, cluster):
    """pytorch#170298: torch resizes no storage over memory that it has not allocated."""
    model, x = make()
    ref = rzc.put(model)
    expected = calibrated(copy.deepcopy(model), x)
    assert_exact(model, ray.get(ref))  # not from those below: numpy's view prevents resizing
    loads = [rzc.get(ref, isolation=isolation) for isolation in ("private", "shared", "copy")]
    for loaded in (ray.get(rzc.put(loads[0])), *loads):
        for one, other in zip(calibrated(loaded, x), expected, strict=True):
            assert torch.equal(one, other)


def test_a_model_half_on_the_meta_device_is_told_by_its_parameters(cluster):
    """accelerate and transformers leave parameters there that a checkpoint lacks."""
    half = {"model": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))}
    with pytest.warns(rzc.NoValuesWarning, match=r"dict\['model'\]\.1\.weight, .*\.1\.bias lie on"):
        ref = rzc.put(half)
    assert ray.get(ref)["model"][1].weight.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rzc.put(nn.Linear(3, 3, device="meta"))  # no value is missing if there are none at all


def test_weights_that_a_model_reads_from_files_are_told(cluster, tmp_path):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8)
    expected = net(x)
    there = {"0": "disk", "2": "cpu"}
    half = accelerate.dispatch_model(copy.deepcopy(net), there, "cpu", offload_dir=tmp_path / "h")
    for offloaded in (accelerate.disk_offload(copy.deepcopy(net), tmp_path / "all"), half):
        with pytest.warns(rzc.NoValuesWarning, match=r"dataset reads weights from files at each"):
            ref = rzc.put({"model": offloaded})
        assert torch.equal(ray.get(ref)["model"](x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ref = rzc.put(accelerate.cpu_offload(net, torch.device("cpu")))
    assert torch.equal(ray.get(ref)(x), expected)


def test_what_torch_compiled_is_refused_with_the_way_out(cluster):
    exported = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(rzc.PublishError, match=r"call `.module\(\)`, when loaded"):
        rzc.put(exported.module())
