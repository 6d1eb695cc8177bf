"""Oracles of the usual learner (Goyal et al. 2017), each by hand or in closed form, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.backprop import Backprop, CrossEntropy, amend
from strategies.contract import Batch, Clock, Phase, Plan, PlanError, Predict
from strategies.ema import Average, Ema
from strategies.gradient_clipping import ClipNorm, GradientClipping
from strategies.label_smoothing import LabelSmoothing
from strategies.net import Net
from strategies.optimizers import AdamW, Sgd
from strategies.rate import Rate, Steps
from tests.strategies.harness import baseline, distance, train


def worker() -> object:
    return make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))


def batch(n: int = 1) -> Batch:
    return Batch(torch.ones(n, 2, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), torch.arange(n))


def clock(step: int = 0, steps: int = 10) -> Clock:
    return Clock(step, steps, step * 0.1, 0.1, 1, 0)


class Vector(Net):
    """One weight matrix (1, 2) and one bias-like vector (2,)."""

    def __init__(self) -> None:
        super().__init__([])
        self.w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.w * x).sum(), (self.b * x).sum()])


def linear(predict: Predict, batch: Batch, clock: Clock) -> Tensor:
    """Constant gradient: 1 for each coordinate."""
    return predict(batch.x).sum()


def nothing(predict: Predict, batch: Batch, clock: Clock) -> Tensor:
    return predict(batch.x).sum() * 0


def run(learner: Backprop, steps: int, net: Vector | None = None) -> Vector:
    net = net or Vector()
    state = learner.init(net, worker())  # type: ignore[arg-type]
    for step in range(steps):
        learner.step(state, [batch()], clock(step, steps))
    return net


def test_linear_scaling_is_exact_where_the_gradient_is_constant() -> None:
    """kappa steps at eta equal one step at kappa eta."""
    small = run(Backprop(optimizer=Sgd(momentum=0), rate=Rate(0.01), objective=linear), 4)
    large = run(Backprop(optimizer=Sgd(momentum=0), rate=Rate(0.04), objective=linear), 1)
    assert torch.allclose(small.w, large.w, atol=1e-15, rtol=0)


def quadratic(predict: Predict, batch: Batch, clock: Clock) -> Tensor:
    return 0.5 * predict(batch.x)[0] ** 2


def test_linear_scaling_errs_on_a_quadratic_as_it_must() -> None:
    """Curvature h = |x|^2 = 2, eta h = 0.01: (1 - 0.01)^4 = 0.96059601 against 1 - 0.04 = 0.96."""

    small = run(Backprop(optimizer=Sgd(momentum=0), rate=Rate(0.005), objective=quadratic), 4)
    large = run(Backprop(optimizer=Sgd(momentum=0), rate=Rate(0.02), objective=quadratic), 1)
    assert small.w.sum().item() / 7 == pytest.approx(0.96059601, abs=1e-12)
    assert large.w.sum().item() / 7 == pytest.approx(0.96, abs=1e-12)


def test_no_decay_on_one_dimensional_parameters() -> None:
    """Zero gradient, decay l: matrices shrink by 1 - eta l, vectors stay."""
    for optimizer in (Sgd(momentum=0, weight_decay=0.1), AdamW(weight_decay=0.1)):
        net = run(Backprop(optimizer=optimizer, rate=Rate(0.5), objective=nothing), 1)
        assert net.w.tolist()[0] == pytest.approx([3 * 0.95, 4 * 0.95], abs=1e-15)
        assert net.b.tolist() == [1.0, 2.0]


def test_momentum_needs_no_correction_when_the_rate_drops() -> None:
    """torch's form (v <- m v + g; w <- w - eta v) equals the absorbed form with its correction (v <- m eta'/eta v + eta' g)."""
    learner = Backprop(optimizer=Sgd(momentum=0.9), rate=Rate(0.1, decay=Steps((0.5,), 0.1)), objective=quadratic)
    net = run(learner, 10)
    w, v, previous = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.1
    for step in range(10):
        rate = 0.1 if step < 5 else 0.01
        v = 0.9 * (rate / previous) * v + rate * w.sum()
        w, previous = w - v, rate
    assert torch.allclose(net.w[0], w, atol=1e-12, rtol=0)


