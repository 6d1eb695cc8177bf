"""Oracles of LARS, worked out by hand from the published equations."""

from __future__ import annotations

import pytest
import torch

from strategies.contract import Need, PlanError
from strategies.lars import Lars, LayerwiseSgd
from strategies.optimizers import Sgd
from strategies.parts.trust_ratio import LarsOptimizer
from tests.strategies.by_hand import Vectors, steps
from tests.strategies.cases import with_adamw
from tests.strategies.harness import baseline

G1, G2 = [0.8, -0.6], [0.5, 0.1]
SGD = Sgd(momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize(
    ("rate_inside", "second"),
    [(True, [2.9899579432, 4.0051691704]), (False, [2.9917568210, 4.0038270258])],
)
def test_two_steps_by_hand(rate_inside: bool, second: list[float]) -> None:
    """The forms differ once the rate has: 1, then 0.5."""
    path = steps(LayerwiseSgd(SGD, 1e-3, rate_inside), [G1, G2], [1.0, 0.5], Vectors())
    assert path[0] == pytest.approx([2.9960024938, 4.0029825436], abs=1e-10)
    assert path[1] == pytest.approx(second, abs=1e-10)


def test_local_rates_by_hand() -> None:
    """local = 0.004987531172069826, then 0.009757945015937153: read off steps without momentum and bare of the decay."""
    net = Vectors()
    first = steps(LayerwiseSgd(Sgd(0.0, weight_decay=5e-4), 1e-3, True), [G1], [1.0], net)[0]
    assert (3 - first[0]) / (0.8 + 5e-4 * 3) == pytest.approx(0.004987531172069826, abs=1e-15)
    w = torch.tensor(first, dtype=torch.float64)
    second = steps(LayerwiseSgd(Sgd(0.0, weight_decay=5e-4), 1e-3, True), [G2], [1.0], Vectors(first))[0]
    assert float((w[0] - second[0]) / (0.5 + 5e-4 * w[0])) == pytest.approx(0.009757945015937153, abs=1e-13)


@pytest.mark.parametrize("rate_inside", [True, False])
def test_both_forms_agree_while_the_rate_is_constant(rate_inside: bool) -> None:
    path = steps(LayerwiseSgd(SGD, 1e-3, rate_inside), [G1, G2] * 5, [0.7] * 10, Vectors())
    assert path[-1] == pytest.approx(
        steps(LayerwiseSgd(SGD, 1e-3, True), [G1, G2] * 5, [0.7] * 10, Vectors())[-1], abs=1e-14
    )


def test_absorbed_form_with_its_correction_is_torchs() -> None:
    """With an LR drop, v <- m (rate' / rate) v + rate' g follows torch's form; without the correction it does not."""
    rates, plain = [1.0, 1.0, 0.1, 0.1], Sgd(momentum=0.9)
    torchs = steps(LayerwiseSgd(plain, 0.0, False), [G1, G2] * 2, rates, Vectors())[-1]
    absorbed = steps(LayerwiseSgd(plain, 0.0, True), [G1, G2] * 2, rates, Vectors())[-1]
    w, v, previous = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 1.0
    for gradient, rate in zip([G1, G2] * 2, rates, strict=True):
        v = 0.9 * (rate / previous) * v + rate * torch.tensor(gradient, dtype=torch.float64)
        w, previous = w - v, rate
    assert torchs == pytest.approx(w.tolist(), abs=1e-12)
    assert abs(absorbed[0] - torchs[0]) > 0.1


def test_without_decay_the_scale_of_the_gradient_is_nothing_and_that_of_the_weights_all() -> None:
    lars = LayerwiseSgd(Sgd(momentum=0.9), 1e-3, True)
    path = steps(lars, [G1, G2], [1.0, 0.5], Vectors())
    louder = steps(lars, [[7 * g for g in G] for G in (G1, G2)], [1.0, 0.5], Vectors())
    larger = steps(lars, [G1, G2], [1.0, 0.5], Vectors([21.0, 28.0]))
    for step in range(2):
        assert louder[step] == pytest.approx(path[step], abs=1e-14)
        assert larger[step] == pytest.approx([7 * w for w in path[step]], abs=1e-13)


def test_with_decay_a_wrong_scale_of_the_gradient_shows() -> None:
    lars = LayerwiseSgd(SGD, 1e-3, True)
    halved = steps(lars, [[g / 2 for g in G1]], [1.0], Vectors())[0]
    assert abs(halved[0] - 2.9960024938) > 1e-6


def test_biases_take_plain_steps() -> None:
    net = Vectors()
    steps(LayerwiseSgd(SGD, 1e-3, True), [G1], [0.5], net)
    assert net.b.tolist() == pytest.approx([1.0 - 0.4, 2.0 + 0.3], abs=1e-15)


def test_a_layer_of_zeros_moves_and_a_layer_without_gradient_decays() -> None:
    assert steps(LayerwiseSgd(SGD, 1e-3, True), [G1], [0.5], Vectors([0.0, 0.0]))[0] == pytest.approx([-0.4, 0.3])
    still = steps(LayerwiseSgd(SGD, 1e-3, True), [[0.0, 0.0]], [0.5], Vectors())[0]
    assert still == pytest.approx([3 * (1 - 0.5 * 5e-4), 4 * (1 - 0.5 * 5e-4)], abs=1e-15)


def test_each_layer_has_its_own_ratio() -> None:
    """Not one norm over a flat bucket."""
    one, other = (torch.nn.Parameter(torch.full((1, 2), v, dtype=torch.float64)) for v in (3.0, 300.0))
    made = LarsOptimizer([{"params": [one, other], "decay": 0.0, "trust": 0.01}], 0.0, False, True)
    for p in (one, other):
        p.grad = torch.ones_like(p)
    made.param_groups[0]["lr"] = 1.0
    made.step()
    assert one.tolist()[0] == pytest.approx([2.97, 2.97], abs=1e-14)
    assert other.tolist()[0] == pytest.approx([297.0, 297.0], abs=1e-12)


def test_norms_are_over_whole_layers() -> None:
    assert Need.LAYER_GRADS in Lars().edit(baseline()).needs


def test_needs_sgd() -> None:
    with pytest.raises(
        PlanError, match=r"lars scales the steps of SGD, but the optimizer is AdamW\(.*`optimizer: sgd`"
    ):
        Lars().edit(with_adamw(baseline()))
