"""What the entry points share: arguments, result files, and errors that people can read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from sapt_core.errors import SaptError, ServiceError


def parser(description: str, example: str, *, needs_config: bool = True) -> argparse.ArgumentParser:
    """An argument parser with ``--config`` and dotted ``key=value`` overrides."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", type=Path, required=needs_config, help="experiment YAML, see pipelines/configs")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted field of the config, e.g. seed=3")
    return made


def check_output(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work that would be lost.

    Raises:
        SaptError: it is a folder, or lies where this user cannot write.
    """
    if path is None:
        return
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SaptError(f"{path} cannot be written: give a file in a folder that this user can write to")


def write_output(path: Path, content: str | bytes) -> None:
    """Write a result file, whole or not at all; its folder is made.

    Raises:
        ServiceError: no space, or the folder has become read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            try:
                part.write(content.encode() if isinstance(content, str) else content)
                part.close()
                Path(part.name).chmod(0o644)
                Path(part.name).replace(path)
            finally:
                Path(part.name).unlink(missing_ok=True)
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error


def first_time() -> Callable[[logging.LogRecord], bool]:
    """A filter for messages that were told before: every row of a comparison looks at the same tasks."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in told
        told.add(message)
        return new

    return is_new


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake is one message and an exit code, ours keeps its trace.

    Exit codes: 0 done, 2 bad input, 3 a service cannot be used, 130 interrupted, 1 a defect.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(first_time())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", handlers=[handler])
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        main()
    except SaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
