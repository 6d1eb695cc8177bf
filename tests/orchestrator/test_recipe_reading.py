"""YAML text -> data, places and problems."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe import RecipeError, dump, load
from orchestrator.recipe.problems import Place
from orchestrator.recipe.yaml_nodes import MAX_ALIASES, MAX_BYTES, MAX_DEPTH, MAX_VALUES, read
from tests.waiting import at_once


def value(text: str) -> Any:
    document = read(f"a: {text}\n", "r.yaml")
    assert not document.problems
    return document.data["a"]


def complaints(text: str, file: str = "r.yaml") -> list[str]:
    return [str(problem) for problem in read(text, file).problems]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 1e-3),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("6.02E+23", 6.02e23),
        ("010", 10),
        ("-7", -7),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ('"1e-3"', "1e-3"),
        ("'true'", "true"),
        ('""', ""),
    ],
)
def test_words_are_read_as_in_yaml_1_2(text: str, expected: Any) -> None:
    result = value(text)
    assert result == expected and type(result) is type(expected)


def test_places_are_those_of_keys_and_values() -> None:
    document = read("a: 1\nb:\n  c: [x, {d: 2}]\n", "r.yaml")
    assert document.keys[("b", "c")] == Place("r.yaml", 3, 3)
    assert document.values[("b", "c", 1, "d")] == Place("r.yaml", 3, 14)
    assert document.place(("b", "c", 1, "missing")) == Place("r.yaml", 3, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1: a: duplicate key, first at line 1, column 1"),
        ("a: {x: 1, x: 2}\n", "r.yaml:1:11: a.x: duplicate key, first at line 1, column 5"),
        ("a:\n\tb: 1\n", "r.yaml:2:1: tab in the indentation, use spaces"),
        ("a:\n  \tb: 1\n", "r.yaml:2:3: tab in the indentation, use spaces"),
        ("a: .inf\n", "r.yaml:1:4: a: expected a finite number"),
        ("a: [-.INF]\n", "r.yaml:1:5: a[0]: expected a finite number"),
        ("a: .nan\n", "r.yaml:1:4: a: expected a finite number"),
        ("a: 1e999\n", "r.yaml:1:4: a: expected a finite number"),
        ("1: a\n", "r.yaml:1:1: key is not text, put it in quotes"),
        ("? [a]\n: 1\n", "r.yaml:1:3: key is not text, put it in quotes"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "r.yaml:2:5: c: merge keys (<<) are not read, write the keys out"),
        ("a: *x\n", "r.yaml:1:4: alias *x has no anchor that ends before it"),
        ("a: &x [*x]\n", "r.yaml:1:8: alias *x has no anchor that ends before it"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: a second document, expected one recipe per file"),
        ("", "r.yaml:1:1: empty, expected a recipe"),
        ("# nothing\n", "r.yaml:1:1: empty, expected a recipe"),
        ("a: !!python/object/apply:os.system [x]\n", "tag tag:yaml.org,2002:python/object/apply:os.system refused"),
        ("!!python/object:os.system {}\n", "tag tag:yaml.org,2002:python/object:os.system refused"),
        ("a: !!int '1'\n", "tag tag:yaml.org,2002:int refused"),
        ("a: [1\n", "r.yaml:2:1: not YAML: "),
        ("a: b: c\n", "r.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("a: \x00\n", "not readable as text"),
        ('a: "\\ud800"\n', "r.yaml:1:4: a: half a character"),
        ("a: " + "[" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels deep"),
        ("a: [" + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES} values"),
        ("#" * (MAX_BYTES + 1), "more than 1 MiB"),
        ("a: &x 1\nb: [" + "*x," * (MAX_ALIASES + 1) + "]\n", f"more than {MAX_ALIASES} aliases"),
    ],
)
def test_one_line_says_what_cannot_be_read(text: str, expected: str) -> None:
    with at_once():
        (problem,) = complaints(text)
    assert expected in problem and problem.isprintable()


def test_billion_laughs_end_in_a_problem_at_once() -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with at_once():
        assert "aliases make more than" in complaints("\n".join(lines))[0]


def test_aliases_that_stay_small_are_copies() -> None:
    document = read("a: &x {n: 1}\nb: *x\n", "r.yaml")
    assert document.data == {"a": {"n": 1}, "b": {"n": 1}} and document.data["a"] is not document.data["b"]


def test_several_unreadable_things_are_told_at_once() -> None:
    assert len(complaints("a: .inf\na: 1\n2: 3\nb: !x y\n")) == 4


def test_json_is_read_too_tabs_and_all() -> None:
    document = read('{\n\t"a": {"b":1E5,\t"c": null, "d": "\\/"}\n}\n', "r.json")
    assert document.problems == [] and document.data == {"a": {"b": 1e5, "c": None, "d": "/"}}


def refusal(path: Path | str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path)
    return str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: a directory, expected a recipe file"
    (tmp_path / "latin.yaml").write_bytes(b"study: caf\xe9\n")
    assert refusal(tmp_path / "latin.yaml") == f"{tmp_path}/latin.yaml:1:1: not UTF-8 text, at byte 10"
    assert "cannot be read" in refusal("a\0b.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    assert refusal(tmp_path / "list.yaml").startswith(f"{tmp_path}/list.yaml:1:1: expected a map")
    (tmp_path / "big.yaml").write_text("# ä" * (MAX_BYTES // 4 + 1))  # fewer characters than bytes
    assert "more than 1 MiB" in refusal(tmp_path / "big.yaml")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=20), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(min_size=1, max_size=20).filter(lambda key: key != "<<"), PLAIN, min_size=1, max_size=4))
def test_what_is_dumped_reads_back(data: dict[str, Any]) -> None:
    document = read(dump(data), "r.yaml")
    if all("<<" not in str(problem) for problem in document.problems):
        assert document.problems == [] and document.data == data


@given(st.text(max_size=200))
def test_no_text_is_a_traceback(text: str) -> None:
    for problem in read(text, "r.yaml").problems:
        assert str(problem).isprintable()


def test_a_byte_order_mark_is_no_part_of_the_recipe() -> None:
    assert read(b"\xef\xbb\xbfa: 1\n", "r.yaml").data == {"a": 1}
    assert complaints("a: \udc80\n") == ["r.yaml:1:1: not UTF-8 text, at byte 3"]


def test_importing_the_package_is_light() -> None:
    heavy = "('torch', 'ray', 'numpy', 'wandb')"
    code = f"import sys, orchestrator.recipe; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
