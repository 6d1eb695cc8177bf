"""The order of examples: a pure function of (seed, epoch, position), whatever the number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.workloads.order import indices, micro, share

N = 60  # the three data set sizes below are one less, equal to, and one more than five batches of 12


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [N - 1, N, N + 1])
def test_every_world_size_sees_the_same_examples_in_the_same_steps(n: int, world: int) -> None:
    batch, steps = 12, 11  # two epochs and more
    for step in range(steps):
        start, stop = step * batch, (step + 1) * batch
        shares = [share(start, stop, rank, world) for rank in range(world)]
        seen = np.concatenate([indices(3, a, b, n) for a, b in shares])
        assert np.array_equal(seen, indices(3, start, stop, n))
        assert len(seen) == batch


@pytest.mark.parametrize("n", [N - 1, N, N + 1])
def test_an_epoch_holds_every_example_once(n: int) -> None:
    for epoch in range(3):
        assert sorted(indices(0, epoch * n, (epoch + 1) * n, n)) == list(range(n))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    first = indices(0, 0, N, N)
    assert not np.array_equal(first, indices(1, 0, N, N))
    assert not np.array_equal(first, indices(0, N, 2 * N, N))
    assert np.array_equal(first, indices(0, 0, N, N))  # asked again after others
    assert first.dtype == np.int64


def test_a_batch_may_span_several_epochs() -> None:
    whole = indices(5, 0, 4 * N, N)
    assert np.array_equal(indices(5, 7, 3 * N + 5, N), whole[7 : 3 * N + 5])
    assert len(indices(5, 7, 7, N)) == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [7, 8, 9, 60, 61])
def test_shares_are_contiguous_and_differ_by_one_at_most(length: int, world: int) -> None:
    shares = [share(100, 100 + length, rank, world) for rank in range(world)]
    assert [a for a, _ in shares[1:]] == [b for _, b in shares[:-1]]
    assert (shares[0][0], shares[-1][1]) == (100, 100 + length)
    sizes = [b - a for a, b in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("length", "limit", "sizes"), [(9, 4, [3, 3, 3]), (8, 4, [4, 4]), (5, 4, [2, 3]), (3, 8, [3]), (0, 4, [])]
)
def test_micro_batches_are_few_and_even(length: int, limit: int, sizes: list[int]) -> None:
    pieces = micro(10, 10 + length, limit)
    assert [b - a for a, b in pieces] == sizes
    assert [i for a, b in pieces for i in range(a, b)] == list(range(10, 10 + length))
