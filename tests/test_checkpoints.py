"""A checkpoint that was loaded and put arrives in a worker exactly as its loader returns it."""

import json

import pytest
import ray
import ray_zerocopy as rzc
import torch
from checkpoints import CHECKPOINTS
from exact import assert_same_description, describe
from footprint import with_peak
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM


class Reader:
    def describe(self, model):
        return describe(model)

    def describe_weights(self, model):
        return describe(weights(model))


def weights(model):
    """The same in two loads of one file, unlike hooks: a process counts these."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


@pytest.fixture(scope="module")
def reader(start):
    (reader,) = start(Reader)
    return reader


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_exact_in_a_worker(reader, tmp_path, name):
    checkpoint = CHECKPOINTS[name]
    checkpoint.save(tmp_path)
    model = checkpoint.load(tmp_path)
    ref = rzc.put(model)
    expected = describe(model)
    assert_same_description(expected, ray.get(reader.describe.remote(ref)))
    ref = rzc.build(checkpoint.load, tmp_path)
    expected = describe(weights(model))
    assert_same_description(expected, ray.get(reader.describe_weights.remote(ref)))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("shard", ["50GB", "5MB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_is_saved_as_its_source_is_and_not_copied(cluster, tmp_path, tied, shard):
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, num_hidden_layers=2, tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(config)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "source", max_shard_size=shard)
    loaded = ray.get(rzc.put(model))
    save = lambda: loaded.save_pretrained(tmp_path / "loaded", max_shard_size=shard)  # noqa: E731
    _, peak = with_peak(save)
    assert peak < 0.05 * nbytes
    assert bytes_of(tmp_path / "loaded") == bytes_of(tmp_path / "source")

    distinct = {tensor.data_ptr(): (name, tensor) for name, tensor in loaded.state_dict().items()}
    _, peak = with_peak(lambda: save_file(dict(distinct.values()), tmp_path / "file"))
    assert peak < 0.05 * nbytes


CONFIG = """
from transformers import PretrainedConfig

class RemoteConfig(PretrainedConfig):
    model_type = "remote"

    def __init__(self, width=8, **others):
        super().__init__(**others)
        self.width = width
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_remote import RemoteConfig

def doubled(x):
    return 2 * x

class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        return doubled(self.linear(x))
"""


def test_a_class_that_came_with_a_checkpoint_loads_where_nobody_has_it(cluster, tmp_path):
    """`trust_remote_code=True`: plain Ray fails with No module named 'transformers_modules'."""
    (tmp_path / "configuration_remote.py").write_text(CONFIG)
    (tmp_path / "modeling_remote.py").write_text(MODEL)
    auto = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModel": "modeling_remote.RemoteModel",
    }
    config = {"model_type": "remote", "width": 8, "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModel.from_config(
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True), trust_remote_code=True
    )
    assert type(model).__module__.startswith("transformers_modules.")

    @ray.remote(num_cpus=0)
    def run(model, x):
        return type(model).__name__, model.config.width, model(x)

    x = torch.ones(2, 8)
    name, width, output = ray.get(run.remote(rzc.put(model), x))
    assert (name, width) == ("RemoteModel", 8)
    assert torch.equal(output, model(x))
