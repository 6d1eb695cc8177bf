"""What curvature keeps from step to step and from phase to phase: for how long it holds, and what takes its place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from orchestrator.checkpoint import restore, snapshot
from orchestrator.workloads.models import small_cnn
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, PlanError, State
from strategies.curvature.estimate import Curvature
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.rate import Rate
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


# ----------------------------------------------------------------------------------------------------------------- ekfac

EKFAC: dict[str, Any] = {"inverse": "ekfac", "factors_every": 1, "eager": 1, "damping": 0.1, "kl_clip": 0.0}


def test_a_layer_that_is_not_due_keeps_its_eigenvalues() -> None:
    made, state, found = begun(cnn(), inverses_every=100, tolerance=1e-9, **EKFAC)
    paths: dict[str, list[Tensor]] = {"stages.1.0/scale": [], "head/scale": []}
    for step in range(5):
        made.step(state, [images(8, step)], at(step))
        for key, path in paths.items():
            path.append(found.kept[key].clone())
        found.due_at |= {key: 100 for key in found.shapes if key.startswith("stages.1.0/")} if step else {}
    assert all(torch.equal(later, paths["stages.1.0/scale"][1]) for later in paths["stages.1.0/scale"][2:])
    assert not torch.equal(paths["head/scale"][1], paths["head/scale"][4])


def test_the_first_sample_along_new_bases_replaces_eigenvalues() -> None:
    """The step after an inversion sees it, whether or not factors are due; the next one makes a mean with it."""
    made, state, found = begun(cnn(), inverses_every=10, **EKFAC | {"factors_every": 3})
    still = dataclasses.replace(made, rate=Rate(1e-300))
    path = []
    for step in range(5):
        still.step(state, [images(8, step)], at(step))
        path.append(found.kept["head/scale"][0].clone())
    g, a = found.kept["head/g_basis"][0], found.kept["head/a_basis"][0]
    samples = [(g.T @ gradients @ a).square().mean(0) for gradients in map(of_the_head, (images(8, 1), images(8, 3)))]
    assert torch.allclose(path[1], samples[0], rtol=1e-9, atol=1e-18)
    assert torch.equal(path[1], path[2])
    assert torch.allclose(path[3], (samples[0] + samples[1]) / 2, rtol=1e-9, atol=1e-18)
    assert torch.equal(path[3], path[4])


def of_the_head(batch: Batch) -> Tensor:
    """(n, classes, features + 1), the gradient of each example."""
    net = cnn()
    inputs: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    grads = net(batch.x).detach().softmax(1) - nn.functional.one_hot(batch.y, 3)
    rows = torch.cat([inputs[0], torch.ones(len(batch.x), 1)], 1)
    return grads[:, :, None] * rows[:, None]


def test_ekfac_at_each_step_differs_from_eigen_where_layers_wait_and_is_refused_where_none_does() -> None:
    weights = []
    for inverse in ("eigen", "ekfac"):
        made, state, _ = begun(cnn(), inverses_every=1, tolerance=10.0, **EKFAC | {"inverse": inverse})
        for step in range(4):
            made.step(state, [images(8, step)], at(step))
        weights.append(state.live.net.head.weight.detach())
    assert not torch.allclose(*weights)
    with pytest.raises(PlanError, match="with inverses_every: 1 there are none: raise it, set a tolerance"):
        NaturalGradient(inverse="ekfac", factors_every=1, inverses_every=1)
