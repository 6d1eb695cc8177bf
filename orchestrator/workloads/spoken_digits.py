"""Spoken digits: recordings of the Free Spoken Digit Dataset as small images of their log-mel spectra.

32 bands (rows, low to high) by 32 windows of 32 ms that lie evenly over the recording, whatever its length: each word fills its
image. Logarithms of energies, down to a millionth of the recording's largest, less their mean: how loud it is does not count.
"""

from __future__ import annotations

import io
import re
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.workloads.files import DataError, Parsed, read, require, under_data

RATE = 8000  # samples per second
WINDOW = 256  # samples
BANDS = FRAMES = 32
RANGE = 1e-6  # energies below that share of the largest are not told apart
TEST_TAKES = 5  # takes 0 to 4 of each digit and speaker, as usual
NAME = re.compile(r"(\d)_\w+_(\d+)\.wav")  # digit_speaker_take.wav
SOURCE = (
    "get the folder recordings of https://github.com/Jakobovski/free-spoken-digit-dataset into a folder fsdd, "
    "and set BIGBATCH_DATA to the folder around it"
)


def files() -> list[Path]:
    """All recordings by name; raises DataError if there is none."""
    folder = under_data("fsdd") / "recordings"
    found = sorted(path for path in folder.glob("*.wav") if NAME.fullmatch(path.name))
    require([] if found else [folder / "0_jackson_0.wav"], SOURCE)
    return found


def parse(paths: list[Path]) -> Parsed:
    x = np.stack([features(samples(path)) for path in paths])[..., None]
    numbers = [(int(digit), int(take)) for digit, take in NAME.findall("\n".join(path.name for path in paths))]
    y, take = np.array(numbers).T
    test = take < TEST_TAKES
    return Parsed(x[~test], y[~test], x[test], y[test], classes=10)


def samples(path: Path) -> NDArray[np.float64]:
    """(n,) those of a recording, between -1 and 1."""
    try:
        with wave.open(io.BytesIO(read(path))) as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            expected, content = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path}: corrupt: {error or 'it breaks off'}") from error
    if form != (1, 2, RATE):
        raise DataError(f"{path}: {form[0]} channels of {form[1]} bytes at {form[2]} Hz, expected 1 of 2 at {RATE}")
    if len(content) != 2 * expected or not expected:
        raise DataError(f"{path}: truncated: expected {2 * expected or 'some'} bytes of sound, got {len(content)}")
    return np.frombuffer(content, "<i2") / 2**15


def features(sound: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) samples -> (BANDS, FRAMES)"""
    sound = np.pad(sound, (0, max(0, WINDOW - len(sound))))
    starts = np.linspace(0, len(sound) - WINDOW, FRAMES).round().astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[starts] * np.hanning(WINDOW)
    energies = mel_filters() @ np.square(np.abs(np.fft.rfft(windows))).T
    logs = np.log(np.maximum(energies, RANGE * energies.max() + np.finfo(float).tiny))
    return (logs - logs.mean()).astype(np.float32)


def mel_filters() -> NDArray[np.float64]:
    """(BANDS, frequencies) triangles whose corners are even on the mel scale, 2595 log10(1 + f / 700 Hz), up to RATE / 2."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    left, middle, right = (corners[i : i + BANDS, None] for i in range(3))
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)
    return np.maximum(0, np.minimum((hertz - left) / (middle - left), (right - hertz) / (right - middle)))
