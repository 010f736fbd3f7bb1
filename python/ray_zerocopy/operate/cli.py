"""`ray-zerocopy`: what is published and stored, in one line or as JSON.

Exit codes: 0 done, 1 refused or a defect found, 2 wrong usage, 3 no cluster there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
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
from ray_zerocopy.registry.publication import find, state
from ray_zerocopy.store.ray_inside import located

_REFUSED, _NO_CLUSTER = 1, 3
_CONNECT_S = 5.0
_WIDTH = 100
_TOLD = (RayZeroCopyError, ray.exceptions.RayError, OSError, ValueError)  # these say what to do

Command = Callable[..., Any]


class _Group(click.Group):
    """A group whose commands end in one line, not in a traceback, unless `--debug` asks for one."""

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
@click.option("--address", help="The cluster; by default the one of this machine, as Ray finds it.")
@click.option("--debug", is_flag=True, help="Show the traceback of what goes wrong.")
@click.version_option(rzc.__version__, prog_name="ray-zerocopy")
@click.pass_context
def main(ctx: click.Context, address: str | None, debug: bool) -> None:
    """Models in Ray's object store: published, listed, looked at."""
    ctx.obj = address


def _command(connects: bool = True, slow: bool = False) -> Callable[[Command], click.Command]:
    """Make a command that has `--json`, and whose function gives what is to be shown.

    It gives a value, which `--json` prints, and how to tell it to a person. While one that is slow
    works, a terminal shows for how long.
    """

    def decorate(function: Command) -> click.Command:
        @functools.wraps(function)
        def run(ctx: click.Context, as_json: bool, **options: Any) -> None:
            with contextlib.ExitStack() as stack:
                if as_json:  # what is printed meanwhile is not JSON
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
        asks = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(
            asks
        )
        return main.command(function.__name__.rstrip("_"))(asks)

    return decorate


