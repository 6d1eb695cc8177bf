"""What natural_gradient promises beyond the laws: its variants, its work shared out, its schedules and safeguards."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from kernels.patches import by_patches
from orchestrator.workloads.models import small_cnn
from strategies.backprop import Backprop, Step, one_forward_one_backward
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError, State
from strategies.curvature.estimate import Curvature
from strategies.curvature.precondition import Geometric, Watched
from strategies.loss_smoothing import LossSmoothing
from strategies.natural_gradient import NaturalGradient, TiedMomentum
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Polynomial, Rate
from tests.strategies import harness
from tests.strategies.by_hand import Vectors, steps
from tests.strategies.cases import convolved_net, normalised_net, with_adamw, with_convolutions
from tests.strategies.harness import IMAGES, Blobs, FlatNet, baseline, distance

EXACT = 1e-12
OFTEN: dict[str, Any] = {"damping": 0.1, "eager": 1, "factors_every": 2, "inverses_every": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "eigen": {"inverse": "eigen"},
    "ekfac": {"inverse": "ekfac"},
    "sampled": {"fisher": "sampled"},
    "reduce": {"positions": "reduce"},
    "adaptive": {"tolerance": 0.5, "factors_every": 1, "inverses_every": 1},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def edited(options: dict[str, Any], epochs: float = 3) -> Plan:
    return NaturalGradient(**OFTEN | options).edit(with_convolutions(baseline(epochs)))


def train(plan: Plan, directory: Path, data: Blobs | None = None, **options: Any) -> harness.Trained:
    return harness.train(plan, directory, data or Blobs(inputs=IMAGES), **options)


# -------------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ekfac"])
def test_variants_do_not_see_micro_batches(variant: str, tmp_path: Path) -> None:
    plan, plain = edited(VARIANTS[variant], epochs=1.5), edited({}, epochs=1.5)
    whole = train(plan, tmp_path / "whole")
    assert distance(whole, train(plan, tmp_path / "parts", micro_batch=5)) < EXACT
    assert distance(whole, train(plain, tmp_path / "plain")) > 1e-6


def test_ekfac_does_not_see_micro_batches(tmp_path: Path) -> None:
    """With factors of full rank: in a null space, rounding chooses the basis, and what later steps see there follows it."""

    def linear(plan: Plan) -> Plan:
        return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(linear_net)))

    plan, plain = (NaturalGradient(**OFTEN, inverse=kind).edit(linear(baseline())) for kind in ("ekfac", "eigen"))
    whole = train(plan, tmp_path / "whole", Blobs())
    assert distance(whole, train(plan, tmp_path / "parts", Blobs(), micro_batch=5)) < EXACT
    assert distance(whole, train(plain, tmp_path / "plain", Blobs())) > 1e-6


@every_variant
def test_variants_resume(variant: str, tmp_path: Path) -> None:
    plan = edited(VARIANTS[variant], epochs=2)
    unbroken = train(plan, tmp_path / "unbroken")
    data = Blobs(inputs=IMAGES, fail_at=5 * 12)
    with pytest.raises(InterruptedError):
        train(plan, tmp_path / "broken", data, save_seconds=0)
    assert distance(train(plan, tmp_path / "broken", data, save_seconds=0), unbroken) == 0


def learner(build: Any, options: dict[str, Any], inputs: tuple[int, ...] = IMAGES) -> tuple[Backprop, State, Curvature]:
    """A learner with natural_gradient on one worker, begun."""
    return begun(NaturalGradient(**options).edit(baseline()), build, inputs)


def begun(plan: Plan, build: Any, inputs: tuple[int, ...] = IMAGES) -> tuple[Backprop, State, Curvature]:
    torch.manual_seed(0)
    made: Any = plan.phases[0].learner
    state = made.init(build(inputs, 3).double(), make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    return made, state, state.saved["updates"][0].live


def clock(step: int = 0, batch: int = 12, steps_: int = 100) -> Clock:
    return Clock(step, steps_, step * 0.25, 0.25, batch, seed=0)


def batch(size: int = 12, start: int = 0, inputs: tuple[int, ...] = IMAGES) -> Batch:
    return Blobs(inputs=inputs).train(start, start + size)


def step_of(made: Backprop, state: State, examples: Batch, at: Clock) -> Step:
    live = state.live
    return Step(live.model, made.objective, examples, at, 1.0, live.worker, live.net, state.saved["updates"])


def linear_net(inputs: tuple[int, ...], classes: int) -> Net:
    return FlatNet([], head=nn.Linear(6, classes))


def test_sampled_labels_give_the_fisher_matrix_of_the_model() -> None:
    """Of a linear model: A = E[a a^T], and G = E[diag(p) - p p^T] within four standard errors. p.grad is the loss's own."""
    made, state, curvature = learner(linear_net, {"fisher": "sampled", "factors_every": 1}, (6,))
    examples, net, draws = batch(48, inputs=(6,)), state.live.net, []
    for draw in range(400):
        net.zero_grad()
        curvature.watch(made.gradient.old, step_of(made, state, examples, clock(draw, 48)))  # type: ignore[attr-defined]
        a, g = (curvature.sums.pop(f"head/{name}")[0] / 48 for name in "ag")
        draws.append(g)
    seen = net.head.weight.grad.clone()
    net.zero_grad()
    nn.functional.cross_entropy(net(examples.x), examples.y).backward()
    assert torch.allclose(seen, net.head.weight.grad, atol=EXACT)
    rows = torch.cat([examples.x, torch.ones(48, 1)], 1)
    assert torch.allclose(a, rows.T @ rows / 48, atol=EXACT)
    p = net(examples.x).softmax(1)
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((mean - (torch.diag(p.mean(0)) - p.T @ p / 48)).abs() <= 4 * error).all()


