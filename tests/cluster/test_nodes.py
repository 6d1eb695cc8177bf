"""Studies on several nodes that share no file system: real raylets, before which the study's folder is hidden."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.cluster.nodes import Hosts, Nodes, nodes, two_hosts
from tests.orchestrator.test_study_on_ray import without_seconds
from tests.waiting import until

RECIPE = """
study: NAME
workload: {data: {npz: {path: FOLDER/data.npz}}, model: {mlp: {width: 32, depth: 2}}}
cluster: CLUSTER
base: {steps: STEPS, batch: 16, rate: {peak: 0.05, decay: cosine}}
checkpoint: {seconds: 0}
log_steps: 20
"""
HERE = "{workers: 2, timeout: 30}"
SPREAD = "{workers: 2, timeout: 30, placement: spread}"


class Driver:
    """`bigbatch run` in a process of its own, in a folder that other nodes do not see."""

    def __init__(
        self,
        folder: Path,
        name: str,
        cluster: str,
        environment: dict[str, str],
        steps: int = 400,
        inside: Sequence[str] = (),
        words: Sequence[str] = (),
    ):
        text = RECIPE.replace("NAME", name).replace("FOLDER", str(folder)).replace("CLUSTER", cluster)
        recipe = folder / f"{name}.yaml"
        recipe.write_text(text.replace("STEPS", str(steps)))
        self.runs = folder / f"runs_{name}"
        self.study = self.runs / name
        self.began = time.monotonic()
        command = [*inside, sys.executable, "-m", "orchestrator", "run", str(recipe), "-o", str(self.runs), *words]
        self.process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)

    def end(self, limit: float = 90) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=limit)
        return self.process.returncode, err

    def rows(self) -> list[dict[str, Any]]:
        files = self.study.glob("trials/*/metrics.jsonl")
        return [json.loads(line) for f in files for line in f.read_text().splitlines(keepends=True) if line[-1] == "\n"]

    def weights(self) -> bytes:
        (file,) = self.runs.glob(".phases/*/weights.safetensors")
        return file.read_bytes()

    def log(self, rank: int) -> str:
        return "".join(path.read_text() for path in self.study.glob(f"trials/*/logs/rank_{rank}.log"))

    def pid(self, rank: int) -> int:
        """Of the newest attempt."""
        return int(re.findall(r"# pid (\d+)", self.log(rank))[-1])

    def raylet(self, rank: int) -> int:
        """The process that stands for the node of a rank."""
        parent = psutil.Process(self.pid(rank)).parent()
        assert parent
        return parent.pid

    def until_step(self, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return any(row["step"] >= step for row in self.rows())

        until(there)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("driver")
    noise = np.random.default_rng(0)
    x, y = noise.normal(size=(256, 12)).astype(np.float32), noise.integers(0, 4, 256)
    np.savez(made / "data.npz", train_x=x, train_y=y, test_x=x[:64], test_y=y[:64])
    return made


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Nodes]:
    """A head without CPUs, and two nodes of two CPUs that see neither the study nor its data."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary, nodes(folder, Path(temporary)) as made:
        made.add(2)
        made.add(2)
        yield made


@pytest.fixture(scope="module")
def near(folder: Path, pair: Nodes) -> Driver:
    """The same study on this machine alone, for comparison."""
    environment = {k: v for k, v in pair.environment().items() if k != "RAY_ADDRESS"}
    driver = Driver(folder, "near", HERE, environment)
    code, err = driver.end()
    assert code == 0, err
    return driver


def copies() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("bigbatch-mirror-*"))


def test_all_comes_back_from_nodes_that_see_no_file(folder: Path, pair: Nodes, near: Driver) -> None:
    """Data go there, and rows, checkpoints, phases and logs come back while ranks on two nodes train."""
    before = copies()
    far = Driver(folder, "far", SPREAD, pair.environment(), steps=400)
    far.until_step(20)
    assert far.raylet(0) != far.raylet(1)
    code, err = far.end()
    assert code == 0, err
    assert far.weights() == near.weights()
    assert without_seconds(far.rows()) == without_seconds(near.rows())
    assert list(far.study.glob("trials/*/checkpoints/step_*/manifest.json"))
    assert "pid" in far.log(0) and "pid" in far.log(1)
    assert not list(far.runs.rglob("*.part")) and not list(far.runs.glob(".driver-*"))
    assert copies() <= before


def test_what_the_cluster_can_never_give_is_told_at_once(folder: Path, pair: Nodes) -> None:
    driver = Driver(folder, "never", "{workers: 8}", pair.environment())
    code, err = driver.end()
    assert code == 2
    assert "no room for 8 workers x (1 CPUs, 0 GPUs): 3 nodes have 4 CPUs, 0 GPUs in all" in err
    began, ended = (json.loads(line)["time"] for line in (driver.study / "journal.jsonl").read_text().splitlines())
    assert ended - began < 5


