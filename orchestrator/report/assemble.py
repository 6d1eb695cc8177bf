"""Puts a report together: loads, summarises, draws, and writes every file as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.files import write_atomic
from orchestrator.report import export, gallery, latex, pages
from orchestrator.report.evidence import evidence
from orchestrator.report.headlines import headlines
from orchestrator.report.load import load
from orchestrator.report.summary import summarise


def build(study: Path, trials: Sequence[str] | None = None) -> list[str]:
    summary = summarise(load(study, trials))
    sentences = headlines(summary)
    drawn = gallery.draw(summary)
    rows = export.table(summary.study.results)
    page = pages.page(summary, sentences, drawn)
    write_atomic(study / "results.csv", export.as_csv(rows))
    write_atomic(study / "results.parquet", export.as_parquet(rows))
    write_atomic(study / "report.md", pages.markdown(page))
    write_atomic(study / "report.html", pages.html(page))
    write_atomic(study / "evidence.json", evidence(summary))
    _write_figures(study / "figures", drawn)
    _write_tables(study / "tables", latex.tables(summary))
    return sentences


def _write_figures(folder: Path, drawn: dict[str, dict[str, bytes]]) -> None:
    """Also removes figures of an earlier report that the data no longer allow."""
    folder.mkdir(exist_ok=True)
    for name in gallery.GALLERY:
        for kind in ("svg", "pdf"):
            path = folder / f"{name}.{kind}"
            if name in drawn:
                write_atomic(path, drawn[name][kind])
            else:
                path.unlink(missing_ok=True)


def _write_tables(folder: Path, made: dict[str, str]) -> None:
    """Likewise of tables."""
    folder.mkdir(exist_ok=True)
    for name in latex.TABLES:
        path = folder / f"{name}.tex"
        if name in made:
            write_atomic(path, made[name])
        else:
            path.unlink(missing_ok=True)
