"""Three models in one Ray Data pass: encode images, classify them, and recheck doubtful ones.

The example draws its images: discs, squares and crosses, with noise. Run it with
`python examples/pipeline.py`.
"""

import numpy as np
import ray
import ray_zerocopy as rzc
import torch

SIZE, SHAPES = 24, ("disc", "square", "cross")


def draw(row):
    """A shape in the middle of an image, for the row's number."""
    generator = np.random.default_rng(row["id"])
    label = int(generator.integers(len(SHAPES)))
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    radius = generator.integers(5, 9)
    shape = {
        "disc": x**2 + y**2 < radius**2,
        "square": np.maximum(abs(x), abs(y)) < radius * 0.8,
        "cross": (np.minimum(abs(x), abs(y)) < 2) & (np.maximum(abs(x), abs(y)) < radius),
    }[SHAPES[label]]
    image = shape + generator.normal(0, 0.2, (SIZE, SIZE))
    return {"image": image.astype(np.float32)[None], "label": label}


class Recognizer(torch.nn.Module):
    """An encoder, a fast classifier, and a careful one for images that the first is unsure of."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 5, stride=2, padding=2),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
        ).to(memory_format=torch.channels_last)
        width = 32 * (SIZE // 4) ** 2
        self.quick = torch.nn.Linear(width, len(SHAPES))
        self.careful = torch.nn.Sequential(
            torch.nn.Linear(width, 128), torch.nn.ReLU(), torch.nn.Linear(128, len(SHAPES))
        )

    def forward(self, image):
        features = self.encoder(image)
        quick, careful = self.quick(features), self.careful(features)
        doubtful = quick.softmax(1).amax(1, keepdim=True) < 0.9
        return torch.where(doubtful, careful, quick)


def trained(images, labels, steps=60):
    torch.manual_seed(0)
    model = Recognizer()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        features = model.encoder(images)
        loss = sum(
            torch.nn.functional.cross_entropy(head(features), labels)
            for head in (model.quick, model.careful)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main():
    rows = [draw({"id": 1000 + index}) for index in range(192)]
    images = torch.from_numpy(np.stack([row["image"] for row in rows]))
    model = trained(images, torch.tensor([row["label"] for row in rows]))

    dataset = ray.data.range(256).map(draw)
    scored = rzc.data.map_batches(
        dataset,
        model,
        inputs="image",
        actors=2,
        batch_size=64,
        postprocess=lambda logits: {"shape": logits.argmax(1)},
    )
    rows = scored.take_all()
    right = np.mean([row["shape"] == row["label"] for row in rows])
    print(f"{len(rows)} images, {right:.0%} of them recognized, by two actors with one model")
    assert right > 0.8


if __name__ == "__main__":
    ray.init(num_cpus=4, object_store_memory=300_000_000)
    main()
    ray.shutdown()
