"""What `precision: auto` stands for: asked on a machine where the study's workers will train."""

from __future__ import annotations

from orchestrator.environment import gpu_count
from orchestrator.launch import elsewhere
from orchestrator.recipe.resolve import Number
from orchestrator.recipe.schema import Cluster
from orchestrator.tuning import bf16_pays


def auto(cluster: Cluster, convolutional: bool) -> Number:
    """bf16 on GPUs, and for convolutions on CPUs where it was measured to pay; else fp32. Raises ClusterError."""
    pays = _pays_there if elsewhere(cluster) else _pays_here
    return "bf16" if pays(cluster, convolutional) else "fp32"


def _pays_here(cluster: Cluster, convolutional: bool) -> bool:
    """Workers train on GPUs only where each of them gets one of its own."""
    return gpu_count() >= cluster.workers or (convolutional and bf16_pays())


def _pays_there(cluster: Cluster, convolutional: bool) -> bool:
    """Where the driver has no GPU, as on the head node of many a cluster, or another processor."""
    from cluster import session

    with session.connected():
        return bool(session.gpus_each(cluster.workers)) or (
            convolutional and session.at_a_worker(bf16_pays, cluster.workers, cluster.threads)
        )
