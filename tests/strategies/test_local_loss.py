"""Local losses against training each module alone, and against similarities worked out by hand; in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.contract import Batch, Clock, ModelSpec, PlanError, State
from strategies.decoupled.auxiliary import Auxiliary, similarities
from strategies.decoupled.boundary import build
from strategies.decoupled.greedy import Greedy
from strategies.local_loss import LocalLoss
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate
from tests.strategies.cases import with_stages
from tests.strategies.harness import CLASSES, baseline, distance, train

RATE = 0.2


def mlp(inputs: tuple[int, ...], classes: int) -> Net:
    stages = [nn.Sequential(nn.Linear(size, out), nn.Tanh()) for size, out in ((inputs[0], 5), (5, 4), (4, 4))]
    return Net(stages, head=nn.Linear(4, classes))


def batch_of(step: int, n: int = 6) -> Batch:
    made = torch.Generator().manual_seed(100 + step)
    return Batch(torch.randn(n, 3, generator=made, dtype=torch.float64), torch.arange(n) % CLASSES, torch.arange(n))


def started(loss: Any, head: Any = "pooled") -> tuple[Greedy, State]:
    torch.manual_seed(0)
    net = build((3,), CLASSES, ModelSpec(mlp), None).double()
    usual: dict[str, Any] = {"optimizer": Sgd(momentum=0.9, weight_decay=1e-2), "rate": Rate(RATE)}
    learner = Greedy(**usual, loss=loss, head=head)
    return learner, learner.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))


def step(learner: Greedy, state: State, number: int) -> dict[str, Tensor]:
    batch = batch_of(number)
    return learner.step(state, [batch], Clock(number, 10, 0.0, 0.1, len(batch), 0))


def test_each_module_learns_as_if_alone() -> None:
    """Copies of a module and its head, trained by plain SGD on what the modules below make at that time."""
    learner, state = started("pred")
    parts, heads = state.live.parts, [helper.head for helper in state.live.helpers]
    alone = [nn.Sequential(copy.deepcopy(part), copy.deepcopy(head)) for part, head in zip(parts, heads, strict=False)]
    alone.append(nn.Sequential(copy.deepcopy(parts[-1])))
    optimizers = [
        torch.optim.SGD(
            [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 1e-2},
             {"params": [p for p in module.parameters() if p.ndim < 2]}], lr=RATE, momentum=0.9
        ) for module in alone
    ]  # fmt: skip
    for number in range(4):
        batch = batch_of(number)
        x, given = batch.x, []
        for module in alone:
            given.append(x)
            x = module[0](x).detach()
        for module, optimizer, features in zip(alone, optimizers, given, strict=True):
            nn.functional.cross_entropy(module(features), batch.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        step(learner, state, number)
    for part, module in zip(parts, alone, strict=True):
        for p, q in zip(part.parameters(), module[0].parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12)
    for head, module in zip(heads, alone, strict=False):
        assert torch.allclose(head[-1].weight, module[1][-1].weight, rtol=0, atol=1e-12)


def test_nothing_comes_back_from_above() -> None:
    (learner, state), (_, other) = started("pred"), started("pred")
    with torch.no_grad():
        for part in other.live.parts[1:]:
            for p in part.parameters():
                p.mul_(-3)
    step(learner, state, 0)
    step(learner, other, 0)
    first, second = (list(s.live.parts[0].parameters()) for s in (state, other))
    assert all(p.equal(q) for p, q in zip(first, second, strict=True))


def test_with_one_module_it_is_backpropagation(tmp_path: Path) -> None:
    base = with_stages(baseline(epochs=1))
    alone = LocalLoss(cuts=[], loss="predsim").edit(base)
    assert distance(train(alone, tmp_path / "alone"), train(base, tmp_path / "plain")) == 0


def test_without_a_loss_modules_below_the_last_stay() -> None:
    learner, state = started("none")
    before = [[p.detach().clone() for p in part.parameters()] for part in state.live.parts]
    for number in range(3):
        step(learner, state, number)
    stayed = [all(p.equal(q) for p, q in zip(part.parameters(), old, strict=True))
              for part, old in zip(state.live.parts, before, strict=True)]  # fmt: skip
    assert stayed == [True, True, False]


# ---------------------------------------------------------------------------------------------------------- similarity


def test_similarities_are_cosines_of_centred_rows() -> None:
    z = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, -1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    centred = z - z.mean(1, keepdim=True)
    for i in range(3):
        for j in range(3):
            a, b = centred[i].tolist(), centred[j].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            cosine = dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            assert similarities(z)[i, j].item() == pytest.approx(cosine, abs=1e-12)


def test_labels_are_alike_or_a_simplex_apart() -> None:
    """Centred one-hot vectors of 3 classes: cosine 1 within a class, -1/2 between classes."""
    found = similarities(torch.eye(3, dtype=torch.float64)[torch.tensor([0, 0, 2])])
    expected = torch.tensor([[1, 1, -0.5], [1, 1, -0.5], [-0.5, -0.5, 1]], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_features_that_tell_classes_apart_have_no_dissimilarity() -> None:
    helper = Auxiliary((3,), CLASSES, None, similar=True).double()
    helper.features = nn.Identity()
    y = torch.tensor([0, 1, 2, 1])
    perfect = torch.eye(3, dtype=torch.float64)[y]
    assert helper.dissimilarity(perfect, y).item() == pytest.approx(0, abs=1e-24)
    assert helper.dissimilarity(perfect, torch.tensor([0, 0, 2, 1])).item() == pytest.approx(2.25 * 4 / 16, abs=1e-12)


def test_maps_of_one_position_are_compared_by_their_values() -> None:
    """A single value has no standard deviation."""
    torch.manual_seed(0)
    helper = Auxiliary((8, 1, 1), CLASSES, None, similar=True).double()
    h, y = torch.randn(6, 8, 1, 1, dtype=torch.float64, requires_grad=True), torch.arange(6) % CLASSES
    loss = helper.dissimilarity(h, y)
    loss.backward()
    wanted = similarities(helper.features(h).flatten(1)) - similarities(torch.eye(CLASSES, dtype=torch.float64)[y])
    assert torch.allclose(loss, wanted.square().mean(), rtol=0, atol=1e-12)
    assert h.grad is not None and h.grad.isfinite().all() and h.grad.norm() > 0


def test_images_enter_by_their_standard_deviations() -> None:
    helper = Auxiliary((2, 2, 2), CLASSES, None, similar=True).double()
    helper.features = nn.Identity()
    h = torch.randn(4, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([0, 1, 2, 1])
    spread = h.flatten(2).var(2).sqrt()
    wanted = (similarities(spread) - similarities(nn.functional.one_hot(y, 3).double())).square().mean()
    assert helper.dissimilarity(h, y).item() == pytest.approx(float(wanted), abs=1e-12)


def test_predsim_is_a_hundredth_of_pred_and_the_rest_sim() -> None:
    """In the gradient of the first module, with the same heads."""
    gradients = {}
    for loss in ("predsim", "pred", "sim"):
        learner, state = started("predsim")
        learner = Greedy(optimizer=learner.optimizer, rate=learner.rate, loss=loss, head="pooled")  # type: ignore[arg-type]
        learner.exchange(state, batch_of(0), Clock(0, 10, 0.0, 0.1, 6, 0), 1.0)
        gradients[loss] = [p.grad for p in state.live.parts[0].parameters()]
    for both, pred, sim in zip(*gradients.values(), strict=True):
        assert torch.allclose(both, 0.01 * pred + 0.99 * sim, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- options and refusals


@pytest.mark.parametrize(("head", "images", "vectors"), [
    ("linear", 4 * 36 * 3 + 3, 4 * 3 + 3),
    ("pooled", 4 * 3 + 3, 4 * 3 + 3),
    ("deep", 3 * (16 + 4 + 8) + 2 * (16 * 16 + 16) + 16 * 3 + 3, 2 * (16 + 4) + 4 * 3 + 3),
])  # fmt: skip
def test_heads_have_these_parameters(head: Any, images: int, vectors: int) -> None:
    for shape, size in (((4, 6, 6), images), ((4,), vectors)):
        helper = Auxiliary(shape, CLASSES, head, similar=False)
        assert helper.head(torch.randn(5, *shape)).shape == (5, CLASSES)
        assert sum(p.numel() for p in helper.parameters()) == size


def test_losses_of_modules_are_told() -> None:
    learner, state = started("pred")
    batch = batch_of(0)
    with torch.no_grad():
        h = state.live.parts[0](batch.x)
        expected = nn.functional.cross_entropy(state.live.helpers[0].head(h), batch.y)
    metrics = step(learner, state, 0)
    assert metrics["loss_1"].item() == pytest.approx(float(expected), abs=1e-12)
    assert metrics.keys() == {"loss", "loss_1", "loss_2"}


@pytest.mark.parametrize("loss", ["sim", "none"])
def test_a_head_without_logits_is_refused(loss: Any) -> None:
    with pytest.raises(PlanError, match="leave out `head`"):
        LocalLoss(loss=loss, head="linear")
