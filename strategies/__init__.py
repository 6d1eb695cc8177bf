"""Training methods. `CATALOGUE` is what recipes can name: recipe key = file name = class in snake case."""

from __future__ import annotations

from strategies.adascale import Adascale
from strategies.batch_growth import BatchGrowth
from strategies.contract import Strategy
from strategies.ema import Ema
from strategies.ghost_batch_norm import GhostBatchNorm
from strategies.gradient_clipping import GradientClipping
from strategies.label_smoothing import LabelSmoothing
from strategies.lamb import Lamb
from strategies.lars import Lars
from strategies.mixup import Mixup
from strategies.muon import Muon
from strategies.noise_scale import NoiseScale
from strategies.swa import Swa

CATALOGUE: dict[str, type[Strategy]] = {
    "adascale": Adascale,
    "batch_growth": BatchGrowth,
    "ema": Ema,
    "ghost_batch_norm": GhostBatchNorm,
    "gradient_clipping": GradientClipping,
    "label_smoothing": LabelSmoothing,
    "lamb": Lamb,
    "lars": Lars,
    "mixup": Mixup,
    "muon": Muon,
    "noise_scale": NoiseScale,
    "swa": Swa,
}
