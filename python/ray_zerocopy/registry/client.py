"""Call the catalog from any process, and start it if there is none."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

import ray

from ray_zerocopy.errors import CatalogError, RayZeroCopyError, UnknownVersionError
from ray_zerocopy.registry import manifest
from ray_zerocopy.registry.catalog import NAMESPACE, START_S
from ray_zerocopy.store import references
from ray_zerocopy.store.ray_inside import cluster, outside_of_jobs

logger = logging.getLogger(__name__)

ANSWER_S = 60.0  # for a catalog that is busy or restarting


def is_running() -> bool:
    """Whether anything was ever published in this cluster; if so, the catalog runs after this."""
    references.refuse_client()
    try:
        catalog()
    except ValueError:
        if not manifest.names():
            return False
        start()
    return True


def running(name: str) -> None:
    """Raise `UnknownVersionError` if nothing was ever published."""
    if not is_running():
        raise UnknownVersionError(
            f"nothing is published as {name!r}: nothing at all was published in this cluster"
        )


def catalog() -> Any:
    """Return the handle of the catalog; raises `ValueError` if there is none."""
    return _actor("catalog")


def owner() -> Any:
    """Return the handle of the owner; raises `ValueError` if there is none."""
    return _actor("owner")


def _actor(name: str) -> Any:
    """Look up an actor, once per connection: each lookup is a message to the GCS."""
    global _found, _where
    here = f"{cluster()} {ray.get_runtime_context().get_worker_id()}"
    if _where != here:
        _found, _where = {}, here
    if name not in _found:
        _found[name] = ray.get_actor(name, NAMESPACE)
    return _found[name]


_found: dict[str, Any] = {}  # by name, for the connection `_where`
_where: str | None = None


def start(seconds: float = 2 * START_S) -> None:
    """Start the catalog if there is none: a few seconds, once per cluster.

    Raises `CatalogError` if it is not ready in time; it keeps starting.
    """
    references.refuse_client()
    try:
        catalog()
    except ValueError:
        pass
    else:
        return
    address = ray.get_runtime_context().gcs_address
    code = f"from ray_zerocopy.registry import catalog; catalog.start({address!r})"
    starting = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.sep,  # a folder without modules that a worker could import
        env=outside_of_jobs(dict(os.environ)),
    )
    try:
        _, told = starting.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        threading.Thread(target=starting.communicate, daemon=True).start()  # reaps it
        raise CatalogError(
            f"the catalog has not started in {seconds:.3g} s, and is still starting: try again"
        ) from None
    if starting.returncode:
        raise CatalogError(f"the catalog does not start: {told[-2000:]}")


def ask(method: str, *args: Any, seconds: float = ANSWER_S) -> Any:
    """Call the catalog; repeat the call while it restarts.

    Raises the catalog's own errors, and `CatalogError` if it does not answer in time.
    """
    ends_s = time.monotonic() + seconds
    while True:
        try:
            left_s = max(ends_s - time.monotonic(), 0.01)
            return ray.get(getattr(catalog(), method).remote(*args), timeout=left_s)
        except RayZeroCopyError as error:
            raise getattr(error, "cause", error) from None
        except ray.exceptions.GetTimeoutError:
            raise CatalogError(f"the catalog took more than {seconds:.3g} s to {method}") from None
        except (ray.exceptions.RayActorError, ValueError) as error:
            _forget()
            if time.monotonic() > ends_s:
                told = f"no catalog for {seconds:.3g} s, so it could not {method}: {error}"
                raise CatalogError(told) from error
            time.sleep(random.uniform(0.1, 0.3))
        except ray.exceptions.RayTaskError as error:
            raise CatalogError(f"the catalog could not {method}: {error.cause}") from error


def _forget() -> None:
    _found.clear()


def tell(method: str, *args: Any) -> None:
    """Call the catalog without waiting for it."""
    try:
        getattr(catalog(), method).remote(*args)
    except (ray.exceptions.RayError, ValueError) as error:
        logger.warning("the catalog could not be told to %s: %s", method, error)
