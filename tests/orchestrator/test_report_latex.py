"""The LaTeX tables of a report: read back by a small reader of their own, and compiled where LaTeX is installed."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report import build, latex
from orchestrator.report.latex import TABLES, escaped
from orchestrator.report.load import load
from orchestrator.report.summary import summarise
from tests.orchestrator.made_study import MadeStudy, quickstart

ODD = r"50% \of{_all}~$x^2$ & #1 <a|b> \"--''`` ?` [*] é漢"
WORDS = {
    r"\textbackslash": "\\",
    r"\textasciicircum": "^",
    r"\textasciitilde": "~",
    r"\textless": "<",
    r"\textgreater": ">",
    r"\textbar": "|",
    r"\char34": '"',
}
TOKEN = re.compile(r"\\[A-Za-z]+(?:34)?|\\[{}$&#_%]|\{\}|\{[][*`]\}|[^\\]", re.DOTALL)


def printed(text: str) -> str:
    """What LaTeX prints of escaped text. Fails on whatever LaTeX would take for markup."""
    out, end = "", 0
    for found in TOKEN.finditer(text):
        assert found.start() == end, f"cannot read {text[end:]!r}"
        token, end = found[0], found.end()
        if token in WORDS:
            assert text.startswith("{}", end), f"{token} swallows what follows"
            out += WORDS[token]
        elif token[0] == "{":
            out += token[1:-1]
        elif token[0] == "\\":
            out += token[1:]
        else:
            assert token not in '{}$&#_%^~<>|"[]*`', f"{token!r} is not escaped in {text!r}"
            out += token
    assert end == len(text)
    return out


def rows(tex: str) -> list[list[str]]:
    """Header and rows of a table, having checked its structure."""
    lines = tex.splitlines()
    told = [line for line in lines if line.startswith("%")]
    assert told and lines[: len(told)] == told and told[0].startswith("% Study ")
    begin, top, head, middle, *body, bottom, end = lines[len(told) :]
    columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", begin)
    assert columns and [top, middle, bottom, end] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    found = [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in (head, *body) if line != r"\addlinespace"]
    assert all(line.endswith(r" \\") for line in (head, *body) if line != r"\addlinespace")
    assert {len(row) for row in found} == {len(columns[1])}
    return [[cell.strip() for cell in row] for row in found]


def contents(tex: str) -> list[dict[str, str]]:
    """Rows by heading, as LaTeX prints them, the arm in each."""
    symbols = {r"$S_{\min}$": "S_min", r"$B_{\mathrm{crit}}$": "B_crit"}
    head, *body = rows(tex)
    names = [re.sub("|".join(map(re.escape, symbols)), lambda m: escaped(symbols[m[0]]), cell) for cell in head]
    listed = [dict(zip(map(printed, names), map(printed, row), strict=True)) for row in body]
    arm = ""
    for row in listed:
        arm = row["Arm"] = row["Arm"] or arm
    return listed


def tables(path: Path) -> dict[str, str]:
    return latex.tables(summarise(load(path, None)))


def written(path: Path) -> dict[str, str]:
    return {p.stem: p.read_text() for p in (path / "tables").iterdir()}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = quickstart(tmp_path_factory.mktemp("study") / "quickstart")
    return made.path


# ------------------------------------------------------------------------------------------------------------- escapes


@given(st.text())
def test_escaped_text_prints_as_it_is(text: str) -> None:
    """Beyond ASCII by the code point, which no font lacks."""
    assert printed(escaped(text)) == "".join(c if " " <= c <= "~" else f"U+{ord(c):04X}" for c in text)


@given(st.text(alphabet="-',`?!<>\\", max_size=9))
def test_escaped_text_has_no_ligatures(text: str) -> None:
    assert not re.search(r"--|''|,,|``|<<|>>|[?!]`", escaped(text))


def test_names_from_results_are_escaped_everywhere(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path, name="100% _odd_\nstudy")
    for batch, steps in zip((32, 64, 128, 256), (100, 60, 40, 30), strict=True):
        made.add(ODD, batch, 0, steps)
    found = tables(tmp_path)
    assert found.keys() == TABLES.keys()
    for tex in found.values():
        assert "% Study 100% _odd_ study: " in tex
        assert {row["Arm"] for row in contents(tex)} == {printed(escaped(ODD))}


def test_numbers_are_set_as_numbers_and_names_as_names() -> None:
    rows = [{"arm": "v1-2e3", "steps": "2e+06-1.5e+07"}, {"arm": "x", "steps": "0.1-1e-05"}]
    body = latex.latex("s", latex.Content("t", rows, []))
    assert r"v1-2e3 & $2 \times 10^{6}$--$1.5 \times 10^{7}$ \\" in body and r"x & 0.1--$1 \times 10^{-5}$ \\" in body


# ------------------------------------------------------------------------------------------------------------ contents


def test_steps_intervals_and_misses(study: Path) -> None:
    found = contents(tables(study)["steps_to_target"])
    assert [(row["Arm"], row["Batch"]) for row in found] == [
        (arm, batch) for arm in ("sgd", "adamw") for batch in ("32", "128", "512", "1437")
    ]
    assert found[0] == {
        "Arm": "sgd", "Batch": "32", "Seeds": "3", "Steps to target": "310", "Range": "294--341", "Missed": "0 of 3"
    }  # fmt: skip
    assert [found[-1][name] for name in ("Steps to target", "Range", "Missed")] == ["never", "18 to never", "2 of 3"]


def test_critical_batch_sizes_with_interval_or_bound(study: Path) -> None:
    sgd, adamw = contents(tables(study)["critical_batch"])
    assert sgd["B_crit"] == "at least 230" and sgd["Remark"] == "not identified: its interval has an open end"
    assert (adamw["B_crit"], adamw["B_crit, 95 % interval"], adamw["Remark"]) == ("580", "180--3300", "")
    assert sgd["S_min"] == "" and float(adamw["S_min"]) > 0


def test_too_few_batch_sizes_for_a_law(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    made.add("sgd", 32, 0, 100)
    made.add("sgd", 64, 0)
    (row,) = contents(tables(tmp_path)["critical_batch"])
    assert row == {"Arm": "sgd", "Batch sizes reached": "1 of 2", "Remark": "fitted from 3 batch sizes on"}


def test_final_metrics(study: Path) -> None:
    first = contents(tables(study)["final_metric"])[0]
    assert (first["Final test accuracy"], first["Range"]) == ("0.971", "0.969--0.973") and "Diverged" not in first


def test_a_diverged_trial_is_told(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    made.add("sgd", 32, 0, 100)
    made.add("sgd", 32, 1, status="diverged", final={"test_accuracy": None})
    (row,) = contents(tables(tmp_path)["final_metric"])
    assert row["Diverged"] == "1 of 2"


def test_tuning_budgets_of_searches_and_grids(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    for rate in (0.1, 0.2, 0.4):
        point = {"base.batch": 32, "base.rate.peak": rate}
        made.add("searched", 32, 0, 100 / rate, point=point, role="tuning", steps=500, examples=16000)
        made.add("crossed", 32, 0, 100 / rate, point=point, steps=500, examples=16000)
    for seed in (1, 2):
        made.add("searched", 32, seed, 260, point={"base.batch": 32, "base.rate.peak": 0.4}, role="winner")
        for momentum in (0.8, 0.9):  # a search for each, and one of their winners reported
            point = {"base.batch": 32, "base.optimizer.sgd.momentum": momentum, "base.rate.peak": seed / 10}
            made.add("both", 32, 0, 300, point=point, role="tuning", steps=500, examples=16000)
            best = point | {"base.rate.peak": 0.1}
            made.add("both", 32, seed, 260, point=best, role="winner", steps=500, examples=16000)
    made.add("plain", 32, 0, 300)
    found = {row.pop("Arm"): row for row in contents(tables(tmp_path)["tuning_budgets"])}
    names = (
        "Settings tried",
        "Trials to choose",
        "Steps to choose",
        "Examples to choose",
        "Chosen on",
        "Seeds reported",
    )
    assert {arm: [row[name] for name in names] for arm, row in found.items()} == {
        "searched": ["3", "3", "1500", "48000", "other seeds", "2"],
        "crossed": ["3", "3", "1500", "48000", "the same seeds", "1"],
        "both": ["4", "8", "4000", "128000", "the same seeds", "2"],
        "plain": ["1", "0", "0", "0", "nothing: one setting", "1"],
    }


def test_the_comment_names_the_trials_behind_the_numbers_and_no_date(study: Path) -> None:
    ids = {p.name for p in (study / "trials").iterdir()}
    for tex in tables(study).values():
        comment = " ".join(line.removeprefix("% ") for line in tex.splitlines() if line.startswith("%"))
        title, _, listed = comment.partition(" Trials: ")
        assert set(listed.split()) == ids and title.startswith("Study quickstart: ")
        assert not re.search(r"20\d\d|\d\d:\d\d", title)


def test_tables_that_no_longer_hold_go_away(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    path = tmp_path / "trials" / made.add("sgd", 32, 0, 100) / "result.json"
    build(tmp_path)
    assert written(tmp_path) == tables(tmp_path) and written(tmp_path).keys() == TABLES.keys()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target": None}))
    build(tmp_path)
    assert written(tmp_path).keys() == {"final_metric", "tuning_budgets"}


def test_no_results_no_tables(tmp_path: Path) -> None:
    MadeStudy(tmp_path)
    build(tmp_path, ["0" * 12])
    assert written(tmp_path) == {}


@pytest.mark.skipif(not (shutil.which("pdflatex") or shutil.which("tectonic")), reason="needs pdflatex or tectonic")
def test_tables_compile_in_a_document_with_booktabs(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "study", name="100% odd")
    for batch, steps in zip((32, 64, 128, 256), (100, 60, 40, math.inf), strict=True):
        made.add(ODD, batch, 0, steps)
    build(made.path)
    inputs = "\n\n".join(rf"\input{{study/tables/{name}}}" for name in TABLES)
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + inputs + "\n\\end{document}\n"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error"] if shutil.which("pdflatex") else ["tectonic"]
    subprocess.run([*command, "paper.tex"], cwd=tmp_path, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
