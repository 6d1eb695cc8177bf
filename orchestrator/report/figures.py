"""The figures of a report, drawn by matplotlib without a display: each as SVG and as PDF, byte for byte reproducible."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from orchestrator.batch_law import intervals
from orchestrator.report.load import Result
from orchestrator.report.summary import Cell, Summary, final_value, seconds_to_target, steps_to_target
from orchestrator.report.wording import metric_name
from orchestrator.statistics import Estimate

Maker = Callable[[Summary], "Figure | None"]
# Okabe and Ito's colours: told apart with every kind of colour vision. Markers differ too, for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "v", "P", "X", "<", ">")
GREY = "#8a8f98"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b66",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "pdf.fonttype": 42,
}
UNDATED = {"svg": "Date", "pdf": "CreationDate"}  # kinds of files, and the name of what would tell builds apart
CURVES = 300  # points of one line at most
BAND = 60  # stretches of a fitted law


def draw(summary: Summary, makers: Mapping[str, Maker]) -> dict[str, dict[str, bytes]]:
    """Figure name -> {"svg": ..., "pdf": ...}, for those that the data allow: the others make None."""
    drawn = {}
    for name, make in makers.items():
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            figure = make(summary)
            if figure:
                drawn[name] = {kind: _save(figure, kind, date) for kind, date in UNDATED.items()}
    return drawn


def _save(figure: Figure, kind: str, date: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata={date: None})
    figure.set_layout_engine("none")  # it was laid out now: the next kind of file is to look the same, and sooner
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------ against the batch


def steps(summary: Summary) -> Figure | None:
    if not (summary.target and summary.all_cells):
        return None
    figure, axes = batch_axes("optimizer steps to target")
    for index, cells in enumerate(summary.cells.values()):
        _estimates(axes, summary, index, lambda cell: cell.steps, steps_to_target)
        _ideal(axes, index, cells)
        _law(axes, summary, index)
        missed = [(c.batch, t.steps) for c in cells for t in c.trials if t.steps and math.isinf(steps_to_target(t))]
        style: dict[str, Any] = {"color": colour(index), "fillstyle": "none", "markersize": 9, "markeredgewidth": 1.4}
        axes.plot([b * _shift(index, summary) for b, _ in missed], [s for _, s in missed], "^", **style)
    log_y(axes)
    extra = [Line2D([], [], color=GREY, linestyle="--", label="perfect scaling")]
    if summary.laws:
        extra.append(Line2D([], [], color=GREY, linestyle=":", label="fitted law"))
    if any(cell.hits < len(cell.trials) for cell in summary.all_cells):
        extra.append(
            Line2D([], [], color=GREY, marker="^", fillstyle="none", linestyle="", label="not reached by then")
        )
    finish(figure, axes, summary, extra)
    return figure


def _ideal(axes: Axes, index: int, cells: Sequence[Cell]) -> None:
    """From the arm's smallest batch size that reached the target: twice the batch, half the steps."""
    reached = [cell for cell in cells if math.isfinite(cell.steps.median)]
    if len(cells) > 1 and reached:
        first, end = reached[0], cells[-1].batch
        steps = [first.steps.median, first.steps.median * first.batch / end]
        axes.plot([first.batch, end], steps, "--", color=colour(index), linewidth=1, alpha=0.7)


def _law(axes: Axes, summary: Summary, index: int) -> None:
    """The law fitted to an arm, over its batch sizes, with its band."""
    found = summary.laws.get(summary.study.arms[index])
    if found:
        ends = found.at.batches[[0, -1]].tolist()
        batches = [ends[0] * (ends[1] / ends[0]) ** (i / BAND) for i in range(BAND + 1)]
        band = intervals.band(found.at, batches)
        low, high = [i.low for i in band], [i.high for i in band]
        axes.fill_between(batches, low, high, color=colour(index), alpha=0.1, linewidth=0)
        axes.plot(batches, [found.fit.law.steps(b) for b in batches], ":", color=colour(index), linewidth=1)


def final(summary: Summary) -> Figure | None:
    if not (summary.metric and summary.all_cells):
        return None
    figure, axes = batch_axes(f"final {metric_name(summary.metric)}")
    for index in range(len(summary.cells)):
        _estimates(axes, summary, index, lambda cell: cell.final, partial(final_value, metric=summary.metric))
    finish(figure, axes, summary)
    return figure


def seconds(summary: Summary) -> Figure | None:
    if not any(math.isfinite(seconds_to_target(t)) and not t.reused for c in summary.all_cells for t in c.trials):
        return None
    figure, axes = batch_axes("training seconds to target")
    for index in range(len(summary.cells)):
        _estimates(axes, summary, index, lambda cell: cell.seconds, _own_seconds)
    log_y(axes)
    finish(figure, axes, summary)
    return figure


def _own_seconds(trial: Result) -> float:
    return math.inf if trial.reused else seconds_to_target(trial)


