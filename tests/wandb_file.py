"""Reads the `.wandb` files of offline runs: 32 KiB blocks of checksummed records, each a protobuf message."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(data: bytes) -> Iterator[bytes]:
    """Whole records; a file that was cut short ends where it was cut."""
    assert struct.unpack("<4sHB", data[:FILE_HEADER]) == (b":W&B", 0xBEE1, 0)
    at, whole = FILE_HEADER, b""
    while at + CHUNK_HEADER <= len(data):
        if BLOCK - at % BLOCK < CHUNK_HEADER:  # the end of a block is padded
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + CHUNK_HEADER])
        chunk = data[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
        if len(chunk) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        at += CHUNK_HEADER + length
        whole = chunk if kind in (FULL, FIRST) else whole + chunk
        if kind in (FULL, LAST):
            yield whole


@dataclass
class Run:
    record: Any  # the first `run` record: id, group, name, job type, config
    configs: int  # records that set the config
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_code: int | None  # None: the run never ended


def read(path: Path) -> Run:
    records = [Record.FromString(payload) for payload in payloads(path.read_bytes())]
    runs = [r.run for r in records if r.HasField("run")]
    exits = [r.exit.exit_code for r in records if r.HasField("exit")]
    changes = [r.config for r in records if r.HasField("config")]
    summaries = [r.summary for r in records if r.HasField("summary")]
    return Run(
        record=runs[0] if runs else None,
        configs=sum(bool(c.update) for c in [*(r.config for r in runs), *changes]),
        rows=[items(r.history.item) for r in records if r.HasField("history")],
        summary={k: v for s in summaries for k, v in items(s.update).items()},
        exit_code=exits[-1] if exits else None,
    )


def items(pairs: Any) -> dict[str, Any]:
    return {pair.key or "/".join(pair.nested_key): json.loads(pair.value_json) for pair in pairs}
