"""Look after a store: list what nothing needs any more, and remove it.

    python pipelines/store.py clean store.uri=runs/store
    python pipelines/store.py clean --remove store.uri=runs/store

What no record of a stage reaches is of no use to any run, report or version. What has been written or put in the last
14 days is left out: it may be on its way into a record. Records are never removed.
"""

from __future__ import annotations

import argparse
import re

from pipelines.console import cli
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line, list and, if that is asked for, remove."""
    parser = cli.parser(
        __doc__ or "", pasted("store", "clean", "store.uri=runs/store"), needs_config=False, actions=["clean"]
    )
    parser.add_argument("--remove", action="store_true", help="remove what is listed; default: list it")
    parser.add_argument(
        "--keep",
        type=_digest,
        action="append",
        default=[],
        metavar="DIGEST",
        help="of a version that counts although its record was deleted; may be given several times",
    )
    arguments = cli.parse(parser)

    from cluster.store import open_store
    from cluster.store.cleaning import remove, unreachable
    from sapt_core.config.experiment import load_config, load_places

    config, overrides = arguments.config, arguments.overrides
    places = load_places(overrides) if config is None else load_config(config, overrides)
    store = open_store(places.store)
    found = unreachable(store, keep=arguments.keep)
    for leftover in found:
        print(f"{leftover.entry.size:>14,}  {leftover.entry.name}: {leftover.why}")
    print(f"{sum(leftover.entry.size for leftover in found):>14,}  bytes in {len(found)} objects of {store.uri}")
    if arguments.remove:
        print(f"{remove(store, found):>14,}  bytes removed")
    elif found:
        print("Nothing was removed: --remove does.")


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the 64 hex digits that learning ended with")
    return text


if __name__ == "__main__":
    cli.run(main)
