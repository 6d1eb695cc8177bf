"""A study: a recipe over its directory. What is done, what is left, and whether the recipe is still the one it began with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import yaml

from orchestrator.environment import describe, redact, redact_text
from orchestrator.files import Damaged, write_atomic, write_json
from orchestrator.precision import auto
from orchestrator.recipe import Recipe, dump, resolved
from orchestrator.recipe.resolve import Number
from orchestrator.results import Deadline, outcome
from orchestrator.run_trial import labels
from orchestrator.search.stages import Stages
from orchestrator.store import Store
from orchestrator.trial import Trial
from orchestrator.workloads import fingerprint, load

# Keys that change no result: they may differ from one run of a study to the next.
FREE = ("cluster", "tracking", "speed", "checkpoint", "unfair")
# Keys that may only grow, of the base and of each arm's.
GROWING = ("base.epochs", "base.steps", "search.points", "search.winners")


class Changed(Exception):
    """The recipe differs from the one that the study began with. str() is the diff."""


@dataclass(frozen=True)
class Study:
    recipe: Recipe
    source: str  # the recipe file's text, kept as it was written
    runs: Path  # the folder of all studies

    @cached_property
    def store(self) -> Store:
        return Store(self.runs / self.recipe.study)

    @property
    def phases(self) -> Path:
        """Finished phases are shared by all studies of a folder."""
        return self.runs / ".phases"

    def check_data(self) -> None:
        """Raises DataError if the data set is missing, truncated or corrupt: no worker need find it out."""
        data = self.recipe.workload.data
        if not data.noisy_quadratic:
            load(data)

    @cached_property
    def precision(self) -> Number:
        """That of the recipe; where it says `auto`, the one it began with, wherever it goes on. Raises ClusterError."""
        if self.recipe.precision != "auto":
            return self.recipe.precision
        if self.resolved.exists() and (began := _read_resolved(self.resolved).get("precision")) in get_args(Number):
            return began  # type: ignore[return-value]
        networks = [self.recipe.workload.model, *(arm.model for arm in self.recipe.arms.values() if arm.model)]
        convolutional = any(network.name != "mlp" for network in networks)
        return auto(self.recipe.cluster, convolutional)

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.recipe, fingerprint, self.precision, self.store.result)

    @property
    def searched(self) -> bool:
        return any(cell.search for cell in self.stages.cells)

    @property
    def trials(self) -> list[Trial]:
        """All that the results on file call for; a search may call for more once it has more results."""
        return self.stages.trials

    def done(self, trial: Trial) -> bool:
        """Whether the trial has its final result."""
        return self.stages.finished(trial)

    def left(self) -> list[Trial]:
        """Trials without a final result, in the order of the recipe."""
        return [trial for trial in self.trials if not self.done(trial)]

    def finished(self) -> list[dict[str, Any]]:
        results = (self.store.result(trial.id) for trial in self.trials)
        return [result for result in results if result]

    def commit(self, trial: Trial, result: dict[str, Any]) -> list[Trial]:
        """Keep a trial's result; the trials that it calls for, which nothing called for before."""
        cell = self.stages.cell_of[trial.id]
        if result["status"] == "pruned":
            result = result | {"pruned_by": cell.terms(result)}
        self.store.commit(result)
        known = set(self.stages.cell_of)
        if not (cell.search and self.stages.update([cell])):
            return []
        self.adopt([new for new in self.trials if new.id not in known])  # trained for an earlier form of the recipe
        self._list_trials()
        return [new for new in self.trials if new.id not in known]

    def deadlines(self, trial: Trial) -> tuple[Deadline, ...]:
        """By when the trial has to have reached what, lest its search gives it up."""
        return self.stages.cell_of[trial.id].deadlines(trial, self.store.rows)

    # ------------------------------------------------------------------------------------------- the recipe on file

    @property
    def resolved(self) -> Path:
        """The recipe as understood, when it was last run."""
        return self.store.directory / "resolved.yaml"

    def understood(self) -> dict[str, Any]:
        """The recipe with every default filled in, and with what is measured once; without secrets."""
        return redact(resolved(self.recipe) | {"precision": self.precision})

    def check_unchanged(self) -> None:
        """Raises Changed if a result on file would not answer for this recipe, Damaged if that cannot be told."""
        if self.resolved.exists():
            lines = list(differences(decisive(_read_resolved(self.resolved)), decisive(self.understood())))
            if lines:
                raise Changed("\n".join(lines))

    def set_aside(self) -> Path | None:
        """Move an earlier study of this name, which we hold the lock of, out of the way; nothing is deleted."""
        old = self.store.directory
        if not any(path.name != ".lock" for path in old.iterdir()):
            return None
        number = next(n for n in range(1, 10**6) if not old.with_name(f"{old.name}.old{n}").exists())
        return Path(shutil.move(old, old.with_name(f"{old.name}.old{number}")))

    def write_recipe(self) -> None:
        """The recipe as written and as understood, without secrets, and where it runs."""
        folder, understood = self.store.directory, dump(self.understood())
        folder.mkdir(parents=True, exist_ok=True)
        _keep_current(folder / "recipe.yaml", redact_text(self.source))
        _keep_current(self.resolved, understood)
        self._list_trials()
        write_json(folder / "env.json", describe())

    def _list_trials(self) -> None:
        write_json(self.store.directory / "trials.json", [trial.id for trial in self.trials])

    def adopt(self, trials: Sequence[Trial] | None = None) -> None:
        """Bring results on file up to this recipe's names and target: both are read from the curves, nothing is trained."""
        found = [(t, r) for t in (self.trials if trials is None else trials) if (r := self.store.result(t.id))]
        for trial, result in found:
            if result["status"] != "failed":
                self._adopt(trial, result)
        if found and self.stages.update():  # a new target has other winners
            self._list_trials()
            self.adopt()

    def _adopt(self, trial: Trial, result: dict[str, Any]) -> None:
        new = result | outcome(self.store.rows(result), trial.workload.target, timed=not result["reused"])
        new |= labels(trial)
        if new != result:
            self.store.commit(new)


