"""Kernel rescaling as a plan and in training: phases, schedule, resolutions, statistics, and what each option does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.engines import make_worker
from orchestrator.checkpoint import snapshot
from orchestrator.recipe.workload_schema import Interval, Network
from orchestrator.workloads import build_network
from strategies import CATALOGUE
from strategies.backprop import amend
from strategies.batch_growth import BatchGrowth
from strategies.contract import Batch, Clock, ModelSpec, Phase, Plan, PlanError
from strategies.kernel_rescale import KernelRescale, largest_kernel, with_kernels
from strategies.net import Net
from strategies.parts.kernel_growth import Grow
from strategies.parts.resizing import Continued, Resize
from strategies.progressive_resize import ProgressiveResize
from strategies.rate import Constant, Cosine, Rate, Steps
from tests.strategies.cases import CASES, with_large_kernels, with_step_decay
from tests.strategies.harness import IMAGES, Blobs, Trained, baseline, distance, train

CIFAR = (3, 32, 32)


def model(name: str, **options: Any) -> ModelSpec:
    chosen = Network.model_validate({name: options})
    return ModelSpec(build_network, (("name", name), *sorted(chosen.options.model_dump().items())))


def plan(spec: ModelSpec) -> Plan:
    return baseline(epochs=10).map(lambda phase: dataclasses.replace(phase, model=spec))


def normed_net(inputs: tuple[int, ...], classes: int, kernel: int) -> Net:
    one = (nn.Conv2d(inputs[0], 8, kernel, padding=kernel // 2), nn.BatchNorm2d(8), nn.Tanh())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(
        [nn.Sequential(*one), nn.Sequential(nn.Conv2d(8, 8, kernel, padding=kernel // 2))], pool, nn.Linear(8, classes)
    )


def images(side: int) -> Batch:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x, torch.tensor([0, 1]), torch.arange(2))


def sides(phases: tuple[Phase, ...], side: int) -> list[int]:
    return [phase.source(images(side), Net([])).x.shape[2] for phase in phases]


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("spec", "kernels", "expected", "pixels"),
    [
        (model("resnet", depth=8, kernel=5), [3], [{"kernel": 3, "stem": 3}, {"kernel": 5, "stem": 3}], [19, 32]),
        (model("resnet", depth=8, kernel=5, stem=7), [5], [{"kernel": 3, "stem": 5}, {"kernel": 5, "stem": 7}], [23, 32]),
        (model("convnext"), [3, 5], [{"kernel": 3}, {"kernel": 5}, {"kernel": 7}], [14, 23, 32]),
        (model("small_overfeat"), [3], [{"kernels": [3, 3, 3]}, {"kernels": [7, 5, 3]}], [14, 32]),
        (model("overfeat"), [7], [{"kernels": [7, 3, 3]}, {"kernels": [11, 5, 3]}], [147, 231]),
    ],
)  # fmt: skip
def test_phases(spec: ModelSpec, kernels: list[int], expected: list[dict[str, Any]], pixels: list[int]) -> None:
    """The model's largest kernel has the side asked for, the others follow, and so do images."""
    shares = [0.6 / len(kernels)] * len(kernels)
    phases = KernelRescale(shares=shares, kernels=kernels).edit(plan(spec)).phases
    for phase, options in zip(phases, expected, strict=True):
        resized = dict(dict(phase.model.options)["stages"][-1].options)
        assert options.items() <= dict(resized["model"].options).items()
    assert [phase.epochs for phase in phases] == pytest.approx([10 * share for share in (*shares, 0.4)])
    assert sides(phases, pixels[-1]) == pixels
    assert [phase.hands_on for phase in phases] == [True] * len(kernels) + [False]


