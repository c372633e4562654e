"""Where a version belongs among those that are there."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.tracking.lines import Lineage, Place, PoolVersion, place_of, require_continuation
from sapt_core.errors import LineageError


def version(number: int, name: str, line: str | None = "main", **tags: str) -> PoolVersion:
    """A version called by what it was learnt from: "abc" knows the tasks a, b, c."""
    own = {"tasks": ", ".join(name), "index": str(len(name)), "sapt.lineage": name, "sapt.snapshot": f"of {name}"}
    return PoolVersion("sapt", number, (), {"method": "sapt", **own, **({"line": line} if line else {}), **tags}, None)


def sequence(tasks: str, known: int = 0) -> Lineage:
    """One that learns tasks by letter, the first ``known`` of which an older version has learnt."""
    names = [tasks[: place + 1] if place + 1 >= known else "" for place in range(len(tasks))]
    return Lineage(f"method sapt, tasks {', '.join(tasks)}", tuple(names), None, tuple(tasks))


def place(versions: list[PoolVersion], tasks: str, **asked: Any) -> Place | PoolVersion:
    given = {"parent": f"of {tasks[:-1]}" if tasks[1:] else None, "model": "sapt", **asked}
    return place_of(versions, sequence(tasks), len(tasks), **given)


A, AB, ABC = version(1, "a"), version(2, "ab"), version(3, "abc")


@pytest.mark.parametrize(
    ("versions", "tasks", "line"),
    [
        ([], "a", "main"),
        ([A], "ab", "main"),
        ([A, AB], "abc", "main"),
        ([A, AB, version(3, "abx", "branch-of-2")], "abc", "main"),
        ([A, AB, version(3, "abx", "other")], "abxy", "other"),
        ([version(1, "a", None), version(2, "ab", None)], "abc", "main"),
        ([version(1, "x", "blue")], "a", LineageError),
        ([A, AB, ABC], "abd", "branch-of-2"),
        ([A, AB, ABC, version(4, "abd", "branch-of-2")], "abe", "branch-of-2-2"),
        ([A, AB, ABC, version(4, "abd", "branch-of-2")], "abde", "branch-of-2"),
        ([version(1, "xy")], "ab", LineageError),
    ],
)
def test_the_line_of_a_version(versions: list[PoolVersion], tasks: str, line: Any) -> None:
    if line is LineageError:
        with pytest.raises(LineageError, match="holds another pool"):
            place(versions, tasks)
        return
    found = place(versions, tasks)
    assert isinstance(found, Place)
    assert found.line == line
    assert (found.branched == AB) == (line.startswith("branch") and tasks != "abde")


def test_a_line_that_is_asked_for() -> None:
    assert place([A, AB], "x", line="blue") == Place("blue")
    assert place([A, AB, version(3, "x", "blue")], "xy", line="blue") == Place("blue")
    assert place([A, AB, ABC], "abd", line="blue") == Place("blue")
    with pytest.raises(LineageError, match="in its line blue the newest version, 3,"):
        place([A, AB, version(3, "x", "blue")], "z", line="blue")


def test_a_pool_that_lost_tasks_is_not_put_on_top_of_its_line() -> None:
    """Learnt from the same and scored on other rows, it is another snapshot of what is there."""
    assert place([A, AB], "a", parent=None) == A
    with pytest.raises(LineageError, match="; x, b would be lost"):
        place([version(1, "xb")], "a", parent=None)


def test_other_rows_of_the_newest_go_on_its_line() -> None:
    assert place([A, AB], "ab", parent="of other rows") == Place("main")


def test_what_is_asked_before_it_is_learnt() -> None:
    for versions, tasks, known in (([], "a", 0), ([A], "ab", 0), ([A, AB], "abc", 2), ([A, AB, ABC], "ab", 0)):
        require_continuation(versions, sequence(tasks, known), model="sapt")
    with pytest.raises(LineageError) as told:
        require_continuation([A, AB, ABC], sequence("abd", 2), model="sapt")
    assert "version 3 (method sapt, tasks a, b, c) is the newest of its line main by now" in str(told.value)
    assert "sapt extend --from models:/sapt/3" in str(told.value)
    assert "tracking.line=branch-of-2" in str(told.value)
    require_continuation([A, AB, ABC], sequence("abd", 2), model="sapt", line="branch-of-2")
    branched = [A, AB, ABC, version(4, "abd", "branch-of-2")]
    require_continuation(branched, sequence("abde", 3), model="sapt")
    with pytest.raises(LineageError, match="a, b would be lost"):
        require_continuation([A, AB], sequence("x"), model="sapt")
