"""Random numbers that are a pure function of (seed, tag, position): the same for any split of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.contract import mix

# The constants of SplitMix64, as the signed integers that hold the same bits.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def uniform(seed: int, tag: str, positions: Tensor, k: int = 1) -> Tensor:
    """(n,) int64 positions -> (n, k) float64 in [0, 1), on the device of `positions`."""
    counter = positions[:, None] * k + torch.arange(k, device=positions.device)
    z = (counter + 1) * GOLDEN + mix(seed, tag)  # int64 wraps, as the hash wants
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """`z` moved right as if it were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
