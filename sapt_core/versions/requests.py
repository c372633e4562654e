"""The rows of a request: what may be asked of a version, and what is wrong with what was asked.

Code, commands and served models ask alike, so what is refused is decided here alone. While a row is at fault, nothing
is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sapt_core.data.task import LearntTask
from sapt_core.errors import RequestError, SaptError
from sapt_core.template_settings import template_fault
from sapt_core.versions.manifest import Manifest


class Row(NamedTuple):
    """One row as it was given, not looked at yet; None is what was not given.

    Attributes:
        prompt: a full prompt, answered as it is.
        input: an input of a task, whose definition and template are put around it.
        task: that task's name, as ``find_task`` takes it.
    """

    prompt: object = None
    input: object = None
    task: object = None


class Request(NamedTuple):
    """A row that can be answered: a full prompt where ``task`` is None, else an input of the task."""

    text: str
    task: LearntTask | None


def rows_of(texts: Sequence[object], tasks: Sequence[str | None] | None = None) -> list[Row]:
    """Texts as rows: an input where a task is named, else a full prompt.

    Raises:
        RequestError: there is not one of ``tasks`` for each of ``texts``, or one of them is a text instead of a list.
    """
    faults = [
        f"{name} are one text: give a list of them"
        for name, given in (("texts", texts), ("tasks", tasks))
        if isinstance(given, str | bytes)
    ]
    named = [None] * len(texts) if tasks is None else tasks
    if not faults and len(named) != len(texts):
        faults.append(f"there are {len(texts)} texts and {len(named)} tasks: give a task, or None, for every text")
    if faults:
        raise RequestError("The request cannot be answered:", faults)
    pairs = zip(texts, named, strict=True)
    return [Row(prompt=text) if task is None else Row(input=text, task=task) for text, task in pairs]


def read_rows(manifest: Manifest, rows: Iterable[Row]) -> tuple[dict[int, Request], dict[int, str]]:
    """What can be answered, and what is wrong with the other rows, each by its row's place from 0."""
    requests, faults = {}, {}
    for place, row in enumerate(rows):
        try:
            requests[place] = _request(manifest, row)
        except SaptError as error:
            faults[place] = str(error)
    return requests, faults


def refuse(faults: Mapping[int, str], names: Sequence[str] | None = None, others: Sequence[str] = ()) -> None:
    """Refuse a request that has faults.

    Args:
        faults: by the rows' places.
        names: of all rows; default: row 0, row 1 and so on.
        others: faults of no row.

    Raises:
        RequestError: there are any.
    """
    lines = [f"{f'row {place}' if names is None else names[place]}: {faults[place]}" for place in sorted(faults)]
    if lines or others:
        counted = "; rows count from 0" if lines and names is None else ""
        raise RequestError(f"The request cannot be answered{counted}:", [*others, *lines])


def find_task(manifest: Manifest, name: str) -> LearntTask:
    """A task that the version has learnt, by its name or by what comes before the name's first underscore.

    Raises:
        SaptError: it has learnt no such task, or several that begin so.
    """
    found = [task for task in manifest.tasks if task.name == name]
    found = found or [task for task in manifest.tasks if task.name.startswith(f"{name}_")]
    if len(found) == 1:
        return found[0]
    if found:
        raise SaptError(f"task {name!r} fits several, give one in full: {', '.join(task.name for task in found)}")
    raise SaptError(f"the version has not learnt task {name!r}; it knows: {_known(manifest)}")


def _request(manifest: Manifest, row: Row) -> Request:
    given = {name: text for name, text in (("prompt", row.prompt), ("input", row.input)) if text is not None}
    if len(given) != 1:
        which = "both prompt and input are given" if given else "no text is given"
        raise SaptError(f"{which}: give either prompt, a full prompt, or input with its task")
    ((field, text),) = given.items()
    faults = [f"{field} {fault}"] if (fault := _text_fault(text)) else []
    task = None
    if field == "input":
        try:
            task = _task(manifest, row.task)
        except SaptError as error:
            faults.append(str(error))
    elif row.task is not None:
        faults.append("a prompt is answered as it is: leave task out, or give input instead of prompt")
    elif manifest.method.needs_task:
        faults.append(
            f"method {manifest.method.name} answers only where the task is told: give input and task; it knows: "
            f"{_known(manifest)}"
        )
    if faults:
        raise SaptError("; ".join(faults))
    return Request(str(text), task)


def _task(manifest: Manifest, name: object) -> LearntTask:
    if name is None:
        raise SaptError(f"an input needs its task, one of: {_known(manifest)}; a whole prompt is given as prompt")
    if not isinstance(name, str):
        raise SaptError(f"task is not text but {type(name).__name__}; the version knows: {_known(manifest)}")
    task = find_task(manifest, name)
    if (fault := template_fault(task.template)) is not None:
        raise SaptError(
            f"the version puts inputs of {task.name} into a template that this release cannot fill in ({fault}): "
            "update SAPT on Ray, or give prompt"
        )
    return task


def _text_fault(text: object) -> str | None:
    if not isinstance(text, str):
        return f"is not text but {type(text).__name__}"
    if not text.strip():
        return "is blank"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds bytes or a lone surrogate that are no characters"
    return None


def _known(manifest: Manifest) -> str:
    return ", ".join(task.name for task in manifest.tasks)
