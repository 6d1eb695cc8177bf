"""tables/*.tex: the tables of a report for papers, each one `tabular` for \\input in a document that loads booktabs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from orchestrator.batch_law import intervals
from orchestrator.files import printable
from orchestrator.report.load import Result
from orchestrator.report.summary import Cell, Summary
from orchestrator.report.tables import Table, interval_kinds
from orchestrator.report.wording import count, figures2, figures3, goal, metric_name, metric_value, span
from orchestrator.statistics import Estimate

WIDTH = 100  # columns of a comment
COMMANDS = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    **{c: f"\\{c}" for c in "{}$&#_%"},
    **{c: f"{{{c}}}" for c in "[]*`"},  # \\ takes * and [ for its own, and a ` joins with what stands before it
}
SYMBOLS = {r"S\_min": r"$S_{\min}$", r"B\_crit": r"$B_{\mathrm{crit}}$"}  # in headings


class Content(NamedTuple):
    title: str
    rows: list[dict[str, Any]]  # with the same keys, the first of them "arm"
    trials: Sequence[Result]  # that the numbers come from


def tables(summary: Summary) -> dict[str, str]:
    """Table name -> LaTeX, for those that the data allow."""
    contents = {name: make(summary) for name, make in TABLES.items()}
    return {name: latex(summary.study.name, content) for name, content in contents.items() if content.rows}


def latex(study: str, content: Content) -> str:
    """A comment with title, study and trials, then the tabular."""
    trials = " ".join(dict.fromkeys(t.trial for t in content.trials))
    told = (f"Study {study}: {content.title}. Needs \\usepackage{{booktabs}}.", f"Trials: {trials}")
    lines = [line for text in told for line in textwrap.wrap(printable(text), WIDTH, break_on_hyphens=False)]
    table = Table.of(content.rows)
    heads = [_heading(name) for name in table.header]
    groups = [list(rows) for _, rows in groupby(table.rows, key=lambda row: row[0])]
    space = "\n\\addlinespace\n" if len(groups) < len(table.rows) else "\n"
    body = space.join("\n".join(_group(rows, table.numeric)) for rows in groups)
    return (
        "".join(f"% {line}\n" for line in lines)
        + f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in table.numeric)}}}\n"
        + f"\\toprule\n{_row(heads)}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )


def _group(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """The rows of an arm, which is named in the first of them alone."""
    cells = [[_cell(text, right) for text, right in zip(row, numeric, strict=True)] for row in rows]
    return [_row([row[0] if row is cells[0] else "", *row[1:]]) for row in cells]


def _row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _cell(text: str, right: bool) -> str:
    """Of numbers, intervals get an en dash and exponents are set as such; a name keeps its hyphens."""
    if not right:
        return escaped(text)
    power = re.sub(r"([\d.]+)e\+?(-?)0*(\d+)", r"$\1 \\times 10^{\2\3}$", escaped(text))
    return re.sub(r"(?<=[\d$])-(?=[\d$])", "--", power)


def _heading(name: str) -> str:
    text = escaped(name[:1].upper() + name[1:])
    return re.sub("|".join(map(re.escape, SYMBOLS)), lambda found: SYMBOLS[found[0]], text)


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is: no commands, no ligatures of dashes and quotes; beyond ASCII, which fonts may lack,
    as U+00E9."""
    plain = "".join(c if " " <= c <= "~" else f"U+{ord(c):04X}" for c in text)
    safe = "".join(COMMANDS.get(c, c) for c in plain)
    return re.sub(r"([-',])(?=\1)", r"\1{}", safe)


# ------------------------------------------------------------------------------------------------------------- contents


def _steps(summary: Summary) -> Content:
    cells = summary.all_cells if summary.target else []
    rows = [
        _of_cell(cell)
        | {"steps to target": count(cell.steps.median), interval_kinds(summary): _span(cell.steps, count)}
        | {"missed": f"{len(cell.trials) - cell.hits} of {len(cell.trials)}"}
        for cell in cells
    ]
    title = f"steps to {goal(summary.target)} by arm and batch size, medians" if summary.target else ""
    return Content(title, rows, _trials(cells))


