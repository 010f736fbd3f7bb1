"""Models for everyday use, by size: kilobytes, 64 MiB, and BERT as it comes."""

import torch
from torch import nn

from models.architectures import text
from models.case import Case, mlp, seeded


@seeded
def simple() -> Case:
    """A three-layer perceptron of a few kilobytes."""
    return Case(mlp(16, 32, 32, 4).eval(), (torch.randn(3, 16),))


@seeded
def large() -> Case:
    """A perceptron of 64 MiB whose activations are a few kilobytes."""
    return Case(mlp(2048, 2048, 2048, 2048, 2048).eval(), (torch.randn(2, 2048),))


class Transformer(nn.Module):
    """Embedding, self-attention and a head tied to the embedding."""

    def __init__(self, vocab=97, width=32, heads=4, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, vocab)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)))


@seeded
def transformer() -> Case:
    """A small encoder with attention and tied weights."""
    return Case(Transformer().eval(), (torch.randint(0, 97, (2, 7)),))


@seeded
def bert_base() -> Case:
    """BERT-base by its default configuration: 201 tensors, 418 MiB."""
    from transformers import BertConfig, BertModel

    return Case(BertModel(BertConfig()).eval(), kwargs=text())
