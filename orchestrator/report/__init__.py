"""The report of a study: headline sentences, figures, tables and how it was run, from the files of its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def build(study: Path, trials: Sequence[str] | None = None) -> list[str]:
    """Writes the report into `study` and returns its headlines.

    Files: report.html, report.md, results.csv, results.parquet, evidence.json, figures/ and tables/.

    trials: ids of the trials that make up the study; those without a result count as missing. Default: all trials in the
    directory. Raises FileNotFoundError if there is no such study, `orchestrator.files.Damaged` if a file does not hold
    what it should.
    """
    from orchestrator.report import assemble  # not before it is asked for: matplotlib and pyarrow take a second

    return assemble.build(study, trials)
