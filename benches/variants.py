"""Classifiers on one backbone: BERT-base, and variants with different poolers."""

import random
import time
from statistics import median

import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy.store.ray_inside import located
from rivals import Ours, PlainRay

VARIANTS = 20
COUNTS = (1, 2, 5, 10, 20)
_ROUNDS = 20


def change(model):
    """Turn the model into a new variant."""
    with torch.no_grad():
        model.pooler.dense.weight.add_(1)


def memory_of_node(model):
    """{rival: bytes of the store for the backbone and n variants, for each n in COUNTS}."""
    refs, totals = [rzc.put(model)], {PlainRay.name: [], Ours.name: []}
    whole = ours = located(refs[0])[1]
    for number in range(1, VARIANTS + 1):
        change(model)
        refs.append(rzc.put(model, base=refs[0]))
        ours += located(refs[-1])[1]
        whole += located(ray.put(model))[1]
        if number in COUNTS:
            totals[PlainRay.name].append(whole)
            totals[Ours.name].append(ours)
    return totals


def times_of_variant(model):
    """{step: median seconds}, in turns: put and load a variant, whole and over its base."""
    base = rzc.put(model)
    change(model)
    refs = {"whole": rzc.put(model), "over its base": rzc.put(model, base=base)}
    acts = {
        ("put", "whole"): lambda: rzc.put(model),
        ("put", "over its base"): lambda: rzc.put(model, base=base),
        ("load", "whole"): lambda: rzc.get(refs["whole"]),
        ("load", "over its base"): lambda: rzc.get(refs["over its base"]),
    }
    seconds = {what: [] for what in acts}
    for number in range(_ROUNDS):
        for what in random.Random(number).sample(list(acts), len(acts)):
            start = time.perf_counter()
            made = acts[what]()
            seconds[what].append(time.perf_counter() - start)
            del made
            time.sleep(0.05)  # dropped memory is unmapped meanwhile
    return {what: median(each) for what, each in seconds.items()}
