"""Oracles of LAMB, worked out by hand from the published equations."""

from __future__ import annotations

from math import copysign, dist, hypot, sqrt

import pytest

from strategies.contract import Need, PlanError
from strategies.lamb import Lamb, LayerwiseAdam
from strategies.optimizers import AdamW
from tests.strategies.by_hand import Vectors, steps
from tests.strategies.cases import with_adamw
from tests.strategies.harness import baseline

G1, G2 = [0.6, 0.8], [-0.2, 0.4]
ADAMW = AdamW(0.9, 0.999, 1e-6, 0.01)


@pytest.mark.parametrize(
    ("corrected", "first", "second"),
    [
        (True, [2.6481587763, 3.6447426942], [2.4665369624, 3.2324534040]),
        (False, [2.6470022711, 3.6458918197], [2.4683138268, 3.2322954926]),
    ],
)
def test_two_steps_by_hand(corrected: bool, first: list[float], second: list[float]) -> None:
    path = steps(LayerwiseAdam(ADAMW, True, corrected, None), [G1, G2], [0.1, 0.1], Vectors())
    assert path[0] == pytest.approx(first, abs=1e-10)
    assert path[1] == pytest.approx(second, abs=1e-10)


@pytest.mark.parametrize(
    ("corrected", "first", "second"),
    [(True, 3.4159397381, 4.2564360655), (False, 1.1058441535, 1.0345852758)],
)
def test_ratios_by_hand(corrected: bool, first: float, second: float) -> None:
    """r is what the step is longer than with r = 1, as a limit on r of the same size shows by changing nothing."""
    free = steps(LayerwiseAdam(ADAMW, True, corrected, None), [G1, G2], [0.1, 0.1], Vectors())
    at = steps(LayerwiseAdam(ADAMW, True, corrected, max(first, second) + 1e-9), [G1, G2], [0.1, 0.1], Vectors())
    plain = steps(LayerwiseAdam(ADAMW, False, corrected, None), [G1], [0.1], Vectors())
    assert free == at
    assert dist(free[0], [3, 4]) / dist(plain[0], [3, 4]) == pytest.approx(first, abs=1e-9)
    assert dist(free[1], free[0]) == pytest.approx(0.1 * hypot(*free[0]), abs=1e-12)  # |r u| = |w|
    below = steps(LayerwiseAdam(ADAMW, True, corrected, second - 1e-3), [G1, G2], [0.1, 0.1], Vectors())
    assert below[1] != free[1]


def test_first_step_without_decay_and_eps() -> None:
    """|dw_i| = rate |w| / sqrt(d) for every coordinate, against the sign of the gradient."""
    path = steps(LayerwiseAdam(AdamW(0.9, 0.999, 1e-300, 0.0), True, True, None), [G1], [0.1], Vectors())
    assert path[0] == pytest.approx([2.64644661, 3.64644661], abs=1e-8)
    w, g = [1.0, -2.0, 2.0, 4.0], [0.3, -1e-3, 5.0, -0.2]
    net = Vectors(w, w)
    moved = steps(LayerwiseAdam(AdamW(0.9, 0.999, 1e-300, 0.0), True, True, None), [g], [0.1], net)[0]
    assert moved == pytest.approx([a - copysign(0.1 * 5 / sqrt(4), b) for a, b in zip(w, g, strict=True)], abs=1e-14)


def test_ratio_limit() -> None:
    """A limit far below every ratio takes its place: the step is the limit times AdamW's."""
    free = steps(LayerwiseAdam(ADAMW, False, True, None), [G1], [0.1], Vectors())[0]
    limited = steps(LayerwiseAdam(ADAMW, True, True, 0.5), [G1], [0.1], Vectors())[0]
    assert [3 - limited[0], 4 - limited[1]] == pytest.approx([(3 - free[0]) / 2, (4 - free[1]) / 2], abs=1e-14)


def test_biases_take_adamws_steps_without_decay() -> None:
    net = Vectors()
    steps(LayerwiseAdam(ADAMW, True, True, None), [G1], [0.1], net)
    assert net.b.tolist() == pytest.approx([0.9, 1.9], abs=1e-6)


def test_a_layer_of_zeros_moves() -> None:
    path = steps(LayerwiseAdam(ADAMW, True, True, None), [G1], [0.1], Vectors([0.0, 0.0]))
    assert path[0] == pytest.approx([-0.1, -0.1], abs=1e-6)


def test_needs_whole_layers_and_adamw() -> None:
    assert Need.LAYER_GRADS in Lamb().edit(with_adamw(baseline())).needs
    with pytest.raises(
        PlanError, match=r"lamb scales the steps of AdamW, but the optimizer is Sgd\(.*`optimizer: adamw`"
    ):
        Lamb().edit(baseline())
    with pytest.raises(PlanError, match="Lamb: clip is 0, expected > 0"):
        Lamb(clip=0)
