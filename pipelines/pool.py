"""Look at the versions of a pool, choose the one that answers, and take adapters out and in.

python pipelines/pool.py list tracking.model=quickstart
python pipelines/pool.py promote 4 tracking.model=quickstart
python pipelines/pool.py export --version latest --task animal --out adapters/animal tracking.model=quickstart
python pipelines/pool.py import adapters/colour --onto models:/quickstart@latest --task colour --rows colour.txt
"""

from __future__ import annotations

import sys

from pipelines.console import cli

ACTIONS = {
    "list": "listing",
    "show": "showing",
    "compare": "comparing",
    "verify": "verifying",
    "promote": "promoting",
    "rollback": "rolling_back",
    "forget": "forgetting",
    "refit": "refitting",
    "export": "exporting",
    "import": "importing",
}
"""The file in ``pipelines/pools`` that each action is."""


def main() -> None:
    """Run the action that is named, or say what there is."""
    module = cli.chosen(
        cli.plain_parser(__doc__ or ""), {name: f"pipelines.pools.{file}" for name, file in ACTIONS.items()}
    )
    del sys.argv[1]
    module.main()


if __name__ == "__main__":
    cli.run(main)
