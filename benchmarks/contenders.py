"""The loops that bigbatch's trainer is measured against: `python -m benchmarks.contenders NAME SPEC.json OUT.json`.

Run under torchrun, they train on as many workers, by DDP over gloo. All have the same network, optimizer, batch and data.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from benchmarks.images import Cifar, augmented, build, matmul_peak, read_data

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Spec:
    data: str  # an .npz file
    model: str
    width: int | None  # of the network's first stage, where it is not the usual one
    batch: int  # over all workers
    warmup: int  # steps before the clock starts, at least 1
    steps: int  # steps that are measured
    precision: str  # the faster one on this machine: fp32, bf16


class Meter:
    """Images per second, from the end of the warm-up on, with all that the loop does between steps."""

    def __init__(self, spec: Spec):
        self.spec, self.done, self.start, self.rate = spec, 0, 0.0, 0.0

    def step(self) -> bool:
        """After each optimizer step; -> whether it was the last."""
        self.done += 1
        if self.done == self.spec.warmup:
            self.start = time.perf_counter()
        if self.done < self.spec.warmup + self.spec.steps:
            return False
        self.rate = self.spec.batch * self.spec.steps / (time.perf_counter() - self.start)
        return True


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def loader(spec: Spec, shard: bool = True) -> DataLoader[Any]:
    """The usual DataLoader, each worker with its share of the examples unless the library sees to that."""
    data, share = Cifar(spec.data), spec.batch // WORLD
    if shard and WORLD > 1:
        return DataLoader(data, share, sampler=DistributedSampler(data, WORLD, RANK), drop_last=True)
    return DataLoader(data, share, shuffle=True, drop_last=True)


def distributed(net: nn.Module) -> nn.Module:
    if WORLD == 1:
        return net
    dist.init_process_group("gloo")
    return DistributedDataParallel(net, gradient_as_bucket_view=True)


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def train(spec: Spec, meter: Meter, net: nn.Module, batches: Iterator[Any], precision: str) -> None:
    optimizer, model = sgd(net), distributed(net)
    for x, y in batches:
        with autocast(precision):
            loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if meter.step():
            return


# ------------------------------------------------------------------------------------------------------ contenders


def plain_fp32(spec: Spec, meter: Meter) -> None:
    train(spec, meter, build(spec.model, spec.width), iter(loader(spec)), "fp32")


def plain_bf16(spec: Spec, meter: Meter) -> None:
    train(spec, meter, build(spec.model, spec.width), iter(loader(spec)), "bf16")


def tuned(spec: Spec, meter: Meter) -> None:
    """What an expert writes by hand: the faster precision, channels last, all images in memory, augmented by the batch."""
    net = build(spec.model, spec.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(spec, meter, net, in_memory(spec), spec.precision)


def in_memory(spec: Spec) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = read_data(spec.data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(spec.batch):
        own = chosen[RANK::WORLD]
        yield augmented(x[own]), y[own]


def lightning(spec: Spec, meter: Meter) -> None:
    import lightning as pl  # type: ignore[import-not-found,unused-ignore]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(spec.model, spec.width)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

        def on_train_batch_end(self, *_: Any) -> None:
            meter.step()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        precision="bf16-mixed" if spec.precision == "bf16" else "32-true",
        max_steps=spec.warmup + spec.steps,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(Module(), loader(spec))


def accelerate(spec: Spec, meter: Meter) -> None:
    from accelerate import Accelerator  # type: ignore[import-not-found,unused-ignore]

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if spec.precision == "bf16" else "no")
    net = build(spec.model, spec.width)
    model, optimizer, batches = accelerator.prepare(net, sgd(net), loader(spec, shard=False))
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if meter.step():
            return


def deepspeed(spec: Spec, meter: Meter) -> None:
    """ZeRO-1."""
    import deepspeed as ds  # type: ignore[import-not-found,unused-ignore]

    if not dist.is_initialized():
        os.environ |= {"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": str(WORLD)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29561")}
    net = build(spec.model, spec.width)
    config = {
        "train_batch_size": spec.batch,
        "train_micro_batch_size_per_gpu": spec.batch // WORLD,
        "zero_optimization": {"stage": 1},
        "torch_autocast": {"enabled": spec.precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    model, *_ = ds.initialize(model=net, optimizer=sgd(net), config=config)
    for x, y in loader(spec):
        with autocast(spec.precision):
            loss = cross_entropy(model(x), y)
        model.backward(loss)
        model.step()
        if meter.step():
            return


CONTENDERS: dict[str, Callable[[Spec, Meter], None]] = {
    "plain_fp32": plain_fp32, "plain_bf16": plain_bf16, "tuned": tuned, "lightning": lightning, "accelerate": accelerate,
    "deepspeed": deepspeed,
}  # fmt: skip
PACKAGES = {"lightning": ("lightning",), "accelerate": ("accelerate",), "deepspeed": ("deepspeed",)}


def main(name: str, spec_file: str, out_file: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if name == "peak":
        result = {kind: matmul_peak(dtype) for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    else:
        spec = Spec(**json.loads(Path(spec_file).read_text()))
        meter = Meter(spec)
        CONTENDERS[name](spec, meter)
        result = {"images_per_second": meter.rate}
    if RANK == 0:
        Path(out_file).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