def _connect(ctx: click.Context) -> None:
    address = ctx.obj or "auto"
    try:
        _refuse_silence(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (OSError, RuntimeError, ValueError) as error:
        if ctx.find_root().params.get("debug"):
            raise
        there = f"at {ctx.obj}" if ctx.obj else "on this machine"
        message = f"no Ray cluster {there}: start one with `ray start --head`, or give --address"
        click.echo(f"ray-zerocopy: {message} ({_one_line(error)})", err=True)
        ctx.exit(_NO_CLUSTER)


@contextlib.contextmanager
def _working(what: str | None) -> Iterator[None]:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(f"{what} ...", total=None)
        yield


def _refuse_silence(address: str) -> None:
    """Raise `ConnectionError` where nobody listens: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


Shown = tuple[Any, Callable[[], None]]


@_command()
def list_() -> Shown:
    """List the published models: versions, bytes, nodes that hold them, followers."""
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
            row["state"],
            _mib(row["nbytes"]),
            str(len(row["nodes"])),
            str(row["followers"]) if row["current"] else "",
            _yes(row["heals"]),
            row["source"],
        )

    if not rows:
        return rows, _told("nothing is published")
    return rows, _told(_table(columns, map(cells, rows), right={3, 4, 5}), "* is current")


@_command(connects=False, slow=True)
@click.argument("target", metavar="NAME|PATH")
@click.option("--version", "number", type=int, help="Another version than the current one.")
@click.option("--verify", is_flag=True, help="Check every span against its checksum.")
@click.option("--tensors", is_flag=True, help="List the tensors as well.")
def inspect(target: str, number: int | None, verify: bool, tensors: bool) -> Shown:
    """Tell what a published model or a snapshot holds; nothing is unpickled."""
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
@click.option("--make", metavar="MODULE:FUNCTION", help="What makes the model, on the cluster.")
@click.option("--path", help="A snapshot: a file, or an fsspec URL.")
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Versions.")
def publish(name: str, make: str | None, path: str | None, keep: int) -> Shown:
    """Publish a model under NAME, as its current version."""
    if (make is None) == (path is None):
        raise click.UsageError("give either --make or --path")
    if path is not None:
        return _publish(name, path=_snapshot(path), keep=keep)
    return _publish(name, make=_imported(str(make)), keep=keep)


@_command()
@click.argument("name")
@click.argument("number", type=int)
def promote(name: str, number: int) -> Shown:
    """Make version NUMBER of NAME the current one."""
    version = rzc.promote(name, number)
    return _shown(version, f"{_named(version)} is current")


@_command()
@click.argument("name")
@click.argument("number", type=int, required=False)
def retire(name: str, number: int | None) -> Shown:
    """Retire version NUMBER of NAME, or NAME with all of its versions."""
    rzc.retire(name, number)
    what = name if number is None else f"version {number} of {name}"
    return {"name": name, "number": number}, _told(f"{what} is retired")


@_command(slow=True)
@click.argument("name")
@click.option("--node", "nodes", multiple=True, help="A node's id, or its start; may be repeated.")
def prefetch(name: str, nodes: tuple[str, ...]) -> Shown:
    """Send NAME's current version to every node, or to these."""
    seconds = rzc.prefetch(name, [_node(start) for start in nodes] or None)
    rows = ((node[:12], "-" if s is None else f"{s:.2f}") for node, s in seconds.items())
    return seconds, _told(_table(("node", "seconds"), rows, right={1}))


@_command()
@click.argument("name")
@click.argument("path")
@click.option("--version", "number", type=int, help="Another version than the current one.")
def save(name: str, path: str, number: int | None) -> Shown:
    """Save NAME's current version as the snapshot PATH, a file or an fsspec URL."""
    version = _version(name, number)
    _, seconds = _timed(lambda: rzc.save(version.ref, path))
    nbytes = version.nbytes
    told = f"{_named(version)} saved as {path}: {_mib(nbytes)} MiB in {seconds:.1f} s"
    return {"path": path, "nbytes": nbytes, "seconds": seconds}, _told(told)


@_command(slow=True)
@click.argument("path")
@click.argument("name")
def restore(path: str, name: str) -> Shown:
    """Publish the snapshot PATH, a file or an fsspec URL, under NAME."""
    return _publish(name, path=_snapshot(path))


@_command(slow=True)
@click.option("--local", is_flag=True, help="This machine alone.")
def doctor(local: bool) -> Shown:
    """Examine every node: what is good, and what costs what and how to mend it."""
    found = {"here": examination.examine()} if local else examination.examine_cluster()
    bad = sum(not finding.good for findings in found.values() for finding in findings)
    parts: list[str | Table] = []
    for node, findings in found.items():
        rows = (
            (f.check, "good" if f.good else "BAD", f"{f.found}\n{f.mend}".strip()) for f in findings
        )
        parts += [_table(("check", "", "found; what it costs, and how to mend it"), rows, node), ""]
    summary = f"{bad} to mend" if bad else "all good"
    click.get_current_context().call_on_close(lambda: _exit_with(bad))
    return examination.as_dict(found), _told(*parts, summary)


@_command(connects=False)
def demo() -> Shown:
    """Share BERT-base among four workers, beside plain Ray."""
    return demonstration.main(), lambda: None


# --- how things are shown -------------------------------------------------------------------------


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
    """Give what JSON lacks as what it has; references are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return {name: v for name, v in fields.items() if not isinstance(v, ray.ObjectRef)}
    return str(value)


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
        return _shown(version, f"{_named(version)} has these bytes already")
    return _shown(version, f"{_named(version)}: {_mib(version.nbytes)} MiB in {seconds:.1f} s")


def _snapshot(path: str) -> str:
    """Give a URL as it is, and the absolute path of a file that is there."""
    if "://" in path:
        return path
    if not Path(path).is_file():
        raise click.UsageError(f"there is no file {path!r}")
    return str(Path(path).resolve())


def _node(start: str) -> str:
    """Give the id of the only live node that starts so."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    found: list[str] = [node for node in alive if node.startswith(start)]
    if len(found) != 1:
        there = ", ".join(node[:12] for node in alive)
        raise click.UsageError(f"--node {start} is {len(found)} of the live nodes {there}")
    return found[0]


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _version(name: str, number: int | None) -> Any:
    """Give a live version with its reference."""
    return find(name, number)


def _nodes(ref: ray.ObjectRef | None) -> list[str]:
    """Give the ids of the nodes that hold a version's block."""
    return [] if ref is None else located(ref)[0]


def _imported(path: str) -> Callable[[], Any]:
    """Give the function that `module:function` names."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise click.UsageError(f"--make is module:function, not {path!r}")
    try:
        made: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise click.UsageError(f"--make {path}: {error}") from error
    return made
