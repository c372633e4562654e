"""Continual learning of language models: learn tasks one after another, and use, compare and report what came of it."""

from __future__ import annotations

import argparse
import sys

from pipelines.console import cli
from pipelines.console.commands import SCRIPTS
from sapt_core import __version__


def main() -> None:
    """Run the command that is named, as its file in ``pipelines`` does, or say what there is."""
    parser = argparse.ArgumentParser(
        prog="sapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"sapt-on-ray {__version__}")
    module = cli.chosen(parser, {name: f"pipelines.{script}" for name, script in SCRIPTS.items()})
    sys.argv = [f"sapt {sys.argv[1]}", *sys.argv[2:]]
    cli.run(module.main)


if __name__ == "__main__":
    main()
