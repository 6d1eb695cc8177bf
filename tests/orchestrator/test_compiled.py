"""Methods on compiled networks learn what they learn without, or are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.engines import make_worker
from orchestrator import micro_batch
from orchestrator.compiled import check_graphs
from orchestrator.recipe.schema import Speed
from strategies.contract import Plan, PlanError
from strategies.ema import Ema
from strategies.loss_smoothing import LossSmoothing
from strategies.ng_sgd import NgSgd
from strategies.noise_scale import NoiseScale
from tests.orchestrator.test_trainer import without_seconds
from tests.strategies.cases import with_batch_norm
from tests.strategies.harness import baseline, distance, train

COMPILED = {"speed": Speed(patch_convolutions=False, compile="default")}
CUDA = make_worker("solo", {}, "fp32", 0, 1, torch.device("cuda"))


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [pytest.approx(row, rel=1e-9, abs=1e-9) for row in without_seconds(rows)]


@pytest.mark.parametrize("plan", [Ema(0.5).edit(with_batch_norm(baseline())), NoiseScale().edit(baseline())])
def test_rows_are_those_of_the_network_as_it_is(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are seen though the search for a micro-batch has compiled the network without them: those that estimate the
    statistics of batch norms at each of three evaluations, and the one that counts micro-batches, of which there are two."""
    compile = nn.Module.compile  # what is traced does not depend on who computes it
    monkeypatch.setattr(nn.Module, "compile", lambda net, mode: compile(net, backend="eager"))
    fits = micro_batch._fits
    monkeypatch.setattr(micro_batch, "_fits", lambda *args: fits(*args) and args[2] <= 6)
    plain = train(plan, tmp_path / "plain", micro_batch=None)
    quick = train(plan, tmp_path / "quick", micro_batch=None, **COMPILED)
    assert without_seconds(quick.rows) == numbers(plain.rows)
    assert distance(plain, quick) < 1e-9 and quick.progress.micro_batch == 6


def test_ng_sgd_is_refused(tmp_path: Path) -> None:
    """It would precondition by factors that never saw a row."""
    with pytest.raises(PlanError, match=r"ng_sgd sees no layer at work: .* leave speed\.compile off"):
        train(NgSgd().edit(baseline()), tmp_path, **COMPILED)


def test_cuda_graphs_take_one_backward_pass_per_step() -> None:
    learner = baseline().phases[0].learner
    check_graphs(learner, 12, 12, CUDA)
    check_graphs(learner, 12, 6, make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu")))
    with pytest.raises(PlanError, match=r"takes one backward pass .* 12 examples go in micro-batches of 6"):
        check_graphs(learner, 12, 6, CUDA)


@pytest.mark.parametrize(("draws", "antithetic", "count"), [(2, False, 2), (1, True, 2), (3, True, 6)])
def test_cuda_graphs_do_not_take_several_passes(draws: int, antithetic: bool, count: int) -> None:
    several = LossSmoothing(sigma=0.1, draws=draws, antithetic=antithetic).edit(baseline())
    with pytest.raises(PlanError, match=f"takes {count}: compile: default takes any number"):
        check_graphs(several.phases[0].learner, 12, 12, CUDA)
    check_graphs(LossSmoothing(sigma=0.1).edit(baseline()).phases[0].learner, 12, 12, CUDA)
