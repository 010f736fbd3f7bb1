"""A checkpoint: from its file into the store, to a snapshot, and back at the disk's speed.

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

        # What is mapped is read from the file, and never passes through private memory.
        weights = rzc.put(torch.load(checkpoint, mmap=True))
        print("as it stands:", f"{rzc.inspect(weights).nbytes:,} bytes")

        # What is cast lies in shared memory from the start.
        ref = rzc.build(load_half, checkpoint)
        print("cast:", f"{rzc.inspect(ref).nbytes:,} bytes, {rzc.inspect(ref).dtypes}")

        # The cast is done once: a snapshot is the block as a file.
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
