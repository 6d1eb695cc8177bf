"""Gradients that take several passes over the same examples, and what sees each pass by itself. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from strategies.backprop import Gradient, Step


def inside(old: Gradient, wrap: Callable[[Gradient], Gradient]) -> Gradient:
    """`wrap` of what is innermost in `old`: of a gradient that takes passes of an `inner` one, `wrap` sees each."""
    inner: Gradient | None = getattr(old, "inner", None)
    if inner is None:
        return wrap(old)
    taking: Any = old
    return dataclasses.replace(taking, inner=inside(inner, wrap))


def passes(gradient: Gradient | None) -> int:
    """Backward passes that a gradient takes over each micro-batch."""
    inner: Gradient | None = getattr(gradient, "inner", None)
    own: int = getattr(gradient, "passes", 1)
    return own * passes(inner) if inner else own


def share(step: Step) -> float:
    """Of one pass among all passes over its examples: 1 over their number, up to rounding."""
    return step.weight * step.clock.batch / (step.worker.size * len(step.batch))
