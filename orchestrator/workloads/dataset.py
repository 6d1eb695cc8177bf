"""A data set on a worker's device: gathers, augments and normalises batches without a loop over examples."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.recipe import workload_schema
from orchestrator.workloads import order
from orchestrator.workloads.arrays import Arrays
from orchestrator.workloads.files import DataError
from orchestrator.workloads.noise import uniform
from strategies.contract import Batch, Metrics


class Dataset:
    """Train and test examples as batches. On the CPU they are read from the node's one copy; a GPU holds a copy.

    Images stay uint8, as (n, h, w, c), until the last step.
    """

    def __init__(
        self, arrays: Arrays, augment: workload_schema.Augment, seed: int, device: torch.device, dtype: torch.dtype
    ):
        """Raises DataError where flat data are to be cropped or flipped, or images are smaller than their reflected rim."""
        self.augment, self.seed, self.device, self.dtype = augment, seed, device, dtype
        self.classes = arrays.classes
        self.inputs: tuple[int, ...] = arrays.train_x.shape[1:]  # (c, h, w) or (d,)
        self.examples, self.test_examples = len(arrays.train_x), len(arrays.test_x)
        self.train_x, self.test_x = (self._place(x) for x in (arrays.train_x, arrays.test_x))
        self.train_y, self.test_y = (self._place(y) for y in (arrays.train_y, arrays.test_y))
        if (augment.crop or augment.flip) and len(self.inputs) != 3:
            raise DataError(f"augment: crop and flip need images, this data set has inputs of shape {self.inputs}")
        if augment.pad == "reflect" and augment.crop and min(self.inputs[1:]) <= augment.crop:
            raise DataError(f"augment: pad: reflect: crop {augment.crop} needs larger images than {self.inputs[1:]}")
        self._set_scale(arrays)

    def train(self, start: int, stop: int) -> Batch:
        """Augmented examples of stream positions [start, stop)."""
        position = torch.arange(start, stop, device=self.device)
        chosen = self._send(self.places(start, stop))
        x = self.train_x.index_select(0, chosen)
        if self.augment.crop:
            padded = _padded(x, self.augment.crop, self.augment.pad == "reflect")
            x = _crop(padded, self.augment.crop, uniform(self.seed, "crop", position, 2))
        if self.augment.flip:
            x = _flip(x, self._mirrored(position, chosen))
        return Batch(self._normalise(x), self.train_y.index_select(0, chosen), position)

    def places(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) which examples stand at stream positions [start, stop)."""
        return order.indices(self.seed, start, stop, self.examples)

    def _mirrored(self, position: Tensor, chosen: Tensor) -> Tensor:
        """(n,) which examples are mirrored: each time anew, or once for each example and the other way in odd epochs."""
        if self.augment.flip == "alternating":
            return (uniform(self.seed, "flip", chosen)[:, 0] < 0.5) ^ (position // self.examples % 2 == 1)
        return uniform(self.seed, "flip", position)[:, 0] < 0.5

    def first(self, n: int) -> Batch:
        """The first n training examples, or all if there are fewer, in the order of the data set and not augmented."""
        return self.unaugmented(0, min(n, self.examples))

    def unaugmented(self, start: int, stop: int) -> Batch:
        """Training examples [start, stop), in the order of the data set."""
        position = torch.arange(start, stop, device=self.device)
        return Batch(self._normalise(self.train_x[start:stop]), self.train_y[start:stop], position)

    def test(self, start: int, stop: int) -> Batch:
        """Test examples [start, stop), in the order of the data set."""
        position = torch.arange(start, stop, device=self.device)
        return Batch(self._normalise(self.test_x[start:stop]), self.test_y[start:stop], position)

    def score(self, logits: Tensor, y: Tensor) -> Metrics:
        """Sums over the examples, float64: cross-entropy and number of correct answers."""
        loss = F.cross_entropy(logits.to(self.dtype), y, reduction="none").sum(dtype=torch.float64)
        return {"test_loss": loss, "test_accuracy": (logits.argmax(1) == y).sum(dtype=torch.float64)}

    def _place(self, array: NDArray) -> Tensor:
        """On the device, images as (n, h, w, c); the memory is shared with `array` where that is possible."""
        tensor = torch.from_numpy(array)
        return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous().to(self.device)

    def _send(self, places: NDArray) -> Tensor:
        """On the device; pinned on the way to a GPU, so that the host does not wait for the work queued there."""
        tensor = torch.from_numpy(places)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _set_scale(self, arrays: Arrays) -> None:
        """Factor and summand of the normalisation, for every entry of an example: (size,) each."""
        unit = 255.0 if arrays.train_x.dtype.name == "uint8" else 1.0
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (arrays.mean, arrays.std))
        entries = self.train_x[0].numel() // len(mean)
        self.factor = (1 / (unit * std)).repeat(entries).to(self.device, self.dtype)
        self.summand = (-mean / std).repeat(entries).to(self.device, self.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        """(n, h, w, c) or (n, d), as stored -> (n, c, h, w) channels-last or (n, d), in the training dtype."""
        flat = x.flatten(1).to(self.dtype, copy=True)  # the data set itself must not change
        out = torch.addcmul(self.summand, flat, self.factor, out=flat).view(x.shape)
        return out.permute(0, 3, 1, 2) if out.ndim == 4 else out


def _padded(x: Tensor, pad: int, reflect: bool) -> Tensor:
    """`x` (n, h, w, c) with a rim of `pad` pixels that holds zeros, or what lies inside, reflected at the outermost pixel."""
    out = F.pad(x, (0, 0, pad, pad, pad, pad))
    if reflect:
        for side in (out.transpose(1, 2), out):  # columns first, so that the rows' reflection fills the corners
            side[:, :pad] = side[:, pad + 1 : 2 * pad + 1].flip(1)
            side[:, -pad:] = side[:, -2 * pad - 1 : -pad - 1].flip(1)
    return out


def _crop(padded: Tensor, pad: int, where: Tensor) -> Tensor:
    """Windows that are smaller than `padded` by `pad` pixels on each side; `where` (n, 2) in [0, 1): how far down and right.

    Each row of a window is one contiguous run of the padded images, so the whole crop is one gather of n * h runs.
    """
    n, tall, wide, c = padded.shape
    h, w = tall - 2 * pad, wide - 2 * pad
    runs = padded.as_strided((n * tall * wide - w + 1, w * c), (c, 1))  # the run of w pixels that starts at each pixel
    offset = (where * (2 * pad + 1)).long()
    corner = (torch.arange(n, device=padded.device) * tall + offset[:, 0]) * wide + offset[:, 1]
    rows = corner[:, None] + torch.arange(h, device=padded.device) * wide
    return runs.index_select(0, rows.view(-1)).view(n, h, w, c)


def _flip(x: Tensor, mirrored: Tensor) -> Tensor:
    """`x` (n, h, w, c), left-right mirrored where `mirrored` (n,) says so. Both are made: a pick needs no host."""
    n = len(x)
    both = torch.cat((x, x.flip(2)))
    return both.index_select(0, torch.arange(n, device=x.device) + n * mirrored)
