"""What came of a sequence in a few lines: learnt or not, kept or not, better than the champion or not, what is next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from pipelines.console.commands import pasted
from pipelines.reports.findings import Findings
from sapt_core.io.addresses import redacted, without_user

NAMED = 3  # tasks in one line


@dataclass(frozen=True)
class Champion:
    """The version that answers now.

    Attributes:
        version: its number.
        scores: those that it was published with, by task; none of a task that has other rows here.
    """

    version: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Registered:
    """What the registry says of a version.

    Attributes:
        version: its number.
        champion: of the same model; None if it has none.
    """

    version: int
    champion: Champion | None


@dataclass(frozen=True)
class Line:
    """One line of a verdict.

    Attributes:
        label: what it is of, or what holds.
        text: by which figures.
        good: whether that is as it should be; None where it is neither.
    """

    label: str
    text: str
    good: bool | None = None

    def __str__(self) -> str:
        return f"{self.label}: {self.text}"


def judge(findings: Findings, registered: Registered | None = None) -> tuple[Line, ...]:
    """The verdict on the newest version, from what is measured and warned of; the last line is what to type.

    Args:
        findings: of the sequence up to that version.
        registered: None without MLflow, or where the version is not registered.
    """
    lines = [_learnt(findings), _kept(findings)]
    if registered is not None and registered.champion is not None:
        lines.append(_compared(findings, registered.version, registered.champion))
    # The other warnings say what could be better, not that it may not be used.
    held = all(line.good is not False for line in lines)
    return (*lines, _warned(findings), Line("next", _command(findings, registered, promote=held)))


def _learnt(findings: Findings) -> Line:
    tasks, matrix = len(findings.tasks), findings.matrix
    failed = [each for each in findings.diagnoses if each.kind == "not learnt"]
    ap = f"AP {matrix.ap():.2f}"
    if failed:
        told = "; ".join(f"{each.task} {each.size}" for each in failed[:NAMED])
        more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        return Line("not learnt", f"{len(failed)} of {_tasks(tasks)}, {ap}: {told}{more}", good=False)
    measured = {"always its commonest answer": findings.constant, "the bare backbone": findings.bare}
    held = [
        text if None not in scores else f"{text} ({tasks - scores.count(None)} of {tasks} scored)"
        for text, scores in measured.items()
        if any(score is not None for score in scores)
    ]
    every = "the one task" if tasks == 1 else f"all {tasks} tasks"
    if not held:
        return Line("learnt", f"{every}, {ap}; held against no baseline, as none is known")
    return Line(
        "learnt", f"{every}, {ap}; {'' if tasks == 1 else 'each '}better than {' and than '.join(held)}", good=True
    )


def _kept(findings: Findings) -> Line:
    matrix, limit = findings.matrix, findings.experiment.config.diagnostics.forgetting
    earlier = len(matrix.forgotten())
    if earlier == 0:
        return Line("kept", "nothing to forget yet")
    lost = f"F.Ra {matrix.f_ra():.2f}"
    most, task = max(zip(matrix.forgotten(), matrix.tasks, strict=False))
    failed = sum(each.kind == "forgetting" for each in findings.diagnoses)
    if failed:
        told = f"{failed} of {earlier} earlier {'task' if earlier == 1 else 'tasks'} fell by more than {limit:g} points"
        return Line("not kept", f"{told}, most {task} ({most:.1f}); {lost}", good=False)
    worst = f"; most fell {task} ({most:.1f})" if most > 0 else ""
    return Line("kept", f"no earlier task fell by more than {limit:g} points; {lost}{worst}", good=True)


def _compared(findings: Findings, version: int, champion: Champion) -> Line:
    """Against the champion: better if no task is lost and the mean is higher, or more tasks are learnt."""
    config, own = findings.experiment.config, dict(zip(findings.tasks, findings.matrix.rows[-1], strict=True))
    named = f"version {champion.version} of {config.tracking.model}"
    if champion.version == version:
        return Line("champion", f"it is, as {named}", good=True)
    shared = [task for task in own if task in champion.scores]
    lost = sorted(champion.scores.keys() - own.keys())
    if not shared:
        return Line("not better than the champion", f"{named} has no score on any of its tasks", good=False)
    mine, other = (fmean(scores[task] for task in shared) for scores in (own, champion.scores))
    change, task = min((own[task] - champion.scores[task], task) for task in shared)
    limit = config.registry.max_drop
    told = f"{named}: mean {mine:.2f} against {other:.2f} on {_tasks(len(shared))} that both know"
    told += f", most lost on {task} ({change:+.2f})" if change < 0 else ""
    told += f"; it has not learnt {', '.join(lost)}" if lost else ""
    more = len(own) - len(shared)
    told += f"; {more} more learnt" if more else ""
    good = not lost and -change <= limit and (mine > other or more > 0)
    return Line("better than the champion" if good else "not better than the champion", told, good=good)


def _warned(findings: Findings) -> Line:
    counts = Counter(each.kind for each in findings.diagnoses)
    if not counts:
        return Line("warnings", "none", good=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return Line("warnings", f"{kinds}; each says below what to change", good=False)


def _command(findings: Findings, registered: Registered | None, *, promote: bool) -> str:
    """What to type next: make it the champion, unless something speaks against that or it is; else ask it."""
    config = findings.experiment.config
    endpoint = config.store.endpoint_url
    address = [f"store.endpoint_url={redacted(without_user(endpoint))}"] if endpoint else []
    task = ["--task", findings.tasks[0], "--input", "your text"]
    if registered is None:
        place = f"store.uri={config.store.uri}"
        return pasted("predict", "--snapshot", findings.manifest.digest, *task, place, *address)
    shown = config.tracking.uri == redacted(config.tracking.uri)  # a password is not for the console
    uri = [f"tracking.uri={config.tracking.uri}"] if shown else []
    places = [*uri, f"tracking.model={config.tracking.model}", *address]
    if promote and (registered.champion is None or registered.champion.version != registered.version):
        return pasted("pool", "promote", registered.version, *places)
    return pasted("predict", "--version", registered.version, *task, *places)


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"
