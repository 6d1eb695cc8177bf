"""What frozen stages make of a data set, on file beside the finished phases: computed once, memory-mapped by every worker.

A folder `<key of the phase that trained the last of the stages>.<store>` holds a shard for each worker that made it, in the
order of the data set, and is whole or absent. Test examples are kept exactly, whatever the store.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.mirror import mirrored
from orchestrator.broadcast import from_rank_0
from orchestrator.files import read_json, sync_directory, write_json
from orchestrator.identity import feature_key, feature_maker
from orchestrator.workloads.order import share
from strategies.contract import Batch, Metrics, PlanError, Worker
from strategies.net import Net
from strategies.parts.frozen import channels_last, through

if TYPE_CHECKING:
    from orchestrator.trainer import Job

READ = 256  # examples that are computed and written at once
LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Split:
    """The features of one split. `at(places)`: (n, ...) of these examples."""

    shards: list[NDArray]
    ranges: list[NDArray]  # for bytes: (n, 2) least value and step of each example; else empty
    channels_last: bool  # lie in memory as (n, h, w, c)
    dtype: torch.dtype
    device: torch.device

    def at(self, places: NDArray[np.int64]) -> Tensor:
        x = torch.from_numpy(_rows(self.shards, places)).to(self.device, self.dtype)
        if self.ranges:
            low, step = torch.from_numpy(_rows(self.ranges, places)).to(x).view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)
            x = low + step * x
        return x.permute(0, 3, 1, 2) if self.channels_last else x


def _rows(shards: list[NDArray], places: NDArray[np.int64]) -> NDArray:
    """A copy of these rows of the shards laid end to end."""
    out = np.empty((len(places), *shards[0].shape[1:]), shards[0].dtype)
    begin = 0
    for shard in shards:
        here = (places >= begin) & (places < begin + len(shard))
        out[here] = shard[places[here] - begin]
        begin += len(shard)
    return out


class Features:
    """The data set with features for inputs; has the interface of `workloads.Dataset`."""

    def __init__(self, data: Any, folder: Path, dtype: torch.dtype, device: torch.device):
        """Raises OSError, ValueError or KeyError for a folder that is not whole."""
        self.data, self.device = data, device
        self.examples, self.test_examples, self.classes = data.examples, data.test_examples, data.classes
        self.train_x, self.test_x = (_open(folder, split, dtype, device) for split in ("train", "test"))

    def train(self, start: int, stop: int) -> Batch:
        return self._batch(self.data.places(start, stop), start)

    def unaugmented(self, start: int, stop: int) -> Batch:
        return self._batch(np.arange(start, stop), start)

    def _batch(self, places: NDArray[np.int64], start: int) -> Batch:
        y = self.data.train_y[torch.from_numpy(places).to(self.device)]
        return Batch(self.train_x.at(places), y, torch.arange(start, start + len(places), device=self.device))

    def test(self, start: int, stop: int) -> Batch:
        position = torch.arange(start, stop, device=self.device)
        return Batch(self.test_x.at(np.arange(start, stop)), self.data.test_y[start:stop], position)

    def score(self, logits: Tensor, y: Tensor) -> Metrics:
        return self.data.score(logits, y)


def _open(folder: Path, split: str, dtype: torch.dtype, device: torch.device) -> Split:
    meta = read_json(folder / "meta.json")
    names = [f"{split}-{rank}" for rank in range(meta["shards"])]
    shards = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    ranges = [np.load(path) for name in names if (path := folder / f"{name}-range.npy").exists()]
    if sum(map(len, shards)) != meta[split]:
        raise ValueError(f"expected features of {meta[split]} examples")
    return Split(shards, ranges, meta["channels_last"], dtype, device)


def features(job: Job, index: int, net: Net, worker: Worker) -> Features:
    """The data set as the network of phase `index` reads it, made if it is not on file. Raises PlanError on all ranks alike
    where workers do not share the folder."""
    if worker.sum_(torch.tensor(float(mirrored()), device=worker.device)).item():
        raise PlanError("the cache of features needs a folder of studies that all nodes see: write `cache: off`")
    folder = job.store.root / feature_key(job.plan, index, job.context)
    if not from_rank_0(worker, lambda: _whole(job, folder, worker) or None):
        _make(job, index, net, worker, folder)
    return Features(job.dataset, folder, job.dtype, worker.device)


def _whole(job: Job, folder: Path, worker: Worker) -> bool:
    """Whether it can be read; a damaged folder is removed."""
    if not folder.exists():
        return False
    try:
        Features(job.dataset, folder, job.dtype, worker.device)
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"{folder}: damaged features are computed anew ({error})", stacklevel=2)
        shutil.rmtree(folder)
        return False
    return True


def _make(job: Job, index: int, net: Net, worker: Worker, folder: Path) -> None:
    """Each worker writes its share of the examples, from the features below if there are any."""
    plan, maker = job.plan, feature_maker(job.plan, index)
    cache, below = plan.phases[index].cache, plan.phases[maker].cache
    assert cache
    data = features(job, maker, net, worker) if below else job.dataset
    stages = list(net.eval().stages)[below.stages if below else 0 : cache.stages]
    part = folder.with_name(f".{folder.name}.{from_rank_0(worker, os.getpid)}")
    part.mkdir(parents=True, exist_ok=True)

    def write(split: str, read: Callable[[int, int], Batch], count: int, store: str) -> Layout:
        begin, end = share(0, count, worker.rank, worker.size)
        with worker.autocast():
            sample = through(stages, read(0, 1).x)
            pieces = (through(stages, read(a, min(a + READ, end)).x) for a in range(begin, end, READ))
            layout = Layout(store, channels_last(sample))
            _write(part / f"{split}-{worker.rank}", end - begin, layout, sample, pieces)
        return layout

    layout = write("train", data.unaugmented, data.examples, cache.store)
    write("test", data.test, data.test_examples, "exact")
    worker.sum_(torch.zeros(1, device=worker.device))  # all have written
    if worker.rank == 0:
        meta = {"channels_last": layout.channels_last, "shards": worker.size}
        write_json(part / "meta.json", meta | {"train": data.examples, "test": data.test_examples})
        _move(part, folder)
    worker.sum_(torch.zeros(1, device=worker.device))


@dataclass(frozen=True, slots=True)
class Layout:
    """How features lie on file."""

    store: str
    channels_last: bool

    def encoded(self, x: Tensor) -> tuple[NDArray, NDArray | None]:
        """(n, ...) as kept, in the order of memory; for bytes also (n, 2) least value and step."""
        x = (x.permute(0, 2, 3, 1) if self.channels_last else x).cpu()
        if self.store == "exact":
            return x.numpy(), None
        if self.store == "fp16":
            return x.clamp(-LARGEST_HALF, LARGEST_HALF).half().numpy(), None
        low, high = x.flatten(1).aminmax(dim=1)
        step = torch.where(high > low, (high - low) / 255, 1.0)
        each = (-1, *[1] * (x.ndim - 1))
        return ((x - low.view(each)) / step.view(each)).round().byte().numpy(), torch.stack([low, step], 1).numpy()


def _write(path: Path, count: int, layout: Layout, sample: Tensor, pieces: Iterator[Tensor]) -> None:
    """One shard as .npy, written piece by piece: a full disk is an error, where a mapped file would end the process."""
    values, ranges = layout.encoded(sample)
    header = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False}
    every = [] if ranges is None else [ranges[:0]]
    with open(f"{path}.npy", "wb") as file:
        np.lib.format.write_array_header_2_0(file, header | {"shape": (count, *values.shape[1:])})
        for values, ranges in map(layout.encoded, pieces):
            file.write(values.tobytes())
            every += [] if ranges is None else [ranges]
        file.flush()
        os.fsync(file.fileno())
    if every:
        np.save(f"{path}-range.npy", np.concatenate(every))


def _move(part: Path, final: Path) -> None:
    try:
        part.rename(final)
        sync_directory(final.parent)
    except OSError:
        shutil.rmtree(part)
        if not final.exists():  # else another gang was first
            raise
