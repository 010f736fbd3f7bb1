"""`replace_tensors(*extract_tensors(m))` equals m, in evaluation mode, and copies nothing."""

import gc
import itertools
import pickle

import numpy as np
import pytest
import ray
import torch
from exact import assert_exact, assert_same_description, assert_same_output, describe
from models import ARCHITECTURES, DIFFICULT, bert_base, large, simple, transformer
from ray_zerocopy.rewrite import extract_tensors, replace_tensors, replace_tensors_direct
from torch import nn

MODELS = {
    "simple": simple,
    "transformer": transformer,
    **{
        name: DIFFICULT[name]
        for name in (
            *("tied_weights", "bfloat16", "float16", "channels_last", "lstm", "gru", "hooks"),
            *("non_persistent_buffers", "buffer_class", "none_parameters", "frozen_parameters"),
            *("parameter_containers", "plain_tensor_attributes", "mixed_training_flags"),
            *("submodule_twice", "shared_storage_views", "integer_and_complex_parameters"),
            *("weight_norm", "hooked_weight_norm", "attributes_on_parameters", "custom_state"),
            *("parameter_subclass", "numpy_attributes", "tensors_in_containers", "class_by_value"),
            "reference_cycle",
        )
    },
    **{
        f"hf-{name}": ARCHITECTURES[name]
        for name in ("bert", "gpt2", "llama", "t5", "resnet", "whisper", "mixtral", "vit")
    },
}
REPLACES = {"replace": replace_tensors, "direct": replace_tensors_direct}
each_model = pytest.mark.parametrize("name", MODELS)
each_way = pytest.mark.parametrize("way", REPLACES)


def modules(model):
    return [module for _, module in model.named_modules()]


def kinds(module):
    return {"params": module._parameters, "buffers": module._buffers}


def arrays(tensors):
    pairs = itertools.product(tensors, ("params", "buffers"))
    return [array for mapping, kind in pairs for array in mapping[kind].values()]


@each_model
def test_the_skeleton_is_bare_and_in_eval_mode(name):
    model = MODELS[name]().model
    skeleton, _ = extract_tensors(model)
    names = [[type(m).__qualname__ for m in modules(part)] for part in (skeleton, model)]
    assert names[0] == names[1]
    for bare, full in zip(modules(skeleton), modules(model), strict=True):
        assert bare is not full
        assert not bare.training
        assert bare._parameters == dict.fromkeys(full._parameters)
        assert bare._buffers == dict.fromkeys(full._buffers)


@each_model
def test_the_model_is_untouched(name):
    model = MODELS[name]().model
    before = describe(model)
    skeleton, tensors = extract_tensors(model)
    replace_tensors(skeleton, tensors)
    assert_same_description(before, describe(model))


@each_model
def test_the_tensors_are_one_mapping_a_module(name):
    model = MODELS[name]().model
    _, tensors = extract_tensors(model)
    assert len(tensors) == len(modules(model))
    for mapping, module in zip(tensors, modules(model), strict=True):
        assert set(mapping) == {"params", "buffers"}
        for kind, named in kinds(module).items():
            there = {name: tensor for name, tensor in named.items() if tensor is not None}
            assert list(mapping[kind]) == list(there)
            for array, tensor in zip(mapping[kind].values(), there.values(), strict=True):
                assert isinstance(array, np.ndarray)
                assert array.shape == tensor.shape
                assert array.tobytes() == bytes_of(tensor)


def bytes_of(tensor):
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.detach().view(word).numpy().tobytes()


@each_way
@each_model
def test_replace_inverts_extract(name, way):
    case = MODELS[name]()
    skeleton, tensors = extract_tensors(case.model)
    REPLACES[way](skeleton, tensors)
    case.model.eval()
    assert_exact(case.model, skeleton)
    assert_same_output(case, case.model, skeleton)


@each_way
@each_model
def test_replace_inverts_extract_through_the_store(name, way, cluster):
    case = MODELS[name]()
    skeleton, tensors = ray.get(ray.put(extract_tensors(case.model)))
    REPLACES[way](skeleton, tensors)
    case.model.eval()
    assert_exact(case.model, skeleton)
    assert_same_output(case, case.model, skeleton)


@ray.remote
def rebuild(extracted, way):
    skeleton, tensors = extracted
    REPLACES[way](skeleton, tensors)
    return describe(skeleton)


