"""The turns of a chat as the input of a row, which is one text.

Where a template keeps roles, several turns are written as JSON. So whatever holds inputs as text, from stored samples
to the requests of a served version, holds chats as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

Turn: TypeAlias = dict[str, str]
"""``role`` and ``content``."""


def as_input(turns: Sequence[Turn]) -> str:
    """The text that ``turns_of`` reads: one turn of the user as it is, all else as JSON."""
    if len(turns) == 1 and turns[0]["role"] == "user" and turns_of(turns[0]["content"]) == [*turns]:
        return turns[0]["content"]
    return json.dumps([{"role": turn["role"], "content": turn["content"]} for turn in turns], ensure_ascii=False)


def turns_of(text: str) -> list[Turn]:
    """The turns that an input stands for; a text that is none as JSON is one turn of the user."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list) and found and all(map(_is_turn, found)):
            return found
    return [{"role": "user", "content": text}]


def as_lines(turns: Sequence[Turn]) -> str:
    """The turns as a text without marks of a model's own: a single one as it is, of several a line each with roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _is_turn(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
    )
