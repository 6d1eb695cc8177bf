"""Delayed gradients against autograd at the weights and on the batches that each variant states, in float64."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.contract import Batch, Clock, ModelSpec, PlanError
from strategies.decoupled.boundary import CutNet, build
from strategies.decoupled.delayed import Delayed
from strategies.decoupled.flights import Ages
from strategies.delayed_gradient import DelayedGradient
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate
from tests.strategies.cases import with_stages
from tests.strategies.harness import CLASSES, baseline, distance, train

RATE, STEPS = 0.5, 9
VARIANTS = {"ddg": (False, False), "fr": (False, True), "fdg": (True, False)}


def mlp(inputs: tuple[int, ...], classes: int) -> Net:
    sizes = ((inputs[0], 5), (5, 4), (4, 4))
    return Net([nn.Sequential(nn.Linear(size, out), nn.Tanh()) for size, out in sizes], head=nn.Linear(4, classes))


def normalised(inputs: tuple[int, ...], classes: int) -> Net:
    stages = [nn.Sequential(nn.Linear(size, 5), nn.BatchNorm1d(5), nn.Tanh()) for size in (inputs[0], 5, 5)]
    return Net(stages, head=nn.Linear(5, classes))


def batch_of(step: int) -> Batch:
    made = torch.Generator().manual_seed(100 + step)
    return Batch(torch.randn(6, 3, generator=made, dtype=torch.float64), torch.arange(6) % CLASSES, torch.arange(6))


def played(variant: str, model: Any = mlp, shrink: float = 1.0) -> tuple[list[CutNet], list[float]]:
    """The network before each step and after the last one, and the losses that were told."""
    torch.manual_seed(0)
    net = build((3,), CLASSES, ModelSpec(model), None).double()
    apart, replay = VARIANTS[variant]
    usual: dict[str, Any] = {"optimizer": Sgd(momentum=0.0), "rate": Rate(RATE)}
    learner = Delayed(**usual, apart=apart, replay=replay, shrink=shrink)
    state = learner.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    nets, losses = [copy.deepcopy(net)], []
    for step in range(STEPS):
        batch = batch_of(step)
        halves = [Batch(batch.x[i : i + 3], batch.y[i : i + 3], batch.position[i : i + 3]) for i in (0, 3)]
        metrics = learner.step(state, halves, Clock(step, STEPS, 0.0, 0.1, len(batch), 0))
        losses.append(float(metrics["loss"]))
        nets.append(copy.deepcopy(net))
    return nets, losses


def weights(net: CutNet, module: int) -> list[Tensor]:
    return [p.detach() for p in net.parts()[module].parameters()]


def moved(nets: list[CutNet], module: int, step: int) -> list[Tensor]:
    """The gradient by which a module moved at a step."""
    before, after = weights(nets[step], module), weights(nets[step + 1], module)
    return [(a - b) / RATE for a, b in zip(before, after, strict=True)]


def true_gradient(modules: list[nn.Module], batch: Batch, module: int) -> tuple[list[Tensor], float]:
    """By autograd through all modules, of one of them."""
    loss = nn.functional.cross_entropy(nn.Sequential(*modules)(batch.x), batch.y)
    return list(torch.autograd.grad(loss, [*modules[module].parameters()])), loss.item()


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_ddg_moves_by_the_true_gradient_of_k_steps_ago() -> None:
    nets, losses = played("ddg", shrink=1.0)
    count = len(nets[0].parts())
    assert count == 3
    for module in range(count):
        delay = count - 1 - module
        for step in range(STEPS):
            if step < delay:
                assert all(g.eq(0).all() for g in moved(nets, module, step))
                continue
            then = step - delay
            expected, loss = true_gradient(list(nets[then].parts()), batch_of(then), module)
            assert_close(moved(nets, module, step), expected)
            assert losses[then] == pytest.approx(loss, abs=1e-12)


def test_fdg_moves_by_the_shrunk_gradient_of_twice_as_many_steps_ago() -> None:
    """Each module passed the batch forward one step after the one below it, with its weights of that step."""
    shrink = 0.7
    nets, losses = played("fdg", shrink=shrink)
    count = len(nets[0].parts())
    for module in range(count):
        above = count - 1 - module
        for step in range(STEPS):
            read = step - above - (count - 1)  # when the batch was read
            assert read + module == step - 2 * above  # forward and backward pass lie 2(K-1-k) steps apart
            if read < 0:
                assert all(g.eq(0).all() for g in moved(nets, module, step))
                continue
            passed: list[nn.Module] = [nets[read + k].parts()[k] for k in range(count)]
            expected, loss = true_gradient(passed, batch_of(read), module)
            assert_close(moved(nets, module, step), [shrink**above * g for g in expected])
            assert losses[read + count - 1] == pytest.approx(loss, abs=1e-12)


def test_fr_passes_old_features_through_the_weights_of_now() -> None:
    """By hand: features of step b; then at b, b+1, ... one module after the other, from above, at its own weights."""
    nets, _ = played("fr")
    count = len(nets[0].parts())
    for read in range(STEPS - count + 1):
        batch, given = batch_of(read), [batch_of(read).x]
        for part in nets[read].parts()[:-1]:
            given.append(part(given[-1]).detach())
        back: Tensor | None = None
        for above in range(count):
            module, step = count - 1 - above, read + above
            part, x = nets[step].parts()[module], given[module].clone().requires_grad_()
            out = part(x)
            value = nn.functional.cross_entropy(out, batch.y) if back is None else (out * back).sum()
            *gradient, back = torch.autograd.grad(value, [*part.parameters(), x])
            assert_close(moved(nets, module, step), gradient)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_staleness_is_that_of_the_papers(count: int) -> None:
    """In steps from a module's forward pass to its backward pass, on one worker and on many alike."""
    together, apart = Ages(count - 1, apart=False), Ages(count - 1, apart=True)
    for module in range(count):
        assert together.back(module) - together.forward(module) == count - 1 - module
        assert apart.back(module) - apart.forward(module) == 2 * (count - 1 - module)
        if module:  # what neighbours send is there a step later, but for activations that are used at once
            assert apart.forward(module) == apart.forward(module - 1) + 1
            assert together.forward(module) == together.forward(module - 1)
            assert all(ages.back(module - 1) == ages.back(module) + 1 for ages in (together, apart))


