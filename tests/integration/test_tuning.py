"""Ray Tune under the sweep: who is stopped, who is tried again, and what is told; trials here only report figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.on_ray.session import connect
from sapt_core.settings import ClusterConfig

pytestmark = pytest.mark.integration

TASKS = 4


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with connect(ClusterConfig(), num_cpus=2):
            yield


class Listed:
    """Proposes listed qualities, and keeps what it and a follower of trials are told."""

    def __init__(self, qualities: list[float], **more: Any) -> None:
        self.left = [{"quality": quality, **more} for quality in qualities]
        self.told: list[float | None] = []
        self.ends: dict[float, tuple[int, str | None]] = {}

    def ask(self, trial: str) -> Mapping[str, Any] | None:
        return self.left.pop(0) if self.left else None

    def tell(self, trial: str, result: Mapping[str, Any] | None) -> None:
        self.told.append(None if result is None else result["ap"])

    def result(self, trial: str, point: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        assert result["ap"] == point["quality"]

    def ended(self, trial: str, point: Mapping[str, Any], results: list[Any], error: str | None) -> None:
        assert [each["tasks"] for each in results] == list(range(1, len(results) + 1))
        self.ends[point["quality"]] = (len(results), error)


def steady(point: Mapping[str, Any], report: Callable[[Mapping[str, Any]], None]) -> None:
    """AP equals the point's quality after every task; dies once after its first task where it is told a file."""
    for task in range(1, TASKS + 1):
        report({"tasks": task, "ap": point["quality"]})
        marker = point.get("dies")
        if marker is not None and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)


def run(listed: Listed, *, stop: Literal["none", "asha", "median"] = "none", retries: int = 1) -> Listed:
    from cluster.on_ray.tuning import run_trials

    run_trials(
        steady, listed, listed, trials=len(listed.left), concurrent=1, stop=stop, grace=2, tasks=TASKS, retries=retries
    )
    return listed


@pytest.mark.parametrize("stop", ["asha", "median"])
def test_bad_trials_end_after_their_grace(stop: Literal["asha", "median"]) -> None:
    """The first four are good; those that are worse after two tasks go no further."""
    found = run(Listed([50.0, 51.0, 52.0, 53.0, 10.0, 11.0]), stop=stop)
    assert found.ends[10.0] == found.ends[11.0] == (2, None)
    assert found.ends[53.0] == (TASKS, None)
    assert len(found.ends) == 6


def test_without_a_rule_all_go_to_the_end() -> None:
    found = run(Listed([50.0, 1.0, 2.0]))
    assert set(found.ends.values()) == {(TASKS, None)}
    assert found.told == [50.0, 1.0, 2.0]


@pytest.mark.chaos
def test_a_trial_that_dies_is_tried_again_and_then_told_of(tmp_path: Path) -> None:
    again = run(Listed([50.0], dies=str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert again.ends == {50.0: (TASKS, None)}
    given_up = run(Listed([50.0], dies=str(tmp_path / "other")), retries=0)
    ((tasks, error),) = given_up.ends.values()
    assert tasks == 1
    assert error
    assert given_up.told == [None]
