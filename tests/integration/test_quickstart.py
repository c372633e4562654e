"""``make run`` shows what it promises: every task learnt, SAPT keeps them, one LoRA trained on forgets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sequences import ROOT, environment

pytestmark = pytest.mark.integration

FIGURES = re.compile(r"^AP (?P<ap>[\d.]+)  F\.Ra (?P<f_ra>-?[\d.]+)", flags=re.MULTILINE)
ALONE = re.compile(r"alone\W+(?P<scores>\d+\.\d.*)$", flags=re.MULTILINE)


@pytest.mark.timeout(900)
def test_make_run(tmp_path: Path) -> None:
    quickstart = [
        sys.executable,
        "pipelines/continual.py --config pipelines/configs/quickstart.yaml",
        f"store.uri={tmp_path}/store",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    # The environment is the one that runs this test; what is run, and in which order, is the Makefile's.
    ended = subprocess.run(
        ["make", "--assume-old=env", "run", f"QUICKSTART={' '.join(quickstart)}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    sapt, sequential = (
        {name: float(value) for name, value in found.groupdict().items()} for found in FIGURES.finditer(ended.stdout)
    )
    rows = ALONE.findall(ended.stdout)
    alone = [[float(score) for score in re.findall(r"\d+\.\d", row)] for row in rows]
    assert [len(scores) for scores in alone] == [4, 4]
    assert min(alone[0]) >= 80
    assert sapt["f_ra"] <= 3
    assert sapt["ap"] - sequential["ap"] >= 25
    assert "registered: quickstart version 4" in ended.stdout
    assert "registered: quickstart-sequential version 4" in ended.stdout
