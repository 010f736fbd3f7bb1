"""Tiny checkpoints of real architectures, saved, and loaded as users do.

`CHECKPOINTS` maps a name to a `Checkpoint` of transformers, or of an `Other` library. The result of
`load` depends only on the files.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import ARCHITECTURES
from safetensors.torch import save_file

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True)
class Checkpoint:
    """An architecture of `models/`, with arguments of `save_pretrained` and `from_pretrained`."""

    architecture: str
    saved: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    kind: str = ""  # the class that loads it, if another one saved it
    quantize: Callable[[], Any] | None = None

    def save(self, path):
        """Write the checkpoint to a folder."""
        model = ARCHITECTURES[self.architecture]().model
        if self.quantize:
            model.save_pretrained(path / "plain")
            how = {"quantization_config": self.quantize(), "dtype": model.dtype}
            model = type(model).from_pretrained(path / "plain", **how)
        model.save_pretrained(path, **self.saved)

    def load(self, path):
        """Load it as users do; seeded, because weights that a checkpoint lacks are random."""
        import transformers

        if not (kind := self.kind):
            (kind,) = transformers.AutoConfig.from_pretrained(path).architectures
        torch.manual_seed(0)
        return getattr(transformers, kind).from_pretrained(path, **self.loaded)


@dataclass(frozen=True)
class Other:
    """A checkpoint of another library; `save` and `load` take its folder."""

    save: Callable[[Path], None]
    load: Callable[[Path], Any]


def _save_bert(path):
    ARCHITECTURES["bert"]().model.save_pretrained(path)


def _load_dispatched(path):
    import accelerate
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with accelerate.init_empty_weights():
        model = transformers.AutoModel.from_config(config)
    how = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    return accelerate.load_checkpoint_and_dispatch(model, path, **how)


def _save_unet(path):
    import diffusers

    diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).save_pretrained(path)


def _load_unet(path, **how):
    import diffusers

    return diffusers.UNet2DModel.from_pretrained(str(path), **how)


def _save_vae(path):
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(path, safe_serialization=False)


def _load_vae(path):
    import diffusers

    return diffusers.AutoencoderKL.from_pretrained(str(path), use_safetensors=False)


def _save_timm(path):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), path / "vit.safetensors")


def _load_timm(path):
    import timm

    return timm.create_model("test_vit", checkpoint_path=path / "vit.safetensors").half()


def _int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


_AS_SAVED = (
    *("albert", "bart", "bert", "bloom", "clip", "convnext", "deberta_v2", "deepseek_v3"),
    *("falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mamba", "mistral", "mixtral"),
    *("modernbert", "opt", "phi", "qwen2", "resnet", "roberta", "swin", "t5", "vit"),
    *("wav2vec2", "whisper"),
)

CHECKPOINTS = {name: Checkpoint(name) for name in _AS_SAVED} | {
    "mistral, sharded": Checkpoint("mistral", saved={"max_shard_size": "20KB"}),
    "llama, tied, sharded": Checkpoint("llama", saved={"max_shard_size": "10KB"}),
    "gpt2, cast": Checkpoint("gpt2", loaded={"dtype": torch.bfloat16}),
    "mixtral, sharded, cast": Checkpoint(
        "mixtral", saved={"max_shard_size": "20KB"}, loaded={"dtype": torch.float16}
    ),
    "bert, a new head": Checkpoint("bert", kind="BertForSequenceClassification"),
    "llama, int8": Checkpoint("llama", quantize=_int8),
    "accelerate, dispatched and cast": Other(_save_bert, _load_dispatched),
    "diffusers, unet": Other(_save_unet, _load_unet),
    "diffusers, unet, cast": Other(_save_unet, partial(_load_unet, torch_dtype=torch.bfloat16)),
    "diffusers, vae": Other(_save_vae, _load_vae),
    "timm, halved": Other(_save_timm, _load_timm),
}
