"""One Ray for the benches of a file. All pages of its store were written to before."""

import pytest
from duel import session, touch_store
from page import GIB


@pytest.fixture(scope="module", autouse=True)
def ray_session():
    with session(4 * GIB):
        touch_store()
        yield
