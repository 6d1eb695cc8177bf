"""What tests of `stage_wise` train: networks to cut, data whose features can be kept, and what a phase left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.identity import phase_key
from orchestrator.phases import PhaseStore
from orchestrator.workloads import order
from strategies.contract import Batch, ModelSpec, Plan
from strategies.net import Net
from strategies.parts.staged_net import StagedNet
from strategies.stage_wise import StageWise
from tests.strategies.cases import staged_net
from tests.strategies.harness import CLASSES, EXAMPLES, WIDTH, Blobs, Trained, baseline


@dataclasses.dataclass
class Indexed(Blobs):
    """Blobs whose features can be kept."""

    @property
    def train_y(self) -> Tensor:
        return self.y

    @property
    def test_y(self) -> Tensor:
        return self.y

    def places(self, start: int, stop: int) -> Any:
        return order.indices(self.seed, start, stop, EXAMPLES)

    def unaugmented(self, start: int, stop: int) -> Batch:
        return Batch(self.x[start:stop], self.y[start:stop], torch.arange(start, stop))


class Pictures(Indexed):
    """The same as 4x4 images that lie in memory as (n, h, w, c), as those of a data set do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wide = torch.linspace(-1, 1, WIDTH * 32, dtype=torch.float64).sin().view(WIDTH, 32).to(self.dtype)
        self.x = (self.x.flatten(1) @ wide).view(-1, 4, 4, 2).permute(0, 3, 1, 2)
        self.inputs = (2, 4, 4)


def convolved(inputs: tuple[int, ...], classes: int) -> Net:
    """Three stages with batch norm, as images, then as vectors."""
    one = nn.Sequential(nn.Conv2d(inputs[0], 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    two = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    three = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh())
    return Net([one, two, three], head=nn.Linear(8, classes))


def plan(build: Any = staged_net, passes: float = 3, **options: Any) -> Plan:
    whole = baseline(passes).map(lambda phase: dataclasses.replace(phase, model=ModelSpec(build)))
    return StageWise(**options).edit(whole) if options else whole


def network(edited: Plan, index: int, inputs: tuple[int, ...] = (WIDTH,)) -> StagedNet:
    torch.manual_seed(index)
    net = edited.phases[index].model(inputs, CLASSES)
    assert isinstance(net, StagedNet)
    return net.double()


def record(edited: Plan, index: int, directory: Path) -> dict[str, Tensor]:
    kept = PhaseStore(directory / "phases").get(phase_key(edited, index, {"test": str(directory)}))
    assert kept
    return kept.weights


def untimed(trained: Trained) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k and k != "flops"} for row in trained.rows]
