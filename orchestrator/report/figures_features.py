"""Maps of features: a panel for each stage that was looked at, a colour and marker for each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orchestrator.report.figures import below, colour, marker, multiples
from orchestrator.report.stage_features import Looked, Stage, looked_at
from orchestrator.report.summary import Summary


def features(summary: Summary) -> Figure | None:
    panels = [(look, stage) for look in looked_at(summary) for stage in look.stages]
    if not panels:
        return None
    figure, grid = multiples(len(panels))
    several = len({look.trial for look, _ in panels}) > 1
    for axes, (look, stage) in zip(grid, panels, strict=True):
        _panel(axes, look, stage)
        name = f"{look.trial} stage {stage.stage}" if several else f"stage {stage.stage}"
        axes.set_title(f"{name} ({100 * stage.accuracy:.1f} %)", fontsize=10)
    classes = sorted({label for look, _ in panels for label in look.labels})
    style: Any = {"linestyle": "", "markersize": 5}
    below(figure, [Line2D([], [], color=colour(c), marker=marker(c), label=f"class {c}", **style) for c in classes])
    return figure


def _panel(axes: Axes, look: Looked, stage: Stage) -> None:
    points, labels = np.array(stage.points), np.array(look.labels)
    points = (points - points.min(0)) / np.ptp(points, axis=0).clip(min=1e-9)  # the map has no unit
    for c in sorted(set(look.labels)):
        x, y = points[labels == c].T
        axes.plot(x, y, linestyle="", marker=marker(c), color=colour(c), markersize=2.2, markeredgewidth=0)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