def test_networks_of_the_phases() -> None:
    """Kernels and flattened maps of each phase's size; what grew in front of no norm has a rate of its own."""
    phases = KernelRescale(shares=[0.3], kernels=[3]).edit(plan(model("alexnet", width=8))).phases
    small, large = (phase.model(CIFAR, 10) for phase in phases)
    assert small.stages[0][0].kernel_size == (3, 3) and large.stages[0][0].kernel_size == (5, 5)
    assert small.stages[5][1].in_features == 32 * 3 * 3 and large.stages[5][1].in_features == 32 * 4 * 4
    assert small.rate_factors == {}
    grown = {"stages.0.0.weight": 9 / 25, "stages.1.0.weight": 9 / 25, "stages.5.1.weight": 9 / 16}
    assert large.rate_factors == pytest.approx(grown)
    (_, last) = KernelRescale(shares=[0.3], kernels=[3]).edit(plan(model("resnet", depth=8, kernel=5))).phases
    assert set(last.model(CIFAR, 10).rate_factors.values()) == {1.0}
    *_, third = KernelRescale(shares=[0.2, 0.2], kernels=[3, 5]).edit(plan(model("small_overfeat", width=8))).phases
    assert third.model(CIFAR, 10).rate_factors["stages.0.0.weight"] == pytest.approx((3 / 7) ** 2)


def test_scales_are_an_option() -> None:
    phases = KernelRescale(scales=[0.5]).edit(plan(model("convnext"))).phases
    assert sides(phases, 32) == [16, 32]


@pytest.mark.parametrize("decay", [Constant(), Cosine(), Steps((0.3, 0.5), 0.1)])
def test_the_schedule_goes_on(decay: Any) -> None:
    """In every phase, the rate of each step is that of the run's step."""
    rate, batch, examples = Rate(0.4, warmup=2.0, start=0.1, decay=decay), 10, 100
    whole = [rate(Clock(step, 100, step / 10, 0.1, batch, 0)) for step in range(100)]
    found = []
    for begin, epochs in ((0.0, 1.5), (1.5, 3.5), (5.0, 5.0)):
        steps = round(epochs * examples / batch)
        part = Continued(rate, begin, 10.0)
        found += [part(Clock(step, steps, step / 10, 0.1, batch, 0, phase=1)) for step in range(steps)]
    assert found == pytest.approx(whole, rel=1e-12)


def test_rewarm() -> None:
    rate = Continued(Rate(1.0), begin=5.0, epochs=10.0, rewarm=0.4)
    found = [rate(Clock(step, 50, step / 10, 0.1, 10, 0, phase=1)) for step in range(6)]
    assert found == pytest.approx([0.3 + 0.7 * n / 5 for n in (1, 2, 3, 4, 5, 5)])
    _, last = KernelRescale(rewarm=0.4).edit(plan(model("convnext"))).phases
    assert last.learner.rate.rewarm == 0.4  # type: ignore[attr-defined]


def test_resizing() -> None:
    """A linear ramp stays one, whole images are not touched, sides are multiples."""
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32)
    small = Resize(0.5)(Batch(ramp, ramp, ramp), Net([])).x
    steps = small[0, 0, 5, 3:-3].diff()
    assert small.shape == (1, 1, 16, 16) and torch.allclose(steps, torch.full_like(steps, 4 / 31), rtol=1e-12)
    whole = images(32)
    assert Resize(1.0)(whole, Net([])) is whole
    assert Resize(0.55, 4).shape((3, 32, 40)) == (3, 16, 24) and Resize(0.01, 4).shape((3, 32, 2)) == (3, 4, 2)
    with pytest.raises(PlanError, match=r"need images, but the data have shape \(64,\)"):
        Resize(0.5).shape((64,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [0.5, 0.5], "kernels": [3, 5]}, "shares are .0.5, 0.5., expected less than 1 in all"),
        ({"shares": [0.0]}, "shares is .0.0., expected > 0"),
        ({"shares": [0.3], "kernels": [3, 5]}, "kernels are .3, 5., expected 1, one per share"),
        ({"kernels": [4]}, "kernels are .4., expected odd sides"),
        ({"kernels": [1]}, "kernels is .1., expected >= 3"),
        ({"scales": [1.5]}, "scales is .1.5., expected <= 1"),
        ({"scales": []}, "scales are .., expected 1, one per share"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        KernelRescale(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("delayed_gradient", {}), ("local_loss", {}), ("pipeline", {"roles": False}), ("synthetic_gradient", {})],
)
def test_modules_with_optimizers_of_their_own_do_not_grow(name: str, options: dict[str, Any]) -> None:
    decoupled, growing = CATALOGUE[name](**options), KernelRescale(shares=[0.3], kernels=[3])
    with pytest.raises(PlanError, match="do not follow a network that grows"):
        decoupled.edit(growing.edit(plan(model("convnext"))))
    with pytest.raises(PlanError, match="has no option kernel"):
        growing.edit(decoupled.edit(plan(model("convnext"))))


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"up to the model's, of side 3, but kernels is .3.: .* progressive_resize"):
        KernelRescale().edit(plan(model("resnet", depth=8)))
    with pytest.raises(PlanError, match="model vgg has no option kernel, kernels or stem"):
        KernelRescale().edit(plan(model("vgg")))
    with pytest.raises(PlanError, match="KernelRescale cuts one run into phases, but the plan has several"):
        KernelRescale().edit(BatchGrowth().edit(with_step_decay(plan(model("convnext")))))
    with pytest.raises(PlanError, match="ProgressiveResize cuts one run into phases, but the plan has several"):
        ProgressiveResize().edit(KernelRescale().edit(plan(model("convnext"))))
    resized = plan(model("convnext")).map(lambda phase: dataclasses.replace(phase, source=Resize(0.5)))
    with pytest.raises(PlanError, match="which another method chooses"):
        KernelRescale().edit(resized)


