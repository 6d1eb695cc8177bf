"""One training run, fully specified. Its id is a hash of all that determines its result, and of nothing else."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from orchestrator.identity import digest
from orchestrator.recipe.choices import Model
from orchestrator.recipe.schema import Base, Checkpoint, Cluster, Engine, Speed
from orchestrator.recipe.workload_schema import Workload
from strategies import CATALOGUE

SEMANTICS = 1  # raised when the trainer changes what a trial means, so that old results are not taken for new ones


class Trial(Model):
    arm: str
    seed: int
    point: dict[str, Any]  # values of the grid and of the search, by dotted path
    role: Literal["grid", "tuning", "winner"] = "grid"  # tuning: a point of a search; winner: its best, a fresh seed
    edge: str | None = None  # of a winner: where its point lies at the edge of the box
    workload: Workload
    base: Base
    strategies: tuple[tuple[str, dict[str, Any]], ...]  # (recipe name, options), in the order of the recipe
    precision: Literal["fp32", "bf16", "fp64"]
    data: str  # fingerprint of the data set
    engine: Engine
    cluster: Cluster
    speed: Speed = Speed()
    checkpoint: Checkpoint
    log_steps: int

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits, safe as a directory name."""
        return digest(self.identity())[:12]

    def identity(self) -> dict[str, Any]:
        """What determines the result. Workers enter only where each treats its own part of a batch in a way of its own."""
        workload = self.workload.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"target"})
        target = self.workload.target
        return {
            "semantics": SEMANTICS,
            "workload": workload | ({"stop": target.model_dump(exclude_none=True)} if target and target.stop else {}),
            "base": self.base.model_dump(mode="json", exclude_none=True, exclude={"micro_batch"}),
            "strategies": [list(s) for s in self.strategies],
            "seed": self.seed,
            "precision": self.precision,
            "data": self.data,
            "log_steps": self.log_steps,
            "local_batch": self._cut() if self.normalises_batches else None,
            **self.compression,
            **self.extra,
            **self.sharing,
        }

    def context(self) -> dict[str, Any]:
        """What determines a phase's result beside the plan up to it, which tells the network as far as the phase has it."""
        kept = {k: v for k, v in self.identity().items() if k not in ("base", "strategies")}
        return kept | {"workload": {k: v for k, v in kept["workload"].items() if k != "model"}}

    @property
    def compression(self) -> dict[str, Any]:
        """How gradients are compressed, where they are: each worker rounds a share of its own, so workers enter too."""
        choice = getattr(self.engine.options, "compression", None)
        if choice is None or choice.name == "none":
            return {}
        options = choice.options.model_dump(mode="json")
        return {"compression": {"by": choice.name, **options, "workers": self.cluster.workers}}

    @property
    def sharing(self) -> dict[str, Any]:
        """How a batch is shared out, where a strategy or the network makes the result depend on it."""
        if not (self.draws or any(CATALOGUE[name].parts_matter for name, _ in self.strategies)):
            return {}
        return {"sharing": {"workers": self.cluster.workers, "local_batch": self.local_batch}}

    @property
    def extra(self) -> dict[str, Any]:
        """What the recipe tells DeepSpeed past us, where it does: it may change anything."""
        found = getattr(self.engine.options, "extra", None)
        return {"extra": found} if found else {}

    @property
    def local_batch(self) -> int:
        """Examples that one worker pushes through the network at once, memory permitting."""
        return self.micro_batch(self.cluster.workers)

    def micro_batch(self, replicas: int) -> int:
        """`local_batch`, where a network may be spread over several workers."""
        share = -(-self.base.batch // replicas)
        return share if self.base.micro_batch == "auto" else min(share, self.base.micro_batch)

    def _cut(self) -> int | list[int]:
        """Examples of each part of a global batch that passes through the network at once; one number where all are alike."""
        from orchestrator.workloads.order import micro, share

        shares = (share(0, self.base.batch, rank, self.cluster.workers) for rank in range(self.cluster.workers))
        sizes = [stop - start for mine in shares for start, stop in micro(*mine, self.local_batch)]
        return sizes if len({*sizes}) > 1 else sizes[0]

    @property
    def normalises_batches(self) -> bool:
        """Batch norm makes the result depend on the local batch; the user's own network is taken to have it."""
        model = self.workload.model
        always = ("resnet", "vgg", "airbench", "import")
        return model.name in always or bool(getattr(model.options, "batch_norm", False))

    @property
    def draws(self) -> bool:
        """Dropout draws anew for each part of a batch, on each worker its own; the user's own network is taken to have it."""
        model = self.workload.model
        return model.name == "import" or bool(getattr(model.options, "dropout", 0))
