"""Copies of the driver's files on other nodes, without Ray: what is sent, what comes back, and how often."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import couriers
from cluster import mirror as module
from cluster.actor import Seat
from cluster.couriers import Couriers
from cluster.mirror import Change, Mirror, beneath, contents, local, take_in, write
from cluster.tasks import Files


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    made = Mirror()
    yield made
    made.remove()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "trial"
    folder.mkdir(parents=True)
    return folder


def begin(mirror: Mirror, trial: Path) -> Path:
    """-> the copy of `trial`."""
    return beneath(mirror.receive("g", [trial], contents([trial])), trial)


def sync(mirror: Mirror, trial: Path) -> list[Change]:
    changes = mirror.changes("g")
    take_in(changes, [trial])
    return changes


def test_a_growing_file_comes_back_by_what_is_new(mirror: Mirror, trial: Path) -> None:
    (trial / "rank_0.log").write_text("attempt 1\n")
    copy = begin(mirror, trial)
    assert (copy / "rank_0.log").read_text() == "attempt 1\n" and not mirror.changes("g")
    for line in ("a\n", "b\n" * 500):
        with open(copy / "rank_0.log", "a") as file:
            file.write(line)
        (change,) = sync(mirror, trial)
        assert change.content == line.encode()
        assert (trial / "rank_0.log").read_text() == (copy / "rank_0.log").read_text()


def test_a_trimmed_file_comes_back_as_it_is_now(mirror: Mirror, trial: Path) -> None:
    (trial / "metrics.jsonl").write_text("".join(f'{{"step":{i}}}\n' for i in range(100)))
    copy = begin(mirror, trial)
    for text in ('{"step":0}\n', "".join(f'{{"step":{i}.5}}\n' for i in range(200))):
        write(copy / "metrics.jsonl", text.encode())
        sync(mirror, trial)
        assert (trial / "metrics.jsonl").read_text() == text


def test_a_checkpoint_comes_behind_its_row(mirror: Mirror, trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are written while changes are looked for."""
    copy = begin(mirror, trial)
    write(copy / "metrics.jsonl", b'{"step":1}\n')
    write(copy / "checkpoints" / "step_1" / "state.json", b"{}")
    plain = module.compared

    def late(path: Path, file: Path, old: Any) -> Any:
        if path.name == "state.json":
            write(copy / "metrics.jsonl", b'{"step":1}\n{"step":2}\n')
        return plain(path, file, old)

    monkeypatch.setattr(module, "compared", late)
    rows, checkpoint = mirror.changes("g")
    assert rows.path.name == "metrics.jsonl" and rows.content == b'{"step":1}\n{"step":2}\n'
    assert checkpoint.path.name == "state.json"


def test_a_new_directory_appears_whole_and_a_deleted_one_goes(mirror: Mirror, trial: Path) -> None:
    copy = begin(mirror, trial)
    for name in ("step_1", "step_2", ".part_3"):
        write(copy / "checkpoints" / name / "state.json", b"{}" * 10)
        write(copy / "checkpoints" / name / "manifest.json", b"m")
    sync(mirror, trial)
    assert sorted(p.name for p in (trial / "checkpoints").iterdir()) == ["step_1", "step_2"]
    for file in (copy / "checkpoints" / "step_1").iterdir():
        file.unlink()
    sync(mirror, trial)
    assert [p.name for p in (trial / "checkpoints").iterdir()] == ["step_2"]
    assert (trial / "checkpoints" / "step_2" / "state.json").read_bytes() == b"{}" * 10


