"""Train LoRA adapters on one frozen base: trainers share the base and own their adapters.

Run it with `python examples/lora.py`.
"""

import psutil
import ray
import ray_zerocopy as rzc
import torch

WIDTH, RANK, CLASSES = 1024, 8, 4


class Adapted(torch.nn.Module):
    """A frozen linear layer plus a trainable low-rank correction (arXiv:2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(RANK, base.in_features) / RANK)
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@ray.remote(num_cpus=1)
class Trainer:
    """Learns its own task; the optimizer has only the adapters."""

    def __init__(self, refs, seed):
        torch.manual_seed(seed)
        memory = psutil.Process().memory_full_info
        before = memory().uss
        base = ray.get(refs[0])
        self.private = lambda: memory().uss - before
        for index, layer in enumerate(base):
            if isinstance(layer, torch.nn.Linear):
                base[index] = Adapted(layer)
        self.model = torch.nn.Sequential(base, torch.nn.Linear(WIDTH, CLASSES))
        self.data = torch.randn(256, WIDTH)
        self.labels = torch.randint(CLASSES, (256,))

    def train(self, steps):
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, 1e-3)
        losses = []
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(self.model(self.data), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1], sum(p.numel() for p in trainable), self.private()

    def base_sum(self):
        return sum(p.double().sum().item() for p in self.model.parameters() if not p.requires_grad)


def main():
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]
    base = torch.nn.Sequential(*layers).requires_grad_(False)
    nbytes = sum(p.nbytes for p in base.parameters())
    ref = rzc.put(base)

    trainers = [Trainer.remote([ref], seed) for seed in range(2)]
    for seed, (first, last, count, private) in enumerate(
        ray.get([trainer.train.remote(20) for trainer in trainers])
    ):
        assert last < first
        print(
            f"trainer {seed}: loss {first:.3f} to {last:.3f}, {count:,} trainable parameters, "
            f"{private / 2**20:.0f} MiB of its own beside a base of {nbytes / 2**20:.0f} MiB"
        )
    sums = ray.get([trainer.base_sum.remote() for trainer in trainers])
    assert sums[0] == sums[1] == sum(p.double().sum().item() for p in base.parameters())


if __name__ == "__main__":
    ray.init(num_cpus=2, object_store_memory=300_000_000)
    main()
    ray.shutdown()
