"""Forecasts from studies whose truth is known: fitted on what was measured, compared with what was not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.batch_law.backtest import REFUSED_BEYOND, predictions, table
from orchestrator.batch_law.fit import locate, trials
from orchestrator.batch_law.law import Law
from orchestrator.batch_law.table import read
from orchestrator.files import Damaged
from orchestrator.predict.calibrate import Calibration, calibrate
from orchestrator.predict.forecast import Forecast, default_batches, forecast
from orchestrator.predict.hardware import PRESETS, Hardware, Link
from orchestrator.predict.measured import measured, summaries
from orchestrator.predict.step_time import Compute, step_seconds
from orchestrator.predict.steps import Steps, steps_of
from orchestrator.predict.uncertainty import DOWN, PER_FOURFOLD, UP, law_error, scale_error
from tests.orchestrator.batch_law_curves import PUBLIC
from tests.orchestrator.predict_studies import BATCHES, COMPUTE, LAW, NETWORK, PARAMETERS, step_of, study

FREE = Hardware(name="free", network=Link(latency=0, bandwidth=1e30), jitter=0)


def known(*paths: Path, arm: str = "sgd") -> tuple[Steps, Calibration]:
    found = summaries(paths)
    return steps_of(found[0].points(arm), "here"), calibrate(measured(found, arm))


def truth(workers: int, batch: int, law: Law = LAW, network: Hardware = NETWORK) -> float:
    return law.steps(batch) * step_seconds(COMPUTE, network, 4 * PARAMETERS, step_of(workers, batch))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, Calibration]:
    return known(study(tmp_path_factory.mktemp("alone") / "study"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Steps, Calibration]:
    folder = tmp_path_factory.mktemp("both")
    return known(study(folder / "one"), study(folder / "two", workers=2))


def seconds(made: Forecast) -> list[float]:
    return [row.seconds.value for row in made.rows]


# --------------------------------------------------------------------------------------------------------- backtests


def test_one_worker_and_the_network_predict_two(alone):
    made = forecast(*alone, NETWORK, [2], BATCHES)
    for row in made.rows:
        actual = truth(2, row.batch)
        assert row.seconds.low < actual < row.seconds.high and row.uncalibrated
        assert row.seconds.value == pytest.approx(actual, rel=0.03)  # noise is 1 %


def test_one_worker_predicts_far_beyond_what_was_measured(alone):
    made = forecast(*alone, NETWORK, [8, 64], [2048, 16384])
    assert all(row.seconds.low < truth(row.load.workers, row.batch) < row.seconds.high for row in made.rows[:3])
    assert made.rows[3].load.passes == 1 and made.rows[1].load.passes == 2  # no micro-batch above the measured 1024


@pytest.mark.parametrize("workers", [1, 2])
def test_measured_points_are_predicted_within_the_interval(both, workers):
    made = forecast(*both, None, [workers], BATCHES)
    for row in made.rows:
        assert not row.uncalibrated
        assert row.seconds.low < truth(workers, row.batch) < row.seconds.high < 1.25 * row.seconds.low
        (cell,) = (c for c in both[1].measured.cells if c.load == row.load)
        assert row.step_seconds.low < cell.seconds < row.step_seconds.high


def test_intervals_cover_the_trials_of_a_noisy_study(tmp_path):
    steps, calibration = known(study(tmp_path / "noisy", noise=0.15, seeds=1))
    made = forecast(steps, calibration, None, [1], BATCHES)
    cells = {cell.load: cell.seconds for cell in calibration.measured.cells}
    covered = [row.step_seconds.low < cells[row.load] < row.step_seconds.high for row in made.rows]
    assert sum(covered) >= len(covered) - 1
    assert made.rows[0].step_seconds.high > 1.2 * made.rows[0].step_seconds.low


# ---------------------------------------------------------------------------------------------------------- the fit


def test_parameters_come_back_from_exact_step_times(tmp_path):
    calibration = known(study(tmp_path / "exact", noise=0))[1]
    assert calibration.fitted == ("per_pass", "per_example")
    assert calibration.compute.per_pass == pytest.approx(COMPUTE.per_pass, rel=1e-6)
    assert calibration.compute.per_example == pytest.approx(COMPUTE.per_example, rel=1e-6)
    assert calibration.own == PRESETS["loopback"] and calibration.backtest is None


def test_accumulation_tells_the_optimizer_from_the_passes(tmp_path):
    compute = Compute(per_pass=0.004, per_example=0.0002, per_step=0.01)
    calibration = known(study(tmp_path / "accumulated", noise=0, micro_batch=128, compute=compute))[1]
    assert calibration.fitted == ("per_pass", "per_example", "per_step")
    assert calibration.compute.per_step == pytest.approx(0.01, rel=1e-6)
    assert calibration.compute.per_pass == pytest.approx(0.004, rel=1e-6)
    assert calibration.measured.largest_micro_batch == 128


def test_two_studies_give_bandwidth_and_slow_down(tmp_path):
    own = PRESETS["loopback"].model_copy(update={"network": Link(latency=5e-5, bandwidth=3e8)})
    compute = Compute(per_pass=0.004, per_example=0.002, slowdown=0.2)
    folders = [study(tmp_path / str(n), n, noise=0, network=own, compute=compute) for n in (1, 2)]
    calibration = known(*folders)[1]
    assert calibration.fitted == ("per_pass", "per_example", "seconds_per_byte", "slowdown")
    assert calibration.own.network.bandwidth == pytest.approx(3e8, rel=1e-4)
    assert calibration.compute.slowdown == pytest.approx(0.2, rel=1e-3)
    assert calibration.backtest is not None and calibration.backtest > 0.1  # the preset network is faster than this one


def test_parameters_are_as_uncertain_as_their_draws_say(tmp_path):
    """The spread of the estimate over repeated studies, against that of the draws from each of them."""
    folders = (study(tmp_path / str(i), seeds=1, noise=0.05, draw=i) for i in range(30))
    found = [calibrate(measured(summaries([folder]), "sgd")) for folder in folders]
    for name in ("per_pass", "per_example"):
        spread = np.std([getattr(one.compute, name) for one in found])
        drawn = np.mean([np.std([getattr(compute, name) for compute, _ in one.draws]) for one in found])
        assert 0.7 < drawn / spread < 1.4


def test_no_draw_of_a_step_takes_no_time(tmp_path):
    """However much step times scatter: some draws have both a pass and an example at 0."""
    steps, calibration = known(study(tmp_path / "wild", seeds=1, noise=0.05, draw=1), study(tmp_path / "two", 2))
    wild = replace(
        calibration.measured,
        cells=tuple(
            replace(cell, trials=(cell.seconds * 10 ** (i % 3),)) for i, cell in enumerate(calibration.measured.cells)
        ),
    )
    made = forecast(steps, calibrate(wild), None, [1, 2], BATCHES)
    assert all(0 < row.seconds.low < row.seconds.high < math.inf for row in made.rows)


def test_accumulation_without_one_worker_tells_traffic_of_a_step_from_the_passes(tmp_path):
    calibration = known(study(tmp_path / "two", workers=2, noise=0, micro_batch=64))[1]
    assert not calibration.told_apart and calibration.fitted == ("per_pass", "per_example", "per_step")
    assert calibration.compute.one_pass(64) == pytest.approx(COMPUTE.one_pass(64), rel=0.05)


def test_reused_trials_and_schedules_of_batch_sizes_have_no_step_time(tmp_path):
    path = study(tmp_path / "mixed", noise=0)
    others = study(tmp_path / "reused", noise=0, examples_per_second=1.0, reused=True)
    grown = study(tmp_path / "grown", noise=0, examples_per_second=1.0, examples=12_345)
    assert known(path, others, grown)[1].compute.per_example == pytest.approx(COMPUTE.per_example, rel=1e-6)
    with pytest.raises(Damaged, match="no trial of arm 'sgd' has a step time of its own"):
        known(others)


def test_modules_on_workers_of_their_own_are_not_predicted(tmp_path):
    """Each worker has one module of the network, and the examples of its replica."""
    with pytest.raises(Damaged, match="arm 'sgd' has modules on workers of their own"):
        known(study(tmp_path / "modules", workers=2, roles=2))


@pytest.mark.parametrize(("name", "value"), [("device", "NVIDIA H200"), ("parameters", 7), ("precision", "bf16")])
def test_studies_of_different_kinds_are_not_mixed(tmp_path, name, value):
    one, other = study(tmp_path / "one"), study(tmp_path / "other", **{name: value})
    with pytest.raises(Damaged, match=f"trials of different {name}"):
        known(one, other)


def test_one_local_batch_size_is_too_few(tmp_path):
    with pytest.raises(Damaged, match="step times of one local batch size"):
        known(study(tmp_path / "one", micro_batch=16, batches=(16, 32, 64)))


# ------------------------------------------------------------------------------------------------------------ properties


def test_forecasts_rise_with_latency_and_fall_with_bandwidth(alone):
    def made(latency: float, bandwidth: float) -> Sequence[float]:
        network = Hardware(name="n", network=Link(latency=latency, bandwidth=bandwidth))
        return seconds(forecast(*alone, network, [2, 64], [256, 4096]))

    middle = made(1e-4, 1e9)
    assert all(a >= b for a, b in zip(made(1e-3, 1e9), middle, strict=True)) and made(1e-3, 1e9) != middle
    assert all(a >= b for a, b in zip(made(1e-4, 1e8), middle, strict=True)) and made(1e-4, 1e8) != middle


def test_without_communication_and_far_below_the_critical_batch_size_time_falls_as_one_over_workers(tmp_path):
    law = Law(steps_min=4, critical=1e6)
    steps, calibration = known(study(tmp_path / "far", law=law, noise=0))
    assert not steps.estimate.identified
    scaled = [forecast(steps, calibration, FREE, [n], [32 * n]).rows[0].seconds.value for n in (1, 2, 4, 8, 16, 32)]
    assert scaled == pytest.approx([scaled[0] / n for n in (1, 2, 4, 8, 16, 32)], rel=0.05)


def test_many_workers_for_one_batch_are_bounded_below_by_latency(alone):
    row = forecast(*alone, NETWORK, [16384], [16384]).rows[0]
    assert row.seconds.value > row.steps.value * 2 * 16383 * NETWORK.network.latency


def test_speed_up_is_the_ratio_of_times_at_one_local_batch_size(alone):
    steps, _ = alone
    made = forecast(*alone, FREE, [1, 8], [32, 256])
    rows = {(r.load.workers, r.batch): r for r in made.rows}
    eight, one = rows[8, 256], rows[1, 32]
    assert eight.load.local_batch == one.load.local_batch == 32 and eight.hardware == pytest.approx(1)
    assert eight.speed_up == pytest.approx(one.seconds.value / eight.seconds.value, rel=1e-9)
    assert eight.statistical == pytest.approx(steps.law.examples(32) / steps.law.examples(256))


def test_three_optima(alone):
    made = forecast(*alone, NETWORK, [1, 4, 16, 64], None)
    best = made.optima
    cheapest, times = best["cheapest"].device_hours.value, seconds(made)
    assert best["fastest"].seconds.value == min(times)
    assert cheapest == min(r.device_hours.value for r in made.rows)
    near = best["fastest within 1.2x of cheapest"]
    assert near.device_hours.value <= 1.2 * cheapest
    assert not [r for r in made.rows if r.device_hours.value <= 1.2 * cheapest and r.seconds.value < near.seconds.value]


# -------------------------------------------------------------------------------------------------------- uncertainty


def test_errors_beyond_are_those_that_published_curves_show():
    """The table holds ten curves, the file eight of them: 90th percentiles agree within 0.03 up to 4 times the distance."""
    every = [one for curve in read(PUBLIC) for one in predictions(locate(trials(curve.points)))]
    found = {(row.up, row.farthest): row.ninetieth for row in table(every)}
    for up, published in ((True, UP), (False, DOWN)):
        for farthest, error in zip((2, 4), published, strict=False):
            assert error == pytest.approx(found[up, farthest], abs=0.03)
        for farthest, error in zip((16, math.inf), published[2:], strict=True):
            assert error >= found[up, farthest] - 0.005  # few pairs: never below what is seen


def test_intervals_contain_the_backtested_error(alone):
    made = forecast(*alone, NETWORK, [1], [1024, 2048, 4096, 16384])
    for row, error in zip(made.rows, (0, *UP[:3]), strict=True):
        assert math.log(row.steps.high / row.steps.value) >= error
        assert math.log(row.seconds.value / row.seconds.low) >= error


def test_classes_of_distance():
    assert [law_error(b, 32, 1024) for b in (32, 1024, 1025, 2048, 4096, 16384, 16385)] == [0, 0, *UP[:1] * 2, *UP[1:]]
    assert [law_error(b, 32, 1024) for b in (31, 16, 8, 2, 1)] == [*DOWN[:1] * 2, *DOWN[1:]]


def test_unmeasured_numbers_of_workers_widen_by_half_per_fourfold(both):
    assert math.exp(PER_FOURFOLD) == pytest.approx(1.5)
    assert [scale_error(n, 2) for n in (1, 2)] == [0, 0] and scale_error(32, 2) == pytest.approx(2 * math.log(1.5))
    near, far = (forecast(*both, None, [n], [1024]).rows[0].step_seconds for n in (2, 512))
    assert far.high / far.low > (near.high / near.low) * 1.5**7.9


def test_beyond_sixteen_times_the_largest_batch_size_only_by_force(alone):
    assert default_batches([32, 1024]) == [32, 1024, 2048, 4096, 8192, 16384] and REFUSED_BEYOND == 16
    assert forecast(*alone, NETWORK, [8], [16384])
    with pytest.raises(Damaged, match=r"batch size 16385 is more than 16 times the largest .*\(1024\).*--force"):
        forecast(*alone, NETWORK, [8], [16385])
    row = forecast(*alone, NETWORK, [8], [16385], force=True).rows[0]
    assert math.log(row.steps.high / row.steps.value) >= UP[3]


def test_a_law_that_is_not_identified_predicts_from_its_bound(tmp_path):
    law = Law(steps_min=40, critical=4000)
    steps, calibration = known(study(tmp_path / "bound", law=law, noise=0.02))
    assert not steps.estimate.identified and steps.estimate.bound is not None
    word, bound = steps.estimate.bound
    assert word == "at least" and steps.law.critical == bound < 4000
    made = forecast(steps, calibration, FREE, [1], [1024, 8192])
    for row in made.rows:
        assert row.steps.low < law.steps(row.batch) < row.steps.high


def test_a_law_without_enough_batch_sizes_is_refused(tmp_path):
    with pytest.raises(Damaged, match="fewer than three batch sizes"):
        known(study(tmp_path / "few", batches=(32, 64)))


def test_a_batch_smaller_than_the_workers_has_no_row(alone):
    made = forecast(*alone, NETWORK, [8, 64], [32, 128])
    assert [(r.load.workers, r.batch) for r in made.rows] == [(8, 32), (8, 128), (64, 128)]
    with pytest.raises(Damaged, match="an example for each of 64 workers"):
        forecast(*alone, NETWORK, [64], [32])
