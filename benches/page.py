"""Writes a report's page: the machine, tables in Markdown, plots as PNG."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import psutil
from matplotlib import pyplot
from rivals import CONTENDERS, Ours

matplotlib.use("Agg")
PLOTS = Path(__file__).resolve().parent / "plots"
MIB, GIB = 1 << 20, 1 << 30
GREY, RED, BLUE, CYAN, PURPLE, ORANGE, GREEN = (
    *("#8c8c8c", "#d62728", "#1f77b4", "#17becf"),
    *("#9467bd", "#ff7f0e", "#2ca02c"),
)
COLORS = dict(
    zip(
        (rival.name for rival in CONTENDERS),
        (GREY, RED, BLUE, CYAN, PURPLE, ORANGE, GREEN),
        strict=True,
    )
)
COLORS |= {
    "TorchRL's shared memory": ORANGE,
    "ray_zerocopy, prefault=False": "#ff9896",
    "a private copy": GREY,
    "a private copy, huge pages": "#c7c7c7",
    "a private copy, there before": GREY,
}


def heading():
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "transformers"))
    rivals = ", ".join(f"{name} {version(name)}" for name in ("zerocopy", "safetensors"))
    return f"""# Benchmarks

`make bench` (`python benches/report.py`) writes this page. Compare figures only within a
section: a section is one run, and `--only` replaces single sections.

- Machine: {cpu()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB,
  Linux {platform.release()}; load average {os.getloadavg()[0]:.1f} at the end of the run.
- Python {platform.python_version()}, {packages}; rivals: {rivals}.
- Rivals take turns in one process, in shuffled order. Figures are medians. A rival that takes more
  than eight times as long as the fastest runs in one round of five.
- **Ray** is `ray.put`. **Ray's flag** is the same with `RAY_ENABLE_ZERO_COPY_TORCH_TENSORS=1`.
  **zerocopy** is IBM's package.
- **The floor** is the least work that Ray and torch allow. Publish: `ray.put` of one flat array of
  the model's bytes. Load: `ray.get` of it and one `Parameter` over `torch.from_numpy` for each
  tensor, without a model around them.
- The files of `torch.load` and safetensors lie in `/dev/shm`; each publish writes a new one.
"""


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def section(title, *parts):
    return "\n\n".join((f"## {title}", *(part.strip("\n") for part in parts))) + "\n"


def table(header, rows):
    """A table. The first column is text, the others are figures."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bold(name):
    return f"**{name}**" if name.startswith(Ours.name) else name


def ms(seconds):
    """Milliseconds in three figures."""
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mib(nbytes):
    return f"{nbytes / MIB:z,.1f}"


def times(value):
    """A ratio."""
    return f"{value:.2f} x" if value < 10 else f"{value:,.0f} x"


def plot(name, lines, x, y, title, log=True):
    """Draw {rival: ([x], [y])}. Returns the Markdown that shows it."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=100, layout="constrained")
    for rival, (across, up) in lines.items():
        ours = rival == Ours.name
        axes.plot(
            *(across, up),
            marker="o",
            markersize=4,
            color=COLORS[rival],
            linewidth=2.5 if ours else 1.4,
            linestyle="--" if rival == "floor" else "-",
            zorder=3 if ours else 2,
            label=rival,
        )
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    ticks = next(iter(lines.values()))[0]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, lines)
    return save(figure, name, title)


def bars(name, groups, y, title, top=None):
    """Draw {group: {rival: height}} and a line at 1. Returns the Markdown that shows it."""
    figure, axes = pyplot.subplots(figsize=(8, 4.2), dpi=100, layout="constrained")
    rivals = list(dict.fromkeys(rival for heights in groups.values() for rival in heights))
    width = 0.84 / len(rivals)
    for at, rival in enumerate(rivals):
        heights = [groups[group].get(rival, np.nan) for group in groups]
        across = np.arange(len(groups)) + (at - (len(rivals) - 1) / 2) * width
        drawn = axes.bar(across, heights, 0.9 * width, color=COLORS[rival], zorder=2, label=rival)
        for bar, height in zip(drawn, heights, strict=True):
            if np.isfinite(height):
                above = (bar.get_x() + bar.get_width() / 2, min(height, top or height))
                axes.annotate(f"{height:.2f}", above, ha="center", va="bottom", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", zorder=3)
    axes.set_ylim(0, top and 1.06 * top)
    axes.set_ylabel(y)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return save(figure, name, title)


def save(figure, name, title):
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"{name}.png")
    pyplot.close(figure)
    return f"![{title}](benches/plots/{name}.png)"


def label_ends(axes, lines):
    """Label the lines in the order of their right ends, from top to bottom."""
    order = sorted(lines, key=lambda rival: -lines[rival][1][-1])
    handles = dict(zip(lines, axes.get_lines(), strict=True))
    axes.legend(
        [handles[rival] for rival in order],
        order,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
    )