def test_an_empirical_factor_is_that_of_the_labels() -> None:
    made, state, curvature = learner(linear_net, {}, (6,))
    examples = batch(48, inputs=(6,))
    curvature.watch(made.gradient.old, step_of(made, state, examples, clock(0, 48)))  # type: ignore[attr-defined]
    g = state.live.net(examples.x).softmax(1) - nn.functional.one_hot(examples.y, 3)
    assert torch.allclose(curvature.sums["head/g"][0] / 48, g.T @ g / 48, atol=EXACT)


# ------------------------------------------------------------------------------------------------------------ the update


def test_a_step_is_the_inverse_times_the_gradient() -> None:
    """By dense Kronecker products, with pi; then clipped by the divergence that it would cause."""
    options = {"damping": 0.3, "kl_clip": 0.02}
    made, state, _ = learner(linear_net, options, (6,))
    net, examples, grads = state.live.net, batch(12, inputs=(6,)), {}
    before = net.head.weight.detach().clone()
    state.live.optimizer.register_step_pre_hook(
        lambda *_: grads.update(w=net.head.weight.grad.clone(), b=net.head.bias.grad.clone())
    )
    g = net(examples.x).softmax(1).detach() - nn.functional.one_hot(examples.y, 3)
    a = torch.cat([examples.x, torch.ones(12, 1)], 1)
    raw, big_a, big_g = g.T @ a / 12, a.T @ a / 12, g.T @ g / 12
    pi = ((big_a.trace() / 7) / (big_g.trace() / 3)) ** 0.5
    damped = torch.kron(big_g + 0.3**0.5 / pi * torch.eye(3), big_a + pi * 0.3**0.5 * torch.eye(7))
    new = torch.linalg.solve(damped, raw.flatten()).view(3, 7)
    made.step(state, [examples], clock())
    rate = made.rate(clock())
    scale = min(1.0, (0.02 / (rate**2 * float((raw * new).sum()))) ** 0.5)
    assert torch.allclose(torch.cat([grads["w"], grads["b"][:, None]], 1), scale * new, atol=EXACT)
    assert not torch.equal(net.head.weight, before)


