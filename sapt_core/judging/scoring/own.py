"""Metrics of the user's own, ``package.module:function``: found where modules are, or in the working folder."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sapt_core.errors import ConfigError
from sapt_core.judging.scoring.base import Row, RowMean

if TYPE_CHECKING:
    from collections.abc import Iterator

Function: TypeAlias = Callable[[str, Sequence[str]], Any]

_PROBE = Row("a probe", ("a probe", "another"))


def own_metric(name: str) -> RowMean:
    """The mean over rows of what a function of the user's gives of a prediction and its references.

    Raises:
        ConfigError: there is no such function; later, of a row that it gives no finite number for.
    """
    function = _function(name)
    return RowMean(lambda row: _number(name, function, row), lambda text: bool(text.strip()))


def own_faults(name: str) -> list[str]:
    """What speaks against a metric, found by asking it of one row; empty if nothing does."""
    try:
        own_metric(name).of_row(_PROBE)
    except ConfigError as error:
        return list(error.faults)
    return []


def source_digest(name: str) -> str:
    """sha256 of the file that a metric stands in; of a function without one, of its name.

    What the file imports is not looked at.

    Raises:
        ConfigError: there is no such function.
    """
    file = inspect.getsourcefile(inspect.unwrap(_function(name)))
    return hashlib.sha256(name.encode() if file is None else Path(file).read_bytes()).hexdigest()


@cache
def _function(name: str) -> Function:
    module, _, path = name.partition(":")
    try:
        with _working_folder():
            found: Any = import_module(module)
    except Exception as error:  # whatever the user's own module raises
        raise _refused(name, f"module {module} cannot be imported: {_told(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            there = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            raise _refused(name, f"{module} has no {path}; it has: {', '.join(sorted(there)) or 'no function'}")
        found = getattr(found, part)
    if not inspect.isfunction(found) and not callable(found):
        raise _refused(name, f"is a {type(found).__name__} and no function")
    try:
        inspect.signature(found).bind("", [""])
    except TypeError as error:
        raise _refused(name, f"does not take a prediction and its references: {error}") from error
    except ValueError:  # no signature is known of it: the probe row tells
        pass
    function: Function = found
    return function


@contextmanager
def _working_folder() -> Iterator[None]:
    """The working folder as the last place that modules are looked for in, where only a script's own folder is."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _number(name: str, function: Function, row: Row) -> float:
    asked = f"of prediction {row.prediction!r} and references {list(row.references)!r} it"
    try:
        value = float(function(row.prediction, list(row.references)))
    except Exception as error:  # whatever the user's own function raises, or gives that is no number
        raise _refused(name, f"{asked} gives no number: {_told(error)}") from error
    if not math.isfinite(value):
        raise _refused(name, f"{asked} gives {value}: give a finite number, 0 to 100")
    return value


def _refused(name: str, fault: str) -> ConfigError:
    return ConfigError("A metric cannot be used:", [f"benchmark.metric={name}: {fault}"])


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
