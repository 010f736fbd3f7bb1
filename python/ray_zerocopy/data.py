"""Ray Data: a pool of actors that run one shared model on batches."""

from __future__ import annotations

from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from ray_zerocopy.batches.predictor import Predictor, split_options
from ray_zerocopy.wrappers import wrap

__all__ = ["Predictor", "map_batches"]


def map_batches(
    dataset: Dataset, model: Any, *, actors: int | tuple[int, int] | None = None, **options: Any
) -> Dataset:
    """Add a model's outputs to a dataset as columns; a pool of actors shares one model.

    The block lives as long as the dataset, and datasets made from it.

    Args:
        dataset: `preprocess`, or the model, gets its batches as dicts of arrays.
        model: as for `Predictor`.
        actors: their number, or minimum and maximum; default: Ray Data decides.
        options: options of `Predictor`, such as `inputs` and `postprocess`; all others go to
            `Dataset.map_batches`, such as `batch_size` and `num_gpus`.

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