def batch_axes(y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="batch size (examples per optimizer step)", ylabel=y)
    return figure, axes


def _estimates(
    axes: Axes,
    summary: Summary,
    index: int,
    of: Callable[[Cell], Estimate | None],
    value: Callable[[Result], float],
) -> None:
    """An arm: medians joined by a line, intervals as bars, each seed as a dot. Bars without end leave the figure."""
    cells = summary.cells[summary.study.arms[index]]
    shift = _shift(index, summary)
    style: dict[str, Any] = {"color": colour(index), "linewidth": 1.6}
    known = [(cell.batch * shift, e) for cell in cells if (e := of(cell)) and math.isfinite(e.median)]
    axes.plot([x for x, _ in known], [e.median for _, e in known], marker=marker(index), markersize=6, **style)
    for x, e in known:
        ends = [end if math.isfinite(end) else e.median for end in (e.low, e.high)]
        axes.plot([x, x], ends, marker="_", markersize=7, **style)
        for end, edge in ((e.low, 0), (e.high, 1)):
            if math.isinf(end):
                arrow = {"arrowstyle": "->", "color": colour(index)}
                axes.annotate("", (x, edge), (x, e.median), ("data", "axes fraction"), "data", arrow)
    dots = [(c.batch * shift, y) for c in cells for t in c.trials if math.isfinite(y := value(t))]
    axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color=colour(index), markersize=5, alpha=0.6)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _shift(index: int, summary: Summary) -> float:
    """A factor that sets arms side by side, so that bars at the same batch size do not hide each other."""
    return float(1.05 ** (index - (len(summary.cells) - 1) / 2))


def finish(figure: Figure, axes: Axes, summary: Summary, extra: Sequence[Line2D] = ()) -> None:
    """Ticks at the batch sizes of the study, room on both sides, a legend below."""
    batch_ticks(axes, summary.batches)
    legend(figure, summary.cells, extra)


def batch_ticks(axes: Axes, batches: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)
    if len(batches) > 8 or any(b / a < 1.3 for a, b in pairwise(batches)):
        axes.tick_params("x", rotation=45)


def legend(figure: Figure, arms: Mapping[str, Any], extra: Sequence[Line2D] = ()) -> None:
    own = [Line2D([], [], color=colour(i), marker=marker(i), label=short(arm)) for i, arm in enumerate(arms)]
    below(figure, [*own, *extra])


def below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend under the figure, in as many columns as its labels leave room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, 76 // (longest + 7))  # characters that fit, and what a marker takes of them
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def short(name: str, length: int = 24) -> str:
    """A name that fits a legend."""
    return name if len(name) <= length else name[: length - 1] + "…"


def multiples(count: int, x: str = "", y: str = "", share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, in threes, four in a square; `x` and `y` are the labels of the outer ones."""
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    size = max(6.4, 3.0 * columns), 4.2 if rows == 1 else 0.9 + 2.5 * rows
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[max(0, count - columns) : count]:  # the lowest of each column
        axes.set_xlabel(x)
        axes.tick_params(labelbottom=True)
    for axes in grid[:count:columns]:
        axes.set_ylabel(y)
    return figure, grid[:count]


def log_y(axes: Axes) -> None:
    """Plain numbers as labels, more of them where the axis spans little."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = (low / 1.3, high * 1.3) if high / low < 3 else (low, high)
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis, high / low)


def log_ticks(axis: Axis, ratio: float) -> None:
    """Plain numbers, as many as an axis whose ends are at that ratio has room for."""
    subs = (1, 1.5, 2, 3, 4, 5, 7) if ratio < 10 else (1, 2, 5) if ratio < 1000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------------------------------ training curves


def curves(summary: Summary) -> Figure | None:
    if not (summary.metric and summary.all_cells):
        return None
    batches = summary.batches
    figure, panels = multiples(len(batches), "epochs", metric_name(summary.metric))
    for axes, batch in zip(panels, batches, strict=True):
        _small_multiple(axes, summary, batch)
    legend(figure, summary.cells)
    return figure


def _small_multiple(axes: Axes, summary: Summary, batch: int) -> None:
    assert summary.metric
    for index, cells in enumerate(summary.cells.values()):
        for trial in (t for cell in cells if cell.batch == batch for t in cell.trials):
            xs, ys = thinned(*summary.study.curve(trial, summary.metric))
            style: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.85, "markersize": 3}
            axes.plot(xs, ys, color=colour(index), marker=marker(index), markevery=max(1, len(xs) // 4), **style)
    if summary.target and summary.target.metric == summary.metric:
        axes.axhline(summary.target.value, color=GREY, linestyle=":", linewidth=1)
    if summary.metric.endswith("loss"):
        axes.set_yscale("log")
    axes.set_title(f"batch {batch}", fontsize=10)


def thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most some hundred points, the last one among them."""
    stride = -(-len(xs) // CURVES) or 1
    return xs[::-stride][::-1], ys[::-stride][::-1]
