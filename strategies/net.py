"""The shape of network that strategies can take apart: stages in a row, then a pool, then a head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Net(nn.Module):
    """`head(pool(stages(x)))`: (n, ...) inputs -> (n, classes) logits. Any module fits as a single stage."""

    @property
    def sample(self) -> int:
        """Examples whose cost, shared out, is that of one."""
        return 2  # so that batch norms work

    def __init__(self, stages: Iterable[nn.Module], pool: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.pool = pool or nn.Identity()
        self.head = head or nn.Identity()
        self.rate_factors: dict[str, float] = {}  # of learning rates, by parameter; else 1
        self.gradient_factors: dict[str, float] = {}  # of sizes of gradients, by parameter; else 1

    def inherit_factors(self, whole: Net) -> None:
        """Those of a network that has this one's parameters, by whatever name."""
        names = {id(p): name for name, p in whole.named_parameters()}
        for own, parameter in self.named_parameters():
            name = names.get(id(parameter))
            if name in whole.rate_factors:
                self.rate_factors[own] = whole.rate_factors[name]
            if name in whole.gradient_factors:
                self.gradient_factors[own] = whole.gradient_factors[name]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x))
