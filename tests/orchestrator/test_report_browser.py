"""The report in headless Chromium: it shows without a network, and hostile names stay text."""

from __future__ import annotations

import contextlib
import html
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.report import build
from orchestrator.report.pages import escaped_markdown
from tests.orchestrator.made_study import MadeStudy, quickstart

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
)
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
IMAGE, SCRIPT = "<img src=x onerror=document.title='pwned'>", "</script><script>document.title='pwned'</script>"
STYLE, MARKDOWN = "</style><svg/onload=document.title='pwned'>", "[a](javascript:b)|`c`"


def chromium(tmp_path: Path, page: Path, *options: str) -> str:
    """What Chromium prints; it and its children end within a minute."""
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    assert CHROMIUM
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *options, page.as_uri()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def hostile(path: Path) -> Path:
    """A study whose every name is an attack."""
    made = MadeStudy(path, name=SCRIPT)
    for arm in (IMAGE, SCRIPT):
        for batch, steps in {32: 100, 64: 60}.items():
            made.add(arm, batch, 0, steps, point={"base.batch": batch, IMAGE: STYLE}, device=STYLE)
    made.add(MARKDOWN, 32, 0, status="failed", error=IMAGE + SCRIPT)
    (path / "recipe.yaml").write_text(f"study: {SCRIPT}\n</pre>{IMAGE}\n")
    (path / "env.json").write_text('{"cpu": "</td>%s", "%s": 1}' % (IMAGE, IMAGE))  # noqa: UP031 - braces of JSON
    return path


@needs_chromium
def test_a_report_shows_in_a_browser(tmp_path):
    made = quickstart(tmp_path / "study")
    headlines = build(made.path)
    dom = chromium(tmp_path, made.path / "report.html", "--dump-dom")
    assert all(html.escape(sentence, quote=False) in dom for sentence in headlines)
    assert dom.count("<svg") == len(list((made.path / "figures").glob("*.svg")))
    assert dom.count("<tr>") > 24
    assert re.search(r'<th[^>]* tabindex="0"', dom), "the page's policy kept its own script from running"


@needs_chromium
def test_a_report_is_not_blank(tmp_path):
    made = quickstart(tmp_path / "study")
    build(made.path)
    shot = tmp_path / "report.png"
    chromium(tmp_path, made.path / "report.html", f"--screenshot={shot}", "--window-size=1200,3000")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1200, 3)
    bands = pixels.reshape(10, 300, 1200, 3)
    assert all(band.std() > 5 for band in bands), "a stretch of the page is blank"
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both arms are drawn
        assert (np.abs(pixels - colour).max(axis=-1) < 8).sum() > 300


@needs_chromium
def test_hostile_names_stay_text_in_a_browser(tmp_path):
    path = hostile(tmp_path / "study")
    build(path)
    dom = chromium(tmp_path, path / "report.html", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title and title[1].endswith("bigbatch report")
    assert not re.search(r"<img|<[^>]*\son(error|load)=", dom)
    assert dom.count("<script") == 1
    assert html.escape(IMAGE, quote=False) in dom and html.escape(SCRIPT, quote=False) in dom


def test_hostile_names_are_escaped_in_every_file(tmp_path):
    path = hostile(tmp_path / "study")
    build(path)
    page = (path / "report.html").read_text()
    assert page.count("<script>") == 1 and page.count("</style>") == 1 and "<img" not in page
    for svg in (path / "figures").glob("*.svg"):
        assert not re.search(r"<img|<script|onload=document", re.sub(r"<!--.*?-->", "", svg.read_text(), flags=re.S))
    text = (path / "report.md").read_text()
    assert "<img" not in text and "<script" not in text and "[a](" not in text
    assert escaped_markdown(MARKDOWN) in text


@needs_chromium
@pytest.mark.parametrize("policy", [True, False])
def test_the_policy_stops_what_escaping_would_miss(tmp_path, policy):
    """With markup put in on purpose: inert under the page's policy, and alive without it, so that the test can fail."""
    made = MadeStudy(tmp_path / "study")
    made.add("sgd", 32, 0, 100)
    build(made.path)
    text = (made.path / "report.html").read_text().replace("<main>", f"<main>{SCRIPT.removeprefix('</script>')}")
    attacked = made.path / "attacked.html"
    attacked.write_text(text if policy else re.sub(r"<meta http-equiv[^>]*>", "", text))
    dom = chromium(tmp_path, attacked, "--dump-dom")
    assert ("<title>pwned</title>" in dom) is not policy
