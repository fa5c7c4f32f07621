"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DENSE = "#8a8f98"
L3 = "#2457d6"
FETCH = "#e08a1e"
WAIT = "#c2273a"
INK = "#1c2330"

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c5cad3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecf1",
    "xtick.color": "#5b6472",
    "ytick.color": "#5b6472",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def rows_by_rank(rows: npt.NDArray[np.integer], tokens: Sequence[str], *, max_rows: int) -> str:
    """Rows owned, tokens in descending order; the largest owners are named."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
        ordered = np.sort(rows)[::-1]
        ranks = np.arange(1, len(ordered) + 1)
        axes.fill_between(ranks, ordered, step="mid", color=L3, alpha=0.12, linewidth=0)
        axes.step(ranks, ordered, where="mid", color=L3, linewidth=1.8)
        mean = rows.mean()
        axes.axhline(mean, color=DENSE, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            len(rows), mean * 1.12, f"uniform: {mean:g} each", ha="right", color="#5b6472", size=9
        )
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.9, max_rows * 1.6)
        axes.set_xlim(1, len(rows) * 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("token, by rows owned")
        axes.set_ylabel("rows owned")
        named = ", ".join(tokens)
        axes.text(
            1.15, 1.15, f"largest owners:  {named}", size=9, color="#5b6472", family="monospace"
        )
        return _svg(figure)


def training_curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Training loss (smoothed) and held-out loss over tokens, by model name."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        final = [curve[-1]["eval_loss"] for curve in curves.values()]
        for (name, curve), color in zip(curves.items(), (DENSE, L3), strict=True):
            tokens = np.array([point["tokens"] for point in curve]) / 1e6
            loss = _smooth(np.array([point["loss"] for point in curve]))
            axes.plot(tokens, loss, color=color, linewidth=1.4, alpha=0.55)
            held = [(p["tokens"] / 1e6, p["eval_loss"]) for p in curve if "eval_loss" in p]
            x, y = zip(*held, strict=True)
            axes.plot(x, y, "o-", color=color, linewidth=1.8, markersize=5, label=name)
            place = (6, 2) if y[-1] == max(final) else (6, -9)  # apart, however close they end
            axes.annotate(
                f"{y[-1]:.2f}", (x[-1], y[-1]), place, textcoords="offset points", color=color
            )
        low = min(point["loss"] for curve in curves.values() for point in curve)
        high = max(p["eval_loss"] for curve in curves.values() for p in curve if "eval_loss" in p)
        axes.set_ylim(low - 0.1, high + 0.9)
        axes.margins(x=0.05)
        axes.set_xlabel("training tokens, millions")
        axes.set_ylabel("loss, nats per token")
        axes.legend(title="held-out (dots), training (thin)", alignment="left")
        return _svg(figure)


def speeds(by_tier: dict[str, list[float]]) -> str:
    """Tokens/s of every run, and the median, by tier."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.9), layout="constrained")
        for place, (_tier, values) in enumerate(by_tier.items()):
            median = float(np.median(values))
            color = DENSE if place == 0 else L3
            axes.barh(place, median, height=0.55, color=color, alpha=0.85)
            axes.plot(values, [place] * len(values), "|", color=INK, markersize=9, alpha=0.6)
            axes.text(max(values) * 1.01, place, f" {median:.0f}", va="center", color=INK)
        axes.set_yticks(range(len(by_tier)), [f"tables {tier}" for tier in by_tier])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(max(values) for values in by_tier.values()) * 1.1)
        axes.set_xlabel("tokens/s: median (bar) and every run (ticks)")
        return _svg(figure)


def timelines(by_tier: dict[str, list[dict[str, Any]]]) -> str:
    """Fetching, computing and waiting of a few decode steps, one panel a tier."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            len(by_tier), 1, figsize=(7.2, 1.6 * len(by_tier) + 0.5), layout="constrained"
        )
        for axes, (tier, steps) in zip(np.atleast_1d(panels), by_tier.items(), strict=True):
            _timeline(axes, tier, steps)
        figure.legend(
            handles=[
                matplotlib.patches.Patch(color=color, label=label)
                for color, label in ((L3, "compute"), (FETCH, "fetch"), (WAIT, "exposed wait"))
            ],
            loc="outside upper right",
            ncols=3,
        )
        return _svg(figure)


def _timeline(axes: Axes, tier: str, steps: list[dict[str, Any]]) -> None:
    origin = steps[0]["begin_us"]
    for step in steps:
        begin, end = ((step[edge] - origin) / 1e3 for edge in ("begin_us", "end_us"))
        axes.broken_barh([(begin, end - begin)], (1.1, 0.8), color=L3, alpha=0.8, linewidth=0)
        for layer in step["layers"]:
            if layer["fetch_us"] == 0:  # every row was in the hot set: nothing was fetched
                continue
            fetch = (layer["fetch_begin_us"] - origin) / 1e3, layer["fetch_us"] / 1e3
            # An outline keeps what is shorter than a pixel visible.
            axes.broken_barh([fetch], (0.1, 0.8), facecolor=FETCH, edgecolor=FETCH, linewidth=0.8)
            if layer["exposed_us"] > 0:
                wait = (layer["wait_begin_us"] - origin) / 1e3, layer["exposed_us"] / 1e3
                axes.broken_barh([wait], (1.1, 0.8), facecolor=WAIT, edgecolor=WAIT, linewidth=0.8)
    axes.set_yticks([0.5, 1.5], ["fetch", "compute"])
    axes.set_ylim(0, 2.05)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"tables {tier}", loc="left", size=10)
    axes.set_xlabel("ms")
    axes.margins(x=0.01)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Exponential moving average over about 30 steps, without the bias of its start."""
    weight = 1 - 1 / min(30, len(values))
    smoothed = np.empty_like(values)
    total = scale = 0.0
    for place, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        smoothed[place] = total / scale
    return smoothed


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    # No date and a fixed salt: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "l3ext"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
