"""Every snippet of the README runs as it stands, one after the other."""

import re
from pathlib import Path

import ray
import torch
from models import simple
from ray import serve

README = Path(__file__).parents[1] / "README.md"


class Pipeline:
    """What the README calls `pipeline`."""

    def __init__(self):
        self.model = simple().model

    def __call__(self, x):
        return self.model(x).argmax(-1)


def test_every_snippet_runs(cluster):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 8
    case = simple()
    x = case.args[0]
    given = {
        "model": case.model,
        "pipeline": Pipeline(),
        "x": x,
        "batches": [x, x + 1],
        "dataset": ray.data.from_numpy(torch.randn(64, 16).numpy()),
    }
    names = {"torch": torch}
    try:
        for snippet in snippets:
            names |= given | {"ref_a": names.get("ref"), "ref_b": names.get("ref")}
            exec(snippet.replace('device="cuda"', 'device="meta"'), names)
    finally:
        serve.shutdown()
    assert set(names["scored"].take(1)[0]) == {"data", "class"}
    assert all(torch.equal(output, case.model(x)) for output in names["outputs"])
