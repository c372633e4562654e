"""From a row as it was found to an input with its right answers.

A row is named ``input`` and ``output``, or ``prompt`` and ``answer`` as in TRACE, or as ``columns`` says; or it holds
the turns of a chat. An answer that is a number or a truth value is taken as JSON writes it, unless it is a label that
has a name. Other columns are ignored.
"""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from sapt_core.data.files import kind
from sapt_core.data.task import Example
from sapt_core.data.turns import as_input, as_lines
from sapt_core.task_settings import ColumnsConfig

USUAL = {
    "input": ("input", "prompt"),
    "output": ("output", "answer"),
    "messages": ("messages",),
    "definition": ("definition",),
}
LABELS_SHOWN = 10


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one split.

    Attributes:
        columns: what they are called.
        label_names: answers by label; None where answers are what they are.
        classes: names that the data itself has for the numbers in a column.
        turns: whether the input of a chat keeps its turns, see ``sapt_core.data.turns``; else it is their text.
        answered: whether a chat has to have an answer.
    """

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    label_names: Mapping[str, str] | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    turns: bool = False
    answered: bool = True

    def missing(self, there: Sequence[str]) -> str | None:
        """What a table lacks that is read, and what it has instead; None if nothing."""
        roles = ["messages"] if self._is_chat(there) else ["input", "output"]
        roles += ["definition"] if self.columns.definition is not None else []
        lacking = [role for role in roles if not {*self._called(role)} & {*there}]
        told = " or ".join(f"{' or '.join(self._called(role))} (columns.{role})" for role in lacking)
        return f"no column {told}; there are: {', '.join(there) or 'none'}" if lacking else None

    def read(self, row: Any) -> Example | str:
        """The row with its scorable answers (maybe none), or what is wrong with it."""
        if not isinstance(row, dict):
            return f"is {kind(row)}, not an object with input and output"
        absent = [name for name in self.columns.model_dump(exclude_none=True).values() if name not in row]
        if absent:
            return f"has no {' and no '.join(absent)}; it has: {', '.join(map(str, row)) or 'nothing'}"
        if self._is_chat([*row]):
            chat = self._chat(row[self._called("messages")[0]])
            return chat if isinstance(chat, str) else self._example(chat)
        columns = {
            role: next((name for name in self._called(role) if name in row), None) for role in ("input", "output")
        }
        found = {role: row[column] for role, column in columns.items() if column is not None}
        if columns["output"] is not None:
            found["output"] = self._named(columns["output"], found["output"])
        return self._example(found)

    def output(self, row: Mapping[str, Any]) -> Any:
        """What a row has for an answer, as it was found."""
        return next((row[name] for name in self._called("output") if name in row), None)

    def _called(self, role: str) -> Sequence[str]:
        """What the column of a role may be called."""
        given = getattr(self.columns, role)
        return USUAL[role] if given is None else (given,)

    def _is_chat(self, there: Sequence[str]) -> bool:
        columns = self.columns
        inputs = columns.input is not None or {*USUAL["input"]} & {*there}
        return columns.messages is not None or (not inputs and USUAL["messages"][0] in there)

    def _chat(self, messages: Any) -> dict[str, str | None] | str:
        """A chat's input and answer, or what is wrong with it."""
        if not isinstance(messages, list) or not messages:
            return f"messages is {'empty' if messages == [] else kind(messages)}, not a list of turns"
        for number, turn in enumerate(messages):
            if not isinstance(turn, dict) or not (is_text(turn.get("role")) and is_text(turn.get("content"))):
                return f"messages: turn {number} is no object with role and content, both text"
        answers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        if self.answered and not answers:
            return "messages has no turn of role assistant, the last of which is the answer: leave the row out"
        before = messages[: answers[-1]] if answers else messages
        if not any(turn["content"].strip() for turn in before):
            return "messages: nothing is said before the answer of the assistant"
        text = as_input(before) if self.turns else as_lines(before)
        return {"input": text, "output": messages[answers[-1]]["content"] if answers else None}

    def _named(self, column: str, output: Any) -> Any:
        """An answer of the data's own classes by its name; the number -1 stands for none."""
        names = self.classes.get(column)
        if names is None or (self.label_names is not None and output != -1):
            return output
        if isinstance(output, list):
            return [names[number] for number in output if number is not None and number >= 0]
        return None if output is None or output < 0 else names[output]

    def _example(self, row: Mapping[str, Any]) -> Example | str:
        text, output = row.get("input"), row.get("output")
        given = output if isinstance(output, list) else [] if output is None else [output]
        references = [json.dumps(answer) if isinstance(answer, int | float) else answer for answer in given]
        problems = []
        if isinstance(text, str) and not is_text(text):
            problems.append("input holds a lone surrogate, which is no character")
        elif not is_text(text):
            problems.append(f"input is {kind(text)}, not text" if "input" in row else "input is missing")
        elif not text.strip():
            problems.append("input is blank")
        if "output" not in row:
            problems.append("output is missing")
        elif not all(map(is_text, references)):
            problems.append("output is neither text, a number nor a list of them")
        elif self.label_names is not None:
            unknown = [answer for answer in references if self._label(answer) is None]
            problems += [f"output {answer!r} is none of label_names ({self._labels()})" for answer in unknown]
        if problems:
            return "; ".join(problems)
        if self.label_names is not None:
            references = [str(self._label(answer)) for answer in references]
        return Example(str(text), tuple(answer for answer in references if any(map(_says_something, answer))))

    def _label(self, answer: str) -> str | None:
        names = self.label_names or {}
        return names.get(answer.strip().removesuffix(".0"), answer if answer in names.values() else None)

    def _labels(self) -> str:
        told = [f"{label} {name}" for label, name in (self.label_names or {}).items()]
        return ", ".join([*told[:LABELS_SHOWN], *(["..."] if len(told) > LABELS_SHOWN else [])])


def definition_of(row: Any, columns: ColumnsConfig) -> Any:
    """The instruction that stands in a row; None where there is none."""
    return row.get(columns.definition or USUAL["definition"][0]) if isinstance(row, dict) else None


def _says_something(character: str) -> bool:
    """A letter, digit or symbol of any script; the ASCII symbols, such as ``*``, are punctuation to the metrics."""
    return unicodedata.category(character)[0] in "LNS" and character not in string.punctuation


def is_text(value: Any) -> TypeGuard[str]:
    """A string that can be encoded; JSON allows lone surrogates, which no tokenizer or file takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
