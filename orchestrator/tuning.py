"""What is measured once per machine, and then remembered: whether bf16 pays, and which convolutions gain by patches.

The file `tuning.json` in the cache ($BIGBATCH_HOME, or ~/.cache/bigbatch) holds what was measured; remove it to measure anew.
A machine whose cache cannot be written gets torch's own operations: a choice that cannot be remembered would not be the
same after a resume.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.environment import cpu_model
from orchestrator.files import Damaged, read_json, write_json
from orchestrator.workloads.files import home
from strategies.contract import Batch, Worker

if TYPE_CHECKING:
    from torch import Tensor, nn

WORTH = 1.1  # times as fast, or nothing is changed
LARGEST_MAP = 64  # output positions: beyond them patches never paid
EXAMPLES = 128  # a convolution is timed with at most so many; patches of fewer stay in cache, and gain more
ROUNDS = 3


def bf16_pays() -> bool:
    """Whether a convolution with batch norm trains faster under bf16 autocast on this machine's CPU, on one thread."""
    return _gain("bf16", _bf16_gain) >= WORTH


def tune(net: nn.Module, sample: Callable[[int], Batch], local: int, worker: Worker, choice: bool | str) -> int:
    """Lets convolutions of `net` go by patches: those that gain by it ("auto"), all that can (True), or none (False).

    `sample(n)` gives n examples; `local` are those of one forward pass. All workers do as rank 0 measured. Returns how many.
    """
    from torch import tensor

    from kernels.patches import by_patches, can

    found = [m for m in net.modules() if can(m)] if choice and worker.device.type == "cpu" else []
    if not found:
        return 0
    chosen = tensor([1.0] * len(found))
    if choice == "auto":
        gains = _gains(net, found, sample, local, worker) if worker.rank == 0 else [0.0] * len(found)
        chosen = worker.sum_(tensor([float(gain >= WORTH) for gain in gains]))
    picked = [conv for conv, use in zip(found, chosen.tolist(), strict=True) if use]
    for conv in picked:
        by_patches(conv)
    return len(picked)


def _gains(
    net: nn.Module, convolutions: list[Any], sample: Callable[[int], Batch], local: int, worker: Worker
) -> list[float]:
    """How many times as fast each convolution is by patches, at the size and in the precision in which it will run."""
    import torch

    examples = min(local, EXAMPLES)
    with worker.autocast():
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else next(net.parameters()).dtype
    gains = []
    for conv, shape in zip(convolutions, _inputs(net, convolutions, sample(1).x), strict=True):
        size = (examples, *shape)
        form = f"{size} to {conv.out_channels}, kernel {conv.kernel_size} stride {conv.stride} padding {conv.padding}"
        key = f"patches {dtype} threads {torch.get_num_threads()} {form}"
        small = shape and _positions(conv, shape) <= LARGEST_MAP
        gains.append(_gain(key, lambda c=conv, s=size: _patch_gain(c, s, dtype)) if small else 0.0)  # type: ignore[misc]
    return gains


def _inputs(net: nn.Module, modules: list[nn.Module], x: Tensor) -> list[tuple[int, ...]]:
    """(c, h, w) of what each module is given for the examples `x`; () for one that is not called. The net is left as it was."""
    import torch

    seen: dict[nn.Module, tuple[int, ...]] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, given: seen.update({m: tuple(given[0].shape[1:])})) for m in modules
    ]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(x)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return [seen.get(m, ()) for m in modules]


def _positions(conv: Any, shape: tuple[int, ...]) -> int:
    geometry = zip(shape[1:], conv.padding, conv.kernel_size, conv.stride, strict=True)
    high, wide = ((side + 2 * p - k) // s + 1 for side, p, k, s in geometry)
    return high * wide


# ------------------------------------------------------------------------------------------------------------ measuring


def _patch_gain(conv: Any, size: tuple[int, ...], dtype: Any) -> float:
    """Seconds of torch's forward and backward pass over those by patches."""
    import torch
    from torch.nn.functional import conv2d

    from kernels.patches import PatchConvolution

    def leaf(shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, 0.1, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()

    x, weight = leaf(size), leaf(tuple(conv.weight.shape))

    def run(way: Callable[..., Tensor]) -> None:
        out = way(x, weight, conv.stride, conv.padding)
        torch.autograd.grad(out, (x, weight), out.detach())

    ways = (lambda x, weight, stride, padding: conv2d(x, weight, None, stride, padding), PatchConvolution.apply)
    plain, ours = _fastest([partial(run, way) for way in ways])
    return plain / ours


def _bf16_gain() -> float:
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        block = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.full((16, 64, 16, 16), 0.1).to(memory_format=torch.channels_last).requires_grad_()

        def run(enabled: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled):
                out = block(x)
            torch.autograd.grad(out.float().sum(), [x, *block.parameters()])

        plain, ours = _fastest([lambda: run(False), lambda: run(True)])
    finally:
        torch.set_num_threads(threads)
    return plain / ours


def _fastest(ways: list[Callable[[], Any]]) -> list[float]:
    """The least seconds of each, taken in turns."""
    best = [float("inf")] * len(ways)
    for _ in range(ROUNDS + 1):  # the first round warms up, and is never the fastest
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


# ------------------------------------------------------------------------------------------------------------ remembering


def _gain(key: str, measure: Callable[[], float]) -> float:
    """What `measure` gave the first time on this machine; 0 if that cannot be remembered."""
    key = f"{cpu_model()}, torch {_torch_version()}: {key}"
    path = home().parent / "tuning.json"
    try:
        with _locked(path.with_suffix(".lock")):
            known = _read(path)
            if key not in known:
                known[key] = round(measure(), 3)
                write_json(path, known)
            return known[key]
    except OSError:
        return 0.0


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def _read(path: Path) -> dict[str, float]:
    try:
        known = read_json(path)
    except (FileNotFoundError, Damaged):
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two that measure at once would disturb each other, and might differ
        yield
