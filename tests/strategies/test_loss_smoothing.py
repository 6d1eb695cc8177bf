"""Oracles of loss smoothing: the unrolled recursion of running mixup, Gaussian convolution of a quadratic, holes in images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.backprop import Step, one_forward_one_backward
from strategies.contract import Batch, Clock, Need, PlanError, Stream
from strategies.loss_smoothing import LossSmoothing
from strategies.mixup import Mixup
from strategies.net import Net
from strategies.noise_scale import NoiseScale
from strategies.parts import running_mixup
from strategies.parts.annealing import Strength
from strategies.parts.random_erasing import Erase, rectangles
from strategies.parts.running_mixup import RunningMixup, shares
from strategies.parts.weight_noise import WeightNoise
from strategies.rate import Constant, Polynomial
from tests.strategies.harness import CLASSES, Blobs, baseline

BATCH = 12


def clock(step: int = 5, **fields: Any) -> Clock:
    return Clock(
        **{"step": step, "steps": 100, "epoch": step / 4, "epochs_per_step": 0.25, "batch": BATCH, "seed": 3} | fields
    )


def always(value: float) -> Strength:
    return Strength(value, Constant())


# ------------------------------------------------------------------------------------------------------ running mixup


def virtual(
    step: int, begin: int = 0, end: int = BATCH, alpha: float = 0.4, negligible: float = 0.0, rank: int = 0
) -> Batch:
    """Examples begin .. end of the step's batch, mixed."""
    data, first = Blobs(), step * BATCH
    stream = Stream(lambda n: data.train(first + begin + n, first + end + n), CLASSES)
    return RunningMixup(always(alpha), negligible)(stream.ahead(0), clock(step, rank=rank), stream)


def onehot(y: Tensor) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[y]


def test_the_unrolled_sum_is_the_recursion() -> None:
    """x~_t = l x_t + (1 - l) x~_(t-1), with what a worker would have to keep from step to step."""
    x = y = torch.zeros(())
    for step in range(12):
        raw, own = Blobs().train(step * BATCH, (step + 1) * BATCH), shares(clock(step), always(0.4))[:, None]
        x, y = own * raw.x + (1 - own) * x, own * onehot(raw.y) + (1 - own) * y
        mixed = virtual(step)
        assert torch.allclose(mixed.x, x, atol=1e-14, rtol=0)
        assert torch.allclose(mixed.y, y, atol=1e-14, rtol=0)


def test_the_first_batch_is_not_mixed() -> None:
    assert torch.equal(virtual(0).x, Blobs().train(0, BATCH).x)
    assert torch.equal(virtual(0).y, onehot(Blobs().train(0, BATCH).y))


@pytest.mark.parametrize("negligible", [0.0, 1e-3, 0.3])
def test_weights_are_those_of_the_closed_form_and_sum_to_1(negligible: float) -> None:
    table = running_mixup.weights(clock(9), always(0.4), negligible)
    assert torch.allclose(table.sum(0), torch.ones(BATCH, dtype=torch.float64), atol=1e-15, rtol=0)
    left = torch.ones(BATCH, dtype=torch.float64)
    for back in range(len(table) - 1):
        own = shares(clock(9 - back), always(0.4))
        assert torch.allclose(table[back], left * own, atol=1e-15, rtol=0)
        left = left * (1 - own)
    assert torch.allclose(table[-1], left, atol=1e-15, rtol=0)


def test_what_is_left_out_is_negligible() -> None:
    short, whole = virtual(40, negligible=1e-3), virtual(40)
    assert 1 < len(running_mixup.weights(clock(40), always(0.4), 1e-3)) < 12
    assert not torch.equal(short.y, whole.y)
    assert (short.y - whole.y).abs().max() < 1e-3


def test_labels_stay_on_the_simplex() -> None:
    y = virtual(20, negligible=1e-3).y
    assert y.min() >= 0 and torch.allclose(y.sum(1), torch.ones(BATCH, dtype=torch.float64), atol=1e-15, rtol=0)


def test_an_example_is_mixed_alike_wherever_it_is_worked_on() -> None:
    whole, part = virtual(7), virtual(7, 4, 9, rank=1)
    assert torch.equal(whole.x[4:9], part.x) and torch.equal(whole.y[4:9], part.y)


