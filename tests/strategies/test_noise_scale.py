"""What is measured in training equals what the gradients of each part, computed apart, give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from strategies.contract import PlanError, mix
from strategies.gradient_clipping import GradientClipping
from strategies.noise_scale import NoiseScale
from strategies.parts import noise_probe
from strategies.parts.gradient_noise import Noise, estimate
from tests.strategies.harness import CLASSES, WIDTH, Blobs, Pair, baseline, tiny_net, train


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def offline(*bounds: int) -> Noise:
    """The noise of the first batch in parts [bounds[i], bounds[i + 1])."""
    torch.manual_seed(mix(0, "init", 0))
    net = tiny_net((WIDTH,), CLASSES).double()
    gradients = []
    for a, b in pairwise(bounds):
        batch = Blobs().train(a, b)
        grads = torch.autograd.grad(cross_entropy(net(batch.x), batch.y), list(net.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]).numpy())
    sizes = [b - a for a, b in pairwise(bounds)]
    mean = np.average(gradients, axis=0, weights=sizes)
    return estimate([float(g @ g) for g in gradients], sizes, float(mean @ mean))


def check(row: dict[str, float], noise: Noise) -> None:
    assert row["train_noise_trace"] == pytest.approx(noise.trace, rel=1e-11)
    assert row["train_noise_signal"] == pytest.approx(noise.signal, rel=1e-11)


@pytest.mark.parametrize("small", [noise_probe.SMALL, 0])
def test_micro_batches_of_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """Whether gradients are kept, or norms of their rows."""
    monkeypatch.setattr(noise_probe, "SMALL", small)
    rows = train(NoiseScale().edit(baseline()), tmp_path, micro_batch=4).rows
    check(rows[0], offline(0, 4, 8, 12))


LARGE, MANY = [(512, 512, 3, 3)], [(64, 64), (64,)] * 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [LARGE, MANY])
def test_squares_of_short_numbers_are_exact_enough(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """A large tensor goes by its rows; the sum of many small ones is longer than they are. Summed in one row, or in 16 as
    some processors' dot products do, two million squares miss the tolerance several times over."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.rand(shape, generator=generator).to(dtype) for shape in shapes]
    kept = noise_probe.Kept(grads)
    for index, grad in enumerate(grads):
        kept.take(index, grad)
    exact = sum(float(g.double().square().sum()) for g in grads)
    assert float(kept.square()) == pytest.approx(exact, rel=2e-6)
    assert kept.empty and float(kept.square()) == 0


def test_gradients_of_any_layout() -> None:
    weights = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.empty(5, 3)
    kept = noise_probe.Kept(weights)
    grads = torch.arange(48.0).view(4, 3, 2, 2), torch.arange(15.0).view(3, 5).T
    for index, grad in enumerate(grads):
        kept.take(index, grad)
    assert all(place.equal(grad) for place, grad in zip(kept.places, grads, strict=True))
    assert float(kept.square()) == pytest.approx(sum(float(g.square().sum()) for g in grads))


@pytest.mark.parametrize("small", [noise_probe.SMALL, 0])
def test_gradients_may_change_in_place(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """As they do where workers average them: zeros here, which leave the noise of two parts of four examples."""
    monkeypatch.setattr(noise_probe, "SMALL", small)
    net: Any = tiny_net((WIDTH,), CLASSES).double()
    probe = noise_probe.NoiseProbe(net, SimpleNamespace(size=2, sum_=lambda t: 2 * t), "a test")
    batch = Blobs().train(0, 4)
    cross_entropy(net(batch.x), batch.y).backward()
    expected = sum(float(p.grad.square().sum()) for p in net.parameters())
    for p in net.parameters():
        p.grad.zero_()
    trace, _, _ = probe.measure(8)
    assert float(trace) == pytest.approx(8 * expected, rel=1e-12)


def test_two_workers(pair: Pair, tmp_path: Path) -> None:
    plan = NoiseScale().edit(baseline())
    check(pair.train(plan, tmp_path / "two").rows[0], offline(0, 6, 12))
    check(pair.train(plan, tmp_path / "four", micro_batch=3).rows[0], offline(0, 3, 6, 9, 12))
    uneven = NoiseScale().edit(baseline(batch=11))
    check(pair.train(uneven, tmp_path / "uneven", micro_batch=5).rows[0], offline(0, 5, 8, 11))


@pytest.mark.parametrize("first", [True, False])
def test_measured_before_clipping(first: bool, tmp_path: Path) -> None:
    methods = [NoiseScale(), GradientClipping(1e-3)]
    plan = baseline()
    for method in methods if first else methods[::-1]:
        plan = method.edit(plan)
    check(train(plan, tmp_path, micro_batch=6).rows[0], offline(0, 6, 12))


def test_rows_hold_means_over_their_window(tmp_path: Path) -> None:
    """So that the ratio of two columns is a ratio of means."""
    each = train(NoiseScale().edit(baseline()), tmp_path / "each", micro_batch=6).rows
    window = train(NoiseScale().edit(baseline()), tmp_path / "window", micro_batch=6, log_steps=4).rows
    mean = sum(row["train_noise_trace"] for row in each[1:4]) / 3
    assert window[1]["step"] == 4 and window[1]["train_noise_trace"] == pytest.approx(mean, rel=1e-12)


def test_one_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"add workers, or halve base\.micro_batch"):
        train(NoiseScale().edit(baseline()), tmp_path)
