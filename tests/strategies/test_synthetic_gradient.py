"""Synthetic gradients against their oracles: backpropagation, autograd, least squares; in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError
from strategies.decoupled.boundary import CutNet, build
from strategies.decoupled.synthesisers import synthesiser
from strategies.decoupled.synthetic import Guess, Share, Synthetic
from strategies.net import Net
from strategies.synthetic_gradient import SyntheticGradient
from tests.strategies.cases import with_stages
from tests.strategies.cut_nets import IMAGES, WIDTH, Rig, cnn, mlp, perturbed, random_batch
from tests.strategies.harness import CLASSES, baseline, distance, train

KINDS = ("deep", "linear", "affine", "low_rank", "pooled")


def largest(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float:
    return max(float((x[name] - y[name]).abs().max()) for x, y in zip(a, b, strict=True) for name in x)


class Truth(nn.Module):
    """An oracle in a synthesiser's place: the gradient of the summed loss through all that lies above the cut."""

    def __init__(self, above: nn.Module):
        super().__init__()
        self.above = [above]  # not a child: it has no parameters of its own
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            loss = nn.functional.cross_entropy(self.above[0](h), y, reduction="sum")
            return torch.autograd.grad(loss, h)[0] + self.zero


# -------------------------------------------------------------------------------------------- 1 to 3: backpropagation


@pytest.mark.parametrize(("model", "inputs"), [(mlp, WIDTH), (cnn, IMAGES)])
def test_lambda_1_is_backpropagation(model: Any, inputs: tuple[int, ...]) -> None:
    rig = perturbed(Rig(model, inputs, share=Share(1.0, 1.0, 0.0)))
    assert len(rig.state.live.parts) == 3
    assert largest(rig.gradients(), rig.backprop()) < 1e-12


@pytest.mark.parametrize(("model", "inputs"), [(mlp, WIDTH), (cnn, IMAGES)])
def test_the_head_as_a_module_of_its_own(model: Any, inputs: tuple[int, ...]) -> None:
    rig = perturbed(Rig(model, inputs, cuts=(1, 3), share=Share(1.0, 1.0, 0.0)))
    assert {*dict(rig.state.live.parts[-1].named_parameters())} == {"head.weight", "head.bias"}
    assert largest(rig.gradients(), rig.backprop()) < 1e-12
    with pytest.raises(PlanError, match="a cut behind stage 4 leaves nothing: the network has 3 stages"):
        build(inputs, CLASSES, ModelSpec(model), (1, 4))


@pytest.mark.parametrize(("model", "inputs"), [(mlp, WIDTH), (cnn, IMAGES)])
def test_true_guesses_are_backpropagation(model: Any, inputs: tuple[int, ...]) -> None:
    rig = Rig(model, inputs, share=Share(0.0, 0.0, 0.0))
    parts = rig.state.live.parts
    rig.state.live.helpers[:] = [Truth(nn.Sequential(*parts[i + 1 :])) for i in range(2)]
    assert largest(rig.gradients(), rig.backprop()) < 1e-12


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "inputs"), [(mlp, WIDTH), (cnn, IMAGES)])
def test_at_first_only_the_last_module_moves(model: Any, inputs: tuple[int, ...], kind: Any, label: bool) -> None:
    rig = Rig(model, inputs, guess=Guess(kind, label, hidden=None))
    gradients, usual = rig.gradients(), rig.backprop()
    assert all(g.eq(0).all() for module in gradients[:-1] for g in module.values())
    assert largest(gradients[-1:], usual[-1:]) == 0


def test_one_module_is_plain_training(tmp_path: Path) -> None:
    base = with_stages(baseline())
    cut = SyntheticGradient(cuts=[]).edit(base)
    assert distance(train(cut, tmp_path / "cut"), train(base, tmp_path / "plain")) == 0


# --------------------------------------------------------------------------------- 4 and 5: what synthesisers learn from


def targets(rig: Rig) -> dict[int, Tensor]:
    """What each synthesiser is to learn, by cut."""
    seen: dict[int, Tensor] = {}
    rig.learner = dataclasses.replace(rig.learner, queue=1)
    rig.learner.exchange(rig.state, rig.batch, rig.clock(), 1.0)
    for cut, pairs in enumerate(rig.state.live.waiting.fresh):
        ((pair, _),) = pairs
        seen[cut] = pair.target
    return seen


