"""Checkpoints: States to safetensors + JSON in a directory that is whole or absent, and back. No pickle anywhere.

A checkpoint is `step_<n>/` with `tensors.safetensors`, `state.json` and `manifest.json` (SHA-256 of both). It is written
under another name, flushed to disk and renamed; a damaged one is told by its checksums and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from orchestrator.files import sync_directory, unfinished, write_atomic
from strategies.contract import State

FILES = ("tensors.safetensors", "state.json")
DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # what reading such files may raise


def encode(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """`value` as JSON data, its tensors put aside into `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, State):
        return {"state": encode(value.saved, tensors, path)}
    if isinstance(value, dict):
        return {"dict": [[k, encode(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [encode(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if hasattr(value, "state_dict"):
        return {"object": encode(value.state_dict(), tensors, path)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved; State.saved holds tensors, numbers, text, "
                    "lists, dicts, States and what has a state_dict")  # fmt: skip


def decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `encode` was given, objects as their state_dicts."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: decode(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [decode(v, tensors) for v in content]
        return tuple(items) if kind == "tuple" else items
    return decode(content, tensors)  # state, object


def snapshot(value: Any) -> Any:
    """A copy of `value` on the CPU, decoded, which nothing changes."""
    tensors: dict[str, torch.Tensor] = {}
    return decode(encode(value, tensors), tensors)


def restore(old: Any, new: Any) -> Any:
    """`new` (decoded) in the place of `old`: tensors and objects are filled where they stand, since layers refer to them."""
    if isinstance(old, State):
        old.saved = restore(old.saved, new)
        return old
    if isinstance(old, torch.Tensor) and old.shape == new.shape:
        with torch.no_grad():
            return old.copy_(new)
    if isinstance(old, dict) and not hasattr(old, "state_dict"):
        return {k: restore(old.get(k), v) for k, v in new.items()}
    if isinstance(old, list | tuple) and len(old) == len(new):
        return type(old)(restore(a, b) for a, b in zip(old, new, strict=True))
    if hasattr(old, "load_state_dict"):
        old.load_state_dict(new)
        return old
    return new


def save(folder: Path, step: int, content: dict[str, Any], keep: int = 2) -> Path:
    """Write `content` as `folder/step_<step>`, then delete all but the newest `keep` up to there: what claims a later step was
    passed over when this run began. Nobody else writes in `folder`."""
    tensors: dict[str, torch.Tensor] = {}
    tree = encode(content, tensors)
    blobs = (save_tensors(tensors), json.dumps(tree).encode())
    final = folder / _name(step)
    part = folder / f".part_{step:09d}"
    with unfinished(part):
        for name, blob in zip(FILES, blobs, strict=True):
            write_atomic(part / name, blob)
        write_atomic(part / "manifest.json", json.dumps({n: _sha(b) for n, b in zip(FILES, blobs, strict=True)}))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(part, final)
    sync_directory(folder)
    there = list(_newest_first(folder))
    kept = [path for path in there if path.name <= final.name][:keep]
    abandoned = folder.glob(".part_*")  # by a writer that was killed
    for path in {*there, *abandoned} - {*kept}:
        shutil.rmtree(path, ignore_errors=True)
    return final


def load(folder: Path, last: int | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint, decoded, or None; warns about each one that it passes over, damaged or later than step
    `last`, at which the rows of metrics end."""
    for path in _newest_first(folder):
        if last is not None and path.name > _name(last):
            warnings.warn(f"{path}: checkpoint passed over: the rows of metrics end at step {last}", stacklevel=2)
            continue
        try:
            return read(path)
        except DAMAGE as error:
            warnings.warn(f"{path}: damaged checkpoint passed over ({error})", stacklevel=2)
    return None


def read(path: Path) -> dict[str, Any]:
    """One checkpoint, decoded. Raises one of DAMAGE: ValueError if a checksum differs, OSError if a file is missing."""
    manifest = json.loads((path / "manifest.json").read_text())
    blobs = {name: (path / name).read_bytes() for name in FILES}
    for name, blob in blobs.items():
        if _sha(blob) != manifest[name]:
            raise ValueError(f"{name} differs from its checksum")
    return decode(json.loads(blobs["state.json"]), load_tensors(blobs["tensors.safetensors"]))


def _name(step: int) -> str:
    return f"step_{step:09d}"


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step_*"), reverse=True))


def _sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
