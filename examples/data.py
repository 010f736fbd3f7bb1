"""Batch inference with Ray Data: a pool of actors over one shared model.

Run it with `python examples/data.py`.
"""

import numpy as np
import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy.data import map_batches


class Classifier:
    """A class of your own: it takes the reference and calls `rzc.get`."""

    def __init__(self, ref):
        self.model = rzc.get(ref)

    def __call__(self, batch):
        with torch.inference_mode():
            batch["class"] = self.model(torch.tensor(batch["data"])).argmax(1).numpy()
        return batch


def classes(logits):
    return {"class": logits.argmax(1), "logit": logits.amax(1)}


def main():
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    rows = ray.data.from_numpy(np.random.default_rng(0).random((400, 16), np.float32))

    # In one line: the model's outputs become new columns.
    found = map_batches(
        rows, model, actors=2, batch_size=50, num_cpus=0.5, postprocess=classes
    ).to_pandas()
    print(f"{len(found)} rows, by class: {found['class'].value_counts().to_dict()}")

    # The same with your own class.
    by_hand = rows.map_batches(
        Classifier,
        fn_constructor_kwargs={"ref": rzc.put(model)},
        batch_size=50,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=2),
        zero_copy_batch=False,
    ).to_pandas()
    assert sorted(found["class"]) == sorted(by_hand["class"])


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
