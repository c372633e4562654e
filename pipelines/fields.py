"""Print every field of the config files, as the page docs/config.md or as a JSON schema for editors.

python pipelines/fields.py > docs/config.md
python pipelines/fields.py --schema experiment > pipelines/configs/schema.json
"""

from __future__ import annotations

import sys

from pipelines.console import cli

KINDS = ("experiment", "comparison", "sweep")


def main() -> None:
    """Parse the command line and print."""
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument("--schema", choices=KINDS, help="the JSON schema of this kind of file, instead of the page")
    arguments = cli.parse(parser)

    from pipelines.maintenance.reference import page, schema

    sys.stdout.write(page() if arguments.schema is None else schema(arguments.schema))


if __name__ == "__main__":
    cli.run(main)
