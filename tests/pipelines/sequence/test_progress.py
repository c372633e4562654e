"""Lines of progress where there is no terminal."""

from __future__ import annotations

import pytest

from pipelines.sequence import progress as module
from pipelines.sequence.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], first: int, last: int, total: int, seconds: float) -> None:
    with progress("train[00 a]", True) as on_step:
        assert on_step is not None
        for done in range(first, last + 1):
            clock[0] += seconds
            on_step(done, total)


def test_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 1, 25, 100, 1.0)
    assert capsys.readouterr().out.splitlines() == [
        "train[00 a]: step 10/100, 1.0 steps/s, 01:30 left",
        "train[00 a]: step 20/100, 1.0 steps/s, 01:20 left",
    ]


def test_a_resumed_stage_counts_its_own_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 501, 515, 1000, 1.0)
    assert capsys.readouterr().out == "train[00 a]: step 510/1000, 1.0 steps/s, 08:10 left\n"


def test_other_workers_say_nothing() -> None:
    with progress("train[00 a]", False) as on_step:
        assert on_step is None