def test_kernels_of_models() -> None:
    spec = model("overfeat")
    assert largest_kernel(spec) == 11
    for ratio, kernels in ((1.0, [11, 5, 3]), (7 / 11, [7, 3, 3]), (9 / 11, [9, 5, 3]), (0.1, [3, 3, 3])):
        assert dict(with_kernels(spec, ratio).options)["kernels"] == kernels


# -------------------------------------------------------------------------------------------------------------- training


def trained(directory: Path, net: Any = None, evaluate: int = 4, **options: Any) -> Trained:
    base = with_large_kernels(baseline(epochs=4))
    if net:
        base = base.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(net, (("kernel", 5),))))
    changed = KernelRescale(**{"shares": [0.5], "kernels": [3]} | options).edit(base)
    return train(changed, directory, Blobs(inputs=IMAGES), evaluate=Interval(steps=evaluate))


@pytest.mark.parametrize(
    "options",
    [
        {"interpolation": "bicubic"},
        {"interpolation": "nearest"},
        {"interpolation": "moments"},
        {"state": "reset"},
        {"rewarm": 1.0},
        {"scales": [1.0]},
    ],
)
def test_options_act(options: dict[str, Any], tmp_path: Path) -> None:
    assert distance(trained(tmp_path / "a"), trained(tmp_path / "b", **options)) > 1e-6


@pytest.mark.parametrize(
    "name", ["lamb", "lookahead", "natural_gradient", "ng_sgd", "patch_affine", "post_local_sgd", "shampoo", "swa"]
)
def test_methods_go_through_the_switch(name: str, tmp_path: Path) -> None:
    """With what they keep: the first loss behind the switch is near the last before it, and the same in either order."""
    found = []
    for order in (0, 1):
        plan = with_large_kernels(baseline(epochs=4))
        plan = CASES[name].base(plan) if name == "lamb" else plan
        edits = [KernelRescale(shares=[0.5], kernels=[3]), CATALOGUE[name](**CASES[name].acts)]
        for edit in edits[:: 1 if order else -1]:
            plan = edit.edit(plan)
        found.append(train(plan, tmp_path / str(order), Blobs(inputs=IMAGES), micro_batch=6))
    assert distance(*found) < 1e-12
    losses = [row["train_loss"] for row in found[0].rows]
    assert abs(losses[8] - losses[7]) < 0.2 and losses[-1] < losses[0]


def switched(name: str, **options: Any) -> tuple[list[Any], list[Any]]:
    """What the updates of a method keep after a step with small kernels, and what the next phase begins with."""
    base = KernelRescale(shares=[0.5], kernels=[3]).edit(with_large_kernels(baseline(epochs=4)))
    small, large = CATALOGUE[name](**options).edit(base).phases
    nets = [phase.model(IMAGES, 3).double() for phase in (small, large)]
    worker = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    old, new = (phase.learner.init(net, worker) for phase, net in zip((small, large), nets, strict=True))
    batch = small.source(Blobs(inputs=IMAGES).first(12), nets[0])
    small.learner.step(old, [batch], Clock(0, 8, 0.0, 0.25, 12, 0))
    content: Any = large.carry
    return snapshot(old)["updates"], content.state(snapshot(old), new)["updates"]


