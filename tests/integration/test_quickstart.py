"""``make run`` shows what it promises: a pool that is extended and keeps what it knew, one LoRA that forgets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sequences import ROOT, environment

pytestmark = pytest.mark.integration

FIGURES = re.compile(r"^AP (?P<ap>[\d.]+)  F\.Ra (?P<f_ra>-?[\d.]+)", flags=re.MULTILINE)
GATE = re.compile(r"│ (?:animal|basket|ticket|place) +│.*\d\.\d\d │")
ALONE = re.compile(r"alone\W+(?P<scores>\d+\.\d.*)$", flags=re.MULTILINE)


@pytest.mark.timeout(900)
def test_make_run(tmp_path: Path) -> None:
    # The environment is the one that runs this test; what is run, and in which order, is the Makefile's.
    places = f"store.uri={tmp_path}/store tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    ended = subprocess.run(
        ["make", "--assume-old=env", "run", f"SAPT={sys.executable} -m pipelines.sapt", f"PLACES={places}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    three, four, sequential, last = (
        {name: float(value) for name, value in found.groupdict().items()} for found in FIGURES.finditer(ended.stdout)
    )
    rows = ALONE.findall(ended.stdout)
    alone = [[float(score) for score in re.findall(r"\d+\.\d", row)] for row in rows]
    assert [len(scores) for scores in alone] == [3, 3]
    assert min(alone[0]) >= 80
    assert max(three["f_ra"], four["f_ra"]) <= 3
    assert three["ap"] - sequential["ap"] >= 25
    assert four["ap"] - last["ap"] >= 25
    # The gate: every task is held against the champion, which gives way and is remembered.
    gate = [re.findall(r"[+-]?\d+\.\d\d", line) for line in ended.stdout.splitlines() if GATE.match(line)]
    assert [len(cells) for cells in gate] == [2, 2, 2, 4, 4, 4, 4]
    champions = re.findall(r"^champion: quickstart version (\d)", ended.stdout, flags=re.MULTILINE)
    assert champions == ["3", "4"]
    assert "before:   version 3; sapt pool rollback takes it back" in ended.stdout
    assert "registered: quickstart-sequential version 4" in ended.stdout
