"""The network between workers and what a worker costs: from a YAML file, or a named preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from orchestrator.files import Damaged
from orchestrator.predict.collectives import FLAT, Wire, hierarchical
from orchestrator.recipe.choices import Model, Positive
from orchestrator.recipe.messages import findings
from orchestrator.recipe.problems import Problem, RecipeError, nearest
from orchestrator.recipe.yaml_nodes import MAX_BYTES, Document, read

NotNegative = Annotated[float, Field(ge=0)]


class Link(Model):
    latency: NotNegative = Field(description="seconds per message")
    bandwidth: Annotated[float, Field(gt=0)] = Field(description="bytes per second and worker, each way")

    @property
    def wire(self) -> Wire:
        return Wire(self.latency, self.bandwidth)


class Node(Link):
    workers: Positive = Field(description="workers that share a node, and this link")


class Hardware(Model):
    name: str
    network: Link
    node: Node | None = Field(default=None, description="the link within a node; none: a worker per node")
    algorithm: Literal["ring", "halving_doubling", "tree", "torus", "hierarchical", "fastest"] = "fastest"
    reduction: NotNegative = Field(default=0.0, description="seconds to add a byte to another, where that is not free")
    jitter: NotNegative = Field(default=0.02, description="standard deviation of a worker's step over its mean")
    price: NotNegative | None = Field(default=None, description="of a worker for an hour")

    def all_reduce(self, size: float, workers: int) -> float:
        """Seconds for `size` bytes."""
        return self._transfer(size, workers) + self.reduction * size * (workers - 1) / workers

    def _transfer(self, size: float, workers: int) -> float:
        if self.node and workers <= self.node.workers:
            return FLAT.get(self.algorithm, FLAT["fastest"])(size, workers, self.node.wire)
        if self.algorithm != "hierarchical":
            return FLAT[self.algorithm](size, workers, self.network.wire)
        inner, together = (self.node.wire, self.node.workers) if self.node else (self.network.wire, 1)
        return hierarchical(size, workers, inner, together, self.network.wire)


OWN = "loopback"  # the network that a study on one machine ran on
DEFAULT = "ethernet_10g"
PRESETS = {  # line rates, and latencies of an order that is usual
    OWN: Hardware(name=OWN, network=Link(latency=5e-5, bandwidth=1e9), algorithm="ring"),
    DEFAULT: Hardware(name=DEFAULT, network=Link(latency=5e-5, bandwidth=1.25e9)),
    "ethernet_100g": Hardware(name="ethernet_100g", network=Link(latency=2e-5, bandwidth=12.5e9)),
    "nvlink_infiniband": Hardware(
        name="nvlink_infiniband",
        network=Link(latency=5e-6, bandwidth=25e9),  # one adapter of 200 Gbit/s per worker
        node=Node(workers=8, latency=3e-6, bandwidth=300e9),
        algorithm="hierarchical",
    ),
}


def load(path: Path) -> Hardware:
    """Raises RecipeError with every mistake and its place, or Damaged if there is no such file."""
    document = read(_bytes(path), str(path))
    if document.problems:
        raise RecipeError(document.problems)
    try:
        return Hardware.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(_problems(error, document)) from None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = nearest(str(path), list(PRESETS))
        raise Damaged(f"--hardware {path}: neither a file nor a preset, {near}") from None
    except OSError as error:
        raise Damaged(f"--hardware {path}: cannot be read: {error.strerror}") from None


def _problems(error: ValidationError, document: Document) -> list[Problem]:
    if not isinstance(document.data, dict):
        return [Problem.at(document.place(()), (), "expected a map of hardware keys, such as name, network, price")]
    found = findings(error.errors(include_url=False), document.data, Hardware)
    return [Problem.at(document.place(f.path, f.of_key), f.path, f.message) for f in found]
