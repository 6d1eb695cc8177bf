"""Which trials a recipe calls for, given the results on file: those of its searches, then their winners' on fresh seeds.

All of it is a function of the recipe and of results, so the same command again goes on where a study was ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.recipe import resolve
from orchestrator.recipe.resolve import Number, Point
from orchestrator.recipe.study_schema import Recipe
from orchestrator.recipe.workload_schema import Data
from orchestrator.results import Deadline
from orchestrator.search import prune, space, winners
from orchestrator.search.designs import Unit
from orchestrator.search.optuna_sampler import Rank, propose
from orchestrator.search.winners import Result
from orchestrator.store import FINISHED
from orchestrator.trial import Trial

Read = Callable[[str], "Result | None"]  # the result on file of a trial, by its id


class Cell:
    """An arm at one point of the grid: its trials so far, brought up to the results on file by `update`."""

    def __init__(self, recipe: Recipe, point: Point, make: Callable[[Point, int], Trial], read: Read):
        self.recipe, self.point, self.make, self.read = recipe, point, make, read
        self.search = resolve.search_of(recipe, point.arm)
        self.seeds = resolve.seeds(recipe)
        self.design = [self._runs(p) for p in (resolve.designed(point, self.search) if self.search else [point])]
        self.update()

    def _runs(self, point: Point) -> list[Trial]:
        return [self.make(point, seed) for seed in self.seeds]

    def update(self) -> None:
        """Read the results anew: `tuned` are the points of the search with their trials, `trials` all there are."""
        self.finals: dict[str, Result] = {}
        self.tuned = self._points()
        tuning = [trial for point in self.tuned for trial in point]
        self.trials = tuning + self._winners(tuning)

    def _points(self) -> list[list[Trial]]:
        if self.search and self.search.method.name == "optuna":
            return self._proposed()
        self._note([trial for point in self.design for trial in point])
        return self.design

    def _note(self, trials: Sequence[Trial]) -> None:
        """Keep the results that stand: those of failed trials do not, nor of trials that would no longer be given up."""
        ended = {t.id: r for t in trials if (r := self.read(t.id)) and r["status"] in FINISHED}
        known = {**self.finals, **ended}
        if self.search:
            ended = {id: r for id, r in ended.items() if prune.stands(self.search.prune, r, list(known.values()))}
        self.finals |= ended

    def _proposed(self) -> list[list[Trial]]:
        """Point after point, each from those before it, as far as their results go."""
        assert self.search
        points: list[list[Trial]] = []
        units: list[Unit] = []
        while len(points) < self.search.points and all(t.id in self.finals for point in points for t in point):
            units.append(self._next(units, winners.ranks([self._results(p) for p in points])))
            points.append(self._runs(self.point.at(space.place(self.search, units[-1]))))
            self._note(points[-1])
        return points

    def _next(self, units: list[Unit], ranks: list[Rank]) -> Unit:
        assert self.search
        history = tuple(zip(units, ranks, strict=True))
        dimensions = len(space.axes(self.search))
        return propose(self.search.method.options.sampler, self.search.seed, dimensions, history)

    def _results(self, trials: Sequence[Trial]) -> list[Result]:
        return [self.finals[trial.id] for trial in trials]

    def _winners(self, tuning: list[Trial]) -> list[Trial]:
        """None until the whole search of the cell has ended."""
        if not self.search or len(self.tuned) < self.search.points or any(t.id not in self.finals for t in tuning):
            return []
        best = self.tuned[winners.best([self._results(point) for point in self.tuned])][0]
        found = {path: best.point[path] for path in space.axes(self.search)}
        told = {"role": "winner", "edge": "; ".join(space.edges(self.search, found)) or None}
        seeds = winners.fresh(self.seeds, self.search.winners)
        again = [self.make(self.point.at(found), seed).model_copy(update=told) for seed in seeds]
        self.finals |= {t.id: r for t in again if (r := self.read(t.id)) and r["status"] in FINISHED}
        return again

    def deadlines(self, trial: Trial, rows: prune.Rows) -> tuple[Deadline, ...]:
        """By when the trial has to have reached what; nothing outside a search."""
        if not self.search or trial.role != "tuning":
            return ()
        others = [self.finals[t.id] for p in self.tuned for t in p if t.id in self.finals and t.id != trial.id]
        return prune.deadlines(self.search.prune, trial.workload.target, others, rows)

    def terms(self, result: Result) -> dict[str, Any]:
        """What the result of a trial that was given up rests on."""
        assert self.search
        return prune.terms(self.search.prune, result)


class Stages:
    """The trials of a recipe that its results call for."""

    def __init__(self, recipe: Recipe, fingerprint: Callable[[Data], str], precision: Number, read: Read):
        of = functools.cache(fingerprint)

        def make(point: Point, seed: int) -> Trial:
            return resolve.trial_at(recipe, point, seed, of, precision)

        self.cells = [Cell(recipe, point, make, read) for point in resolve.points(recipe)]
        self._list()

    def _list(self) -> None:
        self.trials = [trial for cell in self.cells for trial in cell.trials]
        self.cell_of = {trial.id: cell for cell in self.cells for trial in cell.trials}

    def update(self, cells: Sequence[Cell] | None = None) -> bool:
        """Take in the results on file, of all cells or of these; whether that called for other trials."""
        before = [trial.id for trial in self.trials]
        for cell in self.cells if cells is None else cells:
            cell.update()
        self._list()
        return [trial.id for trial in self.trials] != before

    def finished(self, trial: Trial) -> bool:
        """Whether the trial's result, as of the last update, is final."""
        return trial.id in self.cell_of[trial.id].finals

    def unfinished(self) -> Iterator[str]:
        """A line for each search that ended without a winner."""
        for cell in self.cells:
            left = sum(t.id not in cell.finals for t in cell.trials)
            if cell.search and left and all(t.role == "tuning" for t in cell.trials):
                yield f"arm {cell.point.arm}, batch {cell.point.data['base']['batch']}: no winner yet"
