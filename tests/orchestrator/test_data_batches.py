"""Batches on the device: order, augmentation and normalisation, each against a plain loop in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.recipe.workload_schema import Augment, Workload
from orchestrator.workloads import Arrays, DataError, open_dataset, order
from orchestrator.workloads.dataset import Dataset
from orchestrator.workloads.noise import uniform
from strategies.contract import Batch, mix

CPU = torch.device("cpu")
SEED = 7
BOTH = Augment(crop=3, flip=True)


def arrays(n: int = 40, shape: tuple[int, ...] = (3, 6, 10)) -> Arrays:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 256, (n, *shape), np.uint8)
    channels = shape[0]
    mean, std = tuple(rng.uniform(0.3, 0.6, channels)), tuple(rng.uniform(0.2, 0.4, channels))
    return Arrays(x, rng.integers(0, 5, n), x[:11], rng.integers(0, 5, 11), 5, mean, std)


def dataset(augment: Augment = BOTH, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Dataset:
    return Dataset(arrays(**kwargs), augment, SEED, CPU, dtype)


def naive(data: Arrays, position: int, augment: Augment) -> np.ndarray:
    """One augmented and normalised example, by the definition."""
    x = data.train_x[order.indices(SEED, position, position + 1, len(data.train_x))[0]]
    place = torch.tensor([position])
    if pad := augment.crop:
        down, right = (uniform(SEED, "crop", place, 2)[0] * (2 * pad + 1)).long().tolist()
        _, h, w = x.shape
        mode: Any = "reflect" if augment.pad == "reflect" else "constant"
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), mode)[:, down : down + h, right : right + w]
    if augment.flip and mirrored(data, position, augment):
        x = x[..., ::-1]
    return (x / 255 - np.reshape(data.mean, (-1, 1, 1))) / np.reshape(data.std, (-1, 1, 1))


def mirrored(data: Arrays, position: int, augment: Augment) -> bool:
    n = len(data.train_x)
    if augment.flip == "alternating":
        example = torch.from_numpy(order.indices(SEED, position, position + 1, n))
        return bool(uniform(SEED, "flip", example)[0, 0] < 0.5) != bool(position // n % 2)
    return bool(uniform(SEED, "flip", torch.tensor([position]))[0, 0] < 0.5)


AIRBENCH = Augment(crop=2, pad="reflect", flip="alternating")


@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(crop=3),
        Augment(crop=5, pad="reflect"),
        Augment(flip=True),
        Augment(flip="alternating"),
        BOTH,
        AIRBENCH,
    ],
)
@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 8, 8)])
def test_batches_equal_the_definition(augment: Augment, shape: tuple[int, ...]) -> None:
    batch = dataset(augment, shape=shape).train(25, 95)  # over two ends of epochs
    expected = np.stack([naive(arrays(shape=shape), p, augment) for p in range(25, 95)])
    assert np.abs(batch.x.numpy() - expected).max() < 1e-12
    assert batch.position.tolist() == list(range(25, 95))
    assert batch.y.tolist() == arrays(shape=shape).train_y[order.indices(SEED, 25, 95, 40)].tolist()
    assert batch.x.is_contiguous(memory_format=torch.channels_last) and batch.x.dtype == torch.float64


@pytest.mark.parametrize("augment", [BOTH, AIRBENCH])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_augmentation_is_the_same_for_any_split(world: int, augment: Augment) -> None:
    data = dataset(augment)
    whole = data.train(0, 61)
    shares = [order.share(0, 61, rank, world) for rank in range(world)]
    pieces = [data.train(a, b) for start, stop in shares for a, b in order.micro(start, stop, 7)]
    for field in ("x", "y", "position"):
        assert torch.equal(torch.cat([getattr(piece, field) for piece in pieces]), getattr(whole, field))


def test_alternating_flips_show_each_side_once_in_two_epochs() -> None:
    data, plain = dataset(Augment(flip="alternating")), dataset(Augment()).first(40).x
    sides = []
    for epoch in range(4):
        places = torch.from_numpy(order.indices(SEED, epoch * 40, (epoch + 1) * 40, 40))
        seen = torch.empty_like(plain)
        seen[places] = data.train(epoch * 40, (epoch + 1) * 40).x
        sides.append([torch.equal(a, b) for a, b in zip(seen, plain, strict=True)])
    assert sides[0] == sides[2] == [not side for side in sides[1]] == [not side for side in sides[3]]
    assert 10 < sum(sides[0]) < 30


def test_first_examples_are_neither_augmented_nor_reordered() -> None:
    data, plain = dataset(AIRBENCH), dataset(Augment())
    assert torch.equal(data.first(7).x, plain.first(40).x[:7]) and data.first(7).position.tolist() == list(range(7))
    place = int(np.flatnonzero(order.indices(SEED, 0, 40, 40) == 3)[0])
    assert torch.equal(plain.train(place, place + 1).x[0], data.first(4).x[3])
    assert data.first(7).y.tolist() == arrays().train_y[:7].tolist()
    assert len(data.first(1000)) == 40 == len(data.first(1000).position)


def test_crops_and_flips_take_every_value_equally_often() -> None:
    position = torch.arange(100_000)
    offsets = (uniform(0, "crop", position, 2) * 9).long()
    for axis in (0, 1):
        counts = torch.bincount(offsets[:, axis], minlength=9)
        assert counts.shape == (9,) and (counts / 100_000 - 1 / 9).abs().max() < 0.005
    assert abs(float((uniform(0, "flip", position) < 0.5).double().mean()) - 0.5) < 0.005
    assert abs(float(torch.corrcoef(offsets.double().T)[0, 1])) < 0.01


def test_uniform_is_splitmix64() -> None:
    def splitmix64(state: int) -> int:
        z = state % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    assert splitmix64(golden) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    position = torch.tensor([0, 1, 5, 10**12])
    expected = [
        [(splitmix64(mix(3, "tag") + (3 * p + j + 1) * golden) >> 11) / 2**53 for j in range(3)]
        for p in position.tolist()
    ]
    assert uniform(3, "tag", position, 3).tolist() == expected


def test_test_examples_are_neither_augmented_nor_reordered() -> None:
    data = dataset()
    batch = data.test(2, 9)
    plain = (arrays().test_x[2:9] / 255 - np.reshape(arrays().mean, (1, -1, 1, 1))) / np.reshape(
        arrays().std, (1, -1, 1, 1)
    )
    assert np.abs(batch.x.numpy() - plain).max() < 1e-12
    assert batch.y.tolist() == arrays().test_y[2:9].tolist()
    assert (data.examples, data.test_examples, data.inputs, data.classes) == (40, 11, (3, 6, 10), 5)


def test_flat_data() -> None:
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    flat = Arrays(x, np.zeros(20, np.int64), x, np.zeros(20, np.int64), 1, (1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 4.0, 8.0))
    batch = Dataset(flat, Augment(), SEED, CPU, torch.float64).test(0, 20)
    assert np.abs(batch.x.numpy() - (x.astype(np.float64) - flat.mean) / flat.std).max() < 1e-12
    with pytest.raises(
        DataError, match=r"augment: crop and flip need images, this data set has inputs of shape \(4,\)"
    ):
        Dataset(flat, Augment(flip=True), SEED, CPU, torch.float64)


def test_a_reflected_rim_needs_what_it_reflects() -> None:
    with pytest.raises(DataError, match=r"pad: reflect: crop 6 needs larger images than \(6, 10\)"):
        dataset(Augment(crop=6, pad="reflect"))
    dataset(Augment(crop=6)), dataset(Augment(pad="reflect"))


def test_making_batches_leaves_the_data_set_as_it_was() -> None:
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    flat = Arrays(x.copy(), np.zeros(20, np.int64), x.copy(), np.zeros(20, np.int64), 1, (1.0,) * 4, (2.0,) * 4)
    data = Dataset(flat, Augment(), SEED, CPU, torch.float32)  # no conversion stands between the data and the batch
    data.train(0, 20), data.test(0, 20)
    assert np.array_equal(flat.train_x, x) and np.array_equal(flat.test_x, x)


def test_score_is_a_sum_over_examples() -> None:
    data = dataset()
    logits = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.from_numpy(arrays().test_y)
    score = data.score(logits, y)
    loss = -torch.log_softmax(logits, 1)[range(11), y].sum()
    assert abs(float(score["test_loss"] - loss)) < 1e-12
    assert score["test_accuracy"] == sum(int(row.argmax()) == int(label) for row, label in zip(logits, y, strict=True))
    parts = [data.score(logits[:4], y[:4]), data.score(logits[4:], y[4:])]
    assert abs(float(sum(p["test_loss"] for p in parts) - score["test_loss"])) < 1e-12


def test_a_worker_without_test_examples_scores_nothing() -> None:
    data = dataset()
    empty = data.test(3, 3)
    assert empty.x.shape == (0, 3, 6, 10)
    assert all(value == 0 for value in data.score(torch.zeros(0, 5), empty.y).values())


def test_open_dataset_seeds_the_order(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBATCH_HOME", str(tmp_path))
    workload = Workload.model_validate({"data": "digits", "augment": {"crop": 1}})
    first, again, other = (open_dataset(workload, seed, CPU, torch.float32).train(0, 64) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x) and not torch.equal(first.y, other.y)
    assert first.x.dtype == torch.float32


@pytest.mark.gpu
def test_a_gpu_makes_the_same_batches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def on(device: str) -> Batch:
        return Dataset(arrays(), BOTH, SEED, torch.device(device), torch.float64).train(25, 95)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b.cpu()).abs().max() < 1e-12)

    here, there = on("cpu"), on("cuda")
    assert (
        there.x.is_cuda and close(here.x, there.x) and close(here.y, there.y) and close(here.position, there.position)
    )
