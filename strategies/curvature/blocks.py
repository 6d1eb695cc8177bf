"""The curvature of one layer: which statistics it takes, how they are inverted, and what the inverse makes of a gradient.

Statistics are sums over examples of a loss that is itself a sum over examples: neither a batch that is repeated nor one that is
split changes their mean. For a linear layer or a convolution with t positions (Grosse & Martens 2016, arXiv 1602.01407;
Eschenhagen et al. 2023, arXiv 2311.00636):

    expand   A = sum_n sum_t a a^T                  G = 1 / t sum_n sum_t g g^T
    reduce   A = sum_n (sum_t a) (sum_t a)^T        G = 1 / t^2 sum_n (sum_t g) (sum_t g)^T

Calls of a layer in one forward pass count as further positions. A batch norm has a 2 x 2 block per channel (Osawa et al. 2020,
arXiv 2002.06015).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from strategies.curvature import inverses
from strategies.curvature.buckets import Shape
from strategies.curvature.gram import chunks, gram, square, sum_of, widened
from strategies.curvature.layers import AnyLayer, ConvLayer, LinearLayer, NormLayer
from strategies.curvature.precondition import Inverse

Named: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Block(ABC):
    """Tensors that it asks for and makes are named; `factors` and `inverses` tell which there are, and their shapes."""

    layer: AnyLayer
    factors: dict[str, Shape]
    inverses: dict[str, Shape]

    @property
    def side(self) -> int:
        """Of the largest factor."""
        return max(shape.sizes[-1] for shape in self.factors.values())

    @property
    def cost(self) -> float:
        """Of an inversion, up to a constant: d^3 for each factor."""
        return sum(shape.sizes[0] * shape.sizes[-1] ** 3 for shape in self.factors.values())

    @abstractmethod
    def statistic(self, name: str, xs: list[Tensor], grads: list[Tensor], scale: float) -> Tensor:
        """A factor's sum over examples, from inputs and output gradients of calls; `scale` undoes the mean of the losses."""

    @abstractmethod
    def invert(self, factors: Named, damping: float) -> dict[str, Tensor]: ...

    @abstractmethod
    def apply(self, inverse: Named, grad: Tensor, damping: float) -> Tensor:
        """The preconditioned gradient; both are as `layer.matrix` has them."""


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerBlock(Block):
    """A (groups, d_in, d_in) and G (groups, d_out, d_out)."""

    layer: LinearLayer | ConvLayer
    reduce: bool

    def statistic(self, name: str, xs: list[Tensor], grads: list[Tensor], scale: float) -> Tensor:
        if name == "a":
            return square(sum_of([self.layer.summed(x) for x in xs])) if self.reduce else self._gram(xs)
        rows = [widened(self.layer.outputs(grad)) for grad in grads]
        positions = sum(r.shape[2] for r in rows)
        if self.reduce:
            return square(sum_of([r.sum(2) for r in rows])) * (scale / positions) ** 2
        return sum_of([square(r.flatten(1, 2)) for r in rows]) * (scale**2 / positions)

    def _gram(self, xs: list[Tensor]) -> Tensor:
        return sum_of([gram(self.layer, x) for x in xs])


class CholeskyBlock(KroneckerBlock):
    """(A + pi sqrt(damping))^-1 and (G + sqrt(damping) / pi)^-1."""

    __slots__ = ()

    def invert(self, factors: Named, damping: float) -> dict[str, Tensor]:
        a, g = inverses.factored(factors["a"], factors["g"], damping)
        return {"a_inverse": a, "g_inverse": g}

    def apply(self, inverse: Named, grad: Tensor, damping: float) -> Tensor:
        return inverses.by_factors(grad, inverse["a_inverse"], inverse["g_inverse"])


class EigenBlock(KroneckerBlock):
    """Eigenvectors of A and G, and the curvature along their products, to which the damping is added as it is."""

    __slots__ = ()

    def invert(self, factors: Named, damping: float) -> dict[str, Tensor]:
        (in_a, a), (in_g, g) = (inverses.eigenbasis(factors[name]) for name in ("a", "g"))
        return {"a_basis": a, "g_basis": g, "scale": in_g[..., None] * in_a[..., None, :]}

    def apply(self, inverse: Named, grad: Tensor, damping: float) -> Tensor:
        return inverses.by_basis(grad, inverse["a_basis"], inverse["g_basis"], inverse["scale"], damping)

    def scales(self, inverse: Named, xs: list[Tensor], grads: list[Tensor], scale: float) -> Tensor:
        """(groups, d_out, d_in): the squares of each example's gradient along these products, summed over examples.

        They correct the eigenvalues (EKFAC, George et al. 2018, arXiv 1806.03884). A gradient is summed over positions first.
        """
        size = inverse["scale"].numel()
        parts = zip(*(chunks(t, size) for t in (*xs, *grads)), strict=True)
        return sum_of([self._squares(inverse, part[: len(xs)], part[len(xs) :]) for part in parts]) * scale**2

    def _squares(self, inverse: Named, xs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """(groups, d_out, d_in), of some examples."""
        a, g = inverse["a_basis"][:, None], inverse["g_basis"][:, None]
        rows = [
            (widened(self.layer.outputs(grad)) @ g, widened(self.layer.inputs(x)) @ a)
            for x, grad in zip(xs, grads, strict=True)
        ]
        return sum_of([out.mT @ into for out, into in rows]).square().sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class NormBlock(Block):
    """F (channels, 2, 2) of scale and shift, or 1 x 1 where one of them is frozen."""

    layer: NormLayer

    def statistic(self, name: str, xs: list[Tensor], grads: list[Tensor], scale: float) -> Tensor:
        gradients = sum_of([self.layer.gradients(x, g) for x, g in zip(xs, grads, strict=True)])
        return square(gradients.transpose(0, 1)) * scale**2

    def invert(self, factors: Named, damping: float) -> dict[str, Tensor]:
        f = factors["f"]
        return {"f_inverse": inverses.inverse(f, f.new_full((len(f),), damping))}

    def apply(self, inverse: Named, grad: Tensor, damping: float) -> Tensor:
        return (inverse["f_inverse"] @ grad[..., None])[..., 0]


def block(layer: AnyLayer, inverse: Inverse, reduce: bool) -> Block:
    """The block of a layer."""
    if isinstance(layer, NormLayer):
        shape = Shape((len(layer.parameters[0]), *[len(layer.parameters)] * 2), symmetric=True)
        return NormBlock(layer, {"f": shape}, {"f_inverse": shape})
    groups, out, into = layer.sizes
    factors = {name: Shape((groups, d, d), symmetric=True) for name, d in (("a", into), ("g", out))}
    if inverse == "cholesky":
        return CholeskyBlock(layer, factors, {f"{name}_inverse": shape for name, shape in factors.items()}, reduce)
    bases = {f"{name}_basis": Shape(shape.sizes) for name, shape in factors.items()}
    return EigenBlock(layer, factors, bases | {"scale": Shape((groups, out, into))}, reduce)
