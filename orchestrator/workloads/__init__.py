"""What trials train on: data sets, the order of examples, augmentation, networks. Imports no torch when imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.recipe import workload_schema
from orchestrator.workloads.arrays import Arrays, fingerprint, load, parsed_folder
from orchestrator.workloads.files import DataError

if TYPE_CHECKING:
    import torch

    from orchestrator.workloads.dataset import Dataset
    from orchestrator.workloads.noisy_quadratic import QuadraticData
    from strategies.net import Net

__all__ = ["Arrays", "DataError", "build_network", "fingerprint", "load", "open_dataset", "parsed_folder"]


def build_network(inputs: tuple[int, ...], classes: int, name: str, **options: Any) -> Net:
    """`models.build_network`, which imports torch when it is called and not before."""
    from orchestrator.workloads import models

    return models.build_network(inputs, classes, name, **options)


def open_dataset(
    workload: workload_schema.Workload,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    parsed: Path | None = None,
) -> Dataset | QuadraticData:
    """The workload's data on `device`, in batches of `dtype`; `parsed` as in `load`. Raises DataError if they can't be had."""
    from orchestrator.workloads.dataset import Dataset
    from orchestrator.workloads.noisy_quadratic import QuadraticData

    if workload.data.name == "noisy_quadratic":
        return QuadraticData(device, dtype)
    return Dataset(load(workload.data, parsed), workload.augment, seed, device, dtype)
