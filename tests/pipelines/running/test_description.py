"""What a version says of itself fits into MLflow's databases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.running.description import LONGEST, describe


@pytest.mark.parametrize("tasks", [1, 3, 200])
def test_all_tasks_or_as_many_as_there_is_room_for(tasks: int) -> None:
    names = [f"task{number:04d}_with_a_long_name_as_they_have_there" for number in range(tasks)]
    manifest: Any = SimpleNamespace(
        tasks=[SimpleNamespace(name=name) for name in names],
        method=SimpleNamespace(name="sapt"),
        backbone=SimpleNamespace(path="t5"),
        again=None,
    )
    metrics = {"ap": 50.0, "f_ra": 1.0, **{f"score/{name}": 50.0 for name in names}}
    text = describe(manifest, "quickstart", metrics, {f"score/{name}": 52.0 for name in names[:-1]})
    assert len(text) <= LONGEST
    shown = sum(line.startswith("| task") and "---" not in line for line in text.splitlines()) - 1
    assert shown == tasks or f"{tasks - shown} more tasks" in text
    assert ("more tasks" in text) == (tasks > 100)
    assert text.count("| -2.00 |") == min(shown, tasks - 1)