def test_variants_differ() -> None:
    last = {variant: weights(played(variant)[0][-1], 0)[0] for variant in VARIANTS}
    assert not last["ddg"].equal(last["fr"])
    assert not last["ddg"].equal(last["fdg"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_one_module_it_is_backpropagation(variant: Any, tmp_path: Path) -> None:
    base = with_stages(baseline(epochs=1))
    alone = DelayedGradient(cuts=[], variant=variant, shrink=0.5).edit(base)
    assert distance(train(alone, tmp_path / "alone"), train(base, tmp_path / "plain")) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_running_statistics_see_each_batch_once(variant: str) -> None:
    nets, _ = played(variant, normalised)
    for module, part in enumerate(nets[-1].parts()):
        late = module if variant == "fdg" else 0
        counts = [int(m.num_batches_tracked) for m in part.modules() if isinstance(m, nn.BatchNorm1d)]
        assert counts == [2 * (STEPS - late)]  # two micro-batches in each step


def drops(inputs: tuple[int, ...], classes: int) -> Net:
    stages = [nn.Sequential(nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)) for size in (inputs[0], 8, 8)]
    return Net(stages, head=nn.Linear(8, classes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_without_graphs_changes_nothing(variant: Any, tmp_path: Path) -> None:
    """Passes that were under way are made again, with the same masks, statistics and weights."""
    base = baseline(epochs=2).map(lambda phase: dataclasses.replace(phase, model=ModelSpec(drops)))
    plan = DelayedGradient(variant=variant).edit(base)
    kept = train(plan, tmp_path / "kept", micro_batch=5)
    again = train(plan, tmp_path / "again", micro_batch=5, save_seconds=0)
    assert again.progress.saves > kept.progress.saves == 0
    assert distance(again, kept) == 0


@pytest.mark.parametrize("variant", ["ddg", "fr"])
def test_images_stay_as_convolutions_like_them(variant: str) -> None:
    """In a network of channels last, modules are given channels last, also after a checkpoint, which does not have them so."""

    def cnn(inputs: tuple[int, ...], classes: int) -> Net:
        stages = [nn.Conv2d(size, 4, 3, padding=1) for size in (inputs[0], 4, 4)]
        return Net(stages, nn.Flatten(), nn.Linear(64, classes)).to(memory_format=torch.channels_last)  # type: ignore

    apart, replay = VARIANTS[variant]
    net, seen = build((2, 4, 4), CLASSES, ModelSpec(cnn), None), []
    learner = Delayed(optimizer=Sgd(), rate=Rate(0.1), apart=apart, replay=replay, shrink=1.0)
    state = learner.init(net, make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu")))
    for part in state.live.parts[1:]:
        part.stages[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for step in range(3):
        batch = Batch(torch.randn(6, 2, 4, 4), torch.arange(6) % CLASSES, torch.arange(6))
        learner.step(state, [batch], Clock(step, 3, 0.0, 0.1, 6, 0))
        learner.gather(state)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert seen


def test_while_nothing_has_come_to_the_top_the_loss_is_that_of_what_was_read() -> None:
    nets, losses = played("fdg")
    for step in range(2):
        out = nets[step](batch_of(step).x)
        assert losses[step] == pytest.approx(nn.functional.cross_entropy(out, batch_of(step).y).item(), abs=1e-12)


def test_shrink_is_more_than_nothing() -> None:
    with pytest.raises(PlanError, match="shrink is 0"):
        DelayedGradient(shrink=0.0)
