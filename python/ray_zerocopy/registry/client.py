"""How a process asks the catalog, and starts it where there is none."""

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

ANSWER_S = 60.0  # for a catalog that is busy, or starting again


def is_running() -> bool:
    """Whether anything was ever published in this cluster; its catalog is then there to ask."""
    references.refuse_client()
    try:
        catalog()
    except ValueError:
        if not manifest.names():
            return False
        start()
    return True


def running(name: str) -> None:
    """Raise `UnknownVersionError` where nothing was ever published."""
    if not is_running():
        raise UnknownVersionError(f"nothing is published as {name!r}, nor anything else here")


def catalog() -> Any:
    """Give the handle of the catalog; raises `ValueError` where there is none."""
    return _actor("catalog")


def owner() -> Any:
    """Give the handle of the owner; raises `ValueError` where there is none."""
    return _actor("owner")


def _actor(name: str) -> Any:
    """Look for an actor, once in a connection: to find it by its name is a message to the GCS."""
    global _found, _where
    here = f"{cluster()} {ray.get_runtime_context().get_worker_id()}"
    if _where != here:
        _found, _where = {}, here
    if name not in _found:
        _found[name] = ray.get_actor(name, NAMESPACE)
    return _found[name]


_found: dict[str, Any] = {}  # by name, in this connection:
_where: str | None = None


def start(seconds: float = 2 * START_S) -> None:
    """Start the catalog where there is none; it takes a few seconds, once in a cluster's life.

    Raises `CatalogError` where it is not there in time: it goes on starting.
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
        cwd=os.path.sep,  # beside no script, and in no folder whose modules a worker would find
        env=outside_of_jobs(dict(os.environ)),
    )
    try:
        _, told = starting.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        threading.Thread(target=starting.communicate, daemon=True).start()  # reaps it
        raise CatalogError(
            f"the catalog has not started in {seconds:.3g} s, and goes on starting: try again"
        ) from None
    if starting.returncode:
        raise CatalogError(f"the catalog does not start: {told[-2000:]}")


def ask(method: str, *args: Any, seconds: float = ANSWER_S) -> Any:
    """Call the catalog; one that is starting again is asked again.

    Raises what it raises, and `CatalogError` where it does not answer in time.
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
                told = f"the catalog is not there to {method}, for {seconds:.3g} s: {error}"
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
