"""Continual learning of language models: learn tasks one after another, and use, compare and report what came of it."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from types import ModuleType

from pipelines.console import cli
from pipelines.console.commands import SCRIPTS
from sapt_core import __version__


def main() -> None:
    """Run the command that is named, as its file in ``pipelines`` does, or say what there is."""
    given = sys.argv[1:] or ["--help"]
    if given[0] in SCRIPTS:
        sys.argv = [f"sapt {given[0]}", *given[1:]]
        cli.run(_module(given[0]).main)
        return
    width = max(map(len, SCRIPTS))
    listed = [f"  {name:{width}}  {(_module(name).__doc__ or '').splitlines()[0]}" for name in SCRIPTS]
    parser = argparse.ArgumentParser(
        prog="sapt",
        usage="sapt COMMAND [--help] ...",
        description=__doc__,
        epilog="\n".join(["commands:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sapt-on-ray {__version__}")
    parser.add_argument("command", choices=SCRIPTS, help=argparse.SUPPRESS)
    parser.parse_args(given)


def _module(command: str) -> ModuleType:
    return import_module(f"pipelines.{SCRIPTS[command]}")


if __name__ == "__main__":
    main()
