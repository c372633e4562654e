"""The templates that a task may name, and Jinja text of the user's own.

A template is one text, in configs and in versions alike: a name, ``chat: SYSTEM TEXT``, or Jinja.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BeforeValidator

PUBLISHED = ("superni", "superni_apart", "long_sequence", "long_sequence_apart", "none")
CHAT = "chat"
TEMPLATE_NAMES = (*PUBLISHED, CHAT)
VARIABLES = ("definition", "input", "messages")
"""What Jinja text may read: the task's instruction, a row's input, and the same as turns with role and content."""

_CHAT = re.compile(rf"{CHAT}(?::\s*(?P<system>.*))?", re.DOTALL)
_JINJA = re.compile(r"\{\{|\{%")
_THERE = f"there are {', '.join(TEMPLATE_NAMES)}, chat: SYSTEM TEXT, or Jinja text with {{{{ input }}}}"

# As the chat templates of tokenizers are read, so that one that is copied gives the same.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
    extensions=["jinja2.ext.loopcontrols"],
)
# The same row has the same prompt each time.
del _ENVIRONMENT.globals["lipsum"], _ENVIRONMENT.filters["random"]

RENDERING_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What Jinja text may raise: its own errors, and those of what it does with the values of a row."""


def chat_system(template: str) -> str | None:
    """The system text of a chat template, empty for none; None if the template is no chat."""
    found = None if template in PUBLISHED else _CHAT.fullmatch(template)
    return None if found is None else (found["system"] or "").strip()


def keeps_turns(template: str) -> bool:
    """Whether the turns of a chat reach the template with their roles, and not as one text."""
    return chat_system(template) is not None or "messages" in _read(template)


@lru_cache(maxsize=256)
def compiled(template: str) -> Template:
    """Jinja text, ready to be filled in.

    Raises:
        TemplateError: it is none.
    """
    return _ENVIRONMENT.from_string(template)


def template_fault(template: str) -> str | None:
    """What is wrong with a template before any row is looked at; None if nothing."""
    if template in PUBLISHED:
        return None
    written, system = _JINJA.search(template) is not None, chat_system(template)
    if system is not None:
        fault = f"{template!r} begins as a chat with a system text, which holds no Jinja: begin otherwise"
        return fault if written else None
    return _jinja_fault(template) if written else _unknown(template)


def _unknown(template: str) -> str:
    close = get_close_matches(template, TEMPLATE_NAMES, n=1)
    return f"there is no template {template!r}; {f'did you mean {close[0]}? ' if close else ''}{_THERE}"


def _jinja_fault(template: str) -> str | None:
    try:
        compiled(template)
    except TemplateError as error:
        where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        return f"the Jinja text cannot be read: {where}{error.message}"
    names = _read(template)
    unknown = sorted(names - {*VARIABLES, *_ENVIRONMENT.globals})
    if unknown:
        return f"the Jinja text reads {', '.join(unknown)}, which no row has; there are {', '.join(VARIABLES)}"
    if not names & {"input", "messages"}:
        return "the Jinja text reads neither input nor messages: all rows would have one prompt; put {{ input }} in"
    return None


def told(template: str) -> str:
    """A template in a line: a name, or the beginning of a text."""
    if template in TEMPLATE_NAMES:
        return template
    line = " ".join(template.split())
    shown = line if len(line) <= 60 else f"{line[:57]}..."
    return shown if chat_system(template) is not None else f"Jinja {shown!r}"


@lru_cache(maxsize=256)
def _read(template: str) -> frozenset[str]:
    """Names that Jinja text reads; none of what is no Jinja text."""
    if chat_system(template) is not None or not _JINJA.search(template):
        return frozenset()
    try:
        return frozenset(find_undeclared_variables(_ENVIRONMENT.parse(template)))
    except TemplateError:
        return frozenset()


def _as_text(value: Any) -> Any:
    """``{chat: TEXT}`` is a chat with that system text, where a colon in a text would need quotes."""
    if isinstance(value, dict) and [*value] == [CHAT]:
        return CHAT if value[CHAT] is None else f"{CHAT}: {value[CHAT]}"
    return value


def _checked(template: str) -> str:
    if (fault := template_fault(template)) is not None:
        raise ValueError(fault)
    return template


TemplateText = Annotated[
    str, BeforeValidator(_as_text, json_schema_input_type=str | dict[str, str]), AfterValidator(_checked)
]
"""A template, as the module has it."""