@each_way
@pytest.mark.parametrize("name", ["simple", "transformer", "bfloat16", "lstm", "hf-gpt2"])
def test_replace_inverts_extract_in_a_worker(name, way, cluster):
    model = MODELS[name]().model
    found = ray.get(rebuild.remote(ray.put(extract_tensors(model)), way))
    assert_same_description(describe(model.eval()), found)


@each_way
def test_replace_copies_nothing(way, cluster):
    skeleton, tensors = ray.get(ray.put(extract_tensors(large().model)))
    REPLACES[way](skeleton, tensors)
    for module, mapping in zip(modules(skeleton), tensors, strict=True):
        for kind, named in kinds(module).items():
            for name, array in mapping[kind].items():
                assert named[name].data_ptr() == array.__array_interface__["data"][0]


def test_the_store_holds_one_block_and_gives_views(cluster):
    model = large().model
    ref = ray.put(extract_tensors(model))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert ray.experimental.get_object_locations([ref])[ref]["object_size"] < 1.01 * nbytes

    _, tensors = ray.get(ref)
    starts = [array.__array_interface__["data"][0] for array in arrays(tensors)]
    ends = [start + array.nbytes for start, array in zip(starts, arrays(tensors), strict=True)]
    assert max(ends) - min(starts) < 1.01 * nbytes
    assert all(start % 64 == 0 for start in starts)
    assert not any(array.flags.owndata for array in arrays(tensors))


@each_way
def test_views_outlive_their_reference(way, cluster):
    model = large().model
    skeleton, tensors = ray.get(ray.put(extract_tensors(model)))
    REPLACES[way](skeleton, tensors)
    del tensors
    gc.collect()
    for _ in range(3):
        ray.put(np.full(2**28, 0xFF, np.uint8))
    assert_exact(model, skeleton)


@each_way
@pytest.mark.parametrize(
    "name", ["simple", "transformer", "channels_last", "non_persistent_buffers"]
)
def test_a_plain_list_of_dicts_will_do(name, way):
    case = MODELS[name]()
    skeleton, tensors = extract_tensors(case.model)
    plain = [
        {kind: {k: array.copy() for k, array in named.items()} for kind, named in mapping.items()}
        for mapping in tensors
    ]
    REPLACES[way](skeleton, plain)
    expected, actual = case.model.state_dict(), skeleton.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert all(isinstance(parameter, nn.Parameter) for parameter in skeleton.parameters())
    assert_same_output(case, case.model.eval(), skeleton)


@each_way
def test_one_skeleton_takes_tensors_again_and_again(way):
    case = simple()
    skeleton, tensors = extract_tensors(case.model)
    for _ in range(3):
        REPLACES[way](skeleton, tensors)
    assert_exact(case.model, skeleton)


def test_tensors_of_another_model_are_refused():
    skeleton, _ = extract_tensors(simple().model)
    _, tensors = extract_tensors(transformer().model)
    for replace in REPLACES.values():
        with pytest.raises(ValueError, match="modules"):
            replace(skeleton, tensors)


def test_bert_base_is_exact(cluster):
    case = bert_base()
    skeleton, tensors = ray.get(ray.put(extract_tensors(case.model)))
    replace_tensors_direct(skeleton, tensors)
    assert_same_output(case, case.model, skeleton)
    assert_exact(case.model, skeleton)


class Staged(nn.Module):
    """A list of tuples with a module and a tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
        self.stages = [(self.first, torch.tensor(0.5)), (nn.ReLU(), torch.tensor(2.0))]

    def forward(self, x):
        for stage, scale in self.stages:
            x = stage(x) * scale
        return x


def test_a_module_beside_a_tensor_is_the_skeletons():
    model = Staged()
    skeleton, tensors = extract_tensors(model)
    assert skeleton.stages[0] == (skeleton.first, None)
    skeleton, tensors = pickle.loads(pickle.dumps((skeleton, tensors)))
    replace_tensors(skeleton, tensors)
    assert skeleton.stages[0][0] is skeleton.first
    x = torch.ones(2, 8)
    assert torch.equal(skeleton(x), model.eval()(x))
    assert model.stages[0] == (model.first, torch.tensor(0.5))


def test_a_dict_is_filled_whatever_its_keys_are():
    model = nn.Linear(2, 2)
    model.state = {model.weight: torch.ones(2), "scale": (torch.zeros(1), "text")}
    pair = pickle.loads(pickle.dumps(extract_tensors(model)))
    replace_tensors(*pair)
    first, second = pair[0].state.values()
    assert torch.equal(first, torch.ones(2))
    assert (second[0].item(), second[1]) == (0.0, "text")