@pytest.mark.parametrize(("kl_clip", "clipped"), [(1e-6, True), (0.0, False), (1e9, False)])
def test_the_step_is_clipped(kl_clip: float, clipped: bool) -> None:
    made, state, curvature = learner(linear_net, {"damping": 0.3, "kl_clip": kl_clip}, (6,))
    found: dict[str, Tensor] = {}
    state.live.optimizer.register_step_pre_hook(lambda *_: found.update(w=state.live.net.head.weight.grad.clone()))
    metrics = made.step(state, [batch(12, inputs=(6,))], clock())
    bound = kl_clip / made.rate(clock()) ** 2 / curvature.product
    free_made, free, _ = learner(linear_net, {"damping": 0.3, "kl_clip": 0.0}, (6,))
    other: dict[str, Tensor] = {}
    free.live.optimizer.register_step_pre_hook(lambda *_: other.update(w=free.live.net.head.weight.grad.clone()))
    free_made.step(free, [batch(12, inputs=(6,))], clock())
    scale = bound**0.5 if clipped else torch.tensor(1.0, dtype=torch.float64)
    assert torch.allclose(found["w"], other["w"] * scale, rtol=1e-9)
    assert float(metrics.get("kl_scale", 1.0)) == pytest.approx(float(scale))
    assert ("kl_scale" in metrics) == bool(kl_clip)


def test_the_first_factors_are_means_and_later_ones_forget() -> None:
    made, state, curvature = learner(linear_net, {"memory": 0.5, "factors_every": 1}, (6,))
    fresh = []
    for step in range(3):
        examples = batch(12, 12 * step, (6,))
        made.step(state, [examples], clock(step))
        a = torch.cat([examples.x, torch.ones(12, 1)], 1)
        fresh.append(a.T @ a / 12)
    wanted = 0.5 * (fresh[0] + fresh[1]) / 2 + 0.5 * fresh[2]
    assert torch.allclose(curvature.kept["head/a"][0], wanted, atol=EXACT)


def test_intervals_are_kept_and_between_them_nothing_is_hooked() -> None:
    made, state, curvature = learner(convolved_net, {"eager": 2, "factors_every": 3, "inverses_every": 6})
    hooked, folded, inverted = [], [], []

    def watching(step: Step) -> Tensor:
        hooked.append(sum(len(module._forward_hooks) for module in step.net.modules()))
        return one_forward_one_backward(step)

    seen = dataclasses.replace(made, gradient=Watched(watching))
    for step in range(13):
        count, inverse = curvature.counts.get("head/a", 0), curvature.kept.get("head/a_inverse")
        seen.step(state, [batch(12, 12 * step)], clock(step))
        folded += [step] if curvature.counts["head/a"] > count else []
        inverted += [step] if curvature.kept["head/a_inverse"] is not inverse else []
    assert folded == [0, 1, 3, 6, 9, 12]
    assert inverted == [0, 1, 6, 12]
    assert [step for step, count in enumerate(hooked) if count] == folded


def test_a_factor_that_stays_is_made_anew_ever_less_often() -> None:
    """The rate being 0, a net that sees one batch has the same factors forever: intervals of 1, 1, 2, 3, 5, ..."""
    made, state, curvature = learner(
        linear_net, {"eager": 0, "factors_every": 1, "inverses_every": 1, "tolerance": 0.1}, (6,)
    )
    still = dataclasses.replace(made, rate=Rate(1e-12))
    folds = []
    for step in range(25):
        before = curvature.counts.get("head/a", 0)
        still.step(state, [batch(12, inputs=(6,))], clock(step))
        folds += [step] if curvature.counts["head/a"] > before else []
    assert folds == [0, 1, 2, 4, 7, 12, 20]


