"""Collectives, stragglers and overlap against hand-worked and tabulated numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from orchestrator.predict.collectives import FLAT, Wire, hierarchical, lower_bound, ring
from orchestrator.predict.hardware import Hardware, Link, Node
from orchestrator.predict.step_time import MIB, Compute, Load, bucket_sizes, ends, exposed, step_seconds
from orchestrator.predict.stragglers import delay, expected_largest

WIRE = Wire(latency=20e-6, bandwidth=10e9)
SIZE = 100e6  # bytes

# ------------------------------------------------------------------------------------------------------------ collectives

MILLISECONDS = {
    2: {"ring": 10.040, "halving_doubling": 10.040},
    8: {"ring": 17.780, "halving_doubling": 17.620, "tree": 20.120, "torus": 17.660},
    64: {"ring": 22.208, "halving_doubling": 19.928, "tree": 20.240, "torus": 20.248},
    1024: {"ring": 60.900, "halving_doubling": 20.380, "tree": 20.400, "torus": 22.460},
}
CASES = [(ranks, name, value) for ranks, row in MILLISECONDS.items() for name, value in row.items()]


@pytest.mark.parametrize(("ranks", "name", "milliseconds"), CASES)
def test_all_reduce_of_100_megabytes(ranks, name, milliseconds):
    assert FLAT[name](SIZE, ranks, WIRE) * 1e3 == pytest.approx(milliseconds, abs=0.00051)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 7, 8, 100, 1024])
def test_no_algorithm_beats_the_lower_bound(name, ranks):
    seconds = FLAT[name](SIZE, ranks, WIRE)
    assert seconds >= lower_bound(SIZE, ranks, WIRE) * (1 - 1e-12)
    assert (seconds == 0) == (ranks == 1)


@pytest.mark.parametrize("ranks", [2, 3, 5, 7, 31])
def test_torus_of_one_row_is_a_ring(ranks):
    assert FLAT["torus"](SIZE, ranks, WIRE) == pytest.approx(ring(SIZE, ranks, WIRE), rel=1e-14)


def test_halving_doubling_beyond_a_power_of_two_hands_in_and_gets_back():
    there_and_back = 2 * (20e-6 + 0.01)
    assert FLAT["halving_doubling"](SIZE, 11, WIRE) == pytest.approx(0.01762 + there_and_back, rel=1e-12)


def test_fastest_is_latency_bound_for_small_vectors_and_bandwidth_bound_for_large_ones():
    assert FLAT["fastest"](8, 1024, WIRE) == pytest.approx(20 * 20e-6, rel=1e-3)
    assert FLAT["fastest"](SIZE, 3, WIRE) == ring(SIZE, 3, WIRE)


def test_hierarchical_by_hand():
    inner = Wire(latency=2e-6, bandwidth=100e9)
    within = 2 * 7 * 2e-6 + 2 * 7 / 8 * 1e-3  # reduce-scatter and all-gather of 100 MB over 8 workers
    across = 2 * 3 * 20e-6 + 2 * 7 / 8 * 12.5e6 / 10e9  # 12.5 MB over 8 nodes, halving and doubling
    assert hierarchical(SIZE, 64, inner, 8, WIRE) == pytest.approx(within + across, rel=1e-12)
    assert hierarchical(SIZE, 57, inner, 8, WIRE) == hierarchical(SIZE, 64, inner, 8, WIRE)
    assert hierarchical(SIZE, 8, inner, 8, WIRE) == pytest.approx(ring(SIZE, 8, inner), rel=1e-14)
    assert hierarchical(SIZE, 64, WIRE, 1, WIRE) == FLAT["fastest"](SIZE, 64, WIRE)


def test_hardware_takes_the_link_within_a_node_as_long_as_that_is_enough():
    node = Node(workers=8, latency=2e-6, bandwidth=100e9)
    hardware = Hardware(name="h", network=Link(latency=20e-6, bandwidth=10e9), node=node, algorithm="hierarchical")
    assert hardware.all_reduce(SIZE, 8) == pytest.approx(2 * 3 * 2e-6 + 2 * 7 / 8 * 1e-3, rel=1e-12)
    in_nodes, between_two = 2 * 7 * 2e-6 + 2 * 7 / 8 * 1e-3, 2 * 20e-6 + 12.5e6 / 10e9
    assert hardware.all_reduce(SIZE, 9) == pytest.approx(in_nodes + between_two, rel=1e-12)
    flat = hardware.model_copy(update={"algorithm": "ring", "reduction": 1e-10})
    assert flat.all_reduce(SIZE, 64) == pytest.approx(0.022208 + SIZE * 63 / 64 * 1e-10, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- stragglers

LARGEST = {2: 0.5642, 4: 1.0294, 8: 1.4236, 16: 1.7660, 64: 2.3437, 256: 2.8269, 1024: 3.2482, 2048: 3.4418}


@pytest.mark.parametrize("workers", LARGEST)
def test_slowest_of_many(workers):
    assert delay(workers) == pytest.approx(LARGEST[workers], abs=0.000_06)


@pytest.mark.parametrize("workers", [w for w in LARGEST if w >= 4])
def test_slowest_of_many_by_bloms_approximation(workers):
    assert delay(workers) == pytest.approx(float(ndtri((workers - 0.375) / (workers + 0.25))), abs=0.02)


@pytest.mark.parametrize(("workers", "excess"), [(8, 0.43), (2048, 0.13)])
def test_the_root_of_two_ln_p_overstates(workers, excess):
    assert math.sqrt(2 * math.log(workers)) / delay(workers) - 1 == pytest.approx(excess, abs=0.006)


@pytest.mark.parametrize("workers", [2, 8, 64])
def test_slowest_of_log_normal_times_as_simulated(workers):
    simulated = np.exp(0.3 * np.random.default_rng(0).standard_normal((20_000, workers))).max(1).mean()
    assert expected_largest(workers, lambda z: np.exp(0.3 * z)) == pytest.approx(simulated, rel=0.02)


def test_two_workers_exactly_and_very_many():
    assert delay(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-12)
    assert delay(1) == 0
    assert expected_largest(10**9, np.ones_like) == pytest.approx(1, abs=1e-9)


def test_identical_workers_do_not_wait():
    free = Hardware(name="free", network=Link(latency=0, bandwidth=1e30), jitter=0)
    compute = Compute(0.01, 0.001)
    assert step_seconds(compute, free, 4_000_000, Load(1024, 8, 1)) == pytest.approx(0.018, rel=1e-12)
    late = free.model_copy(update={"jitter": 0.1})
    assert step_seconds(compute, late, 4_000_000, Load(8, 8, 1)) == pytest.approx(0.018 * 1.14236, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize(("each", "end", "late"), [(12, 58, 18), (9, 49, 9), (0, 40, 0)])
def test_sums_hide_behind_the_backward_pass(each, end, late):
    ready = [10, 20, 30, 40]
    assert ends(ready, [each] * 4)[-1] == end
    assert exposed(ready, [each] * 4, 40) == late


def test_buckets_are_counted_in_mebibytes_and_bandwidth_in_bytes():
    assert MIB == 1024 * 1024
    assert bucket_sizes(60 * MIB) == (MIB, 25 * MIB, 25 * MIB, 9 * MIB)
    assert bucket_sizes(26 * MIB) == (MIB, 25 * MIB) and bucket_sizes(1000) == (1000,)
    assert sum(bucket_sizes(100_000_000)) == 100_000_000 and len(bucket_sizes(100_000_000)) == 5
    wire = Hardware(name="w", network=Link(latency=0, bandwidth=1e6), algorithm="ring")
    assert wire.all_reduce(1e6, 2) == 1.0  # a megabyte over a link of one megabyte per second
    assert wire.all_reduce(MIB, 2) == 1.048576


def test_step_by_hand():
    hardware = Hardware(name="w", network=Link(latency=0, bandwidth=26e6 * 1.048576), algorithm="ring", jitter=0)
    compute = Compute(per_pass=0.1, per_example=0.01, per_step=0.05, slowdown=0.5)
    # a pass of 0.3 s; backward 0.2 s; buckets of 1 and 25 MiB take 1/26 s and 25/26 s, ready at 0.2 / 26 s and 0.2 s
    late = 25 / 26
    expected = 0.05 + 0.3 + 0.3 + late + 0.5 * (1 - late)
    assert step_seconds(compute, hardware, 26 * MIB, Load(2, 40, 2)) == pytest.approx(expected, rel=1e-12)
    assert step_seconds(compute, hardware, 26 * MIB, Load(1, 40, 2)) == pytest.approx(0.65, rel=1e-12)


@given(
    gradient=st.integers(1, 200 * MIB),
    local=st.floats(0.1, 1000),
    workers=st.integers(2, 2048),
    slowdown=st.floats(0, 0.9),
    latency=st.floats(0, 0.1),
    slower=st.floats(1, 100),
    algorithm=st.sampled_from(sorted(FLAT)),
)
def test_a_step_takes_no_less_with_more_latency_or_less_bandwidth(
    gradient, local, workers, slowdown, latency, slower, algorithm
):
    def seconds(latency: float, bandwidth: float) -> float:
        hardware = Hardware(name="w", network=Link(latency=latency, bandwidth=bandwidth), algorithm=algorithm)
        return step_seconds(Compute(1e-3, 1e-4, 0, slowdown), hardware, gradient, Load(workers, local, 1))

    here = seconds(latency, 1e9) * (1 - 1e-12)
    assert seconds(latency * slower + (slower - 1), 1e9) >= here
    assert seconds(latency, 1e9 / slower) >= here


def test_more_workers_for_one_batch_end_in_latency():
    hardware = Hardware(name="w", network=Link(latency=1e-4, bandwidth=1e9), algorithm="fastest", jitter=0)
    seconds = [step_seconds(Compute(0, 1e-3), hardware, 4_000_000, Load(n, 4096 / n, 1)) for n in (2**6, 2**12, 2**40)]
    assert seconds[2] > seconds[1]  # workers beyond the batch only lengthen the way
    assert seconds[2] >= 2 * 40 * 1e-4  # messages of the last bucket