def _keep_current(path: Path, text: str) -> None:
    """Written only where it differs: a report older than the recipe is built anew."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def _read_resolved(path: Path) -> dict[str, Any]:
    try:
        old = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError):
        old = None
    if not isinstance(old, dict):
        raise Damaged(f"{path}: damaged: remove it if the recipe is the same as before, or start afresh with --fresh")
    return old


def decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that results depend on: of the engine, the compression of gradients; of the target,
    nothing unless trials stop at it."""
    kept = {key: value for key, value in recipe.items() if key not in FREE}
    ((_, options),) = recipe["engine"].items()
    kept["engine"] = {"compression": options.get("compression", {"none": {}})}
    kept = _searched(kept) | {"arms": {name: _searched(arm) for name, arm in kept["arms"].items()}}
    if not recipe["workload"].get("target", {}).get("stop"):
        kept["workload"] = {key: value for key, value in recipe["workload"].items() if key != "target"}
    return kept


def _searched(holder: dict[str, Any]) -> dict[str, Any]:
    """Whom a search gives up changes no result: what it gave up is trained on where that no longer holds."""
    if "search" not in holder:
        return holder
    kept = {key: value for key, value in holder["search"].items() if key not in ("prune", "allow_unequal")}
    return holder | {"search": kept}


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """A line for each key in which `new` breaks with `old`; what has only grown is passed over."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            below = f"{path}.{key}" if path else str(key)
            if key not in old and path == "arms":
                continue
            yield from differences(old.get(key), new.get(key), below)
    elif not _grown(old, new, path):
        yield f"- {path}: {_show(old)}\n+ {path}: {_show(new)}"


def _grown(old: Any, new: Any, path: str) -> bool:
    if path.endswith(GROWING) and isinstance(old, int | float) and isinstance(new, int | float):
        return new > old
    if path == "precision":
        return old == "auto"  # of a study before `auto` was kept as what it was: its trials' names tell
    if path == "seeds":
        return set(_seeds(old)) <= set(_seeds(new))
    if path.startswith("grid.") and isinstance(old, list) and isinstance(new, list):
        return all(value in new for value in old)
    return False


def _seeds(value: int | list[int]) -> list[int]:
    return list(range(value)) if isinstance(value, int) else value


def _show(value: Any) -> str:
    return "(absent)" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
