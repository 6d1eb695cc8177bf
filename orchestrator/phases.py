"""Finished phases under the hash of all that determined them: what shares a past with one is spared training it again."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from orchestrator import checkpoint
from orchestrator.files import read_json, sync_directory, unfinished, write_atomic, write_json
from orchestrator.identity import phase_key as key

__all__ = ["PhaseStore", "Record", "key"]


@dataclass(frozen=True, slots=True)
class Record:
    weights: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]  # the phase's part of metrics.jsonl
    progress: dict[str, Any]  # the trainer's progress at the end of the phase
    state: Any = None  # of the learner, decoded, where the phase hands it on


@dataclass(frozen=True, slots=True)
class PhaseStore:
    root: Path

    def get(self, name: str) -> Record | None:
        """None if the phase is not there, or is damaged (then with a warning)."""
        folder = self.root / name
        if not folder.exists():
            return None
        try:
            record, blob = read_json(folder / "record.json"), (folder / "weights.safetensors").read_bytes()
            if hashlib.sha256(blob).hexdigest() != record["sha256"]:
                raise ValueError("weights.safetensors differs from its checksum")
            content = checkpoint.decode(record["content"], load(blob))
            return Record(content["weights"], record["rows"], record["progress"], content["state"])
        except checkpoint.DAMAGE as error:
            warnings.warn(f"{folder}: damaged phase passed over ({error})", stacklevel=2)
            return None

    def put(self, name: str, record: Record) -> None:
        """Whole or not at all; a phase that is there already stays as it is."""
        if self.get(name) is not None:
            return
        final, part = self.root / name, self.root / f".{name}.{os.getpid()}"
        shutil.rmtree(final, ignore_errors=True)
        tensors: dict[str, torch.Tensor] = {}
        content = checkpoint.encode({"weights": dict(record.weights), "state": record.state}, tensors)
        blob = save(tensors)
        facts = {"rows": record.rows, "progress": record.progress, "content": content}
        facts |= {"sha256": hashlib.sha256(blob).hexdigest()}
        with unfinished(part):
            write_atomic(part / "weights.safetensors", blob)
            write_json(part / "record.json", facts)
            self._move(part, final)

    def _move(self, part: Path, final: Path) -> None:
        try:
            os.rename(part, final)
            sync_directory(self.root)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not final.exists():  # else another gang finished the same phase first
                raise