def _final(summary: Summary) -> Content:
    metric, cells = summary.metric, summary.all_cells if summary.metric else []
    if metric is None:
        return Content("", [], [])
    rows = [
        _of_cell(cell)
        | {f"final {metric_name(metric)}": metric_value(metric, cell.final.median)}
        | {interval_kinds(summary): _span(cell.final, lambda value: metric_value(metric, value))}
        | {"diverged": f"{cell.diverged} of {len(cell.trials)}" if any(c.diverged for c in cells) else None}
        for cell in cells
        if cell.final
    ]
    return Content(f"final {metric_name(metric)} by arm and batch size, medians", rows, _trials(cells))


def _of_cell(cell: Cell) -> dict[str, Any]:
    return {"arm": cell.arm, "batch": cell.batch, "seeds": len(cell.trials)}


def _span(estimate: Estimate, text: Callable[[float], str]) -> str | None:
    return span(estimate, text) if estimate.n > 1 else None


def _critical(summary: Summary) -> Content:
    arms = {arm: cells for arm, cells in summary.cells.items() if cells} if summary.target else {}
    rows = [_critical_row(arm, cells, summary.laws.get(arm)) for arm, cells in arms.items()]
    title = "critical batch size per arm, of the law S = S_min (1 + B_crit / B)"
    return Content(title, rows, _trials([cell for cells in arms.values() for cell in cells]))


def _critical_row(arm: str, cells: Sequence[Cell], law: intervals.Estimate | None) -> dict[str, Any]:
    reached = sum(cell.hits > 0 for cell in cells)
    row: dict[str, Any] = {"arm": arm, "batch sizes reached": f"{reached} of {len(cells)}"}
    row |= dict.fromkeys(("S_min", "S_min, 95 % interval", "B_crit", "B_crit, 95 % interval", "remark"))
    if law is None:
        return row | {"remark": f"fitted from {intervals.DISTINCT} batch sizes on"}
    if not law.identified:
        bound = f"{law.bound[0]} {figures2(law.bound[1])}" if law.bound else None
        return row | {"B_crit": bound, "remark": f"not identified: {'; '.join(law.reasons)}"}
    found, quoted = law.fit.law, law.quoted
    row |= {"S_min": figures3(found.steps_min), "S_min, 95 % interval": _ends(quoted["steps_min"], figures3)}
    return row | {"B_crit": figures2(found.critical), "B_crit, 95 % interval": _ends(quoted["critical"], figures2)}


def _ends(interval: intervals.Interval, text: Callable[[float], str]) -> str:
    return f"{text(interval.low)}-{text(interval.high)}"


def _budgets(summary: Summary) -> Content:
    spent = {id(cell): _spent(summary, cell) for cell in summary.all_cells}
    rows = [_budget_row(cell, spent[id(cell)]) for cell in summary.all_cells]
    every = [trial for cell in summary.all_cells for trial in (*spent[id(cell)], *cell.trials)]
    return Content("what each arm and batch size was tried at before its numbers", rows, every)


def _spent(summary: Summary, cell: Cell) -> list[Result]:
    """The trials that chose the cell's setting: of its search, or all where those reported had a choice themselves."""
    if cell.settings == 1 and not cell.fresh:
        return []
    here = [r for r in summary.study.results if (r.arm, r.batch) == (cell.arm, cell.batch)]
    return [r for r in here if r.tuning] if cell.unbiased else here


def _budget_row(cell: Cell, spent: Sequence[Result]) -> dict[str, Any]:
    chosen = "other seeds" if cell.unbiased else "the same seeds" if spent else "nothing: one setting"
    row: dict[str, Any] = {"arm": cell.arm, "batch": cell.batch, "settings tried": cell.settings}
    row |= {"trials to choose": len(spent), "steps to choose": sum(t.steps or 0 for t in spent)}
    row |= {"examples to choose": sum(t.examples or 0 for t in spent)}
    return row | {"chosen on": chosen, "seeds reported": len(cell.trials)}


def _trials(cells: Sequence[Cell]) -> list[Result]:
    return [trial for cell in cells for trial in cell.trials]


TABLES: dict[str, Callable[[Summary], Content]] = {
    "steps_to_target": _steps,
    "critical_batch": _critical,
    "final_metric": _final,
    "tuning_budgets": _budgets,
}
