"""Checkpoints: everything comes back, damage is told, a crash while writing leaves the one before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import checkpoint
from orchestrator.signals import Stopped
from strategies.contract import State

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=5)
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=200)
def test_any_plain_tree_comes_back_equal(tree: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(checkpoint.encode(tree, tensors))
    assert checkpoint.decode(json.loads(text), tensors) == tree


def content(value: float) -> dict[str, object]:
    net = torch.nn.Linear(2, 2).double()
    torch.nn.init.constant_(net.weight, value)
    return {
        "net": net,
        "own": State({"average": torch.full((3,), value), "count": 7}),
        "both": [torch.ones(1), (1, "a")],
    }


def test_states_objects_and_tensors_are_filled_in_place(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, content(2.0))
    target = content(0.0)
    average = target["own"].saved["average"]  # type: ignore[attr-defined]
    found = checkpoint.load(tmp_path)
    assert found is not None
    restored = checkpoint.restore(target, found)
    assert restored["own"].saved["average"] is average and average.tolist() == [2.0, 2.0, 2.0]
    assert restored["net"].weight.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert restored["own"].saved["count"] == 7 and restored["both"][1] == (1, "a")


def test_optimizer_state_comes_back(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 1)
    one, two = (torch.optim.AdamW(net.parameters(), lr=0.1) for _ in range(2))
    net(torch.ones(1, 3)).sum().backward()
    one.step()
    checkpoint.save(tmp_path, 1, {"optimizer": one})
    found = checkpoint.load(tmp_path)
    assert found is not None
    checkpoint.restore({"optimizer": two}, found)
    for a, b in zip(one.state.values(), two.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/updates/0: a set cannot be saved"):
        checkpoint.save(tmp_path, 1, {"updates": [{1, 2}]})
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.save(tmp_path, 1, content(1.0))
    last = checkpoint.save(tmp_path, 2, content(2.0))
    file = last / name
    blob = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(blob[: len(blob) // 2])
    else:
        blob[len(blob) // 2] ^= 1
        file.write_bytes(blob)
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        found = checkpoint.load(tmp_path)
    assert found is not None and found["own"]["average"].tolist() == [1.0, 1.0, 1.0]


def test_a_crash_at_any_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, content(1.0))
    real = os.rename
    for crash_at in range(4):
        calls = iter(range(10))

        def crash(*paths: object, at: int = crash_at, calls: object = calls) -> None:
            if next(calls) == at:  # type: ignore[call-overload]
                raise OSError(28, "No space left on device")
            real(*paths)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "rename", crash)
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 2, content(2.0))
        monkeypatch.undo()
        found = checkpoint.load(tmp_path)
        assert found is not None and found["own"]["average"][0] == 1.0


def test_a_save_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, where the driver trains itself."""

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(Stopped):
        checkpoint.save(tmp_path, 2, content(2.0))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_gone_after_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".part_000000001").mkdir()
    (tmp_path / ".part_000000001" / "tensors.safetensors").write_bytes(b"large")
    checkpoint.save(tmp_path, 2, content(2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000002"]


def test_none_is_loaded_that_is_later_than_the_rows(tmp_path: Path) -> None:
    for step in (340, 360, 400):
        checkpoint.save(tmp_path, step, {"n": step}, keep=3)
    with pytest.warns(UserWarning, match="step_000000400: checkpoint passed over: the rows of metrics end at step 380"):
        assert checkpoint.load(tmp_path, 380) == {"n": 360}
    with pytest.warns(UserWarning, match="end at step 0"):
        assert checkpoint.load(tmp_path, 0) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3000):
        checkpoint.save(tmp_path, step, {"n": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000010", "step_000003000"]
    assert checkpoint.load(tmp_path) == {"n": 3000}


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_passed_over_does_not_count_among_the_kept(tmp_path: Path, keep: int) -> None:
    for step in (90, 100):
        checkpoint.save(tmp_path, step, {"n": step}, keep=2)
    (tmp_path / "step_000000100" / "state.json").write_text("x")
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        assert checkpoint.load(tmp_path) == {"n": 90}
    checkpoint.save(tmp_path, 95, {"n": 95}, keep)
    assert checkpoint.load(tmp_path) == {"n": 95}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000090", "step_000000095"][-keep:]


def test_no_pickle_is_ever_loaded() -> None:
    sources = [p for top in ("strategies", "orchestrator", "cluster") for p in Path(top).rglob("*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text()
        assert "torch.load" not in text and "pickle.load(" not in text, path
