"""Publishing, by pytest-benchmark: `pytest benches/bench_put.py --benchmark-only`.

The store's pages were written to before. The previous object is freed before each publish.
"""

import pytest
import subjects
from duel import settle
from rivals import CONTENDERS


@pytest.fixture(scope="module", params=["BERT-base", "conv net", "160 layers"])
def subject(request):
    return request.param, subjects.build(request.param)


@pytest.mark.parametrize("rival", CONTENDERS, ids=lambda rival: rival.name)
def test_put(benchmark, subject, rival):
    name, model = subject
    ready = rival.prepare(model)
    handles = []

    def clear():
        while handles:
            rival.withdraw(handles.pop())
        settle()

    benchmark.group = f"publish {name}"
    try:
        benchmark.pedantic(
            lambda: handles.append(rival.publish(ready)), setup=clear, rounds=5, warmup_rounds=1
        )
    finally:
        clear()
