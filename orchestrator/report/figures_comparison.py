"""Figures that compare: noise scale beside critical batch size, performance profiles, tuning budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.comparison.profiles import LIMIT
from orchestrator.report.arm_profiles import Profile, arm_profiles, examples_differ
from orchestrator.report.figures import GREY, below, colour, log_y, marker, multiples, short
from orchestrator.report.noise_scales import NoiseCurve, noise_curves
from orchestrator.report.summary import Summary
from orchestrator.report.tuning_budgets import Budget, budgets
from orchestrator.report.wording import metric_name

SHADE = 0.12  # opacity of a band


# ------------------------------------------------------------------------------------------------------------ noise scale


def noise_scale(summary: Summary) -> Figure | None:
    """A panel per arm, a line per batch size."""
    curves = noise_curves(summary)
    if not any(math.isfinite(s.scale.value) for c in curves for s in c.stretches):
        return None
    arms = list(dict.fromkeys(c.arm for c in curves))
    batches = sorted({c.batch for c in curves})
    figure, panels = multiples(len(arms), "examples seen", "gradient noise scale (examples)")
    limits = _limits(summary, curves)
    for axes, arm in zip(panels, arms, strict=True):
        for curve in (c for c in curves if c.arm == arm):
            _noise_curve(axes, curve, batches.index(curve.batch), len(batches), limits)
        _critical(axes, summary, arm)
        axes.set_title(short(arm) if len(arms) > 1 else "", fontsize=10)
        axes.set(ylim=limits, xscale="log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    log_y(panels[0])
    lines = [_batch_line(batch, i, len(batches)) for i, batch in enumerate(batches)]
    identified = any(law.identified for arm, law in summary.laws.items() if arm in arms)
    fitted = [Line2D([], [], color="black", linestyle="--", label="fitted critical batch size")] * identified
    below(figure, [*lines, *fitted])
    return figure


def _limits(summary: Summary, curves: Sequence[NoiseCurve]) -> tuple[float, float]:
    """Of the values and of those ends that are within a factor of three of them: open bands leave the figure."""
    ratios = [s.scale for c in curves for s in c.stretches]
    values = [r.value for r in ratios if math.isfinite(r.value)]
    values += [law.fit.law.critical for law in summary.laws.values() if law.identified]
    low, high = min(values), max(values)
    ends = [end for r in ratios for end in (r.low, r.high) if low / 3 < end < high * 3]
    return min([low, *ends]) / 1.3, max([high, *ends]) * 1.3


def _shade(index: int, count: int) -> Any:
    """Batch sizes from dark to light."""
    return matplotlib.colormaps["viridis"](0.85 * index / max(count - 1, 1))


def _batch_line(batch: int, index: int, count: int) -> Line2D:
    return Line2D([], [], color=_shade(index, count), marker=marker(index), label=f"batch {batch}")


def _noise_curve(axes: Axes, curve: NoiseCurve, index: int, count: int, limits: tuple[float, float]) -> None:
    style: dict[str, Any] = {"color": _shade(index, count)}
    at = [(s.first + s.last) / 2 for s in curve.stretches]
    low = [max(s.scale.low, limits[0]) for s in curve.stretches]
    high = [min(s.scale.high, limits[1]) for s in curve.stretches]
    known = [(x, s.scale.value) for x, s in zip(at, curve.stretches, strict=True) if math.isfinite(s.scale.value)]
    axes.plot([x for x, _ in known], [y for _, y in known], marker=marker(index), markersize=4, linewidth=1.4, **style)
    if len(at) > 1:
        axes.fill_between(at, low, high, alpha=SHADE, linewidth=0, **style)
    else:
        axes.plot(at * 2, [*low, *high], marker="_", markersize=7, linewidth=1.4, **style)


def _critical(axes: Axes, summary: Summary, arm: str) -> None:
    law = summary.laws.get(arm)
    if law and law.identified:
        ends = law.quoted["critical"]
        axes.axhspan(ends.low, ends.high, color=GREY, alpha=SHADE, linewidth=0)
        axes.axhline(law.fit.law.critical, color="black", linestyle="--", linewidth=1)


# ---------------------------------------------------------------------------------------------------- performance profile


def performance_profile(summary: Summary) -> Figure | None:
    """Steps of a stair each; in examples beside it where that differs."""
    profiles = arm_profiles(summary)
    if not profiles:
        return None
    figure, panels = multiples(1 + examples_differ(summary), y="share of workloads within tau")
    for axes, of, what in zip(panels, ("in_steps", "in_examples"), ("steps", "examples"), strict=False):
        for p in profiles:
            _stair(axes, getattr(p, of), summary.study.arms.index(p.arm))
        axes.set(xlim=(1, LIMIT), ylim=(-0.02, 1.02), xlabel=f"tau: {what} to target over the fewest")
    below(figure, [_arm_line(summary, p.arm, f"{short(p.arm)} ({_scores(p, len(panels))})") for p in profiles])
    return figure


def _arm_line(summary: Summary, arm: str, label: str) -> Line2D:
    index = summary.study.arms.index(arm)
    return Line2D([], [], color=colour(index), marker=marker(index), label=label)


def _stair(axes: Axes, ratios: Sequence[float], index: int) -> None:
    """Rises at each ratio, by the share of the workloads that have it."""
    taus = sorted({1.0, LIMIT, *(r for r in ratios if r <= LIMIT)})
    shares = [sum(r <= tau for r in ratios) / len(ratios) for tau in taus]
    style: dict[str, Any] = {"color": colour(index), "marker": marker(index), "markersize": 4}
    axes.step(taus, shares, where="post", linewidth=1.6, **style)


def _scores(p: Profile, panels: int) -> str:
    return f"{p.score:.2f}" if panels == 1 else f"{p.score:.2f}, {p.score_examples:.2f}"


# ---------------------------------------------------------------------------------------------------------- tuning budget


def tuning_budget(summary: Summary) -> Figure | None:
    """A panel per batch size, a line per arm."""
    found = budgets(summary)
    if not found:
        return None
    batches = sorted({b.batch for b in found})
    arms = dict.fromkeys(b.arm for b in found)
    name = "steps to target" if summary.target else f"final {metric_name(summary.metric or '')}"
    figure, panels = multiples(len(batches), "points tried", f"expected best {name}", share_y=False)
    for axes, batch in zip(panels, batches, strict=True):
        here = [b for b in found if b.batch == batch]
        for budget in here:
            _budget(axes, budget, summary.study.arms.index(budget.arm))
        if len({len(b.trials) for b in here}) > 1:
            axes.axvline(min(len(b.trials) for b in here), color=GREY, linestyle=":", linewidth=1)
        axes.set_title(f"batch {batch}" if len(batches) > 1 else "", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if summary.target:
            log_y(axes)
    below(figure, [_arm_line(summary, arm, short(arm)) for arm in arms])
    return figure


def _budget(axes: Axes, budget: Budget, index: int) -> None:
    """Ends at infinity are drawn a little above what is known."""
    tried = range(1, len(budget.trials) + 1)
    top = 1.5 * max(v for v in (*budget.low, *budget.high) if math.isfinite(v))
    low, high = ([min(v, top) for v in ends] for ends in (budget.low, budget.high))
    axes.fill_between(tried, low, high, color=colour(index), alpha=SHADE, linewidth=0)
    if budget.best:
        axes.plot(tried, budget.best, color=colour(index), marker=marker(index), markersize=4, linewidth=1.4)
