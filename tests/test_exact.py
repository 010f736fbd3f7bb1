"""The oracle tells exact copies from every kind of inexact one."""

import copy
import pickle

import pytest
import torch
from exact import assert_exact, assert_same_output, describe, storage_partition
from models import ARCHITECTURES, DIFFICULT, LAYOUTS, Case, simple, transformer
from torch import nn

FAITHFULLY_DEEPCOPIED = (
    *("tied_weights", "bfloat16", "channels_last", "lstm", "orthogonal", "non_persistent_buffers"),
    *("plain_tensor_attributes", "tensors_in_containers", "numpy_attributes", "custom_state"),
    *("slotted_pipeline", "mixed_training_flags", "reference_cycle", "quantized_dynamic"),
    *("dataclass_of_models", "one_model_two_names", "class_by_value", "meta_model"),
)


def source_of(factory):
    made = factory()
    return made.model if isinstance(made, Case) else made


@pytest.mark.parametrize("name", FAITHFULLY_DEEPCOPIED)
def test_a_deep_copy_is_exact(name):
    case = DIFFICULT[name]()
    loaded = copy.deepcopy(case.model)
    assert_exact(case.model, loaded)
    if case.call:
        assert_same_output(case, case.model, loaded)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "resnet"])
def test_a_pickled_architecture_is_exact(name):
    case = ARCHITECTURES[name]()
    loaded = pickle.loads(pickle.dumps(case.model))
    assert_exact(case.model, loaded)
    assert_same_output(case, case.model, loaded)


@pytest.mark.parametrize("table", [DIFFICULT, LAYOUTS], ids=["difficult", "layouts"])
def test_a_description_is_plain_data(table):
    for name, factory in table.items():
        description = describe(source_of(factory))
        assert pickle.loads(pickle.dumps(description)) == description, name


def with_(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)


def broken(break_it, factory=simple):
    model = copy.deepcopy(factory().model)
    break_it(model)
    return model


def flip_one_bit(model):
    model[0].weight.data.view(torch.int32)[3, 4] ^= 1


def merge_storages(model):
    flat = torch.cat([p.detach().flatten() for p in model[0].parameters()])
    model[0].weight.data, model[0].bias.data = flat[:512].view(32, 16), flat[512:]


def reorder(model):
    model.__dict__["training"] = model.__dict__.pop("training")


BREAKS = {
    "a bit": flip_one_bit,
    "a stride": lambda m: with_(m[0].weight, data=m[0].weight.data.t().contiguous().t()),
    "a shape": lambda m: with_(m[0].weight, data=m[0].weight.data.reshape(16, 32)),
    "a dtype": lambda m: m[0].double(),
    "requires_grad": lambda m: m[0].weight.requires_grad_(False),
    "training": lambda m: m[0].train(),
    "a storage": merge_storages,
    "parameter-ness": lambda m: m[0]._parameters.update(bias=m[0].bias.detach()),
    "a parameter": lambda m: m[0].register_parameter("bias", None),
    "a new buffer": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "a new attribute": lambda m: with_(m, extra=1),
    "an attribute on a parameter": lambda m: with_(m[0].weight, tag=1),
    "a hook": lambda m: m.register_forward_hook(print),
    "a class": lambda m: with_(m[1], __class__=nn.GELU),
    "the order of attributes": reorder,
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_copy_is_told(what):
    with pytest.raises(AssertionError, match="differences"):
        assert_exact(simple().model, broken(BREAKS[what]))


def test_a_broken_tie_is_told():
    def untie(model):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def half_tie(model):
        model.head.weight = nn.Parameter(model.head.weight.detach())

    for break_it in (untie, half_tie):
        with pytest.raises(AssertionError, match=r"head.*weight"):
            assert_exact(transformer().model, broken(break_it, transformer))


def test_a_lost_buffer_mark_is_told():
    case = DIFFICULT["non_persistent_buffers"]
    with pytest.raises(AssertionError, match="_non_persistent_buffers_set"):
        assert_exact(case().model, broken(lambda m: m._non_persistent_buffers_set.clear(), case))


@pytest.mark.parametrize("name", ["conj_view", "neg_view"])
def test_a_resolved_view_is_told(name):
    source = LAYOUTS[name]()
    with pytest.raises(AssertionError, match=r"is_(conj|neg)=True"):
        assert_exact(source, source.resolve_conj().resolve_neg().clone())


def test_not_a_number_equals_itself_and_no_other():
    one = torch.tensor([float("nan")])
    other = (one.view(torch.int32) ^ 1).view(torch.float32)
    assert other.isnan().all()
    assert_exact(one, one.clone())
    with pytest.raises(AssertionError):
        assert_exact(one, other)


def test_the_same_bytes_by_another_dtype_are_told():
    source = torch.randn(8).half()
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_exact(source, source.view(torch.bfloat16))


def test_the_partition_groups_what_shares_a_storage():
    base, alone = torch.randn(10), torch.randn(3)
    parts = storage_partition({"base": base, "part": base[2:4], "alone": alone, "again": alone})
    assert parts == {frozenset({"['base']", "['part']"}), frozenset({"['alone']"})}
