"""Lines of versions in a registered model: what a version goes on from, and where it belongs.

In a line every version knows all that the one before it knows, so whoever takes the newest loses nothing. A registered
model may hold several lines, each named by the tag ``line`` of its versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

from sapt_core.errors import LineageError

FIRST = "main"
LINE = "line"
PARENT = "sapt.parent"
SNAPSHOT = "sapt.snapshot"
LINEAGE = "sapt.lineage"
SWEEP = "sweep"
FORGOTTEN = "forgotten"
_BRANCH = "branch-of-"


@dataclass(frozen=True)
class PoolVersion:
    """One version of the registered model.

    Attributes:
        model: name of the registered model.
        version: its number, from 1.
        aliases: without ``latest``, which MLflow derives.
        tags: task, index, method and so on, as published.
        run_id: the run that it was learnt in.
        source: where MLflow has its files.
    """

    model: str
    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None
    source: str = ""

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{self.model}/{self.version}"

    @property
    def line(self) -> str:
        """The line's name; what was published before there were lines is of the first."""
        return self.tags.get(LINE, FIRST)

    @property
    def is_branch(self) -> bool:
        """Whether its line came of two who extended one version at once."""
        return self.line.startswith(_BRANCH)

    @property
    def index(self) -> int:
        """Its place among the versions that were learnt one on the other, from 1; 0 where it does not say so."""
        return int(self.tags.get("index", 0))

    @property
    def tasks(self) -> str:
        """The tasks that it has learnt, for people."""
        return self.tags.get("tasks") or self.tags.get("task", "not known")


@dataclass(frozen=True)
class Lineage:
    """Whose versions a sequence publishes.

    Attributes:
        asked: the sequence in words, for messages.
        names: of its versions, oldest first, as known before they are learnt; an ancestor has the same name. Empty
            where it is not said, for versions before one that the sequence goes on from.
        sweep: the sweep whose best trial it is: the next one may learn with other settings, and takes its place.
        tasks: names of all tasks of the sequence.
    """

    asked: str
    names: tuple[str, ...]
    sweep: str | None = None
    tasks: tuple[str, ...] = ()

    def goes_on_from(self, version: PoolVersion) -> bool:
        """Whether a version is one of the sequence's own or an ancestor, or of the sweep that it is of."""
        return self.owns(version) or (self.sweep is not None and version.tags.get(SWEEP) == self.sweep)

    def owns(self, version: PoolVersion) -> bool:
        """Whether a version is learnt from all that one of the sequence's own is learnt from."""
        return version.tags.get(LINEAGE) in self.names


@dataclass(frozen=True)
class Place:
    """Where a new version belongs.

    Attributes:
        line: its line.
        branched: the version that it goes on from, if that is not the newest of its own line any more.
    """

    line: str
    branched: PoolVersion | None = None


def require_continuation(
    versions: Sequence[PoolVersion], lineage: Lineage, *, model: str, line: str | None = None
) -> None:
    """Refuse a sequence before anything is learnt that could only be published beside a line.

    It may be published where the newest version of its line is one of its own or an ancestor, and where all of its
    versions are there already.

    Args:
        versions: of the registered model, oldest first.
        lineage: of the sequence.
        model: name of the registered model.
        line: that is asked for; None is the one of the newest version that the sequence goes on from, else the first.

    Raises:
        LineageError: with what is there, what is asked and what to do.
    """
    known = {version.tags.get(LINEAGE) for version in versions}
    if lineage.names and known.issuperset(filter(None, lineage.names)):
        return
    own = max(filter(lineage.owns, versions), key=lambda version: (version.index, version.version), default=None)
    home = line or first_line(versions) if own is None else line or own.line
    newest = newest_of(versions, home)
    if newest is not None and not lineage.goes_on_from(newest):
        raise _refusal(newest, own, lineage, model)


def place_of(
    versions: Sequence[PoolVersion],
    lineage: Lineage,
    index: int,
    *,
    model: str,
    parent: str | None,
    line: str | None = None,
) -> Place | PoolVersion:
    """Where the version belongs that has learnt ``index`` tasks of a sequence.

    Args:
        versions, lineage, model, line: as of ``require_continuation``.
        index: from 1.
        parent: the snapshot that it goes on from.

    Returns:
        Its place; or the version that it is already, scored on other rows, where its line has gone on since.

    Raises:
        LineageError: it would stand in its line above a pool that it does not go on from.
    """
    before = parent_of(versions, parent, lineage.names[index - 2] if index > 1 else None)
    home = line or (first_line(versions) if before is None else before.line)
    newest = newest_of(versions, home)
    if newest is None or newest == before:
        return Place(home)
    loses = lineage.owns(newest) and newest.index > index
    if lineage.goes_on_from(newest) and not loses:
        return Place(home)
    there = parent_of(versions, None, lineage.names[index - 1])
    if there is not None:
        return there
    if before is not None and before.line == home:
        return Place(_branch(versions, before), branched=before)
    raise _refusal(newest, before, lineage, model)


def forgotten_in(versions: Sequence[PoolVersion], version: PoolVersion) -> set[str]:
    """Tasks that a version, or one before it in its line, was made to forget."""
    before = (each for each in versions if each.line == version.line and each.version <= version.version)
    return {each.tags[FORGOTTEN] for each in before if FORGOTTEN in each.tags}


def first_line(versions: Sequence[PoolVersion]) -> str:
    """The line of the oldest version, and the one that the first will be in."""
    return versions[0].line if versions else FIRST


def newest_of(versions: Sequence[PoolVersion], line: str) -> PoolVersion | None:
    """The newest version of a line."""
    return next((version for version in reversed(versions) if version.line == line), None)


def parent_of(versions: Sequence[PoolVersion], snapshot: str | None, name: str | None) -> PoolVersion | None:
    """The version of a snapshot, else the newest that was learnt from the same, by its lineage's name."""
    for tag, wanted in ((SNAPSHOT, snapshot), (LINEAGE, name)):
        for version in reversed(versions):
            if wanted and version.tags.get(tag) == wanted:
                return version
    return None


def _branch(versions: Sequence[PoolVersion], before: PoolVersion) -> str:
    taken = {version.line for version in versions}
    name = f"{_BRANCH}{before.version}"
    return next(each for each in chain([name], (f"{name}-{number}" for number in count(2))) if each not in taken)


def _refusal(newest: PoolVersion, before: PoolVersion | None, lineage: Lineage, model: str) -> LineageError:
    method = newest.tags.get("method", "not known")
    if before is not None and before.line == newest.line and before.version < newest.version:
        return LineageError(
            f"{lineage.asked} goes on from version {before.version} of tracking.model={model}, and somebody else's "
            f"version {newest.version} (method {method}, tasks {newest.tasks}) is the newest of its line {newest.line} "
            f"by now. Extend that one (sapt extend --from {newest.uri}), or give --new-line NAME, for example "
            f"tracking.line={_BRANCH}{before.version}, and what comes of it is a line of its own beside it."
        )
    lost = [task for task in newest.tasks.split(", ") if task not in lineage.tasks] if lineage.tasks else []
    loss = f"; {', '.join(lost)} would be lost" if lost else ""
    return LineageError(
        f"tracking.model={model} holds another pool: in its line {newest.line} the newest version, {newest.version}, "
        f"is of method {method}, tasks {newest.tasks}. Asked is {lineage.asked}, which does not go on from it: other "
        f"tasks, data, settings or another release{loss}. Give "
        "--new-line NAME (tracking.line=NAME), which leaves the versions that are there and begins a line of its own, "
        "or a tracking.model of its own."
    )