def test_a_directory_cut_short_on_its_way_is_not_there(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is killed between two files."""
    changes = [Change(trial / "checkpoints" / "step_1" / name, b"x") for name in ("a", "b")]
    written: list[Path] = []

    def dies(path: Path, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr("cluster.mirror.write", dies)
    with pytest.raises(KeyboardInterrupt):
        take_in(changes, [trial])
    assert written and not (trial / "checkpoints").exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "{trial}/../other", "{trial}"])
def test_a_node_cannot_write_elsewhere(trial: Path, path: str) -> None:
    with pytest.raises(ValueError, match="is not in"):
        take_in([Change(Path(path.format(trial=trial)), b"x")], [trial])


def test_mirrors_of_killed_processes_are_removed(mirror: Mirror, tmp_path: Path) -> None:
    abandoned = tmp_path / "tmp" / "bigbatch-mirror-old"
    abandoned.mkdir()
    (abandoned / ".lock").touch()
    Mirror().remove()
    assert not abandoned.exists() and mirror.root.exists()


def test_paths_are_what_they_are_without_a_mirror(trial: Path) -> None:
    assert local(trial) == trial


# ---------------------------------------------------------------------------------------------------------- couriers


class Ref:
    """A call's answer, as Ray would give it."""

    def __init__(self, value: Any):
        self.value = value


class Actor:
    """A `Mirror` that is called as an actor is."""

    def __init__(self, mirror: Mirror):
        self.mirror, self.calls = mirror, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Ref:
            self.calls.append(name)
            return Ref(getattr(self.mirror, name)(*(a.value if isinstance(a, Ref) else a for a in args)))

        return SimpleNamespace(remote=remote)


@pytest.fixture
def node(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Actor:
    actor = Actor(mirror)
    ray = SimpleNamespace(
        get=lambda ref: ref.value, put=Ref, wait=lambda refs, **_: (refs, []), exceptions=couriers.ray.exceptions
    )
    monkeypatch.setattr(couriers, "ray", ray)
    monkeypatch.setattr(couriers, "mirrors", {"far": actor})
    monkeypatch.setattr(couriers, "parcels", {})
    return actor


def seats(*sees: bool) -> list[Seat]:
    return [Seat(rank, "near" if s else "far", "host", 1, s) for rank, s in enumerate(sees)]


def test_data_reach_a_node_once_for_all_gangs_and_trials(
    node: Actor, trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write(data / "train_x.npy", b"0123")
    files = Files((trial,), (trial,), (data,))
    gangs = [Couriers(name, seats(False, False)) for name in ("a", "b")]
    monkeypatch.setattr(node.mirror, "missing", lambda folders: [f for f in folders if not absent(node.mirror, f)])
    tops = [gang.send(files)["far"].value for gang in gangs for _ in range(3)]
    assert node.calls.count("keep") == 1 and node.calls.count("receive") == 6
    assert absent(node.mirror, data / "train_x.npy").read_bytes() == b"0123"
    assert all(beneath(top, data / "train_x.npy").read_bytes() == b"0123" for top in tops)


def absent(mirror: Mirror, path: Path) -> Any:
    """The node's copy of a path that it does not see itself; None if it has none."""
    copy = mirror._constant(path)
    return copy if copy.exists() else None


def test_data_that_are_there_are_not_sent(node: Actor, trial: Path, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train_x.npy", b"0123")
    Couriers("a", seats(False)).send(Files((trial,), (trial,), (tmp_path / "data",)))
    assert "keep" not in node.calls


def test_the_last_rows_are_fetched_at_the_end(node: Actor, trial: Path) -> None:
    gang = Couriers("a", seats(False, False))
    copy = beneath(gang.send(Files((trial,), (trial,)))["far"].value, trial)
    (copy / "metrics.jsonl").write_text("{}\n")
    assert gang.finish() is None and (trial / "metrics.jsonl").read_text() == "{}\n"


def test_what_was_lost_on_the_way_is_not_passed_over(node: Actor, trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper of the copies dies while ranks go on: the task's result must not count, and the rank is named."""
    gang = Couriers("a", seats(True, False))
    gang.send(Files((trial,), (trial,)))
    monkeypatch.setattr(couriers.ray, "get", lambda ref: (_ for _ in ()).throw(couriers.ray.exceptions.RayActorError()))
    gang.look()
    assert gang.finish() == 1 and couriers.mirrors == {}


def test_nodes_without_rank_0_get_logs_only(node: Actor, trial: Path) -> None:
    (trial / "rank_1.log").write_text("before\n")
    write(trial / "checkpoints" / "step_1" / "tensors", b"big")
    gang = Couriers("a", seats(True, False))
    copy = beneath(gang.send(Files((trial,), (trial,)))["far"].value, trial)
    assert [p.name for p in copy.rglob("*")] == ["rank_1.log"]
    assert gang.finish() is None and (trial / "checkpoints" / "step_1" / "tensors").exists()


def test_who_sees_the_files_needs_no_copies(trial: Path) -> None:
    gang = Couriers("a", seats(True, True))
    assert gang.send(Files((trial,), (trial,))) == {} and gang.finish() is None
