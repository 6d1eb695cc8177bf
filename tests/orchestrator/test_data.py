"""Data sets from their files: layouts, errors that tell missing from truncated from corrupt."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.recipe.workload_schema import Data
from orchestrator.workloads import Arrays, DataError, cifar10, fingerprint, load
from tests.orchestrator.data_files import RNG, data, idx, write_mnist, write_npz

REAL = os.environ.get("BIGBATCH_DATA")
pytestmark = pytest.mark.usefixtures("folders")


def equal(a: Arrays, b: Arrays) -> bool:
    pairs = [(a.train_x, b.train_x), (a.train_y, b.train_y), (a.test_x, b.test_x), (a.test_y, b.test_y)]
    return all(np.array_equal(x, y) for x, y in pairs) and (a.classes, a.mean, a.std) == (b.classes, b.mean, b.std)


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_split_by_class() -> None:
    arrays = load(data("digits"))
    assert (arrays.train_x.shape, arrays.test_x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert arrays.train_x.dtype == np.uint8 and arrays.train_y.dtype == np.int64
    share = np.bincount(arrays.test_y) / (np.bincount(arrays.test_y) + np.bincount(arrays.train_y))
    assert np.all(np.abs(share - 0.2) < 0.005)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    arrays = load(data("digits"))
    ours = np.concatenate([arrays.train_x, arrays.test_x]).reshape(-1, 64)
    labels = np.concatenate([arrays.train_y, arrays.test_y])
    assert sorted(map(tuple, np.c_[np.rint(ours * (16 / 255)), labels])) == sorted(map(tuple, np.c_[x, y]))
    assert ours.max() == 255


# -------------------------------------------------------------------------------------------------------------- mnist


def test_mnist_packed_and_plain_are_equal(folders: Path) -> None:
    write_mnist(folders, packed=True)
    packed = load(data("mnist"))
    first = fingerprint(data("mnist"))
    write_mnist(folders, packed=False)  # plain files go first
    assert fingerprint(data("mnist")) != first
    assert equal(packed, load(data("mnist")))
    assert packed.train_x.shape == (50, 1, 28, 28) and packed.classes == 10
    x = np.asarray(packed.train_x) / 255
    assert packed.mean == pytest.approx((x.mean(),), abs=1e-12) and packed.std == pytest.approx((x.std(),), abs=1e-12)


def test_missing_files_are_all_named_with_their_source(folders: Path) -> None:
    with pytest.raises(DataError) as error:
        load(data("mnist"))
    message = str(error.value)
    assert message.count(str(folders / "mnist")) == 4 and message.startswith("missing ")
    assert "yann.lecun.com" in message and "BIGBATCH_DATA" in message and "\n" not in message


def test_the_first_so_many_examples_are_a_data_set_of_their_own(folders: Path) -> None:
    write_mnist(folders, packed=False)
    whole, part = load(data("mnist")), load(data({"mnist": {"train": 30}}))
    assert np.array_equal(part.train_x, whole.train_x[:30]) and np.array_equal(part.train_y, whole.train_y[:30])
    assert np.array_equal(part.test_x, whole.test_x)
    assert part.mean == pytest.approx(((np.asarray(whole.train_x[:30]) / 255).mean(),), abs=1e-12)
    assert fingerprint(data({"mnist": {"train": 30}})) != fingerprint(data("mnist"))
    with pytest.raises(DataError, match="mnist: train: 51 examples asked for, there are 50"):
        load(data({"mnist": {"train": 51}}))


IMAGES = "train-images-idx3-ubyte"
EXPECTED = 16 + 50 * 28 * 28


@pytest.mark.parametrize(
    ("packed", "damage", "message"),
    [
        (False, lambda b: b[:5000], f"truncated: expected {EXPECTED} bytes, got 5000"),
        (False, lambda b: b[:7], "truncated: expected 16 bytes and more, got 7"),
        (False, lambda b: b + b"x", f"corrupt: expected {EXPECTED} bytes, got {EXPECTED + 1}"),
        (False, lambda b: b"PK" + b[2:], "corrupt: not a 3-D IDX file"),
        (True, lambda b: b[: len(b) // 2], f"truncated: expected {EXPECTED} bytes, got "),
        (True, lambda b: b[:-8] + bytes(8), "corrupt gzip file"),
        (True, lambda b: b"<html>not found</html>", "corrupt gzip file"),
    ],
)
def test_damaged_mnist_files(folders: Path, packed: bool, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_mnist(folders, packed) / (IMAGES + ".gz" if packed else IMAGES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        load(data("mnist"))
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(50, 11, np.uint8), "train labels go from 11 to 11, expected 0 to 9"),
        (np.zeros(49, np.uint8), "the train set has 50 examples and 49 labels"),
    ],
)
def test_labels_that_do_not_fit(folders: Path, labels: NDArray, message: str) -> None:
    folder = write_mnist(folders, packed=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match=message):
        load(data("mnist"))
    write_mnist(folders, packed=False)
    load(data("mnist"))  # nothing half-written stays behind


# -------------------------------------------------------------------------------------------------------------- cifar


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NDArray, NDArray]]:
    """Six parts of 20 examples instead of 10,000, as (pixels, labels)."""
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    return [(RNG.integers(0, 256, (20, 3072), np.uint8), RNG.integers(0, 10, 20)) for _ in range(6)]


def write_binary(folder: Path, parts: list[tuple[NDArray, NDArray]]) -> list[Path]:
    (folder / "cifar-10-batches-bin").mkdir()
    paths = [folder / "cifar-10-batches-bin" / f"{name}.bin" for name in cifar10.SPLITS]
    for path, (x, y) in zip(paths, parts, strict=True):
        path.write_bytes(np.c_[y.astype(np.uint8), x].tobytes())
    return paths


def write_python(folder: Path, parts: list[tuple[NDArray, NDArray]]) -> list[Path]:
    (folder / "cifar-10-batches-py").mkdir()
    paths = [folder / "cifar-10-batches-py" / name for name in cifar10.SPLITS]
    for path, (x, y) in zip(paths, parts, strict=True):
        batch = {b"batch_label": b"part", b"labels": y.tolist(), b"data": x, b"filenames": [b"a.png"] * 20}
        old_names = pickle.dumps(batch, protocol=3).replace(b"numpy._core", b"numpy.core")  # as in the official files
        path.write_bytes(old_names)
    return paths


def test_cifar_layouts_are_equal(folders: Path, small_cifar: list[tuple[NDArray, NDArray]]) -> None:
    python = write_python(folders, small_cifar)
    from_python = load(data("cifar10"))
    write_binary(folders, small_cifar)
    assert equal(from_python, load(data("cifar10")))
    assert from_python.train_x.shape == (100, 3, 32, 32)
    assert np.array_equal(from_python.train_x[21].reshape(-1), small_cifar[1][0][1])
    assert np.array_equal(from_python.test_y, small_cifar[5][1])
    assert len(python) == 6


def test_damaged_binary_cifar(folders: Path, small_cifar: list[tuple[NDArray, NDArray]]) -> None:
    paths = write_binary(folders, small_cifar)
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(DataError) as error:
        load(data("cifar10"))
    assert str(error.value) == f"{paths[2]}: truncated: expected 61460 bytes, got 61459"
    paths[2].unlink()
    with pytest.raises(DataError) as error:
        load(data("cifar10"))
    assert str(error.value).startswith(f"missing {paths[2]}: ") and "cs.toronto.edu" in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:1000], "truncated: the pickle breaks off after 1000 bytes"),
        (lambda b: b"\x00" + b[1:], "corrupt pickle"),
        (lambda b: pickle.dumps([1, 2]), "corrupt: expected a dictionary with data and labels"),
        (
            lambda b: pickle.dumps({b"data": np.zeros((3, 4)), b"labels": [1]}, 3),
            "corrupt: expected 20 x 3072 bytes and labels",
        ),
    ],
)
def test_damaged_python_cifar(
    folders: Path, small_cifar: list[tuple[NDArray, NDArray]], damage: Callable[[bytes], bytes], message: str
) -> None:
    path = write_python(folders, small_cifar)[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        load(data("cifar10"))
    assert str(error.value).startswith(f"{path}: {message}")


class Malicious:
    def __init__(self, call: Callable[..., Any], *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("call", [os.mkdir, eval, np.load, np.fromfile])
def test_a_malicious_pickle_is_refused_before_it_acts(
    folders: Path, small_cifar: list[tuple[NDArray, NDArray]], call: Callable[..., Any]
) -> None:
    path = write_python(folders, small_cifar)[0]
    path.write_bytes(pickle.dumps({b"data": Malicious(call, str(folders / "owned"))}))
    with pytest.raises(DataError, match=r"refused: its pickle asks for \w+\.\w+, which no CIFAR-10 file needs"):
        load(data("cifar10"))
    assert not (folders / "owned").exists()


# ----------------------------------------------------------------------------------------------------- npz and folder


def test_npz_images_keep_their_values(folders: Path) -> None:
    images = RNG.integers(0, 256, (12, 2, 4, 6), np.uint8)
    arrays = load(write_npz(folders, train_x=images))
    assert np.array_equal(arrays.train_x, images) and arrays.classes == 3
    assert arrays.mean == pytest.approx((images / 255).mean((0, 2, 3)), abs=1e-12)


def test_npz_flat_floats_are_scaled_by_feature(folders: Path) -> None:
    x = RNG.normal(size=(12, 7)) * 3 + 100
    x[:, 2] = 5  # a constant feature
    arrays = load(write_npz(folders, train_x=x, test_x=x[:5]))
    assert arrays.train_x.dtype == np.float32 and np.allclose(arrays.train_x, x)
    assert arrays.mean == pytest.approx(x.mean(0), abs=1e-12) and len(arrays.std) == 7
    assert arrays.std[2] == 1.0 and arrays.std[0] == pytest.approx(x.std(0)[0], abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_y": None}, "has no test_y; it holds train_x, train_y, test_x"),
        ({"train_x": np.zeros((12, 2, 4, 6), np.int32)}, "train_x is int32, expected uint8 or floats"),
        ({"train_x": np.zeros((12, 4, 6))}, r"train_x has shape \(12, 4, 6\), expected \(n, d\) or"),
        ({"test_x": np.zeros((5, 2, 4, 7), np.uint8)}, "training examples are uint8 of shape .*, test examples uint8"),
        ({"train_y": np.zeros(12)}, "train_y is float64 of shape"),
        ({"train_y": np.array([object()] * 12)}, "expected an .npz file of plain arrays"),
        ({"train_x": np.full((12, 3), np.nan), "test_x": np.zeros((5, 3))}, "train_x has values that are not finite"),
        ({"train_y": np.full(12, -1)}, "train labels go from -1 to -1, expected 0 to 2"),
    ],
)
def test_npz_that_does_not_fit(folders: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(write_npz(folders, **changes))
    assert str(folders / "own.npz") in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:200], lambda b: b[:300] + bytes(40) + b[340:], lambda b: b"", lambda b: b"text"]
)
def test_damaged_npz(folders: Path, damage: Callable[[bytes], bytes]) -> None:
    write_npz(folders)
    path = folders / "own.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="corrupt"):
        load(data({"npz": {"path": "own.npz"}}))


def write_images(folder: Path) -> Data:
    from PIL import Image

    for split, n in (("train", 3), ("test", 1)):
        for label, name in enumerate(("ant", "bee")):
            (folder / "pets" / split / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.new("RGB", (10 + i, 8), (100 * label, 50 * i, 7))
                picture.save(folder / "pets" / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return data({"image_folder": {"path": "pets", "size": 6}})


def test_image_folder(folders: Path) -> None:
    recipe = write_images(folders)
    arrays = load(recipe)
    assert arrays.train_x.shape == (6, 3, 6, 6) and arrays.classes == 2
    assert arrays.train_y.tolist() == [0, 0, 0, 1, 1, 1] and arrays.test_y.tolist() == [0, 1]
    assert np.array_equal(arrays.train_x[4][:, 3, 3], (100, 50, 7))  # bee/1.png, kept exactly
    first = fingerprint(recipe)
    assert fingerprint(data({"image_folder": {"path": "pets", "size": 7}})) != first
    (folders / "pets/train/ant/0.jpg").rename(folders / "pets/train/ant/9.jpg")
    assert fingerprint(recipe) != first


def test_damaged_image_folder(folders: Path) -> None:
    recipe = write_images(folders)
    picture = folders / "pets/train/bee/1.png"
    content = picture.read_bytes()
    for damage, message in ((content[: len(content) - 30], "truncated"), (b"text", "corrupt: not an image")):
        picture.write_bytes(damage)
        with pytest.raises(DataError, match=f"{picture}: {message}"):
            load(recipe)
    picture.write_bytes(content)
    (folders / "pets/test/ant").rename(folders / "pets/test/cow")
    with pytest.raises(DataError, match="classes cow are not in"):
        load(recipe)
    with pytest.raises(DataError, match=f"missing {folders}/none/train, {folders}/none/test"):
        load(data({"image_folder": {"path": "none"}}))


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "folder", "shape"), [("mnist", "mnist", (1, 28, 28)), ("cifar10", "cifar-10-batches-*", (3, 32, 32))]
)
def test_the_real_files(name: str, folder: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    real = REAL and next(Path(REAL).glob(folder), None)
    if not real:
        pytest.skip(f"BIGBATCH_DATA has no {folder}")
    monkeypatch.setenv("BIGBATCH_DATA", str(REAL))
    arrays = load(data(name))
    assert arrays.train_x.shape[1:] == shape and len(arrays.test_x) == 10_000
    assert np.bincount(arrays.test_y).min() > 890  # MNIST has 892 fives, CIFAR-10 1,000 of each class
