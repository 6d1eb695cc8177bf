"""Seconds of work, that of a GPU included."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds between laps, with the device's work included."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
