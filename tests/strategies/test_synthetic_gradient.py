"""Synthetic gradients against their oracles: backpropagation, autograd, least squares; in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.backprop import Backprop, CrossEntropy
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError, State
from strategies.decoupled.boundary import CutNet, build
from strategies.decoupled.synthesisers import synthesiser
from strategies.decoupled.synthetic import Guess, Share, Synthetic
from strategies.decoupled.waiting import Pair as Waited
from strategies.decoupled.waiting import Waiting
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate
from strategies.synthetic_gradient import SyntheticGradient
from tests.strategies.cases import with_stages
from tests.strategies.harness import CLASSES, Blobs, Pair, baseline, distance, train

WIDTH, IMAGES = (6,), (2, 6, 6)
KINDS = ("deep", "linear", "affine", "low_rank", "pooled")


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def mlp(inputs: tuple[int, ...], classes: int, depth: int = 3) -> Net:
    stages = [nn.Sequential(nn.Linear(8 if i else inputs[0], 8), nn.Tanh()) for i in range(depth)]
    return Net(stages, head=nn.Linear(8, classes))


def cnn(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Conv2d(inputs[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net([first, Residual(4), Residual(4)], pool, nn.Linear(4, classes))


class Rig:
    """A learner on one network and one batch, with gradients to look at."""

    def __init__(self, model: Any, inputs: tuple[int, ...], cuts: tuple[int, ...] | None = None, **options: Any):
        torch.manual_seed(0)
        self.net = build(inputs, CLASSES, ModelSpec(model), cuts).double()
        settings: dict[str, Any] = {
            "guess": Guess(),
            "share": Share(0.0, 0.0, 0.0),
            "queue": 0,
            "guess_inputs": False,
        } | options
        self.learner = Synthetic(optimizer=Sgd(momentum=0.0), rate=Rate(0.1), **settings)
        self.state: State = self.learner.init(self.net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
        self.batch = random_batch(inputs)

    def gradients(self) -> list[dict[str, Tensor]]:
        """Of each module after one micro-batch that is the whole batch."""
        self.learner.exchange(self.state, self.batch, self.clock(), 1.0)
        return [{name: p.grad.clone() for name, p in part.named_parameters()} for part in self.state.live.parts]

    def clock(self, step: int = 0) -> Clock:
        return Clock(step, 10, 0.1 * step, 0.1, len(self.batch), 0)

    def step(self, step: int = 0, batch: Batch | None = None) -> dict[str, Tensor]:
        return self.learner.step(self.state, [batch or self.batch], self.clock(step))

    def backprop(self) -> list[dict[str, Tensor]]:
        self.net.zero_grad()
        CrossEntropy()(self.net, self.batch, self.clock()).backward()
        return [{name: p.grad.clone() for name, p in part.named_parameters()} for part in self.net.parts()]  # type: ignore[union-attr]


def random_batch(inputs: tuple[int, ...], n: int = 8, seed: int = 1) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *inputs, generator=made, dtype=torch.float64)
    return Batch(x, torch.arange(n) % CLASSES, torch.arange(n))


def largest(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float:
    return max(float((x[name] - y[name]).abs().max()) for x, y in zip(a, b, strict=True) for name in x)


def perturbed(rig: Rig) -> Rig:
    """With synthesisers that say something."""
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (p for helper in rig.state.live.helpers for p in helper.parameters()):
            p.add_(torch.randn(p.shape, generator=made, dtype=p.dtype), alpha=0.1)
    return rig


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


# ---------------------------------------------------------------------------------------------------- 7, and the queue


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


@pytest.mark.parametrize("late", [1, 2])
def test_a_queue_delays_what_synthesisers_learn_by_so_many_batches(late: int) -> None:
    """Played by hand: activations and targets of batch b meet the synthesiser after the modules' step on batch b + late."""
    rig = Rig(mlp, WIDTH, cuts=(1,), queue=late, guess=Guess("linear", rate=None))
    hand = Rig(mlp, WIDTH, cuts=(1,), guess=Guess("linear", rate=None))
    optimizer = torch.optim.SGD(hand.state.live.helpers[0].parameters(), lr=0.1)
    modules, (guess,) = hand.state.live.parts, hand.state.live.helpers
    moves = torch.optim.SGD(hand.net.parameters(), lr=0.1)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(6):
        batch = random_batch(WIDTH, seed=10 + step)
        rig.step(step, batch)
        below = modules[0](batch.x)
        h = below.detach().requires_grad_()
        nn.functional.cross_entropy(modules[1](h), batch.y).backward()
        below.backward(guess(h, batch.y).detach() / len(batch))
        assert h.grad is not None
        kept.append((h.detach(), batch.y, h.grad * len(batch)))
        moves.step()
        moves.zero_grad()
        if step >= late:
            (guess(*kept[step - late][:2]) - kept[step - late][2]).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip([*rig.net.parameters(), *rig.state.live.helpers[0].parameters()],
                    [*hand.net.parameters(), *guess.parameters()], strict=True):  # fmt: skip
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


class Alone:
    """A worker of two whose sums have no other side."""

    device, size = torch.device("cpu"), 2

    def __init__(self, rank: int):
        self.rank = rank

    def sum_(self, t: Tensor) -> Tensor:
        return t