def test_damping_moves_geometrically() -> None:
    schedule = Geometric(1e-2, 0.01)
    assert [schedule(clock(step)) for step in (0, 50, 100)] == pytest.approx([1e-2, 1e-3, 1e-4])


def test_damping_at_the_end_counts(tmp_path: Path) -> None:
    plain, decayed = (train(edited({"damping_end": end}, 1.5), tmp_path / f"{end}") for end in (1.0, 0.1))
    assert distance(plain, decayed) > 1e-6


def test_momentum_falls_with_the_rate() -> None:
    """v <- m v - rate g with m = 0.8 rate / highest rate, beginning with v = 0."""
    rates, gradients = [0.1, 0.2, 0.1, 0.05], [[1.0, 2.0], [0.5, -1.0], [3.0, 1.0], [1.0, 1.0]]
    w, v, path = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
    for rate, highest, gradient in zip(rates, (0.1, 0.2, 0.2, 0.2), gradients, strict=True):
        v = 0.8 * rate / highest * v - rate * torch.tensor(gradient, dtype=torch.float64)
        w = w + v
        path.append(w.tolist())
    found = steps(TiedMomentum(Sgd(momentum=0.8)), gradients, rates, Vectors())
    assert torch.allclose(torch.tensor(found), torch.tensor(path), atol=1e-6)


def test_momentum_at_a_constant_rate_is_the_usual() -> None:
    gradients = [[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]]
    usual, tied = (steps(made, gradients, [0.1] * 3, Vectors()) for made in (Sgd(0.8), TiedMomentum(Sgd(0.8))))
    assert usual == tied


def test_tied_momentum_acts_and_is_sgds(tmp_path: Path) -> None:
    def decaying(plan: Plan) -> Plan:
        def change(phase: Any) -> Any:
            decayed = dataclasses.replace(phase.learner, rate=Rate(0.1, decay=Polynomial(2.0)))
            return dataclasses.replace(phase, learner=decayed)

        return plan.map(change)

    free, tied = (
        train(decaying(edited({"tie_momentum": tie, "kl_clip": 0.0}, 1.5)), tmp_path / str(tie))
        for tie in (False, True)
    )
    assert distance(free, tied) > 1e-6
    with pytest.raises(PlanError, match="tie_momentum is of SGD"):
        NaturalGradient(tie_momentum=True).edit(with_adamw(baseline()))


def test_weights_are_projected() -> None:
    made, state, _ = learner(convolved_net, {"project": True})
    net = state.live.net
    conv = net.stages[0][0]
    with torch.no_grad():
        conv.weight.mul_(100)
        small = net.head.weight.clone()
    made.updates[1].after(state.saved["updates"][1], clock())
    assert conv.weight.norm().item() == pytest.approx((2 * len(conv.weight)) ** 0.5)
    assert torch.equal(net.head.weight, small)


def test_what_is_not_served_is_told_once_and_keeps_its_gradient(caplog: pytest.LogCaptureFixture) -> None:
    def mixed(inputs: tuple[int, ...], classes: int) -> Net:
        return FlatNet([nn.Linear(6, 4), nn.LayerNorm(4)], head=nn.Linear(4, classes))

    with caplog.at_level(logging.WARNING):
        made, state, _ = learner(mixed, {"damping": 0.1, "kl_clip": 0.0}, (6,))
    assert [record.message.count("stages.1.weight, stages.1.bias") for record in caplog.records] == [1]
    examples, net, found = batch(12, inputs=(6,)), state.live.net, {}
    nn.functional.cross_entropy(net(examples.x), examples.y).backward()
    raw = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    state.live.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in net.named_parameters()})
    )
    made.step(state, [examples], clock())
    assert torch.allclose(found["stages.1.weight"], raw["stages.1.weight"], atol=EXACT)
    assert not torch.allclose(found["head.weight"], raw["head.weight"])


