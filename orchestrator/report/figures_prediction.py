"""Figures of what `bigbatch predict` foresees: fans of steps and times against the batch size, fronts of time and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orchestrator.predict.forecast import Range
from orchestrator.report.figures import GREY, below, colour, log_ticks, log_y, marker, short
from orchestrator.report.load import Result
from orchestrator.report.outlook import Offer, Outlook, front, offers, outlooks, times_ahead, workers_of
from orchestrator.report.summary import Cell, Summary, seconds_to_target, steps_to_target
from orchestrator.statistics import median

# Shades of batch sizes that were not measured, and of those for which nothing is predicted.
BEYOND, REFUSED = "#f1f2f5", "#d5d9df"
MOST_LABELLED = 3  # arms whose optima are named in the figure: more would hide each other

# ------------------------------------------------------------------------------------------------------------------ fans


def fan(summary: Summary) -> Figure | None:
    """A row per arm: steps to target and, where step times allow, seconds."""
    arms, times = outlooks(summary).arms, times_ahead(summary)
    if not arms:
        return None
    columns = 2 if times else 1
    figure = Figure(figsize=(6.4 if columns == 1 else 7.6, 1.0 + 2.6 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), columns, squeeze=False, sharex=True)
    for row, one in zip(grid, arms, strict=True):
        _row(row, summary, one, times.get(one.arm))
        if len(arms) > 1:
            row[0].set_title(short(one.arm), loc="left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("batch size")
    figure.legend(handles=_fan_handles(), loc="outside lower center", ncols=4)
    return figure


def _row(row: Sequence[Axes], summary: Summary, one: Outlook, times: Sequence[tuple[int, Range]] | None) -> None:
    index, cells = summary.study.arms.index(one.arm), summary.cells[one.arm]
    ahead = list(zip(one.batches, one.ahead, strict=True))
    _fan(row[0], one, index, ahead, _points(cells, steps_to_target))
    row[0].set_ylabel("steps to target")
    if times:
        _fan(row[1], one, index, times, _points(cells, _own(workers_of(summary))))
        row[1].set_ylabel("seconds to target")
    for axes in row[2 if times else 1 :]:
        axes.set_axis_off()


def _fan(
    axes: Axes, one: Outlook, index: int, ahead: Sequence[tuple[int, Range]], points: Sequence[tuple[int, float]]
) -> None:
    batches = [batch for batch, _ in ahead]
    last, refused, end = float(one.steps.reached[-1]), one.refused, 3 * one.refused
    axes.axvspan(last, refused, color=BEYOND, linewidth=0)
    axes.axvspan(refused, end, facecolor="white", edgecolor=REFUSED, hatch="///", linewidth=0)
    low, high = [r.low for _, r in ahead], [r.high for _, r in ahead]
    axes.fill_between(batches, low, high, color=colour(index), alpha=0.2, linewidth=0)
    axes.plot(batches, [r.value for _, r in ahead], color=colour(index), linewidth=1.4)
    xs, ys = [b for b, _ in points], [y for _, y in points]
    axes.plot(xs, ys, marker(index), color=colour(index), markersize=5, markeredgecolor="white", markeredgewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlim(batches[0] / 1.6, end)
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e5 else f"{x:.0e}".replace("e+0", "e")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=False, axis="x")
    log_y(axes)


def _points(cells: Sequence[Cell], value: Callable[[Result], float]) -> list[tuple[int, float]]:
    """Medians of what was measured, misses left out."""
    medians = [(c.batch, [v for t in c.trials if not math.isnan(v := value(t))]) for c in cells]
    found = [(batch, median(values)) for batch, values in medians if values]
    return [(batch, middle) for batch, middle in found if math.isfinite(middle)]


def _own(workers: int) -> Callable[[Result], float]:
    """Seconds to target of trials that ran here on so many workers; nan of others."""

    def seconds(trial: Result) -> float:
        return math.nan if trial.reused or (trial.workers or 1) != workers else seconds_to_target(trial)

    return seconds


def _fan_handles() -> list[Any]:
    return [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="measured"),
        Line2D([], [], color=GREY, label="predicted"),
        Patch(facecolor=BEYOND, label="beyond what reached the target"),
        Patch(facecolor="white", edgecolor=REFUSED, hatch="///", label="refused"),
    ]


# ---------------------------------------------------------------------------------------------------------------- fronts


def time_and_cost(summary: Summary) -> Figure | None:
    """All offers as dots, those that no other beats in both joined by a line, their intervals along it."""
    found = offers(summary)
    if not found:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="seconds to target", ylabel="cost (worker-seconds)")
    for arm, every in found.items():
        _front(axes, every, summary.study.arms.index(arm), labelled=len(found) <= MOST_LABELLED)
    log_y(axes)
    left, right = axes.get_xlim()
    log_ticks(axes.xaxis, right / left)
    arms = [(arm, summary.study.arms.index(arm)) for arm in found]
    lines = [Line2D([], [], color=colour(i), marker=marker(i), label=short(arm)) for arm, i in arms]
    below(figure, lines)
    return figure


def _front(axes: Axes, every: Sequence[Offer], index: int, labelled: bool) -> None:
    style: dict[str, Any] = {"color": colour(index)}
    axes.plot([o.seconds.value for o in every], [o.cost for o in every], ".", markersize=4, alpha=0.3, **style)
    best = [every[i] for i in front([(o.seconds.value, o.cost) for o in every])]
    for o in best:
        ends = [t for t in (o.seconds.low, o.seconds.high) if math.isfinite(t)]
        axes.plot(ends, [o.workers * t for t in ends], linewidth=3, alpha=0.15, solid_capstyle="round", **style)
    xs, ys = [o.seconds.value for o in best], [o.cost for o in best]
    axes.plot(xs, ys, marker=marker(index), markersize=5, linewidth=1.2, **style)
    for o in every:
        if labelled and o.optimum:
            text = f"{o.workers} x {o.batch}"
            axes.annotate(text, (o.seconds.value, o.cost), (5, 5), textcoords="offset points", fontsize=8, **style)