def test_what_waits_is_saved_whole_and_shared_out_again() -> None:
    """Of a batch of 5, worker 0 holds 2, worker 1 holds 3 in micro-batches of 2 and 1."""
    batch = random_batch(WIDTH, 5)
    whole = Waited(batch.x, batch.y, -batch.x)
    shares = [[(0, 2)], [(2, 4), (4, 5)]]
    waits = [Waiting(Alone(rank), 1, [0]) for rank in (0, 1)]  # type: ignore[arg-type]
    for waiting, bounds in zip(waits, shares, strict=True):
        for begin, end in bounds:
            waiting.add(0, Waited(*(t[begin:end] for t in whole)))
        assert list(waiting.due(1, 5)) == []
    ((size, (one,)),), ((_, (other,)),) = (waiting.whole() for waiting in waits)
    saved = [(size, [{name: t + other[name] for name, t in one.items()}])]
    for waiting, bounds in zip(waits, shares, strict=True):
        waiting.restore(saved)
        out = list(waiting.due(0, 5))
        assert [(cut, size) for cut, _, size in out] == [(0, 5)] * len(bounds)
        for (begin, end), (_, pair, _) in zip(bounds, out, strict=True):
            assert all(t.equal(w[begin:end]) for t, w in zip(pair, whole, strict=True))


@pytest.mark.slow
def test_a_queue_is_resumed_by_two_workers(tmp_path: Path) -> None:
    """Each worker takes its own share of what waits out of rank 0's checkpoint."""
    plan = SyntheticGradient(cuts=[1], queue=2, rate=0.01).edit(with_stages(baseline(batch=11)))
    pair = Pair(tmp_path / "rendezvous")
    try:
        unbroken = pair.train(plan, tmp_path / "unbroken", micro_batch=4, save_seconds=0)
        with pytest.raises(AssertionError, match="planted"):
            pair.train(plan, tmp_path / "broken", data=Blobs(fail_at=77), micro_batch=4, save_seconds=0)
        resumed = pair.train(plan, tmp_path / "broken", micro_batch=4, save_seconds=0)
    finally:
        pair.close()
    assert distance(resumed, unbroken) == 0


# ------------------------------------------------------------------------------------------------------ guessed inputs


@pytest.mark.parametrize(("model", "inputs"), [(mlp, WIDTH), (cnn, IMAGES)])
def test_guessed_inputs_take_the_place_of_those_made(model: Any, inputs: tuple[int, ...]) -> None:
    rig = Rig(model, inputs, guess_inputs=True, share=Share(1.0, 1.0, 0.0))
    parts, ahead = rig.state.live.parts, rig.state.live.helpers[2:]
    gradients = rig.gradients()
    given = [rig.batch.x, *(guess(rig.batch.x).detach().requires_grad_() for guess in ahead)]
    loss = nn.functional.cross_entropy(parts[2](given[2]), rig.batch.y)
    expected: dict[int, Any] = {2: torch.autograd.grad(loss, [*parts[2].parameters(), given[2]])}
    for module in (1, 0):
        wanted = [*parts[module].parameters(), *([given[module]] if module else [])]
        expected[module] = torch.autograd.grad((parts[module](given[module]) * expected[module + 1][-1]).sum(), wanted)
    for module, own in enumerate(gradients):
        for found, g in zip(own.values(), expected[module], strict=False):
            assert torch.allclose(found, g, rtol=0, atol=1e-12)
    for cut, guess in enumerate(ahead):
        error = (guess(rig.batch.x) - parts[cut](given[cut]).detach()).square().sum() / len(rig.batch)
        for p, g in zip(guess.parameters(), torch.autograd.grad(error, [*guess.parameters()]), strict=True):
            assert torch.allclose(p.grad, g, rtol=0, atol=1e-12)


def test_with_guessed_inputs_a_network_learns(tmp_path: Path) -> None:
    plan = SyntheticGradient(cuts=[1], inputs=True, rate=0.02).edit(with_stages(baseline(epochs=10)))
    rows = train(plan, tmp_path).rows
    assert rows[-1]["test_loss"] < 0.5 * rows[0]["train_loss"]


def test_after_guessed_inputs_running_statistics_are_those_of_real_ones() -> None:
    """In evaluation, the examples read pass as they would in training, in one batch and from end to end."""
    rig = Rig(cnn, IMAGES, guess_inputs=True)
    for step in range(3):
        rig.step(step)
    rig.learner.refresh(rig.state, lambda n: rig.batch)
    with torch.no_grad():
        found = rig.learner.predict(rig.state, rig.batch.x)
        expected = rig.net.train()(rig.batch.x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


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


def test_rate_factors_follow_parameters_into_modules() -> None:
    net = mlp(WIDTH, CLASSES)
    net.rate_factors = {"stages.1.0.weight": 2.0, "head.bias": 3.0}
    parts = CutNet(net, (1, 2), WIDTH, CLASSES).parts()
    assert [part.rate_factors for part in parts] == [{}, {"stages.0.0.weight": 2.0}, {"head.bias": 3.0}]


def edited(**options: Any) -> Plan:
    return SyntheticGradient(**options).edit(with_stages(baseline()))


@pytest.mark.parametrize("cuts", [[0], [2, 1], [1, 1]])
def test_cuts_must_rise(cuts: list[int]) -> None:
    with pytest.raises(PlanError, match="rising numbers"):
        edited(cuts=cuts)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the network has 2 stages"):
        train(edited(cuts=[2]), tmp_path)
    with pytest.raises(PlanError, match="forward pass of its own"):
        train(SyntheticGradient().edit(baseline()), tmp_path)
    with pytest.raises(PlanError, match="no hidden layer"):
        SyntheticGradient(hidden=3)
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
