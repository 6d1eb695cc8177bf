"""What curvature keeps from step to step and from phase to phase: for how long it holds, and what takes its place."""

from __future__ import annotations

from typing import Any

import torch

from cluster.engines import make_worker
from orchestrator.checkpoint import restore, snapshot
from orchestrator.workloads.models import small_cnn
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, State
from strategies.curvature.estimate import Curvature
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from tests.strategies.harness import baseline

# ---------------------------------------------------------------------------------------------------------------- phases


def begun(net: Net, handed_on: Any = None, **options: Any) -> tuple[Backprop, State, Curvature]:
    """A learner with natural_gradient on one worker, with what a phase before hands on."""
    made: Any = NaturalGradient(**options).edit(baseline()).phases[0].learner
    state = made.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    if handed_on is not None:
        restore(state, handed_on)
    return made, state, state.saved["updates"][0].live


def images(side: int, seed: int = 0) -> Batch:
    x = torch.randn(6, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(x, torch.arange(6) % 3, torch.arange(6))


def at(step: int = 0) -> Clock:
    return Clock(step, 100, step * 0.25, 0.25, 6, seed=0)


def cnn() -> Net:
    torch.manual_seed(0)
    return small_cnn((1, 8, 8), 3, width=2, batch_norm=True).double()


def after_a_phase(side: int, **options: Any) -> Any:
    """What three steps on images of that side hand on."""
    made, state, _ = begun(cnn(), **options)
    for step in range(3):
        made.step(state, [images(side, step)], at(step))
    return snapshot(state)


def test_curvature_begins_anew_on_images_of_another_size() -> None:
    """The scale of its factors depends on the number of positions."""
    options: dict[str, Any] = {"factors_every": 1, "inverses_every": 1, "tolerance": 0.5}
    handed_on = after_a_phase(4, **options)
    made, state, found = begun(cnn(), handed_on, **options)
    fresh_net = cnn()
    fresh_net.load_state_dict(handed_on["net"])
    fresh_made, fresh, wanted = begun(fresh_net, **options)
    for learner, own in ((made, state), (fresh_made, fresh)):
        learner.step(own, [images(8, 7)], at())
    assert found.kept.keys() == wanted.kept.keys()
    assert all(torch.equal(t, wanted.kept[key]) for key, t in found.kept.items())
    assert (found.counts, found.intervals, found.due_at) == (wanted.counts, wanted.intervals, wanted.due_at)


def test_curvature_goes_on_where_a_phase_changes_neither_images_nor_network() -> None:
    handed_on = after_a_phase(8, memory=0.5)
    made, state, found = begun(cnn(), handed_on, memory=0.5)
    before = found.kept["head/a"].clone()
    made.step(state, [images(8, 7)], at())
    assert {found.counts[key] for key in found.shapes} == {4}
    _, _, fresh = twin = begun(cnn(), memory=0.5)
    twin[1].live.net.load_state_dict(handed_on["net"])
    twin[0].step(twin[1], [images(8, 7)], at())
    assert torch.allclose(found.kept["head/a"], (before + fresh.kept["head/a"]) / 2, rtol=0, atol=1e-12)