def test_nesterov_by_hand() -> None:
    """g = 1 throughout, m = 0.5: v = 1, 1.5, 1.75; steps g + m v = 1.5, 1.75, 1.875."""
    net = run(Backprop(optimizer=Sgd(momentum=0.5, nesterov=True), rate=Rate(1.0), objective=linear), 3)
    assert net.w.tolist() == [[3 - 5.125, 4 - 5.125]]


def test_clipping_by_hand() -> None:
    """The gradient is 1 in each of 4 coordinates: norm 2, clipped to 1."""
    learner = Backprop(optimizer=Sgd(momentum=0), rate=Rate(1.0), objective=linear, updates=(ClipNorm(1.0),))
    net = run(learner, 1)
    assert net.w.tolist() == [[2.5, 3.5]] and net.b.tolist() == [0.5, 1.5]


def test_average_of_a_constant_is_the_constant_and_half_lives_halve() -> None:
    average = Average(half_life=0.5)  # epochs; 0.1 epochs a step: 5 steps
    net = Vector()
    state = average.init(net, worker())  # type: ignore[arg-type]
    for step in range(7):
        average.after(state, clock(step))
    assert torch.equal(state.saved["w"], net.w.detach())
    with torch.no_grad():
        net.w.add_(1.0)
    for step in range(5):
        average.after(state, clock(step))
    assert state.saved["w"].tolist()[0] == pytest.approx([3.5, 4.5], abs=1e-12)


def test_label_smoothing_by_hand() -> None:
    """Uniform logits: log C for any amount. Otherwise (1 - a) onehot + a / C."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    one = Batch(torch.zeros(1, 2), torch.tensor([0]), torch.arange(1))
    loss = CrossEntropy(0.3)(lambda x: logits, one, clock())
    share = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    assert loss.item() == pytest.approx(-(share * logits.log_softmax(1)).sum().item(), abs=1e-14)
    flat = CrossEntropy(0.3)(lambda x: torch.zeros_like(logits), one, clock())
    assert flat.item() == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=1e-7)


class Foreign:
    """A learner that is no Backprop."""

    needs = None


@pytest.mark.parametrize("strategy", [Ema(), GradientClipping(), LabelSmoothing()])
def test_methods_that_need_gradients_name_the_clash(strategy: Ema) -> None:
    phase = dataclasses.replace(baseline().phases[0], name="saab0", learner=Foreign())
    with pytest.raises(
        PlanError, match=f"{type(strategy).__name__} works on gradients, but phase 'saab0' learns by Foreign"
    ):
        strategy.edit(Plan((phase,)))


def test_amend_wraps_what_is_there() -> None:
    phase: Phase = baseline().phases[0]
    by = Sgd(momentum=0)
    changed = amend(phase, by, optimizer=lambda old: by, updates=(ClipNorm(1.0),))
    assert changed.learner.optimizer is by and len(changed.learner.updates) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LabelSmoothing(1.0), "LabelSmoothing: amount is 1.0, expected < 1"),
        (lambda: GradientClipping(0), "GradientClipping: norm is 0, expected > 0"),
        (lambda: Ema(-1), "Ema: half_life is -1, expected >= 0"),
    ],
)
def test_options_out_of_range(make: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


def test_first_batch_of_a_resume_sees_the_same_noise(tmp_path: Path) -> None:
    """The clock's noise depends on seed, tag and step, not on what was drawn before."""
    a = [torch.rand(3, generator=clock(step).noise("tag")) for step in (0, 1)]
    b = torch.rand(3, generator=clock(1).noise("tag"))
    assert torch.equal(a[1], b) and not torch.equal(a[0], a[1])
    assert not torch.equal(b, torch.rand(3, generator=clock(1).noise("other")))
    own = dataclasses.replace(clock(1), rank=1)
    assert torch.equal(b, torch.rand(3, generator=own.noise("tag")))
    assert not torch.equal(b, torch.rand(3, generator=own.noise("tag", own=True)))


def test_training_twice_is_identical(tmp_path: Path) -> None:
    assert distance(train(baseline(), tmp_path / "a"), train(baseline(), tmp_path / "b")) == 0
