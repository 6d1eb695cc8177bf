"""A tiny task in float64 on which plans are trained through the real trainer, on one worker or on two."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from cluster.engines import make_worker
from orchestrator.phases import PhaseStore
from orchestrator.recipe.workload_schema import Interval
from orchestrator.trainer import Job, Progress, Trainer
from orchestrator.workloads import order
from strategies.backprop import Backprop
from strategies.contract import Batch, ModelSpec, Phase, Plan
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate

EXAMPLES, WIDTH, CLASSES = 48, 6, 3
IMAGES = (1, 2, 3)  # the shape of an example where a method needs images


@dataclass
class Blobs:
    """Three Gaussian blobs. `repeat` makes each example stand `repeat` times in a row in the stream; images: see IMAGES."""

    seed: int = 0
    repeat: int = 1
    fail_at: int | None = None  # stream position from which on reading fails, once, on every worker
    inputs: tuple[int, ...] = (WIDTH,)
    classes: int = CLASSES
    test_examples: int = 31
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(1)
        self.y = torch.arange(EXAMPLES) % CLASSES
        centres = torch.randn(CLASSES, WIDTH, generator=made, dtype=torch.float64)
        noise = torch.randn(EXAMPLES, WIDTH, generator=made, dtype=torch.float64)
        self.x = (centres[self.y] + 0.7 * noise).to(self.dtype).view(EXAMPLES, *self.inputs)

    @property
    def examples(self) -> int:
        return EXAMPLES * self.repeat

    def train(self, start: int, stop: int) -> Batch:
        if self.fail_at is not None and stop > self.fail_at:
            self.fail_at = None
            raise InterruptedError("the planted fault")
        position = torch.arange(start, stop)
        first, last = start // self.repeat, -(-stop // self.repeat)
        stream = torch.from_numpy(order.indices(self.seed, first, last, EXAMPLES))
        chosen = stream[position // self.repeat - first]
        return Batch(self.x[chosen], self.y[chosen], position)

    def first(self, n: int) -> Batch:
        position = torch.arange(min(n, self.examples))
        return Batch(self.x[position // self.repeat], self.y[position // self.repeat], position)

    def test(self, start: int, stop: int) -> Batch:
        return Batch(self.x[start:stop], self.y[start:stop], torch.arange(start, stop))

    def score(self, logits: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        return {"test_loss": loss, "test_accuracy": (logits.argmax(1) == y).sum()}


class FlatNet(Net):
    """A net of linear layers, which takes images as vectors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1))


def tiny_net(inputs: tuple[int, ...], classes: int) -> Net:
    return FlatNet([nn.Sequential(nn.Linear(math.prod(inputs), 8), nn.Tanh())], head=nn.Linear(8, classes))


def baseline(epochs: float = 3, batch: int = 12) -> Plan:
    """SGD with momentum and weight decay: the plan that strategies edit, and that neutral settings must equal."""
    learner = Backprop(optimizer=Sgd(momentum=0.9, weight_decay=1e-3), rate=Rate(0.1, warmup=0.5))
    return Plan((Phase(name="train", epochs=epochs, batch=batch, model=ModelSpec(tiny_net), learner=learner),))


@dataclass(frozen=True)
class Trained:
    weights: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    progress: Progress


def train(plan: Plan, directory: Path, data: Blobs | None = None, worker: Any = None, **options: Any) -> Trained:
    """The last phase's weights and the rows, through `Trainer`, on one worker unless another is given."""
    torch.use_deterministic_algorithms(True)
    data = data or Blobs()
    worker = worker or make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    (directory / "trial").mkdir(parents=True, exist_ok=True)
    job = Job(
        plan=plan,
        dataset=data,
        seed=0,
        directory=directory / "trial",
        store=PhaseStore(directory / "phases"),
        context={"test": str(directory)},
        dtype=data.dtype,
        **{"log_steps": 1, "micro_batch": 64, "evaluate": Interval(epochs=1)} | options,
    )
    trainer = Trainer(job, worker)
    progress = trainer.run()
    last = len(plan.phases) - 1
    from orchestrator.phases import key

    record = job.store.get(key(plan, last, job.context))
    assert record is not None or worker.rank or progress.status in ("pruned", "diverged"), "the trainer kept no weights"
    return Trained(record.weights if record else {}, trainer.rows.read(), progress)


def distance(a: Trained, b: Trained) -> float:
    """Largest absolute difference between two sets of weights."""
    assert a.weights.keys() == b.weights.keys()
    return max(float((a.weights[k].double() - b.weights[k].double()).abs().max()) for k in a.weights)


# ---------------------------------------------------------------------------------------------------- two processes


class Pair:
    """Two processes with a gloo group, which train plan after plan as a warm gang does."""

    def __init__(self, rendezvous: Path):
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(2)]
        self.pipes = [mine for mine, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def train(self, plan: Plan, directory: Path, **options: Any) -> Trained:
        for pipe in self.pipes:
            pipe.send((plan, directory, options))
        answers = [self._answer(rank) for rank in range(2)]
        for rank, answer in enumerate(answers):
            assert not isinstance(answer, str), f"rank {rank}: {answer}"
        return answers[0]

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(30):
            self.close()
            raise TimeoutError(f"rank {rank} gave no answer within 30 s")
        return self.pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(rank: int, rendezvous: Path, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{rendezvous}", timeout=limit, rank=rank, world_size=2)
    while True:
        plan, directory, options = pipe.recv()
        engine = options.pop("engine", "ddp")
        worker = make_worker(engine, {}, "fp64", rank, 2, torch.device("cpu"))
        try:
            pipe.send(train(plan, directory, worker=worker, **options))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
