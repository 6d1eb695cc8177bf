"""report.html and report.md: the same contents through two templates, each of which escapes whatever it is given."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from orchestrator.report import best_rates, outlook
from orchestrator.report.arm_pairs import pairs_note, pairs_table
from orchestrator.report.arm_profiles import PROFILES_NOTE, profiles_table
from orchestrator.report.captions import notes
from orchestrator.report.gallery import GALLERY
from orchestrator.report.inline_svg import inlined
from orchestrator.report.load import as_text
from orchestrator.report.noise_scales import NOISE_NOTE, noise_table
from orchestrator.report.search_table import search_table
from orchestrator.report.stage_features import features_table
from orchestrator.report.summary import Summary
from orchestrator.report.tables import Table, cells_table, trials_table


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    title: str
    table: Table
    note: str = ""  # how to read it
    sortable: bool = False


@dataclass(frozen=True)
class Page:
    title: str
    status: str  # how much of the study this is
    headlines: list[str]
    figures: list[Figure]
    unsaid: list[str]  # which figures are missing, and why
    sections: list[Section]  # tables
    notes: list[str]
    environment: list[tuple[str, str]]  # dotted name, value
    recipe: str


def page(summary: Summary, headlines: list[str], drawn: dict[str, dict[str, bytes]]) -> Page:
    study = summary.study
    return Page(
        title=study.name,
        status=f"{len(study.results)} of {study.planned} trials",
        headlines=headlines,
        figures=[_figure(name, files["svg"], summary) for name, files in drawn.items()],
        unsaid=[*best_rates.unsaid(summary), *outlook.unsaid(summary)],
        sections=_sections(summary),
        notes=notes(summary),
        environment=list(flat(study.env)),
        recipe=study.recipe,
    )


def _figure(name: str, svg: bytes, summary: Summary) -> Figure:
    title, text = GALLERY[name].caption(summary)
    return Figure(name, title, text, Markup(inlined(svg, name, title)))


def _sections(summary: Summary) -> list[Section]:
    """Cells and trials always, of the rest what the data allow."""
    between = [
        Section("Searches", search_table(summary)),
        Section("Arms seed by seed", pairs_table(summary), pairs_note(summary)),
        Section("Performance profiles", profiles_table(summary), PROFILES_NOTE),
        Section("Gradient noise scale", noise_table(summary), NOISE_NOTE),
        Section("Features, stage by stage", features_table(summary)),
    ]
    cells = Section("By arm and batch size", cells_table(summary))
    trials = Section("All trials", trials_table(summary), sortable=True)
    return [cells, *(section for section in between if section.table.rows), trials]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested maps as dotted names; a list of plain values stays on one line."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{as_text(key)}" if name else as_text(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(as_text, value)) or "none"
    else:
        yield name, "none" if value is None else as_text(value)


def html(page: Page) -> str:
    """Self-contained: one file, no network, one small script that the page's own policy knows by its hash."""
    script = _text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"css": Markup(_text("report.css")), "script": Markup(script), "digest": digest}
    return _template("report.html.j2", autoescape=True).render(page=page, **parts)


def markdown(page: Page) -> str:
    return _template("report.md.j2", finalize=escaped_markdown).render(page=page)


def escaped_markdown(value: Any) -> str:
    """Text that no reader of Markdown takes for markup, a link or HTML."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", text)


def _template(name: str, **how: Any) -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, **how)
    return environment.from_string(_text(name))


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
