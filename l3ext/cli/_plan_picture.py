"""The picture of a plan: what a hot set of any size saves, and when steps fit the window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l3ext.cli._pictures import import_pyplot, save_figure

if TYPE_CHECKING:
    from l3ext.planner import Link, TableCost

# Dense where a hot set saves most.
HOT_SHARES = tuple(i / 200 for i in range(1, 41)) + tuple(i / 40 for i in range(9, 41))
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_LINES = ("-", "--", ":", "-.")


def draw(costs: list[TableCost], link: Link, memory_bytes: int | None, path: Path) -> None:
    """Draw into ``path``; ``costs`` have hot sets of ``HOT_SHARES``."""
    plt = import_pyplot("--picture")
    shapes = [step.shape for step in costs[0].steps]
    columns = min(3, 1 + len(shapes))
    rows = -(-(1 + len(shapes)) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for panel in panels[1 + len(shapes) :]:
        panel.set_axis_off()
    scale, unit = _unit(max(cost.table_bytes for cost in costs))
    sizes = list(dict.fromkeys((cost.total_rows, cost.max_rows) for cost in costs))
    formats = list(dict.fromkeys(cost.format for cost in costs))
    for cost in costs:
        style = {
            "color": f"C{sizes.index((cost.total_rows, cost.max_rows)) % 10}",
            "linestyle": _LINES[formats.index(cost.format) % len(_LINES)],
            "linewidth": 1.6,
        }
        hot = [hot_set.bytes / scale for hot_set in cost.hot_sets]
        shares = [100 * hot_set.traffic_share for hot_set in cost.hot_sets]
        name = f"v {cost.total_rows:,}, k {cost.max_rows:,}, {cost.format}"
        panels[0].plot(hot, shares, label=name, **style)
        for panel, step in zip(panels[1:], cost.steps, strict=False):
            panel.plot(hot, [transfer.link_ms_p99 for transfer in step.transfers], **style)
    panels[0].set(
        title="Row traffic of the corpus", ylabel="read from the hot set, %", ylim=(0, 102)
    )
    for panel, shape in zip(panels[1:], shapes, strict=False):
        panel.set(
            title=f"{shape.kind}, {_tokens(shape.tokens)} a step", ylabel="p99 on the link, ms"
        )
        panel.set_ylim(bottom=0)
        _mark_window(panel, link)
    for panel in panels[: 1 + len(shapes)]:
        panel.set_xlabel(f"hot set, {unit}")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        if memory_bytes is not None and memory_bytes / scale <= panel.get_xlim()[1]:
            panel.axvline(memory_bytes / scale, color="0.4", linewidth=1)
    title = f"One lookup layer, link of {link.gigabytes_per_second:g} GB/s"
    if memory_bytes is not None:
        title += f"; vertical line: memory of {memory_bytes / scale:.3g} {unit}"
    figure.suptitle(title, fontsize=11)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center",
        ncols=min(len(formats), columns), frameon=False, fontsize=9,
    )  # fmt: skip
    save_figure(figure, path)


def _mark_window(panel: Any, link: Link) -> None:
    """A line where the window is, or a remark where that is far beyond all curves."""
    top = panel.get_ylim()[1]
    if link.window_ms > 3 * top:
        where, place = f"window {link.window_ms:g} ms: far above", (0.98, 0.95)
        panel.annotate(where, place, xycoords="axes fraction", ha="right", va="top", fontsize=8)
        return
    panel.axhline(link.window_ms, color="0.2", linewidth=1)
    panel.annotate(
        f"window {link.window_ms:g} ms", (0.98, link.window_ms),
        xycoords=panel.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
    panel.set_ylim(top=max(top, 1.15 * link.window_ms))


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _unit(nbytes: int) -> tuple[int, str]:
    return next((unit for unit in _UNITS if nbytes >= unit[0]), (1, "B"))
