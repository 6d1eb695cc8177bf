"""Finished phases under the hash of all that determined them: what shares a past with one is spared training it again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from orchestrator.files import write_atomic, write_json
from orchestrator.identity import canonical, digest
from strategies.contract import Plan


@dataclass(frozen=True, slots=True)
class Record:
    weights: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]  # the phase's part of metrics.jsonl
    progress: dict[str, Any]  # the trainer's progress at the end of the phase


def key(plan: Plan, index: int, context: dict[str, Any]) -> str:
    """The name of phase `index`: a hash of the plan up to and with it, and of what else determines its result."""
    return digest({"phases": canonical(plan.phases[: index + 1]), "context": context})


@dataclass(frozen=True, slots=True)
class PhaseStore:
    root: Path

    def get(self, name: str) -> Record | None:
        folder = self.root / name
        if not (folder / "record.json").exists():
            return None
        record = json.loads((folder / "record.json").read_text())
        weights = load((folder / "weights.safetensors").read_bytes())
        return Record(weights, record["rows"], record["progress"])

    def put(self, name: str, record: Record) -> None:
        """Whole or not at all; a phase that is there already stays as it is."""
        final, part = self.root / name, self.root / f".{name}.{os.getpid()}"
        weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in record.weights.items()}
        part.mkdir(parents=True, exist_ok=True)
        write_atomic(part / "weights.safetensors", save(weights))
        write_json(part / "record.json", {f.name: getattr(record, f.name) for f in dataclasses.fields(record)[1:]})
        try:
            os.rename(part, final)
        except OSError:
            shutil.rmtree(part)
