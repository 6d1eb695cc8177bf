"""The cache of parsed data: built once per node, mapped and not copied, damage told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from orchestrator.workloads import DataError, fingerprint, load
from orchestrator.workloads.cache import file_hash
from tests.orchestrator.data_files import RNG, ROOT, data, write_mnist, write_npz

pytestmark = pytest.mark.usefixtures("folders")

BUILD_ONCE = """
import time
from orchestrator.recipe.workload_schema import Data
from orchestrator.workloads import load, mnist
parse = mnist.parse
def slow(paths):
    with open({log!r}, "a") as log:
        log.write("parsed\\n")
    time.sleep(0.5)
    return parse(paths)
mnist.parse = slow
print(load(Data.model_validate("mnist")).train_x.sum(dtype="int64"))
"""


def test_two_processes_at_once_build_the_cache_once(folders: Path) -> None:
    write_mnist(folders, packed=True)
    log = folders / "log"
    command = [sys.executable, "-c", BUILD_ONCE.format(log=str(log))]
    workers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        sums = [worker.communicate(timeout=60)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert sums[0] == sums[1] != ""
    assert log.read_text() == "parsed\n"


def test_a_build_that_was_killed_is_begun_anew(folders: Path) -> None:
    write_mnist(folders, packed=True)
    half = Path(os.environ["BIGBATCH_HOME"]) / "data" / f"{fingerprint(data('mnist'))}.tmp"
    half.mkdir(parents=True)
    (half / "train_x.npy").write_bytes(b"half")
    assert load(data("mnist")).train_x.shape == (50, 1, 28, 28)
    assert not half.exists()


def test_arrays_are_mapped_not_copied(folders: Path) -> None:
    import torch

    from orchestrator.recipe.workload_schema import Augment
    from orchestrator.workloads.dataset import Dataset

    x = RNG.integers(0, 256, (2000, 3, 16, 16), np.uint8)
    recipe = write_npz(folders, train_x=x, train_y=np.zeros(2000, np.int64), test_x=x[:5])
    arrays = load(recipe)
    dataset = Dataset(arrays, Augment(), 0, torch.device("cpu"), torch.float32)
    dataset.train(0, 2000)
    assert dataset.train_x.data_ptr() == arrays.train_x.ctypes.data
    assert private_kilobytes("train_x.npy") == 0  # every page read is the page cache's
    arrays.train_x[:] = 1  # copy-on-write: nobody else sees it
    assert private_kilobytes("train_x.npy") > 1000
    assert np.array_equal(load(recipe).train_x, x)


def private_kilobytes(name: str) -> int:
    """Memory of this process that holds changed pages of mapped files called `name`."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs /proc/self/smaps")
    inside, total = False, 0
    for line in smaps.read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(name)
        elif inside and line.startswith("Anonymous:"):
            total += int(line.split()[1])
    return total


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = file_hash(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert file_hash(path) == first
    path.write_bytes(b"two")
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1_000_000))
    assert file_hash(path) != first


def test_a_cache_that_cannot_be_written_is_told_in_one_line(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "file").touch()
    monkeypatch.setenv("BIGBATCH_HOME", str(folders / "file"))
    with pytest.raises(DataError, match=r"Not a directory|File exists") as error:
        load(data("digits"))
    assert "BIGBATCH_HOME" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_cache_is_told(folders: Path) -> None:
    write_mnist(folders, packed=True)
    load(data("mnist"))
    cached = Path(os.environ["BIGBATCH_HOME"]) / "data" / fingerprint(data("mnist"))
    (cached / "train_x.npy").write_bytes(b"half")
    with pytest.raises(DataError, match=r"damaged cache .*remove this folder"):
        load(data("mnist"))


def test_fingerprints_need_neither_torch_nor_sklearn() -> None:
    code = (
        "import sys; from orchestrator import workloads as w; from orchestrator.recipe.workload_schema import Data\n"
        "from orchestrator.identity import digest; from strategies.contract import ModelSpec\n"
        "print(w.fingerprint(Data.model_validate('digits')), digest(ModelSpec(w.build_network, (('name', 'mlp'),))))\n"
        "w.load(Data.model_validate('digits'))\n"
        "assert not {'torch', 'sklearn'} & set(sys.modules), sorted(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split()[0] == fingerprint(data("digits"))


def test_fingerprint_of_noisy_quadratic_is_its_dimension() -> None:
    small, large = (fingerprint(data({"noisy_quadratic": {"dimension": d}})) for d in (10, 100))
    assert small != large and len(small) == 16 and int(small, 16)
