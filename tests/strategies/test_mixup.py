"""Oracles of mixup."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from strategies.backprop import CrossEntropy
from strategies.contract import Batch, Clock, Stream
from strategies.mixup import MixAhead, Mixup
from strategies.parts.annealing import falling
from tests.strategies.harness import CLASSES, Blobs, baseline


def clock(step: int = 0, rank: int = 0) -> Clock:
    return Clock(step, 100, 0.0, 0.25, 12, seed=3, rank=rank)


def mixed(start: int, stop: int, at: Clock, alpha: float = 0.4) -> Batch:
    data = Blobs()
    stream = Stream(lambda n: data.train(start + n, stop + n), CLASSES)
    return MixAhead(falling(alpha, "none"))(data.train(start, stop), at, stream)


def share(batch: Batch, start: int = 0) -> float:
    """Of the batch's own examples, read off the inputs."""
    own, partner = (Blobs().train(a, a + 1).x[0] for a in (start, start + 12))
    return float((batch.x[0] - partner)[0] / (own - partner)[0])


def test_inputs_and_labels_are_mixed_alike() -> None:
    """With the examples one global batch of 12 further on."""
    batch, own, partner = mixed(0, 12, clock()), Blobs().train(0, 12), Blobs().train(12, 24)
    own_share = share(batch)
    assert 0 < own_share < 1
    assert torch.allclose(batch.x, own_share * own.x + (1 - own_share) * partner.x, atol=1e-14, rtol=0)
    onehot = torch.eye(CLASSES, dtype=torch.float64)
    assert torch.allclose(batch.y, own_share * onehot[own.y] + (1 - own_share) * onehot[partner.y], atol=1e-14, rtol=0)
    assert torch.equal(batch.position, own.position)


def test_the_loss_is_mixed_likewise() -> None:
    batch, own, partner = mixed(0, 12, clock()), Blobs().train(0, 12), Blobs().train(12, 24)
    own_share, loss = share(batch), CrossEntropy()
    losses = [loss(lambda x: batch.x[:, :3], dataclasses.replace(batch, y=b.y), clock()) for b in (own, partner)]
    assert loss(lambda x: x[:, :3], batch, clock()).item() == pytest.approx(
        float(own_share * losses[0] + (1 - own_share) * losses[1]), abs=1e-13
    )


def test_one_share_per_step_alike_on_all_ranks() -> None:
    assert share(mixed(0, 4, clock())) == pytest.approx(share(mixed(6, 12, clock(rank=1)), 6), abs=1e-12)
    assert share(mixed(0, 4, clock(0))) != pytest.approx(share(mixed(0, 4, clock(1))), abs=1e-3)


def test_shares_follow_the_beta_distribution() -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    shares = torch.tensor([share(mixed(0, 1, clock(step), 0.5)) for step in range(2000)], dtype=torch.float64)
    assert abs(shares.mean().item() - 0.5) < 4 * (1 / 8 / 2000) ** 0.5
    assert shares.var().item() == pytest.approx(1 / 8, rel=0.1)


def test_mixing_is_annealed() -> None:
    plan = Mixup(alpha=0.8, anneal="linear").edit(baseline())
    (change,) = plan.phases[0].maps
    assert [change.alpha(clock(step)) for step in (0, 25, 100)] == pytest.approx([0.8, 0.6, 0.0])  # type: ignore[attr-defined]
    data = Blobs()
    batch, stream = data.train(0, 12), Stream(lambda n: data.train(n, 12 + n), CLASSES)
    assert change(batch, clock(100), stream) is batch and not torch.equal(change(batch, clock(), stream).x, batch.x)


def test_soft_labels_stay_soft() -> None:
    soft = dataclasses.replace(Blobs().train(0, 2), y=torch.full((2, CLASSES), 1 / CLASSES, dtype=torch.float64))
    out = MixAhead(falling(0.4, "none"))(soft, clock(), Stream(lambda n: soft, CLASSES))
    assert torch.allclose(out.y, soft.y)
