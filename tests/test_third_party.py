"""Models with parts of other libraries: the laws of `test_put.py` hold.

Each case runs only if its library is installed; the extra `third-party` has them all.
Models are made from configurations, nothing is fetched.
"""

import shutil
from dataclasses import replace

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_exact, assert_same_description, describe
from models import ARCHITECTURES, Case, entry
from torch import nn

CASES = {}
_case = entry(CASES)


def _library(name):
    return pytest.importorskip(name, exc_type=ImportError)


def _image():
    return (torch.randn(2, 3, 64, 64),)


@_case
def accelerate_hooks():
    hooks = _library("accelerate.hooks")
    case = ARCHITECTURES["bert"]()
    hooks.add_hook_to_module(case.model, hooks.AlignDevicesHook(io_same_device=True))
    return case


@_case
def peft_lora():
    peft = _library("peft")
    case = ARCHITECTURES["bert"]()
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    return replace(case, model=peft.get_peft_model(case.model, config).eval())


@_case
def timm_vit():
    create = _library("timm").create_model
    return Case(create("vit_tiny_patch16_224", img_size=64).eval(), _image())


@_case
def timm_efficientnet():
    return Case(_library("timm").create_model("efficientnet_b0").eval(), _image())


@_case
def torchvision_resnet():
    return Case(_library("torchvision").models.resnet18().eval(), _image())


@_case
def torchvision_detector():
    detection = _library("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    return Case(model, ([torch.rand(3, 64, 64)],))


@_case
def torchvision_features():
    """A graph module that torchvision traced."""
    extraction = _library("torchvision.models.feature_extraction")
    net = torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    return Case(extraction.create_feature_extractor(net, {"1": "norm", "2": "relu"}), _image())


@_case
def sentence_transformer():
    models = _library("sentence_transformers.models")
    parts = [models.Pooling(32), models.Dense(32, 8), models.Normalize()]
    pipeline = _library("sentence_transformers").SentenceTransformer(modules=parts, device="cpu")
    features = {"token_embeddings": torch.randn(2, 7, 32), "attention_mask": torch.ones(2, 7)}
    return Case(pipeline.eval(), call=lambda m: m(dict(features))["sentence_embedding"])


@_case
def diffusers_unet():
    diffusers = _library("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    parts = {"unet": unet.eval(), "scheduler": diffusers.DDIMScheduler()}
    x = torch.randn(1, 3, 8, 8)
    return Case(parts, (x,), call=lambda m, x: m["unet"](x, 10).sample)


@_case
def diffusers_vae():
    vae = _library("diffusers").AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    return Case(vae, (torch.randn(1, 3, 8, 8),), call=lambda m, x: m(x).sample)


@_case
def lightning_module():
    lightning = _library("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, width=8):
            super().__init__()
            self.save_hyperparameters()
            self.linear = nn.Linear(width, 4)

        def forward(self, x):
            return self.linear(x)

    return Case(Classifier(), (torch.randn(3, 8),))


@_case
def graph_network():
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    return Case(_library("torch_geometric.nn").GAT(4, 8, 2).eval(), (torch.randn(3, 4), edges))


@pytest.fixture(scope="module")
def reader(start):
    (reader,) = start(Reader)
    return reader


class Reader:
    def take(self, loaded, case):
        return describe(loaded), describe(case.run(loaded))


@pytest.mark.parametrize("name", CASES)
def test_a_library_s_model_comes_back_everywhere(name, reader):
    case = CASES[name]()
    ref = rzc.put(case.model)
    assert_exact(case.model, ray.get(ref))
    described, output = ray.get(reader.take.remote(ref, replace(case, model=None)))
    assert_same_description(describe(case.model), described)
    assert_same_description(describe(case.run()), output)


def test_a_memory_mapped_tensordict_lies_on_the_block(cluster, tmp_path):
    """It pickles as the names of its files, which may be gone, or on another node."""
    tensordict = _library("tensordict")
    plain = tensordict.TensorDict({"a": torch.randn(99, 3), "in": {"b": torch.arange(99)}}, [99])
    plain.memmap(tmp_path / "files")
    ref = rzc.put(tensordict.TensorDict.load_memmap(tmp_path / "files"))
    assert len(rzc.inspect(ref).tensors) == 2
    shutil.rmtree(tmp_path / "files")
    loaded = ray.get(ref)
    assert (loaded == plain).all()
    loaded["a"][3] = 7
    assert (ray.get(ref) == plain).all()
