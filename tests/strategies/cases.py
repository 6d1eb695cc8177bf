"""One case per strategy for the laws: a setting that acts, and the neutral one that must equal the baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from strategies.backprop import amend
from strategies.contract import ModelSpec, Phase, Plan
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.ng_sgd import NgSgd
from strategies.optimizers import AdamW
from strategies.rate import Rate, Steps
from tests.strategies.harness import IMAGES, WIDTH, FlatNet


def as_it_is(plan: Plan) -> Plan:
    return plan


def with_adamw(plan: Plan) -> Plan:
    def change(phase: Phase) -> Phase:
        return amend(phase, plan, optimizer=lambda old: AdamW(weight_decay=1e-2))

    return plan.map(change)


def with_natural_gradient(plan: Plan) -> Plan:
    return NaturalGradient(damping=0.1, eager=1, factors_every=2, inverses_every=3).edit(plan)


def with_large_eps(plan: Plan) -> Plan:
    """AdamW where rounding errors are far below eps, else it steps along them where there is no gradient."""
    return plan.map(lambda phase: amend(phase, plan, optimizer=lambda old: AdamW(eps=0.1)))


def with_step_decay(plan: Plan) -> Plan:
    rate = Rate(0.1, warmup=0.5, decay=Steps((0.5,), 0.5))
    return plan.map(lambda phase: amend(phase, plan, rate=lambda old: rate))


def normalised_net(inputs: tuple[int, ...], classes: int) -> Net:
    stage = nn.Sequential(nn.Linear(math.prod(inputs), 8), nn.BatchNorm1d(8), nn.Tanh())
    return FlatNet([stage], head=nn.Linear(8, classes))


def with_batch_norm(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(normalised_net)))


def convolved_net(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Conv2d(inputs[0], 8, 2), nn.Tanh())
    second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
    return Net([first, second], nn.Flatten(), nn.Linear(16, classes))


def layer_normed_net(inputs: tuple[int, ...], classes: int) -> Net:
    stage = nn.Sequential(nn.Linear(math.prod(inputs), 8), nn.LayerNorm(8), nn.Tanh())
    return FlatNet([stage], head=nn.Linear(8, classes))


def with_layer_norm(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(layer_normed_net)))


def with_convolutions(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(convolved_net)))


def with_factors(plan: Plan) -> Plan:
    """NG-SGD on convolutions."""
    return NgSgd(history_batches=5).edit(with_convolutions(plan))


def pooled_net(inputs: tuple[int, ...], classes: int, kernel: int) -> Net:
    convolution = nn.Conv2d(inputs[0], 16, kernel, padding=kernel // 2)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net([nn.Sequential(convolution, nn.Tanh())], pool, nn.Linear(16, classes))


def with_large_kernels(plan: Plan) -> Plan:
    model = ModelSpec(pooled_net, (("kernel", 5),))
    return plan.map(lambda phase: dataclasses.replace(phase, model=model))


def staged_net(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs), 8), nn.Tanh())
    return Net([first, nn.Sequential(nn.Linear(8, 8), nn.Tanh())], head=nn.Linear(8, classes))


def with_stages(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(staged_net)))


def normalised_stages(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs), 8), nn.BatchNorm1d(8), nn.Tanh())
    return Net([first, nn.Sequential(nn.Linear(8, 8), nn.Tanh())], head=nn.Linear(8, classes))


def with_normalised_stages(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(normalised_stages)))


@dataclass(frozen=True)
class Case:
    acts: dict[str, Any]  # options under which the method changes the result
    neutral: dict[str, Any]  # options under which it must not
    base: Callable[[Plan], Plan] = as_it_is  # makes of the usual baseline the one that the method works on
    inputs: tuple[int, ...] = (WIDTH,)  # shape of an example: IMAGES, or flat
    micro: int = 64  # examples per forward pass where a law does not say otherwise: whole batches
    micro_batches: tuple[tuple[int, int], ...] = ((12, 5), (11, 4))  # law 2: (batch, micro-batch); 12 = 4 + 4 + 4
    shares: tuple[tuple[int, int], ...] = ((12, 2), (11, 2))  # law 3: the same; 11: shares of 5 and 6
    workers: int = 1  # on which it acts: 1 or 2
    measures: bool = False  # changes what is logged, and not the weights
    repeats: bool = True  # law 8; not where the examples of a batch are normalised together


CASES: dict[str, Case] = {
    "adascale": Case(
        acts={"per": 3},
        neutral={"per": 12},
        micro=6,
        micro_batches=(),  # the gain is estimated from parts of a batch, so it depends on them
        shares=((12, 6), (11, 6)),  # with the same parts, who holds them does not matter
        repeats=False,  # twice the batch is twice the scale
    ),
    "batch_growth": Case(acts={}, neutral={"largest": 1}, base=with_step_decay),
    "bias_rate": Case(acts={"factor": 4}, neutral={"factor": 1}, base=with_layer_norm),
    "delayed_gradient": Case(
        acts={"cuts": [1], "variant": "fdg", "shrink": 0.5}, neutral={"cuts": []}, base=with_stages
    ),
    "dirac": Case(acts={}, neutral={"share": 0}, base=with_convolutions, inputs=IMAGES),
    "ema": Case(acts={"half_life": 0.5}, neutral={"half_life": 0.0}),
    "fop": Case(
        acts={},
        neutral={"strength": 0.0},
        base=with_natural_gradient,
        micro=6,
        micro_batches=(),  # halves are made of parts of a batch, so results depend on them
        shares=((12, 6), (11, 6)),  # with the same parts, who holds them does not matter
        repeats=False,
    ),
    "ghost_batch_norm": Case(
        acts={"size": 3},
        neutral={"size": 1000},
        base=with_batch_norm,
        micro_batches=((12, 6), (12, 3)),  # parts are those of the whole batch where bounds coincide
        shares=((12, 3),),
        repeats=False,
    ),
    "gradient_clipping": Case(acts={"norm": 0.05}, neutral={"norm": 1e9}),
    "gradient_noise_convolution": Case(
        acts={"scale": 0.5},
        neutral={"scale": 0.0},
        workers=2,
        shares=(),  # a worker alone has no noise
    ),
    "kernel_rescale": Case(
        acts={"shares": [0.3], "kernels": [3]}, neutral={"shares": []}, base=with_large_kernels, inputs=IMAGES
    ),
    "label_smoothing": Case(acts={"amount": 0.2}, neutral={"amount": 0.0}),
    "lamb": Case(acts={}, neutral={"trust": False}, base=with_adamw),
    "lars": Case(acts={"trust": 0.1}, neutral={"trust": 0.0, "form": "torch"}),
    "local_loss": Case(acts={"cuts": [1]}, neutral={"cuts": []}, base=with_stages),
    "lookahead": Case(acts={"every": 2, "power": 3}, neutral={"every": 3, "alpha": 1}),
    "loss_smoothing": Case(
        acts={"alpha": 0.4, "erase": 0.5, "sigma": 0.1, "draws": 2, "antithetic": True, "anneal": "linear"},
        neutral={"alpha": 0.0},
        inputs=IMAGES,
        repeats=False,  # shares and holes are drawn per example
    ),
    "mixup": Case(acts={"alpha": 0.4}, neutral={"alpha": 0.0}),
    "muon": Case(acts={"rate": 0.5}, neutral={"smallest": 1000}),
    "natural_gradient": Case(
        acts={"damping": 0.1, "eager": 1, "factors_every": 2, "inverses_every": 3},
        neutral={"largest": 0},
        base=with_convolutions,
        inputs=IMAGES,
    ),
    "ng_sgd": Case(
        acts={"history_batches": 5, "layer_change": 0.02},  # a memory in examples would see twice the batch (law 8)
        neutral={"rank_in": 0, "rank_out": 0, "layer_change": None, "total_change": None},
    ),
    "noise_scale": Case(acts={}, neutral={}, micro=6, measures=True),
    "parameter_averaging": Case(
        acts={"steps": 4},
        neutral={"steps": 1, "first": "average"},
        workers=2,
        shares=(),  # workers that step alone are not one worker
    ),
    "patch_affine": Case(
        acts={}, neutral={"largest": 0}, base=with_factors, inputs=IMAGES
    ),  # by itself it changes nothing
    "pipeline": Case(
        acts={"cuts": [1], "roles": False, "micro_batches": 3},
        neutral={"cuts": [], "micro_batches": 1},
        base=with_normalised_stages,  # else it is the baseline
        micro_batches=(),  # normalised are the parts that follow each other
        shares=(),
        repeats=False,
    ),
    "post_local_sgd": Case(
        acts={"start": 0.25, "period": 4},
        neutral={"period": 1},
        workers=2,
        shares=(),  # workers that step alone are not one worker
    ),
    "progressive_resize": Case(
        acts={"increment": 1, "steps": 1, "delay": 0.3},
        neutral={"scale": 1.0},
        base=with_large_kernels,
        inputs=IMAGES,
    ),
    "stage_wise": Case(acts={"cuts": [1]}, neutral={"cuts": []}, base=with_stages),
    "shampoo": Case(acts={"every": 2, "eps": 1e-3}, neutral={"power": 0.0}),  # smaller ones magnify rounding errors
    "soap": Case(acts={"every": 2}, neutral={"largest": 1}, base=with_large_eps),
    "swa": Case(acts={"start": 0.5}, neutral={"start": 1.0}),
    "synthetic_gradient": Case(acts={"cuts": [1], "rate": 0.01, "queue": 1}, neutral={"cuts": []}, base=with_stages),
    "test_time_augmentation": Case(
        acts={"shift": 1}, neutral={"mirror": False}, base=as_it_is, inputs=IMAGES, measures=True
    ),
    "whitening": Case(acts={}, neutral={"examples": 0}, base=with_convolutions, inputs=IMAGES),
}
