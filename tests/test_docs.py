"""Every snippet of the README and of the site runs unchanged, one after the other."""

import re
from pathlib import Path

import pytest
import ray
import ray_zerocopy as rzc
import torch
from models import simple
from ray import serve

TOP = Path(__file__).parents[1]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = [
    page
    for page in (TOP / "README.md", *sorted((TOP / "docs").rglob("*.md")))
    if SNIPPET.search(page.read_text()) and "_build" not in page.parts
]


class Pipeline:
    """What the pages call `pipeline`."""

    def __init__(self):
        self.model = simple().model

    def __call__(self, x):
        return self.model(x).argmax(-1)


def given(path):
    """The names that pages use but do not define. The file contains the model."""
    case = simple()
    x = case.args[0]
    torch.save(case.model, path)
    return {
        "torch": torch,
        "model": case.model,
        "fine_tuned": case.model,
        "path": path,
        "pipeline": Pipeline(),
        "x": x,
        "batches": [x, x + 1],
        "dataset": ray.data.from_numpy(torch.randn(64, 16).numpy()),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_snippet_runs(page, cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    names, own = given(path), given(path)
    try:
        for snippet in SNIPPET.findall(page.read_text()):
            if page.name == "README.md":  # each of its snippets is independent
                names |= own | {"ref_a": names.get("ref"), "ref_b": names.get("ref")}
            exec(snippet.replace('device="cuda"', 'device="meta"'), names)
    finally:
        serve.shutdown()
    if page.name == "README.md":
        assert set(names["scored"].take(1)[0]) == {"data", "class"}
        for output, batch in zip(names["outputs"], own["batches"], strict=True):
            assert torch.equal(output, own["model"](batch))


def test_every_fault_names_a_test_that_exists():
    rows = re.findall(
        r"\| `(\S+)::(\S+)` \|$", (TOP / "docs/explanation/faults.md").read_text(), re.M
    )
    assert len(rows) >= 40
    for file, name in rows:
        assert re.search(rf"(def|fn) {name}\(", (TOP / file).read_text()), (file, name)


def test_nothing_of_ours_listens_on_a_port():
    files = [*(TOP / "python").rglob("*.py"), *(TOP / "rust").rglob("*.rs")]
    assert len(files) > 40
    for file in files:
        shipped = file.read_text().split("#[cfg(test)]")[0]
        assert not re.search(r"\blisten\(|Listener|\bsocket\(", shipped), file


def test_troubleshooting_has_each_error_and_warning():
    page = (TOP / "docs/how-to/troubleshooting.md").read_text()
    for name in rzc.__all__:
        if name.endswith(("Error", "Warning")):
            assert f"`{name}`" in page or name == "RayZeroCopyError"
