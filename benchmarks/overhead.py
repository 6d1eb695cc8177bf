"""What orchestration costs, `python -m benchmarks.overhead`: seconds that a trial adds, and (`benchmarks.books`) what books
add to a step."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import books, common
from benchmarks.one_step import Member, meeting, on_gang, one_step
from orchestrator.files import read_json, read_lines

TIMEOUT = 1200.0  # seconds per measurement

# ------------------------------------------------------------------------------------------ seconds per one-step trial


def timed(trial: Callable[[], Any], trials: int) -> list[float]:
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        trial()
        seconds.append(time.perf_counter() - start)
    return seconds


class Gang:
    """A bare gang of bigbatch, warm from the first repeat to the last."""

    def __init__(self) -> None:
        from cluster.gang import RayGang
        from cluster.tasks import Task

        self.gang, self.task = RayGang(2), Task(on_gang, None, engine="ddp")
        timed(self.trial, 2)

    def trial(self) -> None:
        from cluster.tasks import Done

        self.gang.start(self.task)
        outcome = self.gang.poll(60)
        if not isinstance(outcome, Done):
            raise common.Skipped(str(outcome))


def gang(trials: int, made: list[Gang]) -> list[float]:
    if not made:
        made.append(Gang())
    return timed(made[0].trial, trials)


def driver(trials: int) -> list[float]:
    """A study of one-step trials, as users run it: from the start of a trial to the start of the next, its own work and
    its books included. The first two trials warm up."""
    study = common.bigbatch(tiny(seeds=trials + 2), TIMEOUT)
    starts = [event["time"] for event in read_lines(study / "journal.jsonl") if event["event"] == "trial_started"]
    return [later - earlier for earlier, later in pairwise(starts)][1:]


def driver_gap(trials: int) -> list[float]:
    """The same, without what the workers do: the median from the end of a trial to the start of the next, as told."""
    return [read_json(common.bigbatch(tiny(seeds=trials + 2), TIMEOUT) / "status.json")["gap_seconds"]]


def tiny(**changes: Any) -> dict[str, Any]:
    """One step on 8x8 digits with a network of the size of `one_step`'s."""
    return {
        "study": "overhead",
        "workload": {"data": "digits", "model": {"mlp": {"width": 32, "depth": 2}}, "evaluate": {"steps": 1}},
        "engine": "ddp",
        "cluster": {"workers": 2, "threads": 1},
        "base": {"batch": 64, "steps": 1, "rate": {"peak": 0.1}, "optimizer": {"sgd": {"momentum": 0.9}}},
    } | changes


def torchrun(trials: int) -> list[float]:
    """A shell loop."""
    command = common.python("benchmarks.one_step", workers=2)
    return timed(lambda: common.run(command, TIMEOUT, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"), trials)


def ray_tune(trials: int) -> list[float]:
    """Trials on actors that Tune reuses; each holds a process group with a second actor, which stays too."""
    common.require("ray", "pandas", "pyarrow")
    import ray
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            place = meeting()
            actor: Any = ray.remote(num_cpus=0)(Member)
            self.other = actor.remote(1, place)
            self.member = Member(0, place)

        def step(self) -> dict[str, Any]:
            other = self.other.step.remote()
            loss = self.member.step()
            ray.get(other)
            return {"loss": loss, "at": time.time(), "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

    setting = tune.TuneConfig(num_samples=trials + 2, reuse_actors=True, max_concurrent_trials=1)
    saving = tune.CheckpointConfig(checkpoint_at_end=False)
    run = tune.RunConfig(verbose=0, storage_path=str(Path(meeting()).parent), checkpoint_config=saving)
    results: Any = tune.Tuner(Trial, tune_config=setting, run_config=run).fit()
    if results.errors:
        raise common.Skipped(common.cause(str(results.errors[0])))
    ends = sorted(result.metrics["at"] for result in results if result.metrics)
    return [later - earlier for earlier, later in pairwise(ends)][1:]


def ray_train(trials: int) -> list[float]:
    """`TorchTrainer.fit` per trial, on a cluster that is up."""
    common.require("ray", "pandas", "pyarrow")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def loop() -> None:
        one_step()

    def trial() -> None:
        run = RunConfig(storage_path=str(Path(meeting()).parent))
        scaling = ScalingConfig(num_workers=2, use_gpu=False)
        TorchTrainer(loop, scaling_config=scaling, run_config=run, torch_config=TorchConfig("gloo")).fit()

    return timed(trial, trials)


def per_trial(repeats: int, trials: int, slow: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per trial by contender; `slow`: trials per repeat of those that start processes for each."""
    from cluster.session import connect, disconnect

    common.require("ray")
    connect(cpus=8)  # as Ray counts them: a gang, Tune and Train side by side, one at work at a time
    try:
        made: list[Gang] = []
        contenders: dict[str, common.Measure] = {
            "bigbatch, bare gang": partial(gang, trials, made),
            "bigbatch, driver: gap between trials": partial(driver_gap, trials),
            "bigbatch, driver: trial to trial": partial(driver, trials),
            "Ray Tune, reused actors": partial(ray_tune, trials),
            "torchrun in a loop": partial(torchrun, slow),
            "Ray Train, TorchTrainer.fit": partial(ray_train, slow),
        }
        return common.interleave(contenders, repeats)
    finally:
        disconnect()


def main() -> None:
    parser = common.arguments(__doc__ or "", repeats=5)
    parser.add_argument("--trials", type=int, default=20, help="one-step trials per repeat, on warm workers")
    parser.add_argument("--slow-trials", type=int, default=3, help="the same, where each trial starts processes")
    parser.add_argument("--rounds", type=int, default=300, help="turns of each recipe whose books are measured")
    parser.add_argument("--data", choices=[*books.TURNS], default="digits", help="with which books are measured")
    parser.add_argument("--only", choices=["trials", "books"], help="one of the two tables")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.trials, options.slow_trials, options.rounds = 1, 2, 1, 3
    print(common.machine())
    try:
        with common.scratch():
            tables(options)
    except common.Skipped as why:
        raise SystemExit(f"not measured: {why}") from None


def tables(options: Namespace) -> None:
    results: dict[str, Any] = {}
    if options.only != "books":
        results["trials"] = trials_table(options)
        common.save(options.json, results)
    if options.only != "trials":
        results["books"] = books.table(options.data, options.rounds)
        common.save(options.json, results)


def trials_table(options: Namespace) -> dict[str, Any]:
    samples, skipped = per_trial(options.repeats, options.trials, options.slow_trials)
    rows = [(name, common.spread(found), str(len(found))) for name, found in samples.items()]
    common.tell("Seconds per one-step trial, 2 workers", ("contender", "seconds", "samples"), rows, skipped)
    return {"samples": samples, "skipped": skipped}


if __name__ == "__main__":
    main()
