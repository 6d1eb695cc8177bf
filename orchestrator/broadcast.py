"""What rank 0 reads from disk, told to all ranks: files need be in one place only, and no two ranks see different ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save

from orchestrator.checkpoint import decode, encode
from strategies.contract import Worker


def from_rank_0(worker: Worker, read: Callable[[], Any]) -> Any:
    """What `read()` gives on rank 0, decoded as a checkpoint is; None if it gives None. Only rank 0 calls it."""
    value = read() if worker.rank == 0 else None
    if worker.size == 1:
        return value
    blob = _packed(value) if value is not None else b""
    length = int(worker.sum_(torch.tensor(len(blob), device=worker.device)).item())
    if not length:
        return None
    sent = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.zeros(length, dtype=torch.uint8)
    received = worker.sum_(sent.to(worker.device)).cpu()  # the other ranks add zeros
    return value if worker.rank == 0 else _unpacked(received.numpy().tobytes())


def _packed(value: Any) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(encode(value, tensors))
    return save(tensors, {"tree": tree})


def _unpacked(blob: bytes) -> Any:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return decode(json.loads(header["__metadata__"]["tree"]), load(blob))
