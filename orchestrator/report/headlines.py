"""The sentences of a report: what the data say, with their intervals, and nothing beyond."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from orchestrator.report.arm_pairs import sentences as seed_by_seed
from orchestrator.report.load import Study
from orchestrator.report.summary import Cell, Summary, steps_to_target
from orchestrator.report.wording import (
    batches,
    count,
    factor,
    figures2,
    goal,
    joined,
    metric_name,
    metric_value,
    plural,
    span,
    spread,
    stretch,
)
from orchestrator.statistics import EXCESS, Estimate, paired_ratio, useful_batch
from strategies import CATALOGUE

SCALING = [name for name, method in CATALOGUE.items() if method.scales_rate]


def headlines(summary: Summary) -> list[str]:
    """What is missing, if anything; a sentence or two per arm, and where its search may have had to look further; arms
    compared seed by seed, then the two leading ones."""
    describe = _scaling if summary.target else _quality
    arms = [describe(summary, arm, cells) if cells else _nothing(summary, arm) for arm, cells in summary.cells.items()]
    return notices(summary) + arms + edges(summary) + seed_by_seed(summary) + _comparison(summary)


def notices(summary: Summary) -> list[str]:
    """What a reader must know before the rest: trials without a result, trials that failed, what no figure shows."""
    results, planned = summary.study.results, summary.study.planned
    failed = sum(r.failed for r in results)
    partial = f"partial: {len(results)} of {planned} trials have a result."
    left_out = f"{failed} of {planned} trials failed and {'is' if failed == 1 else 'are'} left out of all figures."
    counts = [partial] * (len(results) < planned) + [left_out] * (failed > 0)
    return [*counts, *gaps(summary), *summary.study.cautions]


def gaps(summary: Summary) -> list[str]:
    """Arms of the recipe without any result, and of the others the batch sizes that have results but no cell."""
    study = summary.study
    silent = [arm for arm in study.stated if arm not in study.arms] if study.results else []
    lines = [f"{joined(silent)} {'has' if len(silent) == 1 else 'have'} no result yet."] if silent else []
    return lines + [line for arm, cells in summary.cells.items() if cells for line in _gaps(study, arm, cells)]


def _gaps(study: Study, arm: str, cells: list[Cell]) -> list[str]:
    own, shown = [r for r in study.results if r.arm == arm], {c.batch for c in cells}
    searched = {r.batch for r in own if r.tuning} - shown
    broken = {r.batch for r in own} - searched - shown
    reasons = {"its search has no winner with a result yet": searched, "all trials failed": broken}
    end = "missing from medians, fits and comparisons."
    return [f"{arm} at {batches(sorted(at))}: {reason}; {end}" for reason, at in reasons.items() if at]


def edges(summary: Summary) -> list[str]:
    """Searches that may have had to look further, a sentence per arm."""
    found: dict[str, dict[str, list[int]]] = {}  # arm -> what lies at an edge -> at which batch sizes
    for cell in summary.all_cells:
        for value in filter(None, (cell.trials[0].edge or "").split("; ")):
            found.setdefault(cell.arm, {}).setdefault(value, []).append(cell.batch)
    # Under the same name, another box is refused: its results would not answer for this one.
    remedy = "widen the box and run it under another `study:` name."
    places = {arm: joined([f"{e} at {batches(at)}" for e, at in values.items()]) for arm, values in found.items()}
    return [f"{arm}: the best point has {where}; {remedy}" for arm, where in places.items()]


def _nothing(summary: Summary, arm: str) -> str:
    """Of an arm without a cell."""
    tuning = any(r.tuning and not r.failed for r in summary.study.results if r.arm == arm)
    return f"{arm}: its search has no winner with a result yet." if tuning else f"{arm}: all trials failed."


# ------------------------------------------------------------------------------------------------- an arm with a target


def _scaling(summary: Summary, arm: str, cells: list[Cell]) -> str:
    assert summary.target
    reached = [cell for cell in cells if math.isfinite(cell.steps.median)]
    if not reached:
        return f"{_never(summary, arm, cells)}{_budget(summary, cells)}{_diverged(cells)}."
    first, last = reached[0], reached[-1]
    sentence = f"{arm} reaches {goal(summary.target)} in {count(first.steps.median)} steps at batch {first.batch}"
    if last is not first:
        sentence += f" and in {count(last.steps.median)} at batch {last.batch}"
        useful = _useful(cells[cells.index(first) :])
        sentence += f" ({_gain(first, last)}; {_over_seeds([first.steps, last.steps])}); {useful}"
    else:
        sentence += f" ({_over_seeds([first.steps])})"
    return f"{sentence}{_best_of(cells)}.{_critical(summary, arm)}{_misses(summary, arm, cells)}"


def _never(summary: Summary, arm: str, cells: list[Cell]) -> str:
    assert summary.target
    hits, n = sum(c.hits for c in cells), sum(len(c.trials) for c in cells)
    where = f"batch {cells[0].batch}" if len(cells) == 1 else f"any of {len(cells)} batch sizes"
    return f"{arm} did not reach {goal(summary.target)} in the median at {where} ({hits} of {n} trials reached it)"


def _gain(first: Cell, last: Cell) -> str:
    ratio, larger = first.steps.median / last.steps.median, factor(last.batch / first.batch)
    if ratio >= 1:
        return f"{factor(ratio)} x fewer steps for {larger} x the batch"
    return f"{factor(1 / ratio)} x more steps for {larger} x the batch"


def _over_seeds(estimates: Sequence[Estimate], text: Callable[[float], str] = count) -> str:
    """`median of 3 seeds, range 38-44`; for two estimates `medians of 3 seeds, ranges 300-322 and 38-44`."""
    numbers = list(dict.fromkeys(e.n for e in estimates))
    kinds = list(dict.fromkeys(e.kind for e in estimates))
    many = "s" * (len(estimates) > 1)
    if numbers == [1]:
        return "1 seed, so no interval"
    if len(kinds) > 1:
        return f"medians of {joined([f'{e.n} seeds, {spread(e, text)}' for e in estimates])}"
    spans = joined([span(e, text) for e in estimates])
    return f"median{many} of {joined([str(n) for n in numbers])} seeds, {kinds[0]}{many} {spans}"


def _useful(cells: list[Cell]) -> str:
    """From the first batch size that reached the target on; one that missed it ends the range as any failure does."""
    batches = [cell.batch for cell in cells]
    useful = useful_batch(batches, [cell.steps.median for cell in cells])
    share = f"{EXCESS:.0%}".replace("%", " %")
    if useful == batches[0]:
        return f"steps exceed perfect scaling by more than {share} already at batch {batches[1]}"
    return f"scaling stays within {share} of perfect up to batch {useful:.0f}"


def _critical(summary: Summary, arm: str) -> str:
    """The critical batch size, or its bound, if there are batch sizes enough to ask for it."""
    if arm not in summary.laws:
        return ""
    law = summary.laws[arm]
    if law.identified:
        value, interval = law.fit.law.critical, law.quoted["critical"]
        ends = f"{figures2(interval.low)}-{figures2(interval.high)}"
        return f" Its critical batch size is {figures2(value)} (95 % interval {ends})."
    bound = f": {law.bound[0]} {figures2(law.bound[1])}" if law.bound else ""
    return f" Its critical batch size cannot be told from these batch sizes{bound}."


def _best_of(cells: list[Cell]) -> str:
    most, least = max(c.settings for c in cells), min(c.settings for c in cells)
    if most == 1:
        return ""
    number = most if most == least else f"{least} to {most}"
    if all(cell.unbiased for cell in cells):
        return f"; best of {number} searched points at each batch size, run again with fresh seeds"
    return f"; best of {number} settings at each batch size"


def _misses(summary: Summary, arm: str, cells: list[Cell]) -> str:
    missed = [cell for cell in cells if cell.hits < len(cell.trials)]
    if not missed:
        return ""
    parts = [f"in {len(c.trials) - c.hits} of {plural(len(c.trials), 'seed')} at batch {c.batch}" for c in missed]
    return f" {arm} missed the target {joined(parts)}{_budget(summary, missed)}{_diverged(missed)}."


def _budget(summary: Summary, cells: list[Cell], lead: str = "within its") -> str:
    """` within its budget of 20 epochs`, if all of these trials had the same one."""
    configs = [summary.study.config(t) for c in cells for t in c.trials]
    stated = [(c.get("base") or {}, _reference(c)) for c in configs]
    if any(at is None for _, at in stated):
        return ""
    budgets = {f"{stretch(b[unit], unit)}{at}" for b, at in stated for unit in ("epochs", "steps") if b.get(unit)}
    return f" {lead} budget of {budgets.pop()}" if len(budgets) == 1 else ""


def _reference(config: dict[str, Any]) -> str | None:
    """` at batch 32`, where a method takes the budget to be stated there and makes more passes at larger batches; ` for each
    part`, where a network is trained part by part; None if these have budgets of their own."""
    if parts := [options for name, options in config.get("strategies") or () if name == "stage_wise"]:
        return None if parts[0].get("epochs") else " for each part"
    scaling = [options for name, options in config.get("strategies") or () if name in SCALING]
    return f" at batch {scaling[0]['per']}" if scaling else ""


def _diverged(cells: list[Cell]) -> str:
    number = sum(c.diverged for c in cells)
    return f"; {number} of {sum(len(c.trials) for c in cells)} diverged" if number else ""


# ---------------------------------------------------------------------------------------------- an arm without a target


def _quality(summary: Summary, arm: str, cells: list[Cell]) -> str:
    metric = summary.metric
    if metric is None:
        return f"{arm}: no metric was recorded{_diverged(cells)}."
    ends = [cells[0]] if len(cells) == 1 else [cells[0], cells[-1]]
    finals = [c.final for c in ends if c.final]
    places = [f"{metric_value(metric, e.median)} at batch {c.batch}" for c, e in zip(ends, finals, strict=True)]
    sentence = f"{arm} ends at {metric_name(metric)} {joined(places)}"
    sentence += f"{_budget(summary, ends, 'with a')} ({_over_seeds(finals, partial(metric_value, metric))})"
    return f"{sentence}{_best_of(cells)}{_diverged(cells)}."


# ------------------------------------------------------------------------------------------------------- arms compared


def _comparison(summary: Summary) -> list[str]:
    """On the two leading arms at the largest batch size that at least two arms share, of those where an arm reached the
    target if there are any; and where none did."""
    shared = [cells for b in summary.batches if len(cells := _ranked(summary, b)) > 1]
    reached = [cells for cells in shared if math.isfinite(cells[0].steps.median)]
    missed = [cells[0].batch for cells in shared if math.isinf(cells[0].steps.median)]
    return _unreached(summary, missed) + (_leading((reached or shared)[-1]) if shared else [])


def _unreached(summary: Summary, missed: Sequence[int]) -> list[str]:
    if not (summary.target and missed):
        return []
    return [f"No arm reached {goal(summary.target)} in the median at {batches(missed)}."]


def _ranked(summary: Summary, batch: int) -> list[Cell]:
    """The cells of a batch size, the best first."""
    return sorted((c for c in summary.all_cells if c.batch == batch), key=lambda c: c.rank)


def _leading(cells: Sequence[Cell]) -> list[str]:
    best, second = cells[:2]
    lead = f"At batch {best.batch}," + (f" the two leading arms of {len(cells)}:" if len(cells) > 2 else "")
    if math.isfinite(second.steps.median):
        return [f"{lead} {_steps_compared(best, second)} {_verdict(best, second, best.steps, second.steps, 'faster')}"]
    if math.isfinite(best.steps.median):
        hits = joined([f"{c.arm} {c.hits} of {len(c.trials)}" for c in cells])
        verdict = _verdict(best, second, best.steps, second.steps, "faster")
        return [f"At batch {best.batch}, only {best.arm} reaches the target in the median (hits: {hits}). {verdict}"]
    if best.metric and best.final and second.final:
        verdict = _verdict(best, second, best.final, second.final, "better")
        return [f"{lead} {_finals_compared(best, second, best.metric)} {verdict}"]
    return []


def _steps_compared(best: Cell, second: Cell) -> str:
    ratio = _paired(best, second)
    medians = f"{best.arm} takes {count(best.steps.median)} steps and {second.arm} {count(second.steps.median)}"
    if not ratio or ratio.n == 1:
        return f"{medians}."
    missed = "" if ratio.low > 0 and ratio.high < math.inf else ", a miss counted as infinitely many steps"
    interval = f"{spread(ratio, factor)} over {ratio.n} pairs{missed}"
    return f"{medians}; paired by seed, the ratio is {factor(ratio.median)} ({interval})."


def _paired(a: Cell, b: Cell) -> Estimate | None:
    """Ratio of the steps to target over the seeds that both have."""
    left = {t.seed: steps_to_target(t) for t in a.trials}
    right = {t.seed: steps_to_target(t) for t in b.trials}
    common = sorted(left.keys() & right.keys())
    return paired_ratio([left[s] for s in common], [right[s] for s in common])


def _finals_compared(best: Cell, second: Cell, metric: str) -> str:
    ends = [f"{c.arm} at {metric_value(metric, c.final.median)}" for c in (best, second) if c.final]
    return f"{metric_name(metric)} ends {joined(ends)}."


def _verdict(best: Cell, second: Cell, a: Estimate, b: Estimate, better: str) -> str:
    """Calls an arm better only where 95 % intervals stay apart; with fewer seeds it tells what was seen, no more."""
    if min(a.n, b.n) == 1:
        return f"With a single seed, neither is called {better}."
    ranges = "range" in (a.kind, b.kind)
    name = "ranges" if ranges else "intervals"
    if a.overlaps(b):
        return f"Their {name} overlap, so neither is called {better}."
    if ranges:
        return f"Their ranges do not overlap: each trial of {best.arm} was {better} than any of {second.arm}."
    return f"Their 95 % intervals do not overlap: {best.arm} is {better} than {second.arm} here."