@pytest.mark.parametrize(("alpha", "mean"), [(0.4, 0.840), (0.6, 0.801), (1.0, 0.750)])
def test_shares_follow_the_folded_beta_distribution(alpha: float, mean: float) -> None:
    many = shares(clock(batch=20_000), always(alpha))
    assert many.min() >= 0.5
    assert many.mean().item() == pytest.approx(mean, abs=5e-3)
    assert not torch.equal(many, shares(clock(6, batch=20_000), always(alpha)))


def test_without_alpha_nothing_is_mixed() -> None:
    """The limit of annealing: so narrow a Beta distribution has shares of 0 and 1 only."""
    assert torch.equal(shares(clock(), always(1e-6)), torch.ones(BATCH, dtype=torch.float64))
    assert torch.equal(virtual(9, alpha=1e-6).x, Blobs().train(9 * BATCH, 10 * BATCH).x)


# ------------------------------------------------------------------------------------------------------- weight noise


class Quadratic(Net):
    """w'Hw / 2 as a "logit", for an objective that returns it."""

    hessian = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__([])
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.w @ self.hessian @ self.w


class Alone:
    """A worker as gradients know it."""

    def autocast(self) -> Any:
        return torch.enable_grad()

    def backward(self, value: Tensor, grad: Tensor | None = None) -> None:
        value.backward(grad)


def step(net: Net, at: Clock, batch: Batch | None = None, objective: Callable[..., Tensor] | None = None) -> Step:
    batch = batch or Blobs().train(0, BATCH)
    return Step(net, objective or (lambda predict, batch, at: predict(batch.x)), batch, at, 1.0, Alone(), net)  # type: ignore[arg-type]


def noisy(sigma: float, draws: int = 1, antithetic: bool = False, relative: bool = False) -> WeightNoise:
    return WeightNoise(one_forward_one_backward, always(sigma), draws, antithetic, relative)


def test_a_quadratic_is_lifted_by_its_trace_and_keeps_its_gradient() -> None:
    """E L(w + u) = L + sigma^2 tr(H) / 2, E grad = Hw, within three standard errors."""
    net, sigma, n = Quadratic(), 0.3, 1500
    loss = noisy(sigma, draws=n)(step(net, clock()))
    hessian, w = net.hessian, net.w.detach()
    lifted = 0.5 * w @ hessian @ w + sigma**2 / 2 * hessian.trace()
    variance = sigma**2 * (hessian @ w).square().sum() + sigma**4 / 2 * (hessian @ hessian).trace()
    assert abs(loss - lifted) < 3 * (variance / n).sqrt()
    assert torch.all((net.w.grad - hessian @ w).abs() < 3 * sigma * (hessian.square().sum(1) / n).sqrt())  # type: ignore[operator]


def test_antithetic_draws_keep_the_gradient_of_a_quadratic_exactly() -> None:
    net, one_sided = Quadratic(), Quadratic()
    noisy(0.3, antithetic=True)(step(net, clock()))
    noisy(0.3)(step(one_sided, clock()))
    exact = net.hessian @ net.w.detach()
    assert torch.allclose(net.w.grad, exact, atol=1e-14, rtol=0)  # type: ignore[arg-type]
    assert (one_sided.w.grad - exact).abs().max() > 1e-2  # type: ignore[operator]


def test_noise_is_drawn_per_step_alike_on_all_ranks() -> None:
    grads = []
    for at in (clock(), clock(rank=1), clock(6)):
        net = Quadratic()
        noisy(0.3)(step(net, at))
        grads.append(net.w.grad)
        assert torch.equal(net.w, Quadratic().w)  # back where it was, bit for bit
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_relative_noise_grows_with_the_weights(scale: float) -> None:
    """In root mean squares, per parameter: the gradient of a quadratic scales with w; absolute noise stays."""
    moved = {}
    for relative in (True, False):
        net = Quadratic()
        with torch.no_grad():
            net.w *= scale
        noisy(0.3, relative=relative)(step(net, clock()))
        moved[relative] = torch.linalg.solve(net.hessian, net.w.grad) - net.w.detach()  # type: ignore[arg-type]
    rms = scale * (5.25 / 3) ** 0.5
    assert torch.allclose(moved[True], rms * moved[False], atol=1e-13, rtol=0)


