"""Oracles of kernels that grow: exact cases, dilation, the factors, and what optimizers and averages keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.engines import make_worker
from orchestrator.checkpoint import snapshot
from strategies.backprop import Backprop, Update
from strategies.contract import Batch, PlanError, State
from strategies.ema import Average
from strategies.net import Net
from strategies.optimizers import AdamW, Sgd
from strategies.parts.batch_norm import reestimate
from strategies.parts.kernel_growth import Grow, Growth, dilated, fit, interpolated, layers
from strategies.parts.layers import layer_groups
from strategies.parts.resizing import Resize
from strategies.parts.trust_ratio import LambOptimizer
from strategies.rate import Rate

PAIRS = [(3, 5), (3, 7), (5, 7), (5, 9), (7, 13)]
MODES = ["bilinear", "bicubic", "nearest", "moments"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def growth(a: int, b: int, mode: Any = "bilinear", normed: bool = False, shape: tuple[int, int] = (4, 2)) -> Growth:
    return Growth((*shape, a, a), (b, b), (*shape, b, b), mode, normed)


def smooth(n: int, channels: int, side: int) -> Tensor:
    """Noise behind a Gaussian of 5 pixels."""
    taps = torch.exp(-(torch.arange(-20, 21, dtype=torch.float64) ** 2) / 50)
    x = normal(n * channels, 1, side + 40, side + 40, seed=3)
    x = F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return (x / x.std()).view(n, channels, side, side)


def alone() -> Any:
    return make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))


class Small(Net):
    """Two convolutions, with or without batch norms; a third, a linear layer behind the flattened map; a head."""

    def __init__(self, kernel: int, side: int, norm: bool = False):
        torch.manual_seed(kernel)
        norms: list[Callable[[], list[nn.Module]]] = [lambda: [nn.BatchNorm2d(4, eps=1e-12)] if norm else []] * 2
        one = nn.Sequential(nn.Conv2d(2, 4, kernel, padding=kernel // 2), *norms[0](), nn.ReLU())
        two = nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2), *norms[1](), nn.ReLU())
        flat = nn.Sequential(nn.Flatten(), nn.Linear(4 * side * side, 6), nn.ReLU())
        super().__init__([one, two, flat], head=nn.Linear(6, 3))
        self.double()


def learner(optimizer: Any = None, *updates: Update) -> Backprop:
    return Backprop(optimizer=optimizer or Sgd(momentum=0.9), rate=Rate(0.1), updates=updates)


# ------------------------------------------------------------------------------------------------------- kernels alone


def test_nothing_grows_nothing_changes() -> None:
    """1.6a: the same sizes, the same bits, also of buffers and learner state."""
    old, new = Small(3, 4, norm=True), Small(3, 4, norm=True)
    for p in old.parameters():
        p.data.add_(normal(*p.shape))
    old(normal(5, 2, 4, 4))
    Grow()(old.state_dict(), new)
    assert all(torch.equal(new.state_dict()[name], t) for name, t in old.state_dict().items())
    assert torch.equal(new.eval()(normal(5, 2, 4, 4)), old.eval()(normal(5, 2, 4, 4)))


@pytest.mark.parametrize("factor", [2, 3])
def test_boxes(factor: int) -> None:
    """1.6b: behind an average pool of any image, or with every tap `factor` times each way and (a/b)^2 of its weight."""
    x, k = normal(2, 2, 12 * factor, 12 * factor), normal(4, 2, 3, 3, seed=1)
    g = growth(3, 3 * factor, "nearest")
    big = F.conv2d(x, g.resample(k, g.amplitude), stride=factor)
    assert torch.allclose(big, F.conv2d(F.avg_pool2d(x, factor), k), rtol=0, atol=1e-13)


@pytest.mark.parametrize("factor", [2, 3])
def test_dilation(factor: int) -> None:
    """1.6c: taps apart respond to the pixels that stand as far apart as the close ones to these; a box joins the taps."""
    x, k = normal(2, 2, 24, 24), normal(4, 2, 3, 3, seed=1)
    apart = torch.zeros(4, 2, 3 * factor, 3 * factor, dtype=torch.float64)
    apart[:, :, ::factor, ::factor] = k
    far = F.conv2d(x, apart[:, :, : 2 * factor + 1, : 2 * factor + 1], stride=factor)
    assert torch.allclose(
        far, F.conv2d(x[:, :, ::factor, ::factor], k)[:, :, : far.shape[2], : far.shape[3]], atol=1e-13
    )
    box = torch.ones(1, 1, factor, factor, dtype=torch.float64)
    joined = F.conv_transpose2d(k.view(8, 1, 3, 3), box, stride=factor).view(4, 2, 3 * factor, 3 * factor)
    assert torch.equal(joined, interpolated(k, (3 * factor, 3 * factor), "nearest"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_constant_kernels_keep_their_sum(a: int, b: int, mode: str) -> None:
    """1.6d"""
    k = torch.full((4, 2, a, a), 0.7, dtype=torch.float64)
    g = growth(a, b, mode)
    assert torch.allclose(g.resample(k, g.amplitude).sum((2, 3)), k.sum((2, 3)), rtol=1e-13)


def response_error(a: int, b: int, factor: float, scale: float, mode: str = "bilinear") -> float:
    """Relative, inside the map, of the grown kernel's response to smooth images, beside the small one's to small images."""
    x, k = smooth(4, 2, 72), normal(3, 2, a, a, seed=1)
    small = Resize(scale)(Batch(x, x, x), Net([])).x
    wanted = F.conv2d(small, k, padding=a // 2)
    large = F.conv2d(x, growth(a, b, mode, shape=(3, 2)).resample(k, factor), padding=b // 2)
    back = Resize(scale)(Batch(large, large, large), Net([])).x
    inside = (..., slice(4, -4), slice(4, -4))
    return float((back - wanted)[inside].norm() / wanted[inside].norm())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "moments"])
@pytest.mark.parametrize(("a", "b"), [(3, 5), (3, 7), (5, 9)])
def test_smooth_images_get_the_same_response(a: int, b: int, mode: str) -> None:
    """1.6e: to 10 %, and to less than a third of what it is without a factor."""
    error = response_error(a, b, (a / b) ** 2, a / b, mode)
    assert error < 0.1 and error < response_error(a, b, 1.0, a / b, mode) / 3


@pytest.mark.parametrize(("a", "b"), [(2, 3), *PAIRS])
def test_moments_are_exact_for_polynomials(a: int, b: int) -> None:
    """1.6h: on images of degree a - 1 in each direction, so for 3 taps on bi-quadratic ones."""
    powers = torch.arange(a, dtype=torch.float64).view(-1, 1)
    factors, k = normal(a, a, seed=2), normal(4, 2, a, a)

    def response(kernel: Tensor, enlarged: float) -> Tensor:
        """To an image enlarged around the middle of the kernel."""
        side = kernel.shape[-1]
        values = ((torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / enlarged) ** powers
        return (kernel * (values.T @ factors @ values)).sum((2, 3))

    g = growth(a, b, "moments")
    assert torch.allclose(response(g.resample(k, g.amplitude), b / a), response(k, 1.0), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(response(growth(a, b).resample(k, g.amplitude), b / a), response(k, 1.0), rtol=0.01)


def test_a_stencil_on_a_finer_mesh() -> None:
    """1.6h: three taps that stay three on images twice as large."""
    expected = torch.tensor([[3.0, 0, 1], [-3, 1, -3], [1, 0, 3]], dtype=torch.float64)
    assert torch.allclose(dilated(3, 3, 2.0), expected, rtol=0, atol=1e-13)
    assert torch.allclose(dilated(3, 3, 1.0), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("a", "b"), [(3, 5), (3, 7), (5, 9)])
def test_the_ratio_is_that_of_kernels(a: int, b: int) -> None:
    """Where images are halved all the same, the images' ratio is the worse factor."""
    assert response_error(a, b, (a / b) ** 2, 0.5) < 0.8 * response_error(a, b, 0.25, 0.5)


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("normed", [False, True])
def test_factors(a: int, b: int, normed: bool) -> None:
    g = growth(a, b, normed=normed)
    assert g.amplitude == pytest.approx(a / b if normed else (a / b) ** 2, rel=1e-15)
    assert g.gradient == pytest.approx(a / b if normed else 1.0, rel=1e-15)
    assert g.rate == pytest.approx(1.0 if normed else (a / b) ** 2, rel=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_growth_is_linear_and_has_an_adjoint(mode: str) -> None:
    """1.6g: <T w, g> = <w, T' g>, with T' from the images of the basis."""
    g = growth(3, 5, mode, shape=(1, 1))
    matrix = torch.stack([g.resample(row, 0.36).flatten() for row in torch.eye(9, dtype=torch.float64)], 1)
    w, seen = normal(9), normal(25, seed=1)
    assert torch.dot(g.resample(w, 0.36).flatten(), seen).item() == pytest.approx(torch.dot(w, matrix.T @ seen).item())


@pytest.mark.parametrize(("a", "b", "side"), [(3, 5, 40), (3, 7, 56), (5, 9, 72)])
def test_gradients_are_interpolated_without_a_factor(a: int, b: int, side: int) -> None:
    """What the rules for momentum rest on: cosine above 0.99, length within 10 %, for a loss that is a mean over the map."""
    x = smooth(8, 2, side)
    small = Resize(a / b)(Batch(x, x, x), Net([])).x
    k = normal(3, 2, a, a, seed=1)
    g = Growth((3, 2, a, a), (b, b), (3, 2, b, b), "bilinear", False)

    def gradient(images: Tensor, kernel: Tensor) -> Tensor:
        kernel = kernel.clone().requires_grad_()
        F.conv2d(images, kernel).relu().square().mean().backward()
        assert kernel.grad is not None
        return kernel.grad

    found, expected = gradient(x, g.resample(k, g.amplitude)), g.resample(gradient(small, k), g.gradient)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99
    assert 0.9 < found.norm() / expected.norm() < 1.1


# ------------------------------------------------------------------------------------------------------------- networks


def test_flattened_maps_are_kernels() -> None:
    """1.6i: on constant maps a layer behind the flattened map answers as before."""
    old, new = Small(3, 2), Small(3, 5)
    Grow()(old.state_dict(), new)
    levels = normal(7, 4, 1, 1)
    answers = [net.stages[2](levels.expand(7, 4, side, side)) for net, side in ((old, 2), (new, 5))]
    assert torch.allclose(*answers, rtol=0, atol=1e-13)
    with pytest.raises(PlanError, match=r"square maps, but stages.2.1.weight has 20 inputs"):
        Grow()(old.state_dict() | {"stages.2.1.weight": normal(6, 20)}, new)
    with pytest.raises(PlanError, match=r"convolutions and layers behind a flattened map, not head.bias"):
        Grow()(old.state_dict() | {"head.bias": normal(4)}, new)


def test_batch_norms_forget_the_amplitude() -> None:
    """1.6f: after recalibration; without it the amplitude is plain to see."""
    old, x = Small(3, 6, norm=True), smooth(32, 2, 10)
    before, after = [], []
    for amplitude, factor in (("auto", 1.0), ("kernel_ratio", 1.0), ("kernel_ratio", 25 / 9)):
        net: Any = Small(5, 10, norm=True)
        Grow("bilinear", amplitude)(old.state_dict(), net)  # type: ignore[arg-type]
        for conv in (net.stages[0][0], net.stages[1][0]):
            conv.weight.data.mul_(factor)
        before.append(net.eval()(x))
        reestimate(net, x, alone())
        after.append(net(x))
    assert (before[0] - before[1]).abs().max() > 0.01
    assert all((other - after[0]).abs().max() < 1e-7 for other in after)


def test_where_the_scale_is_free() -> None:
    def free(*modules: nn.Module) -> list[bool]:
        return [normed for _, _, _, normed in layers(nn.Sequential(*modules))]

    conv, other, bare, last = (nn.Conv2d(2, 2, 3, bias=n != 2) for n in range(4))
    assert free(conv, nn.ReLU(), nn.BatchNorm2d(2)) == [False]
    assert free(conv, nn.MaxPool2d(2), nn.BatchNorm2d(2), bare, nn.ReLU(), other) == [True, False, False]
    assert free(conv, nn.GroupNorm(1, 2), bare, nn.GroupNorm(1, 2)) == [False, True]
    assert [n for _, _, n, _ in layers(nn.Sequential(conv, nn.Linear(2, 5), nn.Conv2d(2, 7, 1), last))] == [0, 2, 2, 7]


# --------------------------------------------------------------------------------------------------------- learner state


def stepped(net: Net, state: State, gradients: dict[str, Tensor], rate: float = 0.1) -> None:
    for name, p in net.named_parameters():
        p.grad = gradients.get(name, torch.zeros_like(p))
    for group in state.live.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    state.live.optimizer.step()


def grown(old: State, small: Net, large: Net, made: Backprop, grow: Grow) -> State:
    for name, g in grow.growths(small.state_dict(), large).items():
        large.rate_factors[name] = g.rate
    new = made.init(large, alone())
    content = grow.state(snapshot(old), new)
    large.load_state_dict(content["net"])
    new.live.optimizer.load_state_dict(content["optimizer"])
    new.saved |= {"updates": content["updates"]}
    return new


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("amplitude", ["auto", "kernel_ratio"])
def test_momentum_goes_on(norm: bool, amplitude: Any) -> None:
    """1.6g: a step on momentum alone, then growing, is growing, then the step; for every weight and amplitude."""
    made, grow = learner(), Grow("bilinear", amplitude)
    gradients = {name: normal(*p.shape, seed=2) for name, p in Small(3, 4, norm).named_parameters()}

    def start() -> tuple[Net, State]:
        net = Small(3, 4, norm)
        state = made.init(net, alone())
        stepped(net, state, gradients)
        return net, state

    (first, late), (small, early) = start(), start()
    stepped(first, late, {})
    before, after = Small(5, 7, norm), Small(5, 7, norm)
    grow(first.state_dict(), before)
    new = grown(early, small, after, made, grow)
    stepped(after, new, {})
    for name, p in before.named_parameters():
        assert torch.allclose(p, after.get_parameter(name), rtol=0, atol=1e-14), name


def test_amplitudes_are_one_gauge() -> None:
    """With batch norms, two steps with momentum after growing give the same function, whatever the amplitude."""
    answers = []
    for amplitude in ("auto", "kernel_ratio"):
        made, grow, small = learner(), Grow("bilinear", amplitude), Small(3, 4, norm=True)  # type: ignore[arg-type]
        state = made.init(small, alone())
        stepped(small, state, {name: normal(*p.shape, seed=2) for name, p in small.named_parameters()})
        large = Small(5, 7, norm=True)
        new, x = grown(state, small, large, made, grow), smooth(16, 2, 7)
        for _ in range(2):
            large.zero_grad()
            F.cross_entropy(large(x), torch.arange(16) % 3).backward()
            by_name = {name: p.grad for name, p in large.named_parameters() if p.grad is not None}
            kept = {n: g for n, g in by_name.items() if n in ("stages.0.0.weight", "stages.1.0.weight")}
            stepped(large, new, kept)
        answers.append(large(x))
    assert (answers[0] - answers[1]).abs().max() < 1e-8
    assert answers[0].std() > 0.01


def moments(a: State, net: Net) -> dict[str, dict[str, Any]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: state for p, state in a.live.optimizer.state.items()}


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "moments"])
def test_adam(mode: Any) -> None:
    """m as gradients, v as their squares and never negative, the count of steps kept."""
    made, grow, small, large = learner(AdamW(weight_decay=0.1)), Grow(mode), Small(3, 4, True), Small(5, 7, True)
    state = made.init(small, alone())
    gradients = {name: normal(*p.shape, seed=2) for name, p in small.named_parameters()}
    for _ in range(3):
        stepped(small, state, gradients)
    new = grown(state, small, large, made, grow)
    before, after = moments(state, small), moments(new, large)
    assert {s["step"].item() for s in after.values()} == {3.0} and before.keys() == after.keys()
    for name, factor in (("stages.0.0.weight", 0.6), ("stages.1.0.weight", 0.6)):
        m = interpolated(before[name]["exp_avg"], (5, 5), mode) * factor
        v = (interpolated(before[name]["exp_avg_sq"], (5, 5), mode) * factor**2).clamp(min=0)
        assert torch.allclose(after[name]["exp_avg"], m, rtol=1e-13)
        assert torch.allclose(after[name]["exp_avg_sq"], v, rtol=1e-13) and after[name]["exp_avg_sq"].min() >= 0
    flat = after["stages.2.1.weight"]["exp_avg"].view(6, 4, 7, 7)
    m = interpolated(before["stages.2.1.weight"]["exp_avg"].view(6, 4, 4, 4), (7, 7), mode)
    assert torch.allclose(flat, m, rtol=1e-13)
    assert torch.equal(after["head.weight"]["exp_avg"], before["head.weight"]["exp_avg"])