def test_ng_sgd_keeps_its_factors_of_outputs() -> None:
    old, new = (next(u["factors"] for u in kept if "factors" in u) for kept in switched("ng_sgd"))
    grown, *same = sorted(new, key=lambda side: side != "stages.0.0.in")
    assert grown == "stages.0.0.in" and new[grown]["batches"] == 0 and new[grown]["q"].shape[1] == 26
    assert sorted(same) == ["head.in", "head.out", "stages.0.0.out"]
    assert all(new[side]["batches"] == 1 and torch.equal(new[side]["q"], old[side]["q"]) for side in same)


def test_curvature_begins_anew() -> None:
    """Factors of outputs too: their scale depends on the number of positions."""
    old, new = (next(u["curvature"] for u in kept if "curvature" in u) for kept in switched("natural_gradient"))
    assert old["tensors"] and {old["counts"][key] for key in old["due_at"]} == {1}
    assert new["tensors"] == new["counts"] == {}


def test_amplitude_acts_in_front_of_norms(tmp_path: Path) -> None:
    auto, other = (trained(tmp_path / a, normed_net, amplitude=a) for a in ("auto", "kernel_ratio"))
    lengths = [t.weights["stages.0.0.weight"].norm() for t in (auto, other)]
    assert lengths[0] / lengths[1] == pytest.approx(5 / 3, rel=0.1)


def test_statistics_are_estimated_at_switches_and_ends(tmp_path: Path) -> None:
    """With statistics of all examples, an evaluation in training mode over all of them says the same."""
    one, none = (trained(tmp_path / str(n), normed_net, evaluate=1, examples=n) for n in (48, 0))
    differing = [a["step"] for a, b in zip(one.rows, none.rows, strict=True) if a["test_loss"] != b["test_loss"]]
    assert [row["phase"] for row in one.rows] == [0] * 8 + [1] * 8
    assert differing[0] == 8 and 9 in differing  # the end of the first phase, the switch
    assert [a["train_loss"] for a in one.rows] == [b["train_loss"] for b in none.rows]
    net = normed_net(IMAGES, 3, 5).double()
    net.load_state_dict(one.weights)
    data = Blobs(inputs=IMAGES)
    net.eval()(data.x)
    seen: list[torch.Tensor] = []
    norm: Any = net.stages[0][1]
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(data.x)
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=0, atol=1e-12)
    assert torch.allclose(norm.running_var, seen[0].var((0, 2, 3), unbiased=False), rtol=0, atol=1e-12)


def test_each_phase_is_evaluated_on_its_own_images(tmp_path: Path) -> None:
    """A run that ends with its first phase is one that knows small images and kernels only."""
    rows = trained(tmp_path / "a").rows
    base = with_large_kernels(baseline(epochs=4))
    first = KernelRescale(shares=[0.5], kernels=[3]).edit(base).phases[0]
    alone = train(Plan((first,)), tmp_path / "b", Blobs(inputs=IMAGES), evaluate=Interval(steps=4)).rows
    assert [row["test_loss"] for row in alone if "test_loss" in row] == [
        row["test_loss"] for row in rows if "test_loss" in row and row["phase"] == 0
    ]


def test_the_switch_keeps_the_function(tmp_path: Path) -> None:
    """At a rate of 0 after the switch, nothing but the growth changes the weights."""
    base = with_large_kernels(baseline(epochs=4)).map(
        lambda phase: amend(phase, phase, rate=lambda old: Rate(0.1, decay=Steps((0.5,), 0.0)))
    )
    changed = KernelRescale(shares=[0.5], kernels=[3], state="reset").edit(base)
    whole = train(changed, tmp_path / "a", Blobs(inputs=IMAGES))
    first = train(Plan(changed.phases[:1]), tmp_path / "b", Blobs(inputs=IMAGES))
    net = changed.phases[1].model(IMAGES, 3).double()
    Grow()(first.weights, net)
    assert all(torch.equal(t, whole.weights[name]) for name, t in net.state_dict().items())


def test_flops_of_each_phase(tmp_path: Path) -> None:
    """Forward and backward pass of the one convolution (no gradient of images) and the head, at each phase's size."""
    rows = trained(tmp_path).rows
    per_example = {}
    for phase, (high, wide), taps in ((0, (1, 2), 9), (1, (2, 3), 25)):
        per_example[phase] = 2 * (2 * high * wide * taps * 16) + 3 * (2 * 16 * 3)
    total = 0.0
    for row in rows:
        total += 12 * per_example[row["phase"]]
        assert row["flops"] == total