def normalised() -> Net:
    torch.manual_seed(0)
    return Net([nn.Linear(6, 4), nn.BatchNorm1d(4)], head=nn.Linear(4, CLASSES)).double()


def cross_entropy(predict: Any, batch: Batch, at: Clock) -> Tensor:
    return nn.functional.cross_entropy(predict(batch.x), batch.y)


def test_a_batch_counts_once_whatever_the_passes() -> None:
    """Running statistics become the mean of what each pass alone would leave; the counter goes on by one. So do gradients."""
    found: list[dict[str, Tensor]] = []

    def seen(one: Step) -> Tensor:
        found.append(copy.deepcopy(one.net.state_dict()))
        return one_forward_one_backward(one)

    net = normalised().train()
    loss = WeightNoise(seen, always(0.3), 2, True, True)(step(net, clock(), objective=cross_entropy))
    alone = [normalised().train() for _ in found]
    losses = []
    for one, weights in zip(alone, found, strict=True):
        one.load_state_dict(weights)
        losses.append(one_forward_one_backward(step(one, clock(), objective=cross_entropy)))
    assert len(found) == 4 and loss.item() == pytest.approx(sum(losses).item() / 4, abs=1e-14)  # type: ignore[union-attr]
    for name, buffer in net.named_buffers():
        each = torch.stack([dict(one.named_buffers())[name].double() for one in alone])
        assert torch.allclose(buffer.double(), each.mean(0), atol=1e-14, rtol=0)
    assert net.stages[1].num_batches_tracked == 1
    for name, p in net.named_parameters():
        each = torch.stack([dict(one.named_parameters())[name].grad for one in alone])
        assert torch.allclose(p.grad, each.mean(0), atol=1e-14, rtol=0)  # type: ignore[arg-type]


def test_weights_are_put_back_after_an_error() -> None:
    def fails(one: Step) -> Tensor:
        raise MemoryError

    net = Quadratic()
    with pytest.raises(MemoryError):
        WeightNoise(fails, always(0.3), 1, False, False)(step(net, clock()))
    assert torch.equal(net.w, Quadratic().w)


# ---------------------------------------------------------------------------------------------------- random erasing


def erased(share: float, begin: int = 0, end: int = 400, at: Clock | None = None) -> Tensor:
    """Of images of ones."""
    batch = Batch(
        torch.ones(end - begin, 3, 16, 20, dtype=torch.float64), torch.zeros(end - begin), torch.arange(begin, end)
    )
    stream = Stream(lambda n: batch, CLASSES)
    return Erase(always(share), 0.25, 0.3)(batch, at or clock(batch=400), stream).x


def test_holes_are_rectangles_of_the_stated_shares() -> None:
    seen = erased(0.5)
    holes = seen[:, 0] == 0
    assert torch.equal(seen == 0, holes[:, None].expand_as(seen)) and ((seen == 0) | (seen == 1)).all()
    hit = holes.flatten(1).any(1)
    assert abs(hit.double().mean().item() - 0.5) < 3 * 0.5 / 400**0.5
    tall, wide = holes[hit].any(2).sum(1), holes[hit].any(1).sum(1)
    assert torch.equal(holes[hit].flatten(1).sum(1), tall * wide)  # all of a rectangle, and nothing else
    area, ratio = tall * wide / 320, tall / wide
    assert area.min() > 0.01 and area.max() < 0.28 and area.max() > 0.2  # rounded to whole pixels
    assert ratio.min() > 0.2 and ratio.max() < 4 and abs((ratio > 1).double().mean().item() - 0.5) < 0.15


def test_holes_lie_everywhere() -> None:
    """Each pixel of the middle is hit, and the corners are."""
    often = (erased(1.0)[:, 0] == 0).sum(0)
    assert often.min() > 0


def test_an_image_is_erased_alike_wherever_it_is_worked_on() -> None:
    assert torch.equal(erased(0.5)[100:300], erased(0.5, 100, 300, clock(batch=400, rank=1)))
    assert not torch.equal(erased(0.5), erased(0.5, at=clock(6, batch=400)))


