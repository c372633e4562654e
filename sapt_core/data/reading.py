"""Reads a split: its rows up to as many as are wanted, and the instruction that stands with them.

A definition that is null or an empty list, as published copa has it, is an empty one; of several wordings the first
is used. The templates put nothing else in the place of an empty definition.

Rows without a usable answer are left out of every split, with a warning that counts them: published data has
mnli rows labelled ``-`` (the annotators did not agree) and task511 summaries that are blank or ``**``. No metric
can score such a row, since none looks at punctuation. Anything else that is wrong is a fault.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sapt_core.data.files import READERS, ContentError
from sapt_core.data.rows import RowReader, definition_of, is_text
from sapt_core.data.sources import Source
from sapt_core.data.task import Example
from sapt_core.task_settings import TaskConfig
from sapt_core.template_settings import keeps_turns

logger = logging.getLogger(__name__)

MAX_FAULTS_PER_FILE = 5
MAX_DEFINITIONS = 100  # that are told apart in a data set that has another in every row


@dataclass
class SplitRows:
    """What a split was found to hold.

    Attributes:
        definition: the instruction.
        usable: rows with an answer.
        inputs: of these and of rows without an answer.
        faults: what is wrong with rows, of which the first are told.
        faulty: how many rows that are.
        unanswered: how many rows have no answer.
        first_unanswered: place of the first of these, and what it has for one.
        wordings: the definitions that rows have.
    """

    definition: str = ""
    usable: list[Example] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    faulty: int = 0
    unanswered: int = 0
    first_unanswered: tuple[int, Any] | None = None
    wordings: list[Any] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows were read."""
        return len(self.inputs) + self.faulty

    def add(self, row: Any, reader: RowReader) -> None:
        """Count one more row."""
        example, place = reader.read(row), self.count
        if isinstance(example, str):
            self.faulty += 1
            if self.faulty <= MAX_FAULTS_PER_FILE:
                self.faults.append(f"row {place}: {example}")
            return
        self.inputs.append(example.input)
        if example.references:
            self.usable.append(example)
        else:
            self.unanswered += 1
            self.first_unanswered = self.first_unanswered or (place, reader.output(row))
        wording = definition_of(row, reader.columns)
        if wording and wording not in self.wordings and len(self.wordings) < MAX_DEFINITIONS:
            self.wordings.append(wording)


def read_split(
    source: Source,
    split_name: str,
    task: TaskConfig,
    limit: int | None,
    faults: list[str],
    *,
    inputs_alone: bool = False,
) -> SplitRows:
    """The first ``limit`` usable rows of a split, or all.

    Args:
        source: has the split.
        split_name: its name there.
        task: what its columns are called, its labels and, if the data need not say it, its definition.
        limit: rows that are enough.
        faults: gets what is wrong.
        inputs_alone: answers and instruction are not looked for, and no row has to have any.
    """
    found = SplitRows()
    if split_name not in source.splits:
        faults.append(_no_split(source, split_name))
        return found
    split = source.splits[split_name]
    told: list[str] = []
    try:
        rows = split.open()
        reader = RowReader(
            task.columns,
            task.label_names,
            rows.classes,
            turns=keeps_turns(task.template or ""),
            answered=not inputs_alone,
        )
        missing = None if rows.columns is None else reader.missing(rows.columns)
        if missing is not None:
            faults.append(f"{split.name}: {missing}")
            return found
        for row in rows.instances:
            found.add(row, reader)
            if len(found.usable) == limit:
                break
        if inputs_alone or task.definition is not None:
            found.definition = task.definition or ""
        elif rows.said is not None:
            found.definition = _said(rows.said, split.name, told)
        else:
            found.definition = _of_rows(found.wordings, told)
    except ContentError as error:
        told.append(str(error))
    except (OSError, ValueError, NotImplementedError) as error:
        told.append(f"cannot be read: {' '.join(str(error).split())}")
    if found.faulty > MAX_FAULTS_PER_FILE:
        found.faults.append(f"{found.faulty - MAX_FAULTS_PER_FILE} more faulty rows")
    told = [*found.faults, *told] or _without_rows(found, split.name, inputs_alone=inputs_alone)
    faults.extend(f"{split.name}: {fault}" for fault in told)
    return found


def _no_split(source: Source, name: str) -> str:
    if not source.of_files:
        return f"{source.name}: has no split {name}, but {', '.join(source.splits)}: name one of them in splits"
    cure = "; scores are of rows that are not learnt: move some of the train rows there" if name == "test" else ""
    return f"{source.name}/{name}.json: no such file, nor with {', '.join(list(READERS)[1:])}{cure}"


def _without_rows(found: SplitRows, name: str, *, inputs_alone: bool) -> list[str]:
    """What is against a split of no usable rows; of some a warning counts those that are left out."""
    if not found.count:
        return ["holds no rows"]
    if inputs_alone or found.first_unanswered is None:
        return []
    if not found.usable:
        return ["no row is usable: no output holds more than punctuation"]
    logger.warning(
        "%s: %d of %d rows left out: their output holds no more than punctuation (first: row %d, %r)",
        name,
        found.unanswered,
        found.count,
        *found.first_unanswered,
    )
    return []


def _said(said: Mapping[str, Any], name: str, faults: list[str]) -> str:
    """The instruction that stands in a file beside its rows."""
    given = said.get("Definition")
    wordings = [given] if isinstance(given, str) else [] if given is None else given
    if "Definition" not in said or not isinstance(wordings, list) or not all(map(is_text, wordings)):
        state = "is not text or a list of texts" if "Definition" in said else "is missing"
        faults.append(f"Definition {state}; give the instruction, or an empty text for none")
        return ""
    if len(wordings) > 1:
        logger.warning("%s: Definition has %d wordings; the first is used", name, len(wordings))
    return str(wordings[0]) if wordings else ""


def _of_rows(wordings: list[Any], faults: list[str]) -> str:
    """The instruction that stands in a column of the rows."""
    if len(wordings) > 1:
        faults.append(f"its rows have {len(wordings)} different definitions; a task has one instruction")
    elif not all(map(is_text, wordings)):
        faults.append("the definition in its rows is no text")
    return str(wordings[0]) if wordings else ""