def test_groups_that_count() -> None:
    """LAMB counts steps in its groups, and has more of these where rates of layers differ."""

    class Lamb:
        def __call__(self, net: Net) -> Any:
            return LambOptimizer(
                layer_groups(net, 0.0, 1.0), betas=(0.9, 0.99), eps=1e-8, bias_correction=True, clip=None
            )

    made, small, large = learner(Lamb()), Small(3, 4), Small(5, 7)
    state = made.init(small, alone())
    stepped(small, state, {name: normal(*p.shape, seed=2) for name, p in small.named_parameters()})
    new = grown(state, small, large, made, Grow())
    groups = new.live.optimizer.param_groups
    assert [group["step"] for group in groups] == [1] * len(groups) and len(groups) > len(
        state.live.optimizer.param_groups
    )
    assert sorted({group["rate_factor"] for group in groups}) == pytest.approx([16 / 49, 9 / 25, 1])
    mean = moments(state, small)["stages.0.0.weight"]["mean"]
    assert torch.allclose(moments(new, large)["stages.0.0.weight"]["mean"], interpolated(mean, (5, 5), "bilinear"))


def test_averages_are_weights() -> None:
    made, small, large = learner(None, Average(1.0)), Small(3, 4), Small(5, 7)
    state = made.init(small, alone())
    average = state.saved["updates"][0].saved
    average["stages.0.0.weight"].add_(1.0)
    new = grown(state, small, large, made, Grow())
    expected = interpolated(average["stages.0.0.weight"], (5, 5), "bilinear") * 0.36
    assert torch.allclose(new.saved["updates"][0]["stages.0.0.weight"], expected, rtol=1e-13)
    assert torch.equal(new.saved["updates"][0]["head.bias"], average["head.bias"])


def test_factors_of_curvature_keep_what_fits() -> None:
    """The side of the outputs, whose size is the same, is kept; that of the inputs begins anew, with its count."""
    old = {"conv": {"A": {"ema": normal(9, 9), "seen": 7}, "G": {"ema": normal(4, 4), "seen": 7}}, "step": 7}
    fresh = {"conv": {"A": {"ema": torch.eye(25), "seen": 0}, "G": {"ema": torch.eye(4), "seen": 0}}, "step": 0}
    found = fit([old, [old["conv"]]], [State(fresh), [fresh["conv"]]], {})
    for conv in (found[0]["conv"], found[1][0]):
        assert (
            conv["A"] is fresh["conv"]["A"] and conv["G"]["ema"] is old["conv"]["G"]["ema"] and conv["G"]["seen"] == 7
        )
    assert found[0]["step"] == 7
    assert fit({"kept": {"A": normal(9, 9)}}, {"kept": {}}, {}) == {"kept": {}}
