"""Loading, by pytest-benchmark: `pytest benches/bench_load.py --benchmark-only`.

This process is the warm worker. Each model is a group of rivals. On a busy machine use `report.py`,
where the rivals take turns.
"""

import pytest
import subjects
from duel import enlist, silence
from rivals import CONTENDERS


@pytest.fixture(scope="module", params=["BERT-base", "conv net", "160 layers"])
def published(request):
    """The model's name, {rival: handle}, and {rival: error}."""
    entries, refusals = enlist(CONTENDERS, subjects.build(request.param))
    yield request.param, {rival.name: handle for rival, handle in entries}, refusals
    for rival, handle in entries:
        rival.withdraw(handle)


@pytest.mark.parametrize("rival", CONTENDERS, ids=lambda rival: rival.name)
def test_load(benchmark, published, rival):
    subject, handles, refusals = published
    if rival.name in refusals:
        pytest.skip(refusals[rival.name])
    benchmark.group = f"load {subject}"
    with silence():
        benchmark.pedantic(rival.load, args=(handles[rival.name],), rounds=10, warmup_rounds=2)
