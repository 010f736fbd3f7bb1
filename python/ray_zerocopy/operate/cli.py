"""The command `ray-zerocopy`. Every command prints text, or JSON with `--json`.

Exit codes: 0 success, 1 error or problem found, 2 usage, 3 no cluster.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import click
import ray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import ray_zerocopy as rzc
from ray_zerocopy.errors import RayZeroCopyError
from ray_zerocopy.operate import demo as demonstration
from ray_zerocopy.operate import doctor as examination
from ray_zerocopy.registry.publication import find_rebuilt, state
from ray_zerocopy.store.ray_inside import located

_REFUSED, _NO_CLUSTER = 1, 3
_CONNECT_S = 5.0
_REBUILT_S = 60.0
_WIDTH = 100
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
_TOLD = (RayZeroCopyError, ray.exceptions.RayError, OSError, ValueError)  # these say what to do

Command = Callable[..., Any]


class _Group(click.Group):
    """A group whose commands print errors in one line; `--debug` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            told = _one_line(error)
            if not isinstance(error, _TOLD):
                told = f"{type(error).__name__}: {told} (--debug shows where)"
            click.echo(f"ray-zerocopy: {told}", err=True)
            ctx.exit(_REFUSED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--address", help="Address of the cluster. Default: the cluster on this machine.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(rzc.__version__, prog_name="ray-zerocopy")
@click.pass_context
def main(ctx: click.Context, address: str | None, debug: bool) -> None:
    """Publish, list and inspect PyTorch models in Ray's object store."""
    ctx.obj = address


def _command(connects: bool = True, slow: bool = False) -> Callable[[Command], click.Command]:
    """Make a command with `--json` from a function that returns a value and a print function.

    `--json` prints the value. A slow command shows the elapsed time on a terminal.
    """

    def decorate(function: Command) -> click.Command:
        @functools.wraps(function)
        def run(ctx: click.Context, as_json: bool, **options: Any) -> None:
            with contextlib.ExitStack() as stack:
                if as_json:  # only JSON goes to standard output
                    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                if slow:
                    stack.enter_context(_working(ctx.info_name))
                if connects:
                    _connect(ctx)
                value, tell = function(**options)
            if as_json:
                click.echo(json.dumps(value, default=_plain, indent=2))
            else:
                tell()

        asks: Command = click.pass_context(run)
        asks = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(asks)
        return main.command(function.__name__.rstrip("_"))(asks)

    return decorate


def _connect(ctx: click.Context) -> None:
    if (error := _failure(ctx.obj or "auto")) is None:
        return
    if ctx.find_root().params.get("debug"):
        raise error
    there = f"at {ctx.obj}" if ctx.obj else "on this machine"
    message = f"no Ray cluster {there}: start one with `ray start --head`, or give --address"
    click.echo(f"ray-zerocopy: {message} ({_one_line(error)})", err=True)
    ctx.exit(_NO_CLUSTER)


def _failure(address: str) -> Exception | None:
    """Connect to a cluster; returns the error if there is none."""
    try:
        _refuse_silence(address)
        ray.init(address, ignore_reinit_error=True, **_QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        return error
    return None


@contextlib.contextmanager
def _working(what: str | None) -> Iterator[None]:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(f"{what} ...", total=None)
        yield


def _refuse_silence(address: str) -> None:
    """Raise `ConnectionError` if nothing listens there: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


Shown = tuple[Any, Callable[[], None]]


@_command()
def list_() -> Shown:
    """List published models: versions, sizes, nodes and followers."""
    rows: list[dict[str, Any]] = []
    for name, entry in sorted(state()["names"].items()):
        refs = {version.number: version.ref for version in rzc.versions(name)}
        rows += [
            {
                "followers": entry["followers"],
                "nodes": _nodes(refs.get(version["number"])),
                **version,
            }
            for version in entry["versions"]
        ]
    columns = ("name", "version", "state", "MiB", "nodes", "followers", "heals", "source")

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            row["name"],
            f"{row['number']}{' *' if row['current'] else ''}",
            _state(row),
            _mib(row["nbytes"]),
            str(len(row["nodes"])),
            str(row["followers"]) if row["current"] else "",
            _yes(row["heals"]),
            row["source"],
        )

    if not rows:
        return rows, _told("no published models")
    return rows, _told(_table(columns, map(cells, rows), right={3, 4, 5}), "* current version")


@_command(connects=False, slow=True)
@click.argument("target", metavar="NAME|PATH")
@click.option("--version", "number", type=int, help="Version. Default: the current one.")
@click.option("--verify", is_flag=True, help="Verify all checksums.")
@click.option("--tensors", is_flag=True, help="List the tensors.")
def inspect(target: str, number: int | None, verify: bool, tensors: bool) -> Shown:
    """Show what a published model or a snapshot file contains, without unpickling it."""
    source: Any = Path(target)
    heading = None
    if not source.is_file():
        _connect(click.get_current_context())
        version = _version(target, number)
        source, current = version.ref, "current" if version.current else version.state
        healing = f"published by {version.source}, {'heals' if version.heals else 'does not heal'}"
        heading = f"{_named(version)}, {current}, {healing}, on {len(_nodes(source))} nodes"
    info = rzc.inspect(source, verify=verify)
    rows = (
        (str(tensor.span), tensor.dtype, str(list(tensor.shape)), str(list(tensor.stride)))
        for tensor in info.tensors
    )
    table = _table(("span", "dtype", "shape", "stride"), rows, right={0})
    return info, _told(heading, str(info), table if tensors else None)


@_command(slow=True)
@click.argument("name")
@click.option(
    "--make",
    metavar="MODULE:FUNCTION",
    help="Returns the model; runs on the cluster.",
)
@click.option("--path", help="Snapshot: a file or an fsspec URL.")
@click.option(
    "--keep", type=click.IntRange(1), default=2, show_default=True, help="Versions to keep."
)
def publish(name: str, make: str | None, path: str | None, keep: int) -> Shown:
    """Publish a model as the current version of NAME."""
    if (make is None) == (path is None):
        raise click.UsageError("give either --make or --path")
    if path is not None:
        return _publish(name, path=_snapshot(path), keep=keep)
    return _publish(name, make=_imported(str(make)), keep=keep)


@_command()
@click.argument("name")
@click.argument("number", type=int)
def promote(name: str, number: int) -> Shown:
    """Make version NUMBER the current version of NAME."""
    version = rzc.promote(name, number)
    return _shown(version, f"{_named(version)} is now current")


@_command()
@click.argument("name")
@click.argument("number", type=int, required=False)
def retire(name: str, number: int | None) -> Shown:
    """Retire version NUMBER of NAME, or all versions of NAME."""
    rzc.retire(name, number)
    what = name if number is None else f"version {number} of {name}"
    return {"name": name, "number": number}, _told(f"{what} retired")


@_command(slow=True)
@click.argument("name")
@click.option("--node", "nodes", multiple=True, help="Start of a node id; may be repeated.")
def prefetch(name: str, nodes: tuple[str, ...]) -> Shown:
    """Copy the current version of NAME to all nodes, or to the given ones."""
    seconds = rzc.prefetch(name, [_node(start) for start in nodes] or None)
    rows = ((node[:12], "-" if s is None else f"{s:.2f}") for node, s in seconds.items())
    return seconds, _told(_table(("node", "seconds"), rows, right={1}))


@_command()
@click.argument("name")
@click.argument("path")
@click.option("--version", "number", type=int, help="Version. Default: the current one.")
def save(name: str, path: str, number: int | None) -> Shown:
    """Save the current version of NAME to PATH, a file or an fsspec URL."""
    version = _version(name, number)
    _, seconds = _timed(lambda: rzc.save(version.ref, path))
    nbytes = version.nbytes
    told = f"{_named(version)} saved to {path}: {_mib(nbytes)} MiB in {seconds:.1f} s"
    return {"path": path, "nbytes": nbytes, "seconds": seconds}, _told(told)


@_command(slow=True)
@click.argument("path")
@click.argument("name")
def restore(path: str, name: str) -> Shown:
    """Publish the snapshot PATH, a file or an fsspec URL, as NAME."""
    return _publish(name, path=_snapshot(path))


@_command(connects=False, slow=True)
@click.option("--local", is_flag=True, help="Check only this machine.")
def doctor(local: bool) -> Shown:
    """Check every node and suggest fixes. Without a cluster: check this machine."""
    ctx = click.get_current_context()
    if ctx.obj or "RAY_ADDRESS" in os.environ or _failure("auto") is None:
        _connect(ctx)
        here = "this machine"
    else:
        ray.init("local", num_cpus=1, include_dashboard=False, **_QUIET)
        local, here = True, "this machine, with a temporary Ray: no cluster is running"
    found = {here: examination.examine()} if local else examination.examine_cluster()
    bad = sum(not finding.good for findings in found.values() for finding in findings)
    parts: list[str | Table] = []
    for node, findings in found.items():
        rows = (
            (f.check, "ok" if f.good else "PROBLEM", f"{f.found}\n{f.mend}".strip())
            for f in findings
        )
        parts += [_table(("check", "status", "found, cost and fix"), rows, node), ""]
    summary = f"problems: {bad}" if bad else "no problems found"
    click.get_current_context().call_on_close(lambda: _exit_with(bad))
    return examination.as_dict(found), _told(*parts, summary)


@_command(connects=False)
def demo() -> Shown:
    """Share BERT-base among four workers and compare with plain Ray."""
    return demonstration.main(), lambda: None


# --- output ---------------------------------------------------------------------------------------


def _exit_with(bad: int) -> None:
    if bad:
        raise SystemExit(_REFUSED)


def _told(*parts: str | Table | None) -> Callable[[], None]:
    def tell() -> None:
        console = Console(highlight=False, soft_wrap=False)
        console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
        for part in parts:
            if part is not None:
                console.print(escape(part) if isinstance(part, str) else part)

    return tell


def _shown(value: Any, told: str) -> Shown:
    return value, _told(told)


def _table(
    columns: tuple[str, ...], rows: Any, title: str | None = None, right: set[int] | None = None
) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        side: Any = "right" if index in (right or ()) else "left"
        table.add_column(column, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _plain(value: Any) -> Any:
    """Convert types that JSON lacks; leave out references."""
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return {name: v for name, v in fields.items() if not isinstance(v, ray.ObjectRef)}
    return str(value)


def _state(row: dict[str, Any]) -> str:
    """Return the state of a version; the block of a retired one may stay for its variants."""
    held = row["state"] == "retired" and row["variants"]
    return f"retired, held by {row['variants']}" if held else str(row["state"])


def _named(version: Any) -> str:
    return f"{version.name} version {version.number}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _publish(name: str, **how: Any) -> Shown:
    known = {version.number for version in rzc.versions(name)}
    version, seconds = _timed(lambda: rzc.publish(name, **how))
    if version.number in known:
        return _shown(version, f"{_named(version)} is identical: not stored again")
    return _shown(version, f"{_named(version)}: {_mib(version.nbytes)} MiB in {seconds:.1f} s")


def _snapshot(path: str) -> str:
    """Return a URL unchanged, and the absolute path of an existing file."""
    if "://" in path:
        return path
    if not Path(path).is_file():
        raise click.UsageError(f"no such file: {path!r}")
    return str(Path(path).resolve())


def _node(start: str) -> str:
    """Return the id of the live node whose id starts with this."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    found: list[str] = [node for node in alive if node.startswith(start)]
    if len(found) != 1:
        there = ", ".join(node[:12] for node in alive)
        number = "more than one" if found else "no"
        raise click.UsageError(f"{number} live node's id starts with {start}; nodes: {there}")
    return found[0]


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _version(name: str, number: int | None) -> Any:
    """Return a live version with its reference; waits while its block is being rebuilt."""
    return find_rebuilt(name, number, _REBUILT_S)


def _nodes(ref: ray.ObjectRef | None) -> list[str]:
    """Return the ids of the nodes that hold a version's block."""
    return [] if ref is None else located(ref)[0]


def _imported(path: str) -> Callable[[], Any]:
    """Return the function of a `module:function` path."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise click.UsageError(f"--make must be module:function, not {path!r}")
    try:
        made: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise click.UsageError(f"--make {path}: {error}") from error
    return made
