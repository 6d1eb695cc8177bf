"""Spoken digits from wav files: which are for testing, what their images show, and errors that name the file."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.workloads import DataError, fingerprint, load
from orchestrator.workloads.spoken_digits import BANDS, FRAMES, RATE, WINDOW, features
from tests.orchestrator.data_files import data

pytestmark = pytest.mark.usefixtures("folders")


def tone(hertz: float, n: int = 3000) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(n) / RATE)


def write(folder: Path, name: str, sound: NDArray[np.float64], rate: int = RATE) -> Path:
    path = folder / "fsdd" / "recordings" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 2**15).astype("<i2").tobytes())
    return path


def write_all(folder: Path) -> None:
    for digit in range(3):
        for take in (0, 4, 5, 11):
            write(folder, f"{digit}_jackson_{take}.wav", tone(500 * (digit + 1)))


def test_the_first_five_takes_are_for_testing(folders: Path) -> None:
    write_all(folders)
    write(folders, "notes.wav", tone(500))
    arrays = load(data("spoken_digits"))
    assert (arrays.train_x.shape, arrays.test_x.shape) == ((6, 1, BANDS, FRAMES), (6, 1, BANDS, FRAMES))
    assert arrays.train_x.dtype == np.float32 and arrays.classes == 10
    assert sorted(arrays.train_y) == sorted(arrays.test_y) == [0, 0, 1, 1, 2, 2]
    first = fingerprint(data("spoken_digits"))
    write(folders, "9_jackson_7.wav", tone(500))
    assert fingerprint(data("spoken_digits")) != first


def test_a_tone_is_a_line_at_its_band() -> None:
    """On the mel scale, 700 (e^(m / 1127) - 1) Hz, with corners even from 0 to 4000 Hz."""
    for band in (8, 16, 28):
        top = 1127 * np.log(1 + 4000 / 700)
        hertz = 700 * (np.exp(top * (band + 1) / (BANDS + 1) / 1127) - 1)
        image = features(tone(hertz))
        assert np.array_equal(image.argmax(0), np.full(FRAMES, band))


def test_windows_lie_evenly_over_a_recording_of_any_length() -> None:
    """Half a tone low, half high: half of the columns each, save where a window sees both."""
    for n in (2 * WINDOW, 1000, 9000):
        image = features(np.concatenate([tone(400, n), tone(2500, n)]))
        low = image[:16].max(0) > image[16:].max(0)
        both = FRAMES * WINDOW // (2 * n) + 1
        assert abs(low.sum() - FRAMES / 2) <= both and np.array_equal(low, np.sort(low)[::-1])


def test_loudness_does_not_count() -> None:
    sound = tone(700) + 0.1 * np.random.default_rng(0).standard_normal(3000)
    assert np.allclose(features(sound), features(0.01 * sound), atol=1e-5)
    assert abs(features(sound).mean()) < 1e-6


def test_silence_and_a_click_are_images_too() -> None:
    assert np.allclose(features(np.zeros(1000)), 0, atol=1e-9)
    assert np.isfinite(features(np.ones(1))).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:1000], "truncated: expected 6000 bytes of sound, got 956"),
        (lambda b: b[:20], "corrupt: "),
        (lambda b: b"<html>not found</html>", "corrupt: file does not start with RIFF id"),
        (lambda b: b[:22] + b"\2" + b[23:], "2 channels of 2 bytes at 8000 Hz, expected 1 of 2 at 8000"),
    ],
)
def test_damaged_recordings(folders: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    write_all(folders)
    path = folders / "fsdd" / "recordings" / "1_jackson_4.wav"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        load(data("spoken_digits"))
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_missing_recordings_are_told_with_their_source(folders: Path) -> None:
    with pytest.raises(DataError, match=r"missing .*fsdd/recordings/.*wav: get the folder recordings of https"):
        load(data("spoken_digits"))
