"""Running statistics of batch norms, estimated anew for weights that training did not leave behind.

They become the exact mean and variance over given examples: in evaluation, the network then does to these examples what it
would do in training with all of them in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from strategies.contract import Worker

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.net import Net


def tracking(net: nn.Module) -> dict[str, Any]:
    """The batch norms that keep running statistics, by name."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return {name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}


def statistics(net: nn.Module) -> dict[str, Tensor]:
    """The running means and variances, by their names in the state_dict."""
    return {
        f"{name}.{kind}": getattr(m, kind)
        for name, m in tracking(net).items()
        for kind in ("running_mean", "running_var")
    }


def reestimate(net: Net, x: Tensor, worker: Worker, weights: Mapping[str, Tensor] | None = None) -> None:
    """Set the running statistics to mean and (population) variance over the examples `x`, which all workers hold alike.

    Each worker pushes its share of (n, ...) inputs through the network in one forward pass, with two small collectives per
    batch norm. `weights` stand for the network's own; statistics among them are set in place instead of the network's.
    """
    import torch
    from torch.func import functional_call

    hooks = [m.register_forward_pre_hook(partial(_take, worker=worker)) for m in tracking(net).values()]
    training = net.training
    try:
        with torch.no_grad(), worker.autocast(), _uncompiled(net):
            functional_call(net.eval(), dict(weights or {}), (x.tensor_split(worker.size)[worker.rank],))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()


@contextmanager
def _uncompiled(net: Net) -> Iterator[None]:
    """Compiled code passes over hooks that it does not know."""
    compiled, net._compiled_call_impl = net._compiled_call_impl, None
    try:
        yield
    finally:
        net._compiled_call_impl = compiled


def _take(norm: Any, inputs: tuple[Tensor, ...], worker: Worker) -> None:
    """Before the layer normalises its input by its running statistics, these become the input's own."""
    import torch

    x = inputs[0].detach().double()
    each = [d for d in range(x.ndim) if d != 1]
    count = x.new_full((1,), x.numel() // x.shape[1])
    total = worker.sum_(torch.cat([x.sum(each), count]))
    mean = total[:-1] / total[-1]
    squares = worker.sum_((x - mean.view(-1, *[1] * (x.ndim - 2))).square().sum(each))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(squares / total[-1])
