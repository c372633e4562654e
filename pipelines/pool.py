"""Look at the versions of a pool, compare them, and choose the one that answers.

python pipelines/pool.py list tracking.model=quickstart
python pipelines/pool.py promote 4 tracking.model=quickstart
python pipelines/pool.py rollback tracking.model=quickstart
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from types import ModuleType

from pipelines.console import cli

ACTIONS = {
    "list": "listing",
    "show": "showing",
    "compare": "comparing",
    "verify": "verifying",
    "promote": "promoting",
    "rollback": "rolling_back",
}
"""The file in ``pipelines.pools`` that each action is."""


def main() -> None:
    """Do what is named, or say what there is."""
    started, given = sys.argv[0], sys.argv[1:] or ["--help"]
    if given[0] in ACTIONS:
        sys.argv = [started if started.endswith(".py") else f"{started} {given[0]}", *given[1:]]
        _module(given[0]).main()
        return
    width = max(map(len, ACTIONS))
    listed = [f"  {name:{width}}  {(_module(name).__doc__ or '').splitlines()[0]}" for name in ACTIONS]
    parser = cli.plain_parser(__doc__ or "")
    parser.epilog = "\n".join(["actions, each with --help:", *listed])
    parser.add_argument("action", choices=ACTIONS, help=argparse.SUPPRESS)
    parser.parse_args(given)


def _module(action: str) -> ModuleType:
    return import_module(f"pipelines.pools.{ACTIONS[action]}")


if __name__ == "__main__":
    cli.run(main)
