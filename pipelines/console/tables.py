"""Tables for a terminal and for a Markdown file, and their place in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.console import cli
from sapt_core.errors import SaptError


def wide_console() -> Console:
    """For all that is printed: names and errors are text, never markup.

    Where there is no terminal to wrap for, a table is as wide as it needs to be.
    """
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 240)


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal; the first and the last column hold text, the others figures."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in {0, len(header) - 1} else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a file."""
    rule = ["---", *["--:"] * (len(header) - 2), "---"]
    told, *cells = ([_markdown(cell) for cell in row] for row in (header, *rows))
    lines = [told, rule, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(ends: Sequence[float] | None) -> str:
    """The ends of a confidence interval of a score; nothing where there is none."""
    return "" if ends is None else f"{ends[0]:.1f}–{ends[1]:.1f}"


def _markdown(text: str) -> str:
    """Text for a cell: nothing in it ends the cell, begins a tag or is taken for a code's or a link's mark."""
    return re.sub(r"([\\|`*\[\]<])", r"\\\1", " ".join(text.splitlines()))


def check_markers(path: Path, name: str) -> None:
    """Refuse a Markdown file that has no place for a table, between comments of its ``name`` with begin and end.

    Raises:
        SaptError: with what to paste.
    """
    _around_markers(path, name)


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Put a table between its markers.

    Raises:
        SaptError: they are not there.
    """
    before, after = _around_markers(path, name)
    cli.write_output(path, f"{before}\n{text}{after}")


def _around_markers(path: Path, name: str) -> tuple[str, str]:
    """The file up to the first marker and from the second on."""
    begin, end = (f"<!-- {name} {place} -->" for place in ("begin", "end"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SaptError(f"--markdown {path} cannot be read: {error}") from error
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SaptError(
            f"--markdown {path} has no place for the table of {name}. Paste these two lines where it belongs:\n"
            f"{begin}\n{end}"
        )
    return before + begin, end + after
