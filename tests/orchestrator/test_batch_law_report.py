"""What a report says of critical batch sizes, and when it says nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from orchestrator.batch_law.curve import Curve, as_data
from orchestrator.batch_law.law import Law
from orchestrator.report import build, latex
from orchestrator.report.captions import notes
from orchestrator.report.headlines import headlines
from orchestrator.report.load import load
from orchestrator.report.summary import summarise
from orchestrator.report.wording import figures2
from tests.orchestrator.made_study import MadeStudy


def made(path: Path, law: Law, batches: list[int]) -> MadeStudy:
    study = MadeStudy(path / "s")
    for batch in batches:
        for seed in range(3):
            study.add("sgd", batch, seed, round(law.steps(batch) * (1, 0.97, 1.02)[seed]))
    return study


def test_an_identified_critical_batch_size_has_its_interval(tmp_path):
    study = made(tmp_path, Law(30, 200), [16, 32, 64, 128, 256, 512, 1024])
    (sentence,) = build(study.path)
    found = re.search(r"Its critical batch size is (\d+) \(95 % interval (\d+)-(\d+)\)\.$", sentence)
    assert found
    value, low, high = map(int, found.groups())
    assert low < 200 < high and value == pytest.approx(200, rel=0.1)
    text = (study.path / "report.md").read_text()
    assert "Dotted: the law S = S_min (1 + B_crit / B) fitted, with its 95 % band." in text
    assert "Critical batch size B_crit:" in text
    assert "fitted law" in (study.path / "figures" / "steps_to_target.svg").read_text()


def test_perfect_scaling_has_a_bound_only(tmp_path):
    (sentence,) = build(made(tmp_path, Law(1e-3, 5e7), [16, 32, 64, 128, 256]).path)
    bound = re.search(r"Its critical batch size cannot be told from these batch sizes: at least (\d+)\.$", sentence)
    assert bound and int(bound[1]) > 256


def test_three_batch_sizes_with_hits_have_the_bound_that_fit_gives(tmp_path):
    study = made(tmp_path, Law(30, 200), [16, 64, 256])
    for batch in (1024, 4096):
        study.add("sgd", batch, 0, math.inf)
    found = summarise(load(study.path, None))
    fitted = as_data(Curve("sgd", found.points("sgd")))
    assert not fitted["identified"] and fitted["reasons"][0] == "the target was reached at 3 batch sizes, not 4"
    ((word, value),) = fitted["bound"].items()
    end = f"cannot be told from these batch sizes: {word.replace('_', ' ')} {figures2(value)}."
    assert end in headlines(found)[0] and "reached the target at 3 batch sizes or more" in " ".join(notes(found))
    row = latex.tables(found)["critical_batch"]
    assert "not identified: the target was reached at 3 batch sizes, not 4" in row


def test_two_batch_sizes_with_hits_are_not_enough(tmp_path):
    study = made(tmp_path, Law(30, 200), [16, 256])
    study.add("sgd", 1024, 0, math.inf)
    assert "critical" not in " ".join(build(study.path))
    assert "B_crit" not in (study.path / "report.md").read_text()
    assert "fitted law" not in (study.path / "figures" / "steps_to_target.svg").read_text()