def test_a_hole_by_hand() -> None:
    """An eighth of 8 x 4 pixels, upright, sides 1 to 4: 4 x 1, at the right edge, from the third of five places down."""
    draws = torch.tensor([[0.0, (1 / 8 - 0.02) / (0.25 - 0.02), 0.0, 0.9, 0.5, 0.999]], dtype=torch.float64)
    hole = torch.zeros(8, 4, dtype=torch.bool)
    hole[2:6, 3] = True
    assert torch.equal(rectangles(draws, 8, 4, 0.25, 0.25)[0], hole)


def test_flat_data_are_refused() -> None:
    flat = Blobs().train(0, BATCH)
    with pytest.raises(PlanError, match="parts of images, the data have shape \\(6,\\): set erase: 0"):
        Erase(always(0.5), 0.25, 0.3)(flat, clock(), Stream(lambda n: flat, CLASSES))


# ------------------------------------------------------------------------------------------------- the strategy itself


def test_smoothing_is_annealed() -> None:
    linear = LossSmoothing(alpha=0.8, anneal="linear").edit(baseline()).phases[0].maps[0].alpha  # type: ignore[attr-defined]
    assert linear == Strength(0.8, Polynomial())
    assert [linear(clock(at)) for at in (0, 50, 100)] == pytest.approx([0.8, 0.4, 0.0])
    phase: Any = LossSmoothing(alpha=0, sigma=0.2, erase=0.5, anneal="cosine").edit(baseline()).phases[0]
    assert phase.maps[0].share(clock(25)) == pytest.approx(0.5 * (1 + 0.5**0.5) / 2)
    assert phase.learner.gradient.sigma(clock(75)) == pytest.approx(0.2 * (1 - 0.5**0.5) / 2)
    constant: Any = LossSmoothing().edit(baseline()).phases[0].maps[0]
    assert constant.alpha(clock(99)) == 0.4


def test_options_arrive_where_they_act() -> None:
    holes = {"erase": 0.5, "erase_area": 0.1, "erase_aspect": 0.8}
    noise = {"sigma": 0.2, "relative": False, "draws": 3, "antithetic": True}
    phase: Any = LossSmoothing(alpha=0, **holes, **noise).edit(baseline()).phases[0]  # type: ignore[arg-type]
    assert phase.maps == (Erase(always(0.5), 0.1, 0.8),)
    assert phase.learner.gradient == WeightNoise(one_forward_one_backward, always(0.2), 3, True, False)


def test_what_is_not_asked_for_is_not_there() -> None:
    assert LossSmoothing(alpha=0).edit(baseline()) == baseline()
    assert LossSmoothing(alpha=0, sigma=0.1).edit(baseline()).needs == Need.OPEN_MODEL
    assert LossSmoothing(alpha=0, sigma=0.1, erase=0.1).edit(baseline()).needs == Need.OPEN_MODEL
    assert LossSmoothing(erase=0.1).edit(baseline()).needs == Need.NOTHING


def test_examples_are_mixed_before_they_are_erased() -> None:
    """Mixup works on what running mixup made, whatever the order of the recipe."""
    both = [[LossSmoothing(erase=0.5), Mixup()], [Mixup(), LossSmoothing(erase=0.5)]]
    for first, second in both:
        maps = second.edit(first.edit(baseline())).phases[0].maps
        assert [type(change).__name__ for change in maps] == ["RunningMixup", "MixAhead", "Erase"]


@pytest.mark.parametrize("passes", [{"draws": 2}, {"antithetic": True}])
def test_what_measures_each_pass_is_refused(passes: dict[str, Any]) -> None:
    """In either order; a single pass is one of a micro-batch, as ever."""
    noise, measures = LossSmoothing(alpha=0, sigma=0.1, **passes), NoiseScale()
    for first, second in ((noise, measures), (measures, noise)):
        with pytest.raises(PlanError, match="several passes for one gradient, but MeasureNoise"):
            second.edit(first.edit(baseline()))
    LossSmoothing(alpha=0, sigma=0.1).edit(measures.edit(baseline()))
