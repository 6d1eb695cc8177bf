"""Synthetic gradients: modules move by guesses of their gradients and do not wait (Jaderberg et al. 2017, arXiv 1608.05343).

The network is cut into modules. At each cut, with h what the module below makes, a synthesiser M guesses dL/dh from h and the
label. With T = dL/dh as it comes back from the module above,

    the module below moves by  lambda T + (1 - lambda) M(h, y),   and M learns to be T by least squares.

T itself is built on the guess at the next cut, and is the true gradient at the last cut alone. Lambda 1 is backpropagation, 0
is fully synthetic, and in between lies BP(lambda). M and T are of the loss summed over examples, so that the batch size does
not change what M has to learn. `queue`: M learns from a batch so many batches later, as where modules run apart. `inputs`: in
training, a module is given a guess of its input (full unlock); synthesisers of inputs learn from what modules make.

With `roles`, each module has workers of its own. The synthesisers as published (`deep`) cost more than the network itself, and
without labels they learn little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.contract import Phase, Plan, PlanError, Strategy, option
from strategies.decoupled.learner import decouple, with_roles
from strategies.decoupled.synthetic import Guess, Kind, Share, Synthetic


@dataclass(frozen=True, slots=True)
class SyntheticGradient(Strategy):
    parts_matter: ClassVar[bool] = True  # deep synthesisers normalise micro-batches
    cuts: list[int] | None = option(
        None,
        "stages behind which the network is cut; []: not at all; none: behind each that has parameters, but the last",
    )
    synthesiser: Kind = option(
        "linear",
        "deep: two hidden layers with batch norm, as published; linear: one layer, 1x1 for images; low_rank: two; affine: "
        "scale and shift of each channel; pooled: linear in the mean over the image",
    )
    label: bool = option(True, "synthesisers see the label")
    hidden: int | None = option(
        None,
        "units of hidden layers of a deep synthesiser (none: 1024, or the image's channels), or rank of a low-rank one "
        "(none: a quarter of the channels)",
        ge=1,
    )
    rate: float | None = option(
        1e-3, "of the synthesisers' Adam, at all batch sizes; none: the network's optimizer at its rate", ge=0
    )
    share: float = option(0.0, "lambda at the end of its change; 0: fully synthetic; 1: backpropagation", ge=0, le=1)
    first_share: float = option(1.0, "lambda at the start of each phase, where share_epochs let it change", ge=0, le=1)
    share_epochs: float = option(0.0, "epochs over which lambda changes evenly from first_share to share", ge=0)
    queue: int = option(0, "batches that a synthesiser learns late", ge=0)
    inputs: bool = option(
        False,
        "in training, modules are given guesses of their inputs, made from the network's, and so need not wait for these",
    )
    roles: bool = option(
        False,
        "each module on workers of its own, at most `queue` batches ahead of the next: `cluster.workers` is a multiple of "
        "the modules; else all modules on each worker",
    )
    bf16_messages: bool = option(False, "with roles: activations and gradients are sent rounded to bf16")

    def __post_init__(self) -> None:
        Strategy.__post_init__(self)
        if self.hidden is not None and self.synthesiser not in ("deep", "low_rank"):
            raise PlanError(
                f"SyntheticGradient: a {self.synthesiser} synthesiser has no hidden layer: leave out `hidden`"
            )
        if self.first_share != 1.0 and not self.share_epochs:
            raise PlanError(
                "SyntheticGradient: lambda does not start at first_share unless share_epochs let it change: state "
                "`share_epochs`, or leave out `first_share`"
            )
        if self.roles and self.inputs:
            raise PlanError(
                "SyntheticGradient: guessed inputs are for modules on the same worker: leave out `inputs` or `roles`"
            )

    def edit(self, plan: Plan) -> Plan:
        plan = with_roles(plan, self, self.cuts) if self.roles else plan
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        guess = Guess(self.synthesiser, self.label, self.hidden, self.rate)
        share = Share(self.first_share, self.share, self.share_epochs)
        what = {"guess": guess, "share": share, "queue": self.queue, "guess_inputs": self.inputs}
        how = {"ahead": self.queue if self.roles else None, "bf16_messages": self.bf16_messages}
        return decouple(phase, self, self.cuts, Synthetic, **what, **how)
