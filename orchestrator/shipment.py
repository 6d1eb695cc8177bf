"""What a trial finds and leaves on disk, so that its ranks may run where the driver's files are not. No torch."""

from __future__ import annotations

from pathlib import Path

from cluster.tasks import Files
from orchestrator.compose import compose
from orchestrator.identity import phase_key
from orchestrator.trial import Trial
from orchestrator.workloads import load, parsed_folder
from orchestrator.workloads.noisy_quadratic import QuadraticData


def shipment(trial: Trial, directory: Path, phases: Path) -> Files:
    """`writes`: the trial's directory and that of phases; `reads`: of the latter, those of this trial; `constant`: its data."""
    quadratic = trial.workload.data.name == "noisy_quadratic"
    examples = QuadraticData.examples if quadratic else len(load(trial.workload.data).train_y)
    plan = compose(trial, examples)
    own = tuple(phases / phase_key(plan, i, trial.context()) for i in range(len(plan.phases)))
    return Files((directory, phases), (directory, *own), () if quadratic else (parsed_folder(trial.data),))
