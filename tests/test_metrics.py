"""Events are counted, by name and kind of pages, and reach Ray's Prometheus endpoint."""

import json
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import ray_zerocopy as rzc
import torch
from ray_zerocopy import metrics

NAME = "metrics/model"


@pytest.fixture
def recorded(cluster, monkeypatch):
    """The recorded events, instead of those passed to Ray a second later."""
    recorded = []
    monkeypatch.setattr(metrics, "record", lambda *record: recorded.append(record))
    return recorded


def values(recorded, metric):
    return [record[1:] for record in recorded if record[0] == metric]


def test_a_put_and_its_loads_are_counted(recorded):
    ref = rzc.put(torch.ones(100_000))
    (nbytes,) = values(recorded, "rzc_published_bytes")
    assert nbytes[0] >= 400_000
    ray.get(ref)
    rzc.get(ref, isolation="copy")
    assert values(recorded, "rzc_loads") == [(1, "", "private"), (1, "", "copied")]
    assert len(values(recorded, "rzc_load_seconds")) == 2
    assert sum(value for value, _ in values(recorded, "rzc_mapped_bytes")) >= 800_000
    assert not values(recorded, "rzc_fallbacks")


def test_a_load_that_had_to_copy_is_a_fallback(recorded):
    @ray.remote(num_cpus=0)
    def small():
        return rzc.Shared(torch.ones(10))  # Ray sends it with the message

    ray.get(small.remote())
    assert values(recorded, "rzc_fallbacks") == [(1, "pages copied")]


def test_a_published_model_is_counted_under_its_name(recorded):
    rzc.publish(NAME, torch.ones(100_000))
    try:
        rzc.load(NAME)
        assert (1, NAME, "private") in values(recorded, "rzc_loads")
    finally:
        rzc.retire(NAME)


def test_what_is_restored_counts_as_published(recorded, tmp_path):
    rzc.save(torch.ones(100_000), tmp_path / "model.rzc")
    rzc.restore(tmp_path / "model.rzc")
    ((nbytes,),) = values(recorded, "rzc_published_bytes")
    assert nbytes >= 400_000


def test_a_gauge_is_set_again_until_it_is_zero(cluster, monkeypatch):
    class Gauge:
        def set(self, value, tags):
            sets.append((value, tags["name"]))
            if sets.count((3, "a")) >= 3:
                again.set()

    sets, again = [], threading.Event()
    monkeypatch.setattr(metrics, "_metric", lambda name: Gauge())
    monkeypatch.setattr(metrics, "_REPEAT_S", 0.01)
    metrics.record("rzc_followers", 3, "a")
    metrics.record("rzc_followers", 1, "b")
    metrics.record("rzc_followers", 0, "b")
    metrics.flush()
    assert again.wait(60)
    metrics.record("rzc_followers", 0, "a")
    metrics.flush()
    assert sets[-1] == (0, "a")
    assert sets.count((0, "b")) == 1
    assert not metrics._standing


SERIES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def test_the_dashboard_asks_for_every_metric_and_for_no_other():
    dashboard = json.loads((Path(metrics.__file__).parent / "operate/grafana.json").read_text())
    names = {
        f"ray_{name}{ending}": name
        for name, (kind, *_) in metrics._METRICS.items()
        for ending in SERIES[kind]
    }
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = set()
    for text in (*(target["expr"] for target in targets), *variables):
        (series,) = re.findall(r"ray_\w+", text)
        asked.add(names[series])
        labels = {"le", "NodeAddress", "SessionName", *metrics._METRICS[names[series]][2]}
        used = re.findall(r"by \(([^)]*)\)|(\w+)=~|, (\w+)\)$", text)
        assert set(", ".join(filter(None, sum(used, ()))).split(", ")) <= labels, text
    assert asked == set(metrics._METRICS)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in dashboard["panels"])


def test_what_is_recorded_reaches_the_nodes_endpoint(cluster):
    ray.get(rzc.put(torch.ones(100_000)))
    metrics.flush()
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while "ray_rzc_loads" not in (shown := urllib.request.urlopen(url).read().decode()):
        assert time.monotonic() < deadline, sorted(
            {line.split("{")[0] for line in shown.splitlines()}
        )
        time.sleep(1)
    assert 'held="private"' in shown
