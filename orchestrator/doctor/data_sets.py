"""The data sets that are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable

from orchestrator.doctor.finding import Finding, bad, ok, warn
from orchestrator.workloads import DataError, cifar10, mnist, spoken_digits
from orchestrator.workloads.files import under_data


def data() -> Finding:
    """What is found where recipes look for data; digits and noisy_quadratic need no files."""
    asked, folder = os.environ.get("BIGBATCH_DATA"), under_data(".").resolve()
    if asked and not folder.is_dir():
        return bad(
            "data", f"BIGBATCH_DATA={asked} is not a folder", "export BIGBATCH_DATA=the folder that holds the data"
        )
    sets = {"mnist": mnist, "cifar10": cifar10, "spoken_digits": spoken_digits}
    found = [name for name, module in sets.items() if complete(module.files)]
    found += sorted(path.name for path in folder.glob("*.npz"))
    found += sorted(path.parent.name + "/" for path in folder.glob("*/train") if (path.parent / "test").is_dir())
    said = f"{folder}{'' if asked else ' (BIGBATCH_DATA is not set)'}: {', '.join(found) or 'no data sets'}"
    if asked and not found:
        return warn(
            "data", said, "expected mnist/, cifar-10-batches-bin/, fsdd/, *.npz or NAME/train and NAME/test in it"
        )
    return ok("data", said)


def complete(files: Callable[[], object]) -> bool:
    try:
        files()
    except DataError:
        return False
    return True
