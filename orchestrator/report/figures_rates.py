"""The figure of the best learning rate against the batch size, beside the rules that people scale it by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orchestrator.report.best_rates import BestRate, best_rates, guide, listed
from orchestrator.report.figures import GREY, batch_ticks, below, colour, log_y, marker, multiples, short
from orchestrator.report.summary import Summary

GUIDES: dict[Literal["--", ":"], tuple[float, str]] = {
    "--": (1.0, "in proportion to the batch"),
    ":": (0.5, "to its square root"),
}
TRIANGLES = {"upper": "^", "lower": "v"}


def rates(summary: Summary) -> Figure | None:
    """A panel per arm."""
    found = best_rates(summary)
    if not found:
        return None
    figure, grid = multiples(len(found), "batch size (examples)", "best peak learning rate")
    for axes, (arm, own) in zip(grid, found.items(), strict=True):
        _rates(axes, own, summary.study.arms.index(arm))
        axes.set_xscale("log")
        axes.set_title(short(arm), fontsize=10)
        batch_ticks(axes, summary.batches)
    log_y(grid[0])
    below(figure, _handles(any(r.edge for r in listed(summary))))
    return figure


def _rates(axes: Axes, own: Sequence[BestRate], index: int) -> None:
    for style, (power, _) in GUIDES.items():
        axes.plot([r.batch for r in own], guide(own, power), style, color=GREY, linewidth=1)
    axes.plot([r.batch for r in own], [r.rate for r in own], color=colour(index), linewidth=1.2, alpha=0.6)
    for rate in own:
        shape: dict[str, Any] = {"marker": marker(index), "markersize": 6}
        if rate.edge:
            shape = {"marker": TRIANGLES[rate.edge], "markersize": 9, "fillstyle": "none", "markeredgewidth": 1.4}
        axes.plot([rate.batch], [rate.rate], color=colour(index), **shape)


def _handles(edges: bool) -> list[Line2D]:
    lines = [Line2D([], [], color=GREY, linestyle=style, label=label) for style, (_, label) in GUIDES.items()]
    told = "at the edge of what was tried"
    edge = Line2D([], [], color=GREY, marker="^", fillstyle="none", linestyle="", label=told)
    return [*lines, *[edge] * edges]
