"""What the entry points share: arguments, and errors that people can read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from sapt_core.errors import SaptError


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser with ``--config`` and dotted ``key=value`` overrides."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", type=Path, required=True, help="experiment YAML, see pipelines/configs")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted field of the config, e.g. train.epochs=3")
    made.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the end as JSON")
    return made


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake is one message and an exit code, ours keeps its trace.

    Exit codes: 0 done, 2 bad input, 3 a service cannot be used, 130 interrupted, 1 a defect.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        main()
    except SaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
