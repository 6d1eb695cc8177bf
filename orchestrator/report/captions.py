"""What stands under each figure, and the notes on how to read the numbers: every choice that a reader could dispute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.batch_law.intervals import DISTINCT, FEWEST
from orchestrator.report.load import Result, as_text
from orchestrator.report.summary import Summary
from orchestrator.report.wording import goal, joined, metric_name, plural, stretch
from orchestrator.statistics import ENOUGH, EXCESS, Estimate


def steps(summary: Summary) -> tuple[str, str]:
    assert summary.target
    medians = _medians(summary, [c.steps for c in summary.all_cells])
    return "Steps to target against batch size", (
        f"Optimizer steps until {goal(summary.target)}: {medians}. Dashed: perfect scaling from the smallest batch size of "
        "each arm that reached the target, twice the batch for half the steps. "
        f"{_fitted(summary)}{_censored(summary)}{_resolution(summary)}"
    )


def _fitted(summary: Summary) -> str:
    return "Dotted: the law S = S_min (1 + B_crit / B) fitted, with its 95 % band. " if summary.laws else ""


def _censored(summary: Summary) -> str:
    missed = sum(len(c.trials) - c.hits for c in summary.all_cells)
    if not missed:
        return "All trials reached the target."
    number = sum(c.diverged for c in summary.all_cells)
    diverged = f"; {number} of them diverged there" if number else ""
    return (
        f"Open triangles: {plural(missed, 'trial')} that did not reach the target, at the last step run (censored: "
        f"reaching it takes more steps than that, if it can be reached){diverged}."
    )


def _resolution(summary: Summary) -> str:
    """How finely the target was looked for, if all trials were alike in it."""
    every = [w.get("evaluate") or {} for w in summary.workloads]
    intervals = {stretch(value, unit).removeprefix("1 ") for e in every for unit, value in e.items() if value}
    if len(intervals) != 1 or summary.target is None or not summary.target.metric.startswith("test"):
        return ""
    return f" The target is checked every {intervals.pop()}, so the steps are upper bounds to that grain."


def final(summary: Summary) -> tuple[str, str]:
    assert summary.metric
    name = metric_name(summary.metric)
    diverged = sum(c.diverged for c in summary.all_cells)
    worst = f" {diverged} diverged, which counts as the worst value there is." if diverged else ""
    stop = " Trials end when they reach the target." if summary.stops else ""
    medians = _medians(summary, [c.final for c in summary.all_cells if c.final])
    return f"Final {name} against batch size", f"{name.capitalize()} at the end of training: {medians}.{worst}{stop}"


def seconds(summary: Summary) -> tuple[str, str]:
    assert summary.target
    reused = sum(t.reused for c in summary.all_cells for t in c.trials)
    left_out = f" {reused} reused trials are left out: times are not carried over." if reused else ""
    medians = _medians(summary, [c.seconds for c in summary.all_cells if c.seconds])
    return "Time to target against batch size", (
        f"Seconds of training until {goal(summary.target)}, without start-up, evaluation and logging: {medians}. "
        f"Measured on {hardware(summary)}; other hardware gives other times.{left_out}"
    )


def curves(summary: Summary) -> tuple[str, str]:
    assert summary.metric
    dotted = " Dotted: the target." if summary.target and summary.target.metric == summary.metric else ""
    name = metric_name(summary.metric)
    return "Training curves", f"{name.capitalize()} against epochs, a line per seed, a panel per batch size.{dotted}"


def _medians(summary: Summary, estimates: Sequence[Estimate]) -> str:
    """What lines, bars and dots are."""
    numbers = sorted({e.n for e in estimates})
    over = plural(numbers[0], "seed") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"
    if numbers == [1]:
        return "a single seed, so no interval"
    kinds = sorted({e.kind for e in estimates}, reverse=True)
    best = " of the best setting" if summary.searched else ""
    open_ended = any(math.isinf(e.low) or math.isinf(e.high) for e in estimates if math.isfinite(e.median))
    arrow = ", an arrow that a bar has no end" if open_ended else ""
    return f"median{best} over {over}, bars show the {' or '.join(kinds)}, dots each seed{arrow}"


def hardware(summary: Summary) -> str:
    """Workers and devices of the trials, and what the environment says of the machine."""
    used = {_workers(t) for c in summary.all_cells for t in c.trials if not t.reused}
    env = summary.study.env
    machine = [as_text(env["cpu"])] * bool(env.get("cpu")) + [
        as_text(gpu) for gpu in dict.fromkeys(env.get("gpus") or [])
    ]
    return f"{'; '.join(sorted(used))}{f' ({joined(machine)})' if machine else ''}"


def _workers(trial: Result) -> str:
    workers, threads = trial.workers or 1, plural(trial.threads or 1, "thread")
    return f"{plural(workers, 'worker')} with {threads}{' each' * (workers > 1)} on {trial.device}"


def notes(summary: Summary) -> list[str]:
    """How to read the report."""
    share = f"{EXCESS:.0%}".replace("%", " %")
    said = [
        f"Intervals: with fewer than {ENOUGH} seeds the range of the seeds, since no interval of a median holds 95 % then; "
        f"from {ENOUGH} on, the 95 % interval from order statistics. Hit rates have Wilson intervals.",
        "An arm is not called better than another where their intervals overlap.",
    ]
    if summary.all_cells:
        said.append(
            "The folder tables/ has the results for papers: LaTeX with booktabs, a file per table, for \\input. The trials "
            "behind every number, by id, are in evidence.json; the fit of an arm rests on all of its cells."
        )
    if any(t.flops for cell in summary.all_cells for t in cell.trials):
        said.append(
            "FLOPs are those of a forward and a backward pass through the whole network for each example. What a method adds "
            "(further passes, synthesisers, curvature) or spares (layers that it does not train) is not counted."
        )
    if summary.target:
        said += [
            "A trial that did not reach the target, or diverged, counts as infinitely many steps in medians and intervals.",
            "Local slope: -d log S / d log B from the batch size before, S steps at batch size B. Above 0.9 scaling is called "
            "perfect, from 0.1 to 0.9 diminishing, below 0.1 maximal data parallelism. The useful batch size is the largest up "
            f"to which steps exceed perfect scaling by {share} at most. These thresholds are conventions of this report.",
        ]
    if summary.laws:
        said.append(
            "Critical batch size B_crit: where the fitted law S = S_min (1 + B_crit / B) takes twice S_min steps. It is fitted "
            f"by maximum likelihood to arms that reached the target at {DISTINCT} batch sizes or more, evaluations taken as "
            "intervals, misses as censored. Its interval is the widest of profile likelihood and of bootstraps over batch "
            "sizes and over seeds. If one of these is open, if all batch sizes lie above or all below half of B_crit, or if "
            f"fewer than {FEWEST} of them reached the target, a bound is given."
        )
    if any(cell.fresh for cell in summary.all_cells):
        said.append(
            "Where an arm was searched, its numbers come from the best point of each batch size, trained again with seeds "
            "that the search had not used. The search itself is shown apart: its best result was chosen for being the best, "
            "so it flatters. A trial that was given up is censored at its last step; exact pruning changes no minimum."
        )
    if summary.searched and not all(cell.unbiased for cell in summary.all_cells):
        said.append(
            "Where the grid varied more than the batch size, each arm and batch size is shown at its best setting: the lowest "
            "median steps to target, then the best final metric. It was chosen on these same seeds, so it flatters; more so "
            "where more settings were tried."
        )
    return said
