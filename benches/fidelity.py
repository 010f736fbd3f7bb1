"""What survives publish and load, for every rival: one small model for each trait.

A trait is a model and a law: `law(source, load)`. Each `load()` loads the model again.
"""

import torch
from duel import shared, silence
from torch import nn


def linear():
    return nn.Linear(64, 64)


def tied():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    return model


def two_views_of_one_storage():
    model, flat = nn.Sequential(linear(), linear()), torch.randn(2, 64, 64)
    model[0].weight, model[1].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    return model


def transposed():
    model = linear()
    model.weight = nn.Parameter(torch.randn(64, 64).T)
    return model


def hidden_buffer():
    model = linear()
    model.register_buffer("mask", torch.ones(64), persistent=False)
    return model


def is_tied(_, load):
    model = load()
    return model[0].weight is model[1].weight


def shares_storage(_, load):
    first, second = (layer.weight.untyped_storage().data_ptr() for layer in load())
    return first == second


def has_same_values(source, load):
    return torch.equal(load().weight, source.weight)


def has_same_strides(source, load):
    return load().weight.stride() == source.weight.stride()


def has_same_mode(source, load):
    return load().training == source.training


def has_same_requires_grad(source, load):
    return load().weight.requires_grad == source.weight.requires_grad


def has_same_state_dict_keys(source, load):
    return list(load().state_dict()) == list(source.state_dict())


def has_gradients(_, load):
    model = load()
    model(torch.randn(2, 64)).sum().backward()
    return model.weight.grad is not None


def hides_writes(source, load):
    with torch.inference_mode():  # some rivals' tensors are writable only in this mode
        load().weight.zero_()
    return has_same_values(source, load)


TRAITS = {
    "a write stays with the writer": (linear, hides_writes),
    "tied Parameters are one object": (tied, is_tied),
    "views share their storage": (two_views_of_one_storage, shares_storage),
    "strides": (transposed, has_same_strides),
    "bfloat16": (lambda: linear().to(torch.bfloat16), has_same_values),
    "training mode": (lambda: linear().train(), has_same_mode),
    "requires_grad": (lambda: linear().requires_grad_(False), has_same_requires_grad),
    "non-persistent buffers": (hidden_buffer, has_same_state_dict_keys),
    "autograd through the model": (linear, has_gradients),
}


def obeys(rival, factory, law):
    """Whether the law holds. An exception of the rival counts as no."""
    source = factory()
    try:
        with silence(), shared(rival, source) as handle:
            return law(source, lambda: rival.load(handle))
    except Exception:  # rivals raise all kinds of exceptions
        return False
