"""Workers that serve many tests, one after the other: to start one takes 2 s of imports.

    start(Reader)  ──▶  Guest ── method.remote(...) ──▶  Host, an actor ──▶  the Reader in it

A guest is used like the handle of an actor. Who needs a worker that is new, or to kill, or one with
coroutines starts an actor of its own.
"""

import gc
import itertools
from functools import partial
from types import SimpleNamespace


class Host:
    """Holds what tests have put into this worker."""

    def __init__(self):
        self.guests = {}

    def enter(self, key, cls):
        self.guests[key] = cls()

    def call(self, key, method, *args):
        return getattr(self.guests[key], method)(*args)

    def leave(self, key):
        del self.guests[key]
        gc.collect()


class Guest:
    """The handle of an object in a host; it travels like that of an actor."""

    _keys = itertools.count()

    def __init__(self, host, cls):
        self.host, self.key = host, next(self._keys)
        host.enter.remote(self.key, cls)

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=partial(self.host.call.remote, self.key, method))

    def leave(self):
        self.host.leave.remote(self.key)
