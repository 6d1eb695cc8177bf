"""Fixtures of several test files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("BIGBATCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BIGBATCH_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where a test's studies go."""
    return tmp_path / "runs"


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own and take seconds."""
    monkeypatch.setattr("orchestrator.report.build", lambda study, trials=None: ["a headline"])
