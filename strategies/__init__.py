"""Training methods. `CATALOGUE` is what recipes can name: recipe key = file name = class in snake case."""

from __future__ import annotations

from strategies.adascale import Adascale
from strategies.batch_growth import BatchGrowth
from strategies.bias_rate import BiasRate
from strategies.contract import Strategy
from strategies.delayed_gradient import DelayedGradient
from strategies.dirac import Dirac
from strategies.ema import Ema
from strategies.fop import Fop
from strategies.ghost_batch_norm import GhostBatchNorm
from strategies.gradient_clipping import GradientClipping
from strategies.gradient_noise_convolution import GradientNoiseConvolution
from strategies.kernel_rescale import KernelRescale
from strategies.label_smoothing import LabelSmoothing
from strategies.lamb import Lamb
from strategies.lars import Lars
from strategies.local_loss import LocalLoss
from strategies.lookahead import Lookahead
from strategies.loss_smoothing import LossSmoothing
from strategies.mixup import Mixup
from strategies.muon import Muon
from strategies.natural_gradient import NaturalGradient
from strategies.ng_sgd import NgSgd
from strategies.noise_scale import NoiseScale
from strategies.parameter_averaging import ParameterAveraging
from strategies.patch_affine import PatchAffine
from strategies.pipeline import Pipeline
from strategies.post_local_sgd import PostLocalSgd
from strategies.progressive_resize import ProgressiveResize
from strategies.shampoo import Shampoo
from strategies.soap import Soap
from strategies.stage_wise import StageWise
from strategies.swa import Swa
from strategies.synthetic_gradient import SyntheticGradient
from strategies.test_time_augmentation import TestTimeAugmentation
from strategies.whitening import Whitening

CATALOGUE: dict[str, type[Strategy]] = {
    "adascale": Adascale,
    "batch_growth": BatchGrowth,
    "bias_rate": BiasRate,
    "delayed_gradient": DelayedGradient,
    "dirac": Dirac,
    "ema": Ema,
    "fop": Fop,
    "ghost_batch_norm": GhostBatchNorm,
    "gradient_clipping": GradientClipping,
    "gradient_noise_convolution": GradientNoiseConvolution,
    "kernel_rescale": KernelRescale,
    "label_smoothing": LabelSmoothing,
    "lamb": Lamb,
    "lars": Lars,
    "local_loss": LocalLoss,
    "lookahead": Lookahead,
    "loss_smoothing": LossSmoothing,
    "mixup": Mixup,
    "muon": Muon,
    "natural_gradient": NaturalGradient,
    "ng_sgd": NgSgd,
    "noise_scale": NoiseScale,
    "parameter_averaging": ParameterAveraging,
    "patch_affine": PatchAffine,
    "pipeline": Pipeline,
    "post_local_sgd": PostLocalSgd,
    "progressive_resize": ProgressiveResize,
    "stage_wise": StageWise,
    "shampoo": Shampoo,
    "soap": Soap,
    "swa": Swa,
    "synthetic_gradient": SyntheticGradient,
    "test_time_augmentation": TestTimeAugmentation,
    "whitening": Whitening,
}
