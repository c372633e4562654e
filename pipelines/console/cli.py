"""What the entry points share: arguments, result files, and errors that people can read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from cluster.processes import stage_processes
from cluster.stages import Executor, InlineExecutor
from cluster.store import ArtifactStore
from sapt_core.addresses import redacted
from sapt_core.errors import SaptError, ServiceError
from sapt_core.files import whole_file
from sapt_core.settings import StoreConfig


def parser(description: str, example: str, *, needs_config: bool = True) -> argparse.ArgumentParser:
    """An argument parser with ``--config`` and dotted ``key=value`` overrides."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", type=Path, required=needs_config, help="experiment YAML, see pipelines/configs")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted field of the config, e.g. seed=3")
    return made


def add_inline(made: argparse.ArgumentParser) -> None:
    """The options of those who run without Ray."""
    made.add_argument("--inline", action="store_true", help="on this machine alone: no Ray, no MLflow")
    made.add_argument(
        "--processes", type=_at_least_one, metavar="N", help="with --inline: run up to N stages at once (default: 1)"
    )


def inline_executor(
    arguments: argparse.Namespace, config: StoreConfig, store: ArtifactStore, stack: ExitStack
) -> Executor[Any]:
    """What runs the stages with ``--inline`` until ``stack`` is closed: this process or ``--processes`` others."""
    if arguments.processes is None:
        return InlineExecutor(store)
    return stack.enter_context(stage_processes(arguments.processes, config))


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; ends with a message if its options do not go together."""
    arguments = made.parse_intermixed_args()
    if arguments.processes is not None and not arguments.inline:
        made.error("--processes goes with --inline; on Ray, the cluster says how many stages run at once")
    return arguments


def _at_least_one(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


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
        with whole_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
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


class _Redacted(logging.Formatter):
    """What libraries warn of may show an address as it was given to them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake is one message and an exit code, ours keeps its trace.

    Exit codes: 0 done, 2 bad input, 3 a service cannot be used, 130 interrupted, 1 a defect.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(first_time())
    handler.setFormatter(_Redacted("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        main()
    except SaptError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
