"""Ray Data: a pool of actors that run batches through one shared model."""

from __future__ import annotations

from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from ray_zerocopy.batches.predictor import Predictor, split_options
from ray_zerocopy.wrappers import wrap

__all__ = ["Predictor", "map_batches"]


def map_batches(
    dataset: Dataset, model: Any, *, actors: int | tuple[int, int] | None = None, **options: Any
) -> Dataset:
    """Add a model's outputs to a dataset as columns; a pool of actors shares the one model.

    The block lives as long as the dataset does, or what is made from it.

    Args:
        dataset: whose batches reach `preprocess`, or the model, as a dict of arrays.
        model: as for `Predictor`.
        actors: how many, or the fewest and the most; without it Ray Data decides.
        options: those of `Predictor`, such as `inputs` and `postprocess`; the others go to
            `Dataset.map_batches`: `batch_size`, `num_gpus` and the rest.

    Example:
        >>> scored = rzc.data.map_batches(dataset, model, actors=4, batch_size=256)

    """
    if actors is not None:
        fewest, most = (actors, actors) if isinstance(actors, int) else actors
        options["compute"] = ActorPoolStrategy(min_size=fewest, max_size=most)
    how, options = split_options(options)
    how["model"] = wrap(model)
    options = {"batch_format": "numpy", "fn_constructor_kwargs": how, **options}
    return dataset.map_batches(Predictor, **options)
