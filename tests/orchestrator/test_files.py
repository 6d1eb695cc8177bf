from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from orchestrator.files import (
    Damaged,
    Tail,
    append_line,
    open_lines,
    printable,
    read_json,
    read_lines,
    write_atomic,
    write_json,
)


def append(path: Path, *rows: dict) -> None:
    with open_lines(path) as file:
        for row in rows:
            append_line(file, row)


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a", {"old": 1})

    def broken(fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "a", {"new": 1})
    assert read_json(tmp_path / "a") == {"old": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_unserialisable_value_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"x": object()})
    assert os.listdir(tmp_path) == []


def test_json_has_sorted_keys_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": float("inf"), "a": [float("nan"), 1.5], "c": (1, -float("inf"))})
    assert (tmp_path / "a").read_text() == json.dumps({"a": [None, 1.5], "b": None, "c": [1, None]}, indent=1) + "\n"


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, stop = tmp_path / "status.json", threading.Event()
    write_json(path, [0] * 2000)

    def rewrite() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            write_json(path, [n] * (1 + n % 2000))

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(len(set(read_json(path))) == 1 for _ in range(500))
    finally:
        stop.set()
        writer.join()


def test_read_json_names_the_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(Damaged, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


def test_lines_round_trip_and_a_torn_last_line_is_ignored_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append(path, {"step": 1}, {"step": 2, "loss": float("nan")})
    with open(path, "ab") as file:
        file.write(b'{"step": 3')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "loss": None}]
    append(path, {"step": 3})
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"step": 2', "[1]", "", "\x00\x00"])
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(Damaged, match=r"m\.jsonl, line 2: expected a JSON object"):
        read_lines(path)
    with pytest.raises(Damaged, match="line 2"):
        Tail(path).new()


def test_tail_gives_each_whole_row_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    append(path, {"step": 1})
    assert tail.new() == [{"step": 1}]
    with open(path, "ab") as file:
        file.write(b'{"step"')
        file.flush()
        assert tail.new() == []
        file.write(b": 2}\n")
    assert tail.new() == [{"step": 2}]
    assert tail.new() == []


def test_tail_starts_over_when_the_file_was_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append(path, *({"step": n, "seconds": n / 8} for n in range(5)))
    tail = Tail(path)
    assert len(tail.new()) == 5
    write_atomic(path, b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert [row["step"] for row in tail.new()] == [0, 1]
    assert tail.new() == []


def test_tail_notices_a_trimmed_file_that_has_grown_past_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append(path, *({"step": n, "seconds": 0.25} for n in range(3)))
    tail = Tail(path)
    tail.new()
    with open(path, "rb+") as file:  # the same inode
        file.truncate(len(path.read_bytes().splitlines(keepends=True)[0]))
    append(path, *({"step": n, "seconds": 0.75} for n in range(1, 9)))
    assert [row["step"] for row in tail.new()] == list(range(9))


def test_printable_strips_what_steers_a_terminal() -> None:
    assert printable("a\x1b]0;owned\x07b\x1b[31m\tc\nd\u202e\x9b") == "a]0;ownedb[31m c d"
    assert printable("größe 学习 64") == "größe 学习 64"
