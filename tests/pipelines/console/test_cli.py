"""What the entry points share: result files, and what reaches the console."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.console import cli
from sapt_core.errors import ServiceError
from tests.pipelines.commands import Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct)
def test_a_result_file_has_the_mode_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        cli.write_output(tmp_path / "new" / "file", "text")
        cli.write_output(tmp_path / "new" / "file", b"bytes")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "new").iterdir()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"bytes", 0o666 & ~umask)


def test_a_result_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder" / "file").mkdir(parents=True)
    with pytest.raises(ServiceError, match="file cannot be written"):
        cli.write_output(tmp_path / "folder" / "file", "text")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_passwords_in_errors_and_in_what_libraries_warn_of_are_not_shown(call: Call) -> None:
    def main() -> None:
        logging.getLogger("a.library").warning("retrying %s", "http://me:made-up@host/x")
        raise ServiceError("http://me:made-up@host does not answer")

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        outcome = call(main, [])
    finally:
        root.handlers = handlers
    assert outcome.code == 3
    assert outcome.err.splitlines() == [
        "WARNING retrying http://***@host/x",
        "error: http://***@host does not answer",
    ]
