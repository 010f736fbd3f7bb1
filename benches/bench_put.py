"""Publishing, by pytest-benchmark: `pytest benches/bench_put.py --benchmark-only`.

Into pages of the store written to before, each publish after the one before it is gone.
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
