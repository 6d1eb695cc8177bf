"""What is measured once per machine: remembered, shared by all workers, and never without an effect on speed alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cluster.engines.solo import SoloWorker
from kernels.patches import PatchConv2d
from orchestrator import tuning
from orchestrator.tuning import bf16_pays, tune
from strategies.contract import Batch

WORKER = SoloWorker(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBATCH_HOME", str(tmp_path))
    return tmp_path / "tuning.json"


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
    )  # fmt: skip


def sample(n: int) -> Batch:
    return Batch(torch.zeros(n, 3, 16, 16), torch.zeros(n, dtype=torch.int64), torch.arange(n))


def patched(net: nn.Sequential) -> list[int]:
    return [i for i, m in enumerate(net) if isinstance(m, PatchConv2d)]


@pytest.mark.parametrize("gain, chosen", [(2.0, [3]), (1.0, [])])
def test_auto_takes_what_gains_on_small_maps(monkeypatch, gain, chosen):
    monkeypatch.setattr(tuning, "_patch_gain", lambda conv, size, dtype: gain)
    net = network()
    assert tune(net, sample, 64, WORKER, "auto") == len(chosen) and patched(net) == chosen


def test_switches():
    net = network()
    assert tune(net, sample, 64, WORKER, False) == 0 and patched(net) == []
    assert tune(net, sample, 64, WORKER, True) == 2 and patched(net) == [0, 3]


def test_measured_once_with_at_most_128_examples(monkeypatch, cache):
    sizes = []
    monkeypatch.setattr(tuning, "_patch_gain", lambda conv, size, dtype: sizes.append(size) or 2.0)
    for local in (256, 512):
        tune(network(), sample, local, WORKER, "auto")
    assert sizes == [(128, 8, 2, 2)]
    ((key, gain),) = json.loads(cache.read_text()).items()
    assert gain == 2.0 and "torch.float32" in key and f"threads {torch.get_num_threads()}" in key


def test_a_real_measurement_tells_a_positive_gain(cache):
    tune(network(), sample, 4, WORKER, "auto")
    assert all(0.01 < gain < 100 for gain in json.loads(cache.read_text()).values())


def test_what_cannot_be_remembered_changes_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIGBATCH_HOME", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tuning, "_patch_gain", lambda conv, size, dtype: 2.0)
    assert tune(network(), sample, 64, WORKER, "auto") == 0
    assert not bf16_pays()


def test_a_damaged_file_is_measured_anew(monkeypatch, cache):
    cache.write_text("{")
    monkeypatch.setattr(tuning, "_bf16_gain", lambda: 3.0)
    assert bf16_pays() and list(json.loads(cache.read_text()).values()) == [3.0]


def test_the_network_is_left_as_it_was():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tune(net, sample, 8, WORKER, "auto")
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net)


def test_bf16_is_measured_on_one_thread_and_gives_the_threads_back():
    threads = torch.get_num_threads()
    assert 0.01 < tuning._bf16_gain() < 100 and torch.get_num_threads() == threads
