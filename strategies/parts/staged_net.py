"""The network of one part of `stage_wise`: stages that were trained before, those that are trained now, and a head.

Names in the state_dict are those of the whole network, so that each part takes over from the one before by name, and the
last one holds the weights of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from strategies.contract import ModelSpec, PlanError, Weights
from strategies.net import Net
from strategies.parts.frozen import chunk, through
from strategies.stage_wise import first, listed

if TYPE_CHECKING:
    from strategies.stage_wise import Part


class StagedNet(Net):
    """`stages[:frozen]` are in evaluation mode and take no gradient. Where the network reads features, they are its input.

    With earlier heads, evaluation gives the mean of all heads' logits, each head weighing `growth` times the one before.
    With a decoder, training gives logits of features that pass no gradient on, and in one more column each example's mean
    squared error of reconstruction.
    """

    def __init__(
        self,
        whole: Net,
        ends: Sequence[int],
        before: Iterable[nn.Module] = (),
        growth: float = 1.0,
        decoder: nn.Module | None = None,
        reads_features: bool = False,
    ):
        super().__init__(list(whole.stages)[: ends[-1]], whole.pool, whole.head)
        self.inherit_factors(whole)
        self.ends, self.frozen = tuple(ends), ends[-2] if len(ends) > 1 else 0
        self.before = nn.ModuleList(before)
        self.growth, self.reads_features = growth, reads_features
        if decoder is not None:
            self.decoder = decoder
        for module in self._done():
            module.requires_grad_(False).eval()

    @property
    def sample(self) -> int:
        computed = self.frozen and not self.reads_features
        return chunk(next(self.parameters()).device) if computed else super().sample

    def train(self, mode: bool = True) -> StagedNet:
        super().train(mode)
        for module in self._done():
            module.eval()
        return self

    def _done(self) -> Iterator[nn.Module]:
        """What is trained no more."""
        yield from list(self.stages)[: self.frozen]
        yield from self.before

    def forward(self, x: Tensor) -> Tensor:
        if len(self.before) and not self.training:
            return self._mean_logits(x)
        given = x if self.reads_features else through(list(self.stages)[: self.frozen], x)
        features = given
        for stage in list(self.stages)[self.frozen :]:
            features = stage(features)
        if not (hasattr(self, "decoder") and self.training):
            return self.head(self.pool(features))
        error = (self.decoder(features) - given).square().flatten(1).mean(1, keepdim=True)
        return torch.cat([self.head(self.pool(features.detach())), error], 1)

    def _mean_logits(self, x: Tensor) -> Tensor:
        logits: list[Tensor] = []
        for begin, end in pairwise((0, *self.ends)):
            for stage in list(self.stages)[begin:end]:
                x = stage(x)
            head = self.before[len(logits)] if len(logits) < len(self.before) else nn.Sequential(self.pool, self.head)
            logits.append(head(x))
        weights = [self.growth**i for i in range(len(logits))]
        return torch.stack([w * one for w, one in zip(weights, logits, strict=True)]).sum(0) / sum(weights)

    def take(self, old: Weights) -> None:
        """What the part before has trained. Its head becomes the last of the earlier heads, where these count."""
        own = tuple(f"stages.{i}." for i in range(self.frozen))
        found = {name: value for name, value in old.items() if name.startswith(own)}
        if len(self.before):
            last = f"before.{len(self.before) - 1}."
            found |= {name: value for name, value in old.items() if name.startswith("before.")}
            found |= {last + name.replace("pool.", "0.", 1): v for name, v in old.items() if name.startswith("pool.")}
            found |= {last + name.replace("head.", "1.", 1): v for name, v in old.items() if name.startswith("head.")}
        left = set(self.load_state_dict(found, strict=False).missing_keys)
        assert not any(name.startswith((*own, "before.")) for name in left), (
            "the part before lacks what this one freezes"
        )


# ------------------------------------------------------------------------------------------------------------ building


def build(inputs: tuple[int, ...], classes: int, model: ModelSpec, part: Part) -> StagedNet:
    """Raises PlanError where the network cannot be cut as the part has it."""
    net = model(inputs, classes)
    if type(net).forward is not Net.forward:
        raise PlanError(f"stage_wise cuts a row of stages, but {type(net).__name__} has a forward pass of its own")
    count = len(net.stages)
    ends = [count if end is None else end for end in part.ends]
    if ends[-1] > count or (ends[-1] == count and None not in part.ends and listed(model) is None):
        raise PlanError(f"stage_wise: a cut behind stage {ends[-1]} leaves nothing: the network has {count} stages")
    shapes = list(_shapes(net, inputs, ends))
    before = [nn.Sequential(*_head(model, kind, shape, inputs, classes, end))
              for kind, shape, end in zip(part.heads[:-1], shapes[1:], ends, strict=False)] if part.growth else []  # fmt: skip
    if part.heads[-1] != "own":
        net.pool, net.head = _head(model, part.heads[-1], shapes[-1], inputs, classes, ends[-1])
    decoder = _decoder(shapes[-1], shapes[-2]) if part.reconstructs else None
    return StagedNet(net, ends, before, part.growth or 1.0, decoder, part.cached)


def _shapes(net: Net, inputs: tuple[int, ...], ends: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Of an example at the input, and at each end."""
    net.eval()
    x = torch.zeros(1, *inputs)
    yield inputs
    with torch.no_grad():
        for begin, end in pairwise((0, *ends)):
            for stage in list(net.stages)[begin:end]:
                x = stage(x)
            yield tuple(x.shape[1:])
    net.train()


def _head(
    model: ModelSpec, kind: str, shape: tuple[int, ...], inputs: tuple[int, ...], classes: int, end: int
) -> tuple[nn.Module, nn.Module]:
    """Pool and head for features of one shape."""
    if kind == "own":
        net = first(model, end)(inputs, classes)
        return net.pool, net.head
    pooled, deep = len(shape) == 3 and kind != "linear", kind == "network"
    size = shape[0] if pooled else math.prod(shape)
    convolution = [nn.Conv2d(size, size, 3, padding=1), nn.ReLU()] if deep and pooled else []
    hidden = [nn.Linear(size, size), nn.ReLU()] if deep and not pooled else []
    average = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    return nn.Sequential(*convolution, *average, nn.Flatten()), nn.Sequential(*hidden, nn.Linear(size, classes))


def _decoder(features: tuple[int, ...], given: tuple[int, ...]) -> nn.Module:
    """From a part's output back to what it was given: a convolution of enlarged images, or a linear layer."""
    if len(features) == len(given) == 3:
        return nn.Sequential(nn.Upsample(given[1:]), nn.Conv2d(features[0], given[0], 3, padding=1))
    linear = nn.Linear(math.prod(features), math.prod(given))
    return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, given))
