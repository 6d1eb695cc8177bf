"""One case per strategy for the laws: a setting that acts, and the neutral one that must equal the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    acts: dict[str, Any]  # options under which the method changes the result
    neutral: dict[str, Any]  # options under which it must not


CASES: dict[str, Case] = {
    "ema": Case(acts={"half_life": 0.5}, neutral={"half_life": 0.0}),
    "gradient_clipping": Case(acts={"norm": 0.05}, neutral={"norm": 1e9}),
    "label_smoothing": Case(acts={"amount": 0.2}, neutral={"amount": 0.0}),
}
