"""How a layer gives rows of inputs and output gradients, and takes a preconditioned gradient back.

Rows have shape (groups, n, t, d): groups of a convolution (1 for a linear layer), examples, positions of an example, features.
The gradient of a layer's weights, as a matrix (groups, d_out, d_in), is the sum of g a^T over rows g of output gradients and a
of inputs. With a bias, each input row ends in a one and each matrix in the bias' column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pad
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True, slots=True, eq=False)
class Layer(ABC):
    """A module whose weight is trained, and its bias if it has one; `module.weight` and `module.bias` are its own."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The trained bias."""
        bias = self.module.bias
        return bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    @abstractmethod
    def groups(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(groups, d_out, d_in)"""
        rows, columns = self.rows(self.weight).shape
        return self.groups, rows // self.groups, columns + (self.bias is not None)

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """(groups, n, t, d_in) rows of the module's input."""

    @abstractmethod
    def outputs(self, grad: Tensor) -> Tensor:
        """(groups, n, t, d_out) rows of the gradient of the module's output."""

    @abstractmethod
    def rows(self, weight: Tensor) -> Tensor:
        """A weight or its gradient, (d_out in all, d_in without bias), features in the order of `inputs`."""

    @abstractmethod
    def unrows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""

    def summed(self, x: Tensor) -> Tensor:
        """(groups, n, d_in) input rows, summed over positions."""
        return self.inputs(x).sum(2)

    def matrix(self) -> Tensor:
        """(groups, d_out, d_in): the gradients in p.grad."""
        return self.join([p.grad for p in self.parameters if p.grad is not None])

    def join(self, parameters: list[Tensor]) -> Tensor:
        """(groups, d_out, d_in) of what is given in the shapes of `parameters`."""
        rows = self.rows(parameters[0])
        if self.bias is not None:
            rows = torch.cat([rows, parameters[1][:, None]], 1)
        return rows.reshape(self.groups, -1, rows.shape[-1])

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        rows = matrix.flatten(0, 1)
        if self.bias is None:
            return [self.unrows(rows)]
        return [self.unrows(rows[:, :-1]), rows[:, -1]]

    def write(self, matrix: Tensor) -> None:
        """A matrix (groups, d_out, d_in) into p.grad."""
        for p, value in zip(self.parameters, self.split(matrix), strict=True):
            p.grad.copy_(value)  # type: ignore[union-attr]

    def _ended(self, rows: Tensor) -> Tensor:
        """Input rows with the bias' one."""
        return rows if self.bias is None else pad(rows, (0, 1), value=1.0)


class LinearLayer(Layer):
    """Inputs (n, ..., d): all dimensions between are positions."""

    __slots__ = ()

    @property
    def groups(self) -> int:
        return 1

    def inputs(self, x: Tensor) -> Tensor:
        return self._ended(_positions(x))

    def outputs(self, grad: Tensor) -> Tensor:
        return _positions(grad)

    def rows(self, weight: Tensor) -> Tensor:
        return weight

    def unrows(self, rows: Tensor) -> Tensor:
        return rows


class ConvLayer(Layer):
    """Positions are those of the output map; features of an input row are in the order (kernel row, column, channel)."""

    __slots__ = ()
    module: nn.Conv2d

    @property
    def groups(self) -> int:
        return self.module.groups

    def inputs(self, x: Tensor) -> Tensor:
        return self._ended(self._grouped(self.windows(x)))

    def summed(self, x: Tensor) -> Tensor:
        windows = self.windows(x)
        positions = windows.shape[1] * windows.shape[2]
        rows = self._grouped(windows.sum((1, 2), keepdim=True))[:, :, 0]
        return rows if self.bias is None else pad(rows, (0, 1), value=float(positions))

    def _grouped(self, windows: Tensor) -> Tensor:
        """(n, h', w', kh, kw, c) -> (groups, n, h' w', kh kw c / groups)"""
        n, high, wide, _, _, _ = windows.shape
        grouped = windows.unflatten(-1, (self.groups, -1)).permute(5, 0, 1, 2, 3, 4, 6)
        return grouped.reshape(self.groups, n, high * wide, -1)

    def windows(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, h', w', kh, kw, c), a view: what each output position sees."""
        conv = self.module
        x = self.padded(x).permute(0, 2, 3, 1)
        n, height, width, channels = x.shape
        extent = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        high, wide = (height - extent[0]) // conv.stride[0] + 1, (width - extent[1]) // conv.stride[1] + 1
        a, b, c, d = x.stride()
        step, apart = (b * conv.stride[0], c * conv.stride[1]), (b * conv.dilation[0], c * conv.dilation[1])
        return x.as_strided((n, high, wide, *conv.kernel_size, channels), (a, *step, *apart, d))

    def padded(self, x: Tensor) -> Tensor:
        conv = self.module
        around = conv._reversed_padding_repeated_twice  # left, right, top, bottom, also of padding "same"
        return pad(x, around) if conv.padding_mode == "zeros" else pad(x, around, mode=conv.padding_mode)

    def outputs(self, grad: Tensor) -> Tensor:
        rows = grad.permute(0, 2, 3, 1).flatten(1, 2)
        return rows.unflatten(-1, (self.groups, -1)).permute(2, 0, 1, 3)

    def rows(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).flatten(1)

    def unrows(self, rows: Tensor) -> Tensor:
        height, width = self.module.kernel_size
        return rows.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class NormLayer:
    """A batch norm with scale and shift, or with one of them trained; its gradient is a matrix (channels, 1 or 2)."""

    name: str
    module: _BatchNorm

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of scale and shift, those that are trained."""
        return [p for p in (self.module.weight, self.module.bias) if p is not None and p.requires_grad]

    def gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """(n, channels, 1 or 2) gradient of each example, with the statistics of the batch taken as constant.

        The normalised input is made anew from the input: the output gives none where the scale is zero.
        """
        module = self.module
        kept = None if module.training else module.running_mean, None if module.training else module.running_var
        normal = batch_norm(x, *kept, training=kept[0] is None, eps=module.eps)
        positions, dtype = tuple(range(2, x.ndim)), torch.promote_types(x.dtype, torch.float32)
        each = {id(module.weight): normal * grad, id(module.bias): grad}
        sums = [each[id(p)] for p in self.parameters]
        return torch.stack([t.sum(positions, dtype=dtype) if positions else t.to(dtype) for t in sums], -1)

    def matrix(self) -> Tensor:
        """(channels, 1 or 2): the gradients in p.grad."""
        return torch.stack([p.grad for p in self.parameters if p.grad is not None], -1)

    def write(self, matrix: Tensor) -> None:
        """A matrix (channels, 1 or 2) into p.grad."""
        for p, value in zip(self.parameters, matrix.unbind(-1), strict=True):
            p.grad.copy_(value)  # type: ignore[union-attr]


AnyLayer: TypeAlias = "LinearLayer | ConvLayer | NormLayer"


def served(net: nn.Module) -> list[AnyLayer]:
    """The layers of a network, in its order: plain linear layers, two-dimensional convolutions and batch norms.

    A subclass with a forward pass of its own is none, nor is a layer that shares a parameter with another module (one that is
    called several times is). A frozen parameter stays out; with a frozen weight, so does a bias.
    """
    holders = Counter(id(p) for module in net.modules() for p in module._parameters.values() if p is not None)
    found = []
    for name, module in net.named_modules():
        layer = _layer(name, module)
        if layer and all(holders[id(p)] == 1 for p in module._parameters.values() if p is not None):
            found.append(layer)
    return [layer for layer in found if layer.parameters]


def _layer(name: str, module: nn.Module) -> AnyLayer | None:
    """What computes its weight anew at each pass (parametrizations) holds no `weight` and is not served."""
    if "weight" not in module._parameters:
        return None
    forward = type(module).forward
    if isinstance(module, _BatchNorm):
        return NormLayer(name, module) if forward is _BatchNorm.forward else None
    if not getattr(module.weight, "requires_grad", False):
        return None
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearLayer(name, module)
    return ConvLayer(name, module) if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward else None


def _positions(x: Tensor) -> Tensor:
    """(n, ..., d) -> (1, n, t, d)."""
    return x.reshape(1, len(x), -1, x.shape[-1])