QUESTION = """
import os, sys
from functools import partial
from cluster.session import at_a_worker, connected, ray

class Busy:
    def there(self): return True

with connected():
    busy = [ray.remote(num_cpus=2)(Busy).remote() for node in range(2)]
    assert all(ray.get([actor.there.remote() for actor in busy]))
    print(at_a_worker(partial(os.path.exists, sys.argv[1]), 2, 1), os.path.exists(sys.argv[1]))
assert not ray.is_initialized()
"""


def test_a_question_goes_to_a_node_of_workers_also_while_all_are_at_work(folder: Path, pair: Nodes) -> None:
    """It is answered where the driver's file is not seen."""
    command = [sys.executable, "-c", QUESTION, str(folder / "data.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env=pair.environment(), timeout=100)
    assert done.stdout == "False True\n", done.stderr


@pytest.mark.slow
def test_workers_are_packed_on_one_node(folder: Path, pair: Nodes, near: Driver) -> None:
    driver = Driver(folder, "packed", HERE, pair.environment())
    driver.until_step(20)
    assert driver.raylet(0) == driver.raylet(1)
    code, err = driver.end()
    assert code == 0, err
    assert driver.weights() == near.weights()


HOLDER = """
import sys, time
import cluster.session
import ray
ray.init(address="auto" if len(sys.argv) < 2 else sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
class Holder:
    def ready(self): pass
held = [Holder.remote() for _ in range(3)]
ray.get([h.ready.remote() for h in held])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_it_waits_for_room_and_says_so(folder: Path, pair: Nodes) -> None:
    command = [sys.executable, "-c", HOLDER, pair.address]
    holder = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=pair.environment())
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        driver = Driver(folder, "waits", HERE, pair.environment(), steps=40)
        time.sleep(12)
        assert driver.process.poll() is None and not driver.rows()
    finally:
        holder.kill()
        holder.communicate()
    code, err = driver.end()
    assert code == 0, err
    assert err.count("gang0 waits for room for 2 workers x (1 CPUs, 0 GPUs): free on the cluster are 1 CPUs") == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_is_lost_in_mid_step(folder: Path, pair: Nodes, near: Driver, rank: int) -> None:
    """What has come back from it is enough: the study goes on elsewhere from a checkpoint, to the same weights."""
    pair.add(2)
    driver = Driver(folder, f"loss{rank}", SPREAD, pair.environment(), steps=400)
    until_saved(driver)
    lost = next(node for node in pair.cluster.worker_nodes if raylet(node) == driver.raylet(rank))
    pair.remove(lost)
    code, err = driver.end()
    assert code == 0, err
    assert f"rank {rank} was lost" in err and "a new gang goes on" in err
    assert driver.weights() == near.weights()
    assert without_seconds(driver.rows()) == without_seconds(near.rows())
    assert [row["step"] for row in driver.rows()] == [row["step"] for row in near.rows()]


@pytest.mark.slow
def test_a_node_is_lost_and_none_takes_its_place(folder: Path) -> None:
    """Of two trials on two nodes, the one whose node goes waits for the other, and takes over its gang."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary, nodes(folder, Path(temporary)) as made:
        kept, lost = made.add(2), made.add(2)
        assert raylet(kept) != raylet(lost)
        driver = Driver(folder, "alone", HERE, made.environment(), words=["--set", "seeds=2"])
        until(lambda: len(list(driver.study.glob("trials/*/checkpoints/step_*/manifest.json"))) >= 2)
        made.remove(lost)
        code, err = driver.end()
    assert code == 0, err
    assert err.count("was lost") == 1 and err.count("has found no room; gang") == 1, err


def until_saved(driver: Driver) -> None:
    """A checkpoint has come back."""
    until(lambda: bool(list(driver.study.glob("trials/*/checkpoints/step_*/manifest.json"))))


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary, two_hosts(folder, Path(temporary)) as made:
        yield made


@pytest.mark.slow
def test_two_hosts_with_addresses_of_their_own(folder: Path, near: Driver, hosts: Hosts) -> None:
    """Ranks find each other through the interface that holds their node's address: loopback does not lead there."""
    driver = Driver(folder, "hosts", HERE, hosts.environment, inside=hosts.inside)
    code, err = driver.end()
    assert code == 0, err
    assert driver.weights() == near.weights()
    assert "pid" in driver.log(0) and "pid" in driver.log(1)


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "losses"), [(3, 0), (25, 1)])
def test_the_cable_between_two_hosts_is_pulled(
    folder: Path, near: Driver, hosts: Hosts, seconds: int, losses: int
) -> None:
    """For less than `cluster.timeout` nobody minds; after it the gang is replaced once its node can be reached again."""
    cluster = HERE.replace("30", "10")
    driver = Driver(folder, f"cable{seconds}", cluster, hosts.environment, inside=hosts.inside)
    until_saved(driver)
    hosts.pull()
    time.sleep(seconds)
    assert driver.process.poll() is None
    hosts.plug()
    code, err = driver.end(180)
    assert code == 0, err
    assert err.count("a new gang goes on") == losses, err
    assert driver.weights() == near.weights()
    assert without_seconds(driver.rows()) == without_seconds(near.rows())
