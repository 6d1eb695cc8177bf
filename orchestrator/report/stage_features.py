"""What each stage of a trained network makes of the test images: how well lines part the classes, and a map by t-SNE.

Measured when `bigbatch report --features` asks for it, since it needs the trial's weights and data; kept in `features/` of the
study, from where every later report draws it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from orchestrator.files import Damaged, printable, read_json, write_json
from orchestrator.report.load import Text
from orchestrator.report.summary import Summary
from orchestrator.report.tables import Table
from orchestrator.workloads import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from orchestrator.trial import Trial
    from strategies.net import Net

TRAIN, TEST = 2000, 1000  # first examples of each split that are looked at
COMPONENTS = 256  # principal ones that the logistic regression sees, at most
MAPPED = 50  # principal components that t-SNE sees, at most
SEED = 0

FEATURES_NOTE = (
    f"Linear separability: accuracy of a logistic regression (L2, C = 1) on the first {COMPONENTS} principal components of a "
    f"stage's output, scaled as a whole; trained on the first {TRAIN} training examples as they are, tested on the first "
    f"{TEST} test examples, or on all if there are fewer. The map is t-SNE of these test examples from {MAPPED} components "
    f"(perplexity 30, seed {SEED}): distances between groups and their sizes mean nothing in it."
)


class Stage(BaseModel):
    stage: int  # from 1 on
    features: int  # values of one example
    accuracy: float
    points: list[tuple[float, float]]


class Looked(BaseModel):
    """features/<trial>.json."""

    trial: Text
    arm: Text
    labels: list[int]
    train: int  # examples on which the regression was trained
    stages: list[Stage]


def measure(study: Path, wanted: str) -> Path:
    """Looks at the trial `ID`, or `ID:STAGE`, and writes features/ID.json. Raises DataError for what cannot be looked at."""
    name, _, stage = wanted.partition(":")
    trial = _trial(study, name)
    net, data = _network(study, trial), _data(trial)
    chosen = _chosen(stage, len(net.stages), wanted)
    train, test = data.first(TRAIN), data.test(0, min(TEST, data.test_examples))
    seen = [_outputs(net, batch.x) for batch in (train, test)]
    labels = [batch.y.numpy() for batch in (train, test)]
    stages = [_look(n, seen[0][n - 1], labels[0], seen[1][n - 1], labels[1]) for n in chosen]
    looked = Looked(trial=trial.id, arm=trial.arm, labels=labels[1].tolist(), train=len(train), stages=stages)
    path = study / "features" / f"{trial.id}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, looked.model_dump())
    return path


def _trial(study: Path, name: str) -> Trial:
    from orchestrator.trial import Trial

    path = study / "trials" / name / "config.json"
    known = sorted(p.parent.name for p in study.glob("trials/*/config.json"))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1) or known[:1]
        raise DataError(f"{study}: no trial {printable(name)!r}" + (f"; there is {near[0]}" if near else ""))
    try:
        trial = Trial.model_validate_json(json.dumps({k: v for k, v in read_json(path).items() if k != "trial"}))
    except (ValidationError, AttributeError) as error:
        raise Damaged(f"{path}: not a trial as this version writes it ({type(error).__name__})") from None
    if trial.workload.model.import_ or trial.workload.data.noisy_quadratic:
        raise DataError(f"{name}: its network is your own code, or none: only networks of bigbatch are taken apart")
    return trial


def _network(study: Path, trial: Trial) -> Net:
    """With the weights at the end of the last phase, from the folder's finished phases."""
    from orchestrator.compose import compose
    from orchestrator.phases import PhaseStore
    from orchestrator.workloads import load

    arrays = load(trial.workload.data)
    plan = compose(trial, len(arrays.train_y))
    listed = study / "trials" / trial.id / "phases.json"
    names = read_json(listed) if listed.exists() else []
    record = PhaseStore(study.parent / ".phases").get(names[len(plan.phases) - 1]) if names else None
    if record is None:
        raise DataError(f"{study}: no weights of trial {trial.id}: it has not ended well, or its phases were deleted")
    phase = plan.phases[-1]
    net = phase.model(arrays.train_x.shape[1:], arrays.classes)
    for surgery in phase.surgery:
        net = surgery(net)
    net.load_state_dict(record.weights)
    return net.float().eval()


def _data(trial: Trial) -> Any:
    import torch

    from orchestrator.workloads import open_dataset

    return open_dataset(trial.workload, trial.seed, torch.device("cpu"), torch.float32)


def _chosen(stage: str, count: int, wanted: str) -> Sequence[int]:
    if not stage:
        return range(1, count + 1)
    if not (stage.isdecimal() and 1 <= int(stage) <= count):
        raise DataError(f"--features {printable(wanted)}: expected a stage from 1 to {count} behind the colon")
    return [int(stage)]


def _outputs(net: Net, x: Tensor) -> list[NDArray]:
    """(n, d) float32 for each stage."""
    import torch

    outputs: list[list[Tensor]] = [[] for _ in net.stages]
    with torch.no_grad():
        for part in x.split(128):
            for kept, stage in zip(outputs, net.stages, strict=True):
                part = stage(part)
                kept.append(part.flatten(1))
    return [torch.cat(kept).numpy() for kept in outputs]


def _look(number: int, train: NDArray, train_y: NDArray, test: NDArray, test_y: NDArray) -> Stage:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.manifold import TSNE
    from sklearn.pipeline import make_pipeline

    def components(most: int, x: NDArray) -> PCA:
        return PCA(min(most, *x.shape), svd_solver="randomized", random_state=SEED)

    lines = make_pipeline(components(COMPONENTS, train), LogisticRegression(max_iter=1000))
    unit = (
        float(train.std()) or 1.0
    )  # of all features: scaled one by one, components that hold rounding alone would count
    accuracy = float(lines.fit(train / unit, train_y).score(test / unit, test_y))
    reduced = components(MAPPED, test).fit_transform(test)
    points = TSNE(perplexity=min(30.0, (len(test) - 1) / 3), init="pca", random_state=SEED).fit_transform(reduced)
    return Stage(stage=number, features=train.shape[1], accuracy=accuracy, points=points.round(3).tolist())


# --------------------------------------------------------------------------------------------------------- in the report


def looked_at(summary: Summary) -> list[Looked]:
    """What was measured of the study's trials. Raises Damaged for a file that does not hold it."""
    found = []
    for path in sorted((summary.study.path / "features").glob("*.json")):
        try:
            found.append(Looked.model_validate(read_json(path)))
        except ValidationError as error:
            raise Damaged(f"{path}: {printable(error.errors()[0]['msg'])}; remove it, or measure it again") from None
    return found


def features_table(summary: Summary) -> Table:
    return Table.of(
        [
            {
                "trial": look.trial,
                "arm": look.arm,
                "stage": stage.stage,
                "features": f"{stage.features:,}",
                "linearly separable": f"{100 * stage.accuracy:.1f} %",
            }
            for look in looked_at(summary)
            for stage in look.stages
        ]
    )


def features_caption(summary: Summary) -> tuple[str, str]:
    looks = looked_at(summary)
    trials = ", ".join(f"{look.trial} ({look.arm})" for look in looks)
    return "Features, stage by stage", (
        f"t-SNE of {len(looks[0].labels)} test examples at the output of each stage of {trials}; a colour and marker for each "
        f"class. In brackets, how well a logistic regression tells the classes there. {FEATURES_NOTE}"
    )