def test_a_layer_that_a_step_passes_by_is_left_alone() -> None:
    class Skipping(FlatNet):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(x if self.skip else x + self.stages[0](x))

    made, state, curvature = learner(
        lambda inputs, classes: Skipping([nn.Linear(6, 6)], head=nn.Linear(6, classes)), {"factors_every": 1}, (6,)
    )
    net = state.live.net
    made.step(state, [batch(12, inputs=(6,))], clock(0))
    net.skip, before = True, curvature.kept["stages.0/g"].clone()
    made.step(state, [batch(12, 12, (6,))], clock(1))
    assert torch.allclose(curvature.kept["stages.0/g"], before / 2)  # a mean with a step in which it gave nothing
    assert net.head.weight.isfinite().all()


def test_hidden_layers_are_told_of() -> None:
    _, _, curvature = learner(convolved_net, {})
    with pytest.raises(PlanError, match=r"sees no layer at work: .* leave speed\.compile off"):
        curvature.refresh(clock())
    with pytest.raises(PlanError, match=r"leave speed\.compile off"):
        learner(compiled_net, {})
    learner(compiled_net, {"largest": 0})


def compiled_net(inputs: tuple[int, ...], classes: int) -> Net:
    net = convolved_net(inputs, classes)
    net.compile()
    return net


def test_bf16_and_convolutions_by_patches_are_seen() -> None:
    """Factors of a step in bf16 are those in float32 within a few units of its rounding, 2^-8."""
    found = []
    for precision, change in (("fp32", lambda conv: None), ("bf16", by_patches)):
        torch.manual_seed(0)
        net = small_cnn((3, 8, 8), 3, width=4, batch_norm=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        change(net.stages[1][0])
        made: Any = NaturalGradient(damping=0.1).edit(baseline()).phases[0].learner
        state = made.init(net, make_worker("solo", {}, precision, 0, 1, torch.device("cpu")))
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        made.step(state, [Batch(x, torch.arange(16) % 3, torch.arange(16))], clock(batch=16))
        found.append(state.saved["updates"][0].live.kept)
    exact, rounded = found
    assert all(t.dtype == torch.float32 for t in rounded.values())
    for key in ("stages.0.0/a", "stages.1.0/a", "stages.1.0/g", "stages.1.1/f", "head/a"):
        assert (rounded[key] - exact[key]).norm() < 0.05 * exact[key].norm()


def test_batch_norms_take_part() -> None:
    made, state, curvature = learner(normalised_net, {"damping": 0.1}, (6,))
    made.step(state, [batch(12, inputs=(6,))], clock())
    assert {"stages.0.1/f_inverse", "stages.0.0/a_inverse"} <= curvature.kept.keys()


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("smoothed_first", [False, True])
def test_several_passes_over_a_batch_count_once(smoothed_first: bool, fisher: str) -> None:
    """Passes of weight noise of next to nothing have the statistics of one: factors, blocks of batch norms, EKFAC's scale."""
    natural = NaturalGradient(damping=0.1, inverse="ekfac", factors_every=1, inverses_every=2, fisher=fisher)  # type: ignore[arg-type]
    noise = LossSmoothing(alpha=0, sigma=1e-13, draws=2, antithetic=True)
    found = []
    for methods in ([natural], [noise, natural] if smoothed_first else [natural, noise]):
        plan = baseline()
        for method in methods:
            plan = method.edit(plan)
        _, state, curvature = begun(plan, normalised_net, (6,))
        for step in range(2):
            plan.phases[0].learner.step(state, [batch(5, 12 * step, (6,)), batch(7, 12 * step + 5, (6,))], clock(step))
        found.append(curvature.kept)
    once, often = found
    for key in ("stages.0.0/a", "stages.0.0/g", "stages.0.1/f", "head/scale"):
        assert torch.allclose(often[key], once[key], rtol=1e-9, atol=EXACT), key


def test_gradients_are_preconditioned_once() -> None:
    once = NaturalGradient().edit(baseline())
    with pytest.raises(PlanError, match="leave one out"):
        NaturalGradient(damping=1.0).edit(once)
