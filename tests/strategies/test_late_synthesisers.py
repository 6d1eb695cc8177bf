"""Synthesisers that learn late, from a queue, and those that guess the inputs of modules; in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.decoupled.synthetic import Guess, Share
from strategies.decoupled.waiting import Pair as Waited
from strategies.decoupled.waiting import Waiting
from strategies.synthetic_gradient import SyntheticGradient
from tests.strategies.cases import with_stages
from tests.strategies.cut_nets import IMAGES, WIDTH, Rig, cnn, mlp, random_batch
from tests.strategies.harness import Blobs, Pair, baseline, distance, train


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