def test_targets_are_built_on_the_guess_above() -> None:
    """T_i = J^T M_{i+1}(h_{i+1}) with J of the module between, and M known; true at the last cut."""
    rig = perturbed(Rig(mlp, WIDTH))
    found = targets(rig)
    first, second, last = rig.state.live.parts
    h1 = first(rig.batch.x).detach().requires_grad_()
    h2 = second(h1)
    guessed = rig.state.live.helpers[1](h2, rig.batch.y).detach()
    (expected,) = torch.autograd.grad((h2 * guessed).sum(), h1)
    assert torch.allclose(found[0], expected, rtol=0, atol=1e-12)
    h2 = h2.detach().requires_grad_()
    summed = nn.functional.cross_entropy(last(h2), rig.batch.y, reduction="sum")
    assert torch.allclose(found[1], torch.autograd.grad(summed, h2)[0], rtol=0, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Against one-hot labels."""

    def __call__(self, predict: Any, batch: Batch, clock: Clock) -> Tensor:
        wanted = nn.functional.one_hot(batch.y, CLASSES).to(batch.x.dtype)
        return 0.5 * (predict(batch.x) - wanted).square().sum(1).mean()


def test_of_a_linear_network_a_linear_synthesiser_finds_the_gradient() -> None:
    """With dL/dh = W'(W h + b - e_y), the best weights are W'W and -W', the bias W'b, and nothing is left."""

    def linear(inputs: tuple[int, ...], classes: int) -> Net:
        return Net([nn.Linear(inputs[0], 4), nn.Identity()], head=nn.Linear(4, classes))

    rig = Rig(linear, WIDTH, cuts=(1,), objective=SquaredError(), guess=Guess("linear"))
    rig.batch = random_batch(WIDTH, 40)
    target = targets(rig)[0]
    part, (guess,) = rig.state.live.parts[-1], rig.state.live.helpers
    with torch.no_grad():
        h = rig.state.live.parts[0](rig.batch.x)
        w, b = part.head.weight, part.head.bias
        guess.first.weight.copy_(w.T @ w)
        guess.first.bias.copy_(w.T @ b)
        guess.label.weight.copy_(-w.T)
        assert torch.allclose(guess(h, rig.batch.y), target, rtol=0, atol=1e-12)
    design = torch.cat([h, nn.functional.one_hot(rig.batch.y, CLASSES).double()], 1)
    fitted = torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert (design @ fitted - target).square().mean() < 1e-24


def test_a_synthesiser_descends_its_squared_error() -> None:
    """Its gradient: of the error summed over an example's values, averaged over examples; by autograd."""
    rig = perturbed(Rig(mlp, WIDTH, cuts=(2,)))
    (guess,) = rig.state.live.helpers
    with torch.no_grad():
        h = rig.state.live.parts[0](rig.batch.x)
    target = targets(rig)[0]
    rig.learner = dataclasses.replace(rig.learner, queue=0)
    rig.net.zero_grad()
    rig.learner.exchange(rig.state, rig.batch, rig.clock(), 1.0)
    error = (guess(h, rig.batch.y) - target).square().sum(1).mean()
    expected = torch.autograd.grad(error, [*guess.parameters()])
    for p, wanted in zip(guess.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, wanted, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- 7


def test_twice_the_batch_of_the_same_examples_changes_nothing() -> None:
    once, twice = perturbed(Rig(mlp, WIDTH)), perturbed(Rig(mlp, WIDTH))
    twice.batch = Batch(*(t.repeat_interleave(2, 0) for t in (once.batch.x, once.batch.y, once.batch.position)))
    for step in range(3):
        once.step(step)
        twice.step(step)
    for rig in (once, twice):
        rig.gradients()
    for a, b in zip(once.state.live.helpers, twice.state.live.helpers, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12)
            assert torch.allclose(p, q, rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------------- options and refusals


def test_lambda_falls_evenly() -> None:
    share = Share(1.0, 0.2, 0.5)
    clock = Clock(0, 10, 0.0, 0.1, 8, 0)
    assert share(clock) == 1.0
    assert share(dataclasses.replace(clock, epoch=0.25)) == pytest.approx(0.6, abs=1e-15)
    assert share(dataclasses.replace(clock, epoch=0.9)) == pytest.approx(0.2, abs=1e-15)
    assert Share(1.0, 0.3, 0.0)(clock) == pytest.approx(0.3, abs=1e-15)


def test_half_lambda_is_half_way() -> None:
    half, none = (perturbed(Rig(mlp, WIDTH, cuts=(2,), share=Share(s, s, 0.0))) for s in (0.5, 0.0))
    whole = half.backprop()
    half.net.zero_grad()
    for g, a, b in zip(half.gradients(), none.gradients(), whole, strict=True):
        for name in g:
            assert torch.allclose(g[name], (a[name] + b[name]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_synthesisers_fit_what_they_are_for(kind: Any) -> None:
    """Shapes, and sizes: of a layer of c channels and k classes."""
    labels, vectors, images = torch.arange(5) % 3, torch.randn(5, 8), torch.randn(5, 8, 4, 4)
    sizes = {"linear": 8 * 8 + 8, "affine": 16, "low_rank": 2 * 8 * 2 + 2 + 8, "pooled": 8 * 8 + 8}
    widths = {"deep": 16, "low_rank": 2}
    for h in (vectors, images):
        for label in (True, False):
            made = synthesiser(Guess(kind, label, widths.get(kind)), tuple(h.shape[1:]), 3)
            assert made(h, labels).shape == h.shape
            if kind != "deep":
                assert sum(p.numel() for p in made.parameters()) == sizes[kind] + label * 3 * widths.get(kind, 8)


def test_without_labels_a_guess_does_not_depend_on_them() -> None:
    rig = Rig(mlp, WIDTH, guess=Guess("linear", label=False))
    guess, h = perturbed(rig).state.live.helpers[0], torch.randn(8, 8, dtype=torch.float64)
    assert guess(h, rig.batch.y).equal(guess(h, 2 - rig.batch.y))
    soft = nn.functional.one_hot(rig.batch.y, CLASSES).double()
    seeing = perturbed(Rig(mlp, WIDTH)).state.live.helpers[0]
    assert not seeing(h, rig.batch.y).equal(seeing(h, 2 - rig.batch.y))
    assert seeing(h, rig.batch.y).equal(seeing(h, soft))


def test_factors_follow_parameters_into_modules() -> None:
    net = mlp(WIDTH, CLASSES)
    net.gradient_factors = {"stages.0.0.bias": 5.0}
    net.rate_factors = {"stages.1.0.weight": 2.0, "head.bias": 3.0}
    parts = CutNet(net, (1, 2), WIDTH, CLASSES).parts()
    assert [part.rate_factors for part in parts] == [{}, {"stages.0.0.weight": 2.0}, {"head.bias": 3.0}]
    assert [part.gradient_factors for part in parts] == [{"stages.0.0.bias": 5.0}, {}, {}]


def edited(**options: Any) -> Plan:
    return SyntheticGradient(**options).edit(with_stages(baseline()))


@pytest.mark.parametrize("cuts", [[0], [2, 1], [1, 1]])
def test_cuts_must_rise(cuts: list[int]) -> None:
    with pytest.raises(PlanError, match="rising numbers"):
        edited(cuts=cuts)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the network has 2 stages"):
        train(edited(cuts=[3]), tmp_path)
    with pytest.raises(PlanError, match="forward pass of its own"):
        train(SyntheticGradient().edit(baseline()), tmp_path)
    with pytest.raises(PlanError, match="no hidden layer"):
        SyntheticGradient(hidden=3)
    with pytest.raises(PlanError, match="state `share_epochs`, or leave out `first_share`"):
        SyntheticGradient(first_share=0.5)
    SyntheticGradient(first_share=0.5, share_epochs=1.0)
    with pytest.raises(PlanError, match="leave one of the two out"):
        SyntheticGradient().edit(edited())


def test_by_default_it_is_cut_behind_each_stage_with_parameters() -> None:
    def flat_first(inputs: tuple[int, ...], classes: int) -> Net:
        return Net([nn.Flatten(), *mlp((36,), classes).stages], head=nn.Linear(8, classes))

    net = build((1, 6, 6), CLASSES, ModelSpec(flat_first), None)
    assert net.ends == (2, 3)
    assert net.shapes == ((8,), (8,))


def test_the_learner_stays_what_others_may_change() -> None:
    learner = edited().phases[0].learner
    assert isinstance(learner, Synthetic)
    assert isinstance(learner, Backprop)
