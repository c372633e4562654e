"""The metrics that a task may name."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

METRIC_NAMES = (
    "rouge_l",
    "rouge_l_unicode",
    "exact_match",
    "exact_match_unicode",
    "accuracy",
    "macro_f1",
    "squad_f1",
    "numeric_match",
    "bleu",
    "chrf",
    "sari",
    "edit_similarity",
)
"""Those that are there (``sapt_core.judging.scoring``); another one is a function of the user's own."""

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def metric_names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The metrics that a ``MetricList`` names, the leading one first."""
    return () if value is None else (value,) if isinstance(value, str) else value


def is_own(name: str) -> bool:
    """Whether a name has the form ``package.module:function``."""
    return _OWN.fullmatch(name) is not None


def unknown_metric(name: str) -> str:
    """What to tell of a name that is no metric's."""
    close = get_close_matches(name, METRIC_NAMES, n=1)
    there = f"did you mean {close[0]}?" if close else f"there are {', '.join(METRIC_NAMES)}"
    return f"there is no metric {name!r}; {there}, or give a function of your own as package.module:function"


def _single_or_several(value: Any) -> Any:
    """``a,b`` from a command line is the list [a, b]; a list of one is its name, as configs of one metric have it."""
    names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return names[0] if isinstance(names, list | tuple) and len(names) == 1 else names


def _known(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    names = metric_names(value)
    faults = [unknown_metric(name) for name in names if name not in METRIC_NAMES and not is_own(name)]
    faults += [f"{name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not names:
        faults.append("names no metric")
    if faults:
        raise ValueError("; ".join(faults))
    return value


MetricList = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_single_or_several, json_schema_input_type=str | tuple[str, ...]),
    AfterValidator(_known),
]
"""A metric, or several of which the first one leads."""
