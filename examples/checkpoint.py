"""Put a checkpoint into the store, save it as a snapshot, and restore it at the disk's speed.

Run it with `python examples/checkpoint.py`.
"""

import tempfile
from pathlib import Path

import ray
import ray_zerocopy as rzc
import torch


def network():
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(512, 512), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers)


def load_half(path):
    """A loader that casts, as `from_pretrained(dtype=torch.bfloat16)` does."""
    model = network()
    model.load_state_dict(torch.load(path, mmap=True))
    return model.to(torch.bfloat16).eval()


@ray.remote(num_cpus=0)
def answer(model, x):
    with torch.inference_mode():
        return model(x)


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, snapshot = Path(folder, "weights.pt"), Path(folder, "model.rzc")
        torch.save(network().state_dict(), checkpoint)

        # The loader maps the file: `put` reads it directly, without a copy in private memory.
        weights = rzc.put(torch.load(checkpoint, mmap=True))
        print("as it stands:", f"{rzc.inspect(weights).nbytes:,} bytes")

        # The loader casts: `build` puts the result into shared memory from the start.
        ref = rzc.build(load_half, checkpoint)
        print("cast:", f"{rzc.inspect(ref).nbytes:,} bytes, {rzc.inspect(ref).dtypes}")

        # A snapshot is the block as a file, so the cast is done only once.
        rzc.save(ref, snapshot)
        print(rzc.inspect(snapshot, verify=True))
        restored = rzc.restore(snapshot)

        x = torch.ones(1, 512, dtype=torch.bfloat16)
        before, after = ray.get([answer.remote(each, x) for each in (ref, restored)])
        assert torch.equal(before, after)
        print("restored: the same output, to the bit")


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    main()
    ray.shutdown()
