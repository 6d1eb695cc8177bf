"""What the throughput contenders share: CIFAR-10, the usual augmentation, the networks, and what the machine can do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.workloads import cifar10
from orchestrator.workloads.files import DataError
from orchestrator.workloads.models import build_network

NETWORKS = {"resnet18": {"resnet": {"depth": 18}}, "vgg": {"vgg": {"depth": 11, "width": 64}}}  # as in a recipe
TEST = 512  # test images: evaluation is not measured
PAD, SIDE = 4, 32
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


def build(model: str, width: int | None = None) -> nn.Module:
    """The network of a recipe's name, with its first stage `width` channels wide where that is stated."""
    ((name, options),) = NETWORKS[model].items()
    torch.manual_seed(0)
    return build_network((3, SIDE, SIDE), 10, name, **{"width": None, **options} | ({"width": width} if width else {}))


def write_data(path: Path, random: bool = False) -> str:
    """CIFAR-10 as an .npz file of 50,000 training images; -> what it holds: random pixels where CIFAR-10 is not there."""
    try:
        if random:
            raise DataError("not asked for")
        parsed = cifar10.parse(cifar10.files())
        arrays = parsed.train_x, parsed.train_y, parsed.test_x[:TEST], parsed.test_y[:TEST]
        told = "CIFAR-10"
    except DataError:
        noise = np.random.default_rng(0)
        sizes = (50_000, TEST)
        pixels = [noise.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8) for n in sizes]
        arrays = pixels[0], np.arange(sizes[0]) % 10, pixels[1], np.arange(sizes[1]) % 10
        told = "random pixels of CIFAR-10's shape"
    train_x, train_y, test_x, test_y = arrays
    channels_first: dict[str, Any] = {"train_x": train_x.transpose(0, 3, 1, 2), "test_x": test_x.transpose(0, 3, 1, 2)}
    np.savez(path, **channels_first, train_y=train_y, test_y=test_y)
    return told


def read_data(path: str) -> tuple[Tensor, Tensor]:
    """(50000, 3, 32, 32) uint8 pixels and (50000,) int64 labels."""
    with np.load(path) as content:
        return torch.from_numpy(np.ascontiguousarray(content["train_x"])), torch.from_numpy(content["train_y"]).long()


class Cifar(Dataset[tuple[Tensor, Tensor]]):
    """Training images one by one, each augmented by itself, as tutorials do it: to float, random crop, flip, normalise."""

    def __init__(self, path: str):
        self.x, self.y = read_data(path)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = F.pad(self.x[index].float() / 255, (PAD,) * 4)
        top, left = torch.randint(2 * PAD + 1, (2,)).tolist()
        image = image[:, top : top + SIDE, left : left + SIDE]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - MEAN) / DEVIATION, self.y[index]


def augmented(x: Tensor) -> Tensor:
    """A batch of uint8 images, cropped, flipped and normalised at once, channels last."""
    n = len(x)
    windows = F.pad(x, (PAD,) * 4).unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # (n, 3, 9, 9, 32, 32), a view
    top, left = torch.randint(2 * PAD + 1, (2, n))
    crops = windows[torch.arange(n), :, top, left]
    crops = torch.where(torch.rand(n, 1, 1, 1) < 0.5, crops.flip(-1), crops)
    return normalised(crops).contiguous(memory_format=torch.channels_last)


def normalised(x: Tensor) -> Tensor:
    """uint8 images as floats, by the mean and deviation of each channel."""
    return x.float().sub_(255 * MEAN).div_(255 * DEVIATION)


def flops_per_image(net: nn.Module) -> float:
    """Floating-point operations of a forward and a backward pass, as torch counts them."""
    images = 2
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(torch.randn(images, 3, SIDE, SIDE)), torch.arange(images)).backward()
    return counter.get_total_flops() / images


def matmul_peak(dtype: torch.dtype, side: int = 2048, tries: int = 10) -> float:
    """FLOP/s of the fastest of some products of square matrices."""
    a, b = torch.randn(2, side, side).to(dtype)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)
