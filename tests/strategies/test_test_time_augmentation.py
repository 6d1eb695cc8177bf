"""Oracles of test-time augmentation: the views by hand, and what is averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.evaluate import evaluate
from strategies import test_time_augmentation as views
from strategies.contract import Phase, PlanError, View
from tests.strategies.harness import IMAGES, Blobs, baseline, train
from tests.strategies.test_backprop import worker

IMAGE = torch.arange(1.0, 10.0).view(1, 1, 3, 3)  # 1 2 3 / 4 5 6 / 7 8 9


def of(mirror: bool, shift: int) -> tuple[View, ...]:
    return views.TestTimeAugmentation(mirror, shift).edit(baseline()).phases[0].views


def test_views_by_hand() -> None:
    """Up and left by one: 5 stands first, and the row and column behind 9 repeat those before it."""
    up, down = [[5, 6, 5], [8, 9, 8], [5, 6, 5]], [[5, 4, 5], [2, 1, 2], [5, 4, 5]]
    expected = [([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 0.5), (up, 0.25), (down, 0.25)]
    assert [(v.change(IMAGE)[0, 0].tolist(), v.weight) for v in of(False, 1)] == expected
    both = [(v.change(IMAGE)[0, 0].tolist(), v.weight) for v in of(True, 1)]
    assert both[::2] == [(image, weight / 2) for image, weight in expected]
    assert both[1::2] == [([row[::-1] for row in image], weight / 2) for image, weight in expected]


@pytest.mark.parametrize(("mirror", "shift", "count"), [(False, 0, 1), (True, 0, 2), (False, 2, 3), (True, 2, 6)])
def test_weights_add_up_to_one(mirror: bool, shift: int, count: int) -> None:
    assert len(of(mirror, shift)) == count and sum(v.weight for v in of(mirror, shift)) == 1.0


def first_and_last(x: torch.Tensor) -> torch.Tensor:
    """(n, 1, 2, 3) -> (n, 3) logits that a mirror changes."""
    return torch.stack([x[:, 0, 0, 0], 2 * x[:, 0, 1, 2] ** 2, x[:, 0, 0, 1]], 1)


class Fixed:
    """A learner with `first_and_last` for a network."""

    def predict(self, state: object, x: torch.Tensor) -> torch.Tensor:
        return first_and_last(x)


def test_logits_are_averaged_by_weight() -> None:
    data = Blobs(inputs=IMAGES)
    plain, mirrored = first_and_last(data.x[:31]), first_and_last(data.x[:31].flip(3))
    (base,) = baseline().phases
    for kept, logits in {
        (View(views.Look(0, False), 3.0), View(views.Look(0, True))): (3 * plain + mirrored) / 4,
        (View(views.Look(0, True), 0.5),): mirrored,
        (): plain,
    }.items():
        phase = Phase(name="a", epochs=1, batch=1, model=base.model, learner=Fixed(), views=kept)  # type: ignore[arg-type]
        found = evaluate(phase, None, None, data, worker())  # type: ignore[arg-type]
        expected = {name: float(value) / 31 for name, value in data.score(logits, data.y[:31]).items()}
        assert found == pytest.approx(expected, abs=1e-14)


def test_training_does_not_change_and_evaluation_does(tmp_path: Path) -> None:
    data = Blobs(inputs=IMAGES)
    plain = train(baseline(), tmp_path / "plain", data)
    acting = train(views.TestTimeAugmentation(shift=1).edit(baseline()), tmp_path / "acting", data)
    neutral = train(views.TestTimeAugmentation(mirror=False).edit(baseline()), tmp_path / "neutral", data)
    losses = [[(row["train_loss"], row.get("test_loss")) for row in t.rows] for t in (plain, acting, neutral)]
    assert losses[0] == losses[2] and [a for a, _ in losses[0]] == [a for a, _ in losses[1]]
    assert all(a != b for (_, a), (_, b) in zip(losses[0], losses[1], strict=True) if a is not None)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"needs images of more than 0 pixels a side, the data have shape \(6,\)"):
        train(views.TestTimeAugmentation().edit(baseline()), tmp_path)
    with pytest.raises(PlanError, match=r"needs images of more than 2 pixels a side, the data have shape \(1, 2, 3\)"):
        train(views.TestTimeAugmentation(shift=2).edit(baseline()), tmp_path / "b", Blobs(inputs=IMAGES))
    with pytest.raises(PlanError, match="phase 'train' has views already"):
        views.TestTimeAugmentation().edit(views.TestTimeAugmentation().edit(baseline()))
