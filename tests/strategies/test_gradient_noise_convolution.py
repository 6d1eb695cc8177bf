"""Oracles of gradient noise convolution: by hand on two shards, identity where shards are equal, resume of two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from strategies.contract import Batch, Clock, Need, Plan, mix
from strategies.gradient_noise_convolution import GradientNoiseConvolution
from strategies.parts.annealing import Anneal
from strategies.rate import Rate
from tests.strategies.harness import CLASSES, WIDTH, Blobs, Pair, baseline, distance, tiny_net, train

SCALE, RATE = 0.5, Rate(0.1, warmup=0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def plan(batch: int = 12, epochs: float = 1, anneal: Anneal = "none") -> Plan:
    return GradientNoiseConvolution(scale=SCALE, anneal=anneal).edit(baseline(epochs, batch))


def gradient(weights: dict[str, Tensor], shard: Batch) -> dict[str, Tensor]:
    """Mean over the shard."""
    own = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loss = nn.functional.cross_entropy(functional_call(tiny_net((WIDTH,), CLASSES).double(), own, (shard.x,)), shard.y)
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def by_hand(start: dict[str, Tensor], batch: int, first: int, steps: int, falls: bool) -> dict[str, Tensor]:
    """SGD with momentum 0.9, decay 1e-3 of matrices at the baseline's rate, over shards of `first` and the rest."""
    data, w = Blobs(), start
    velocity = {name: torch.zeros_like(v) for name, v in w.items()}
    noise = [dict(velocity), dict(velocity)]
    for step in range(steps):
        begin = step * batch
        shards = [data.train(begin, begin + first), data.train(begin + first, begin + batch)]
        scale = SCALE * (1 - step / steps) if falls else SCALE
        there = [{name: v + scale * apart[name] for name, v in w.items()} for apart in noise]
        own = [gradient(point, shard) for point, shard in zip(there, shards, strict=True)]
        mean = {name: (first * own[0][name] + (batch - first) * own[1][name]) / batch for name in w}
        noise = [{name: g[name] - mean[name] for name in w} for g in own]
        per_step = batch / len(data.x)
        rate = RATE(Clock(step, steps, step * per_step, per_step, batch, seed=0))
        velocity = {n: 0.9 * velocity[n] + mean[n] + (1e-3 if w[n].ndim > 1 else 0.0) * w[n] for n in w}
        w = {n: w[n] - rate * velocity[n] for n in w}
    return w


@pytest.mark.parametrize(("batch", "first", "micro", "anneal"), [(12, 6, 2, "none"), (11, 5, 64, "linear")])
def test_two_workers_are_two_shards(
    batch: int, first: int, micro: int, anneal: Anneal, tmp_path: Path, pair: Pair
) -> None:
    """Whatever their micro-batches, and where they have unlike numbers of examples."""
    trained = pair.train(plan(batch, anneal=anneal), tmp_path / "pair", micro_batch=micro)
    steps = plan(batch).phases[0].steps(48)
    torch.manual_seed(mix(0, "init", 0))  # as the trainer has it
    net = tiny_net((WIDTH,), CLASSES).double()
    expected = by_hand({name: p.detach() for name, p in net.named_parameters()}, batch, first, steps, anneal != "none")
    for name, value in expected.items():
        assert torch.allclose(trained.weights[name], value, atol=1e-12, rtol=0)


def test_workers_with_the_same_examples_have_no_noise(tmp_path: Path, pair: Pair) -> None:
    """Each example twice in a row, in batches of two: both workers see the same one."""
    plain = pair.train(baseline(1, 2), tmp_path / "plain", data=Blobs(repeat=2))
    assert distance(pair.train(plan(2), tmp_path / "apart", data=Blobs(repeat=2)), plain) < 1e-12


def test_one_worker_has_no_noise(tmp_path: Path) -> None:
    plain = train(baseline(1), tmp_path / "plain")
    assert distance(train(plan(), tmp_path / "alone", micro_batch=5), plain) < 1e-12


def test_noise_of_every_worker_survives(tmp_path: Path, pair: Pair) -> None:
    """Two workers, broken off after two steps, go on as if nothing had been."""
    unbroken = pair.train(plan(), tmp_path / "unbroken")
    data = Blobs(fail_at=2 * 12)
    with pytest.raises(AssertionError, match="the planted fault"):
        pair.train(plan(), tmp_path / "broken", data=data, save_seconds=0)
    resumed = pair.train(plan(), tmp_path / "broken", save_seconds=0)
    assert distance(resumed, unbroken) == 0
    assert resumed.progress.steps == unbroken.progress.steps


def test_needs() -> None:
    assert plan().needs == Need.LAYER_GRADS | Need.EDIT_WEIGHTS
    assert GradientNoiseConvolution(scale=0).edit(baseline()) == baseline()
