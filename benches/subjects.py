"""The models to measure: seeded, built on demand, without downloads."""

import numpy as np
import torch
from models import bert_base  # tests/models
from torch import nn


def bert_large():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
        )
    )


def llama(layers=15, tied=True):
    """1 GiB of bfloat16, the output layer tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=5120,
        num_hidden_layers=layers,
        num_attention_heads=12,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def mixtral(layers=8):
    """743 MiB of bfloat16. A checkpoint has each expert alone; a load merges them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=1024,
        intermediate_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=8000,
        dtype=torch.bfloat16,
    )
    return MixtralForCausalLM(config).to(torch.bfloat16)


def conv_net():
    """504 small tensors: 84 blocks of a convolution and a BatchNorm."""
    blocks = ((nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(84))
    return nn.Sequential(*(layer for block in blocks for layer in block))


def deep_net():
    """1,440 tiny tensors in 160 layers."""
    return nn.Sequential(*(DeepLayer() for _ in range(160)))


class DeepLayer(nn.Module):
    """Nine tensors in five modules."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16, bias=False)

    def forward(self, x):
        return self.norm(x + self.out(self.query(x) * self.key(x) + self.value(x)))


SUBJECTS = {
    "BERT-base": lambda: bert_base().model,
    "BERT-large": bert_large,
    "Llama-like, bf16, tied": llama,
    "conv net": conv_net,
    "160 layers": deep_net,
}

# BERT-base's size in 44 storages: adjacent in memory, or with gaps of their own size.
TOGETHER, SCATTERED = "together", "scattered"
# Rows of `Linear(1024, 1024)`, 4 MiB each, by size.
ROWS = {f"{4 * count:,} MiB": count for count in (4, 16, 64, 256)}


def build(name):
    torch.manual_seed(0)
    if name in ROWS:
        return linears(ROWS[name], 1024)
    if name in (TOGETHER, SCATTERED):
        return in_pieces(44, step=1 if name == TOGETHER else 2)
    return SUBJECTS[name]().eval()


def sentence(tokens=7):
    """The input of a language model: one sequence."""
    return {"input_ids": torch.arange(1, 1 + tokens)[None]}


def untouched(gib):
    """Zeros in parts of 64 MiB, without memory behind them, because nobody has written to them."""
    flat = torch.from_numpy(np.zeros(gib << 30, np.uint8)).view(torch.bfloat16)
    return nn.ParameterList(nn.Parameter(part, False) for part in flat.split(32 << 20))


def in_pieces(count, step):
    """`count` tensors of 9 MiB: every `step`th of a sequence of allocations."""
    return nn.ParameterList([torch.ones(9 << 18) for _ in range(count * step)][::step])


def linears(count, width):
    """`count` Linears, with two tensors each."""
    return in_blocks(nn.Linear(width, width) for _ in range(count))


def one_module(tensors):
    """`tensors` tiny parameters in a single module."""
    return nn.ParameterList(torch.randn(4) for _ in range(tensors))


def bare_modules(count):
    """`count` modules without tensors, and one that has some."""
    return nn.Sequential(nn.Linear(64, 64), in_blocks(nn.ReLU() for _ in range(count)))


def in_blocks(layers):
    """Layers in blocks of 50, as in real models: `load_state_dict` is quadratic in a flat list."""
    layers = list(layers)
    return nn.Sequential(
        *(nn.Sequential(*layers[start : start + 50]) for start in range(0, len(layers), 50))
    )


def nbytes(model):
    """Bytes of the storages the model's tensors lie in, each counted once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count_tensors(model):
    return len([*model.parameters(), *model.buffers()])
