"""The engine for one worker: nothing to average."""

from __future__ import annotations

from cluster.engines.base import ProcessWorker


class SoloWorker(ProcessWorker):
    """Trains alone, without a process group."""
