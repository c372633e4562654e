"""Pre-train the quickstart's backbone from nothing: a tiny T5 v1.1 that can read, copy, extract and write.

    python pipelines/pretrain_tiny.py --out pipelines/backbones/tiny --seed 0

The model learns general skills on generated text and never sees a synthetic task's definition, answer
or test input. See docs/synthetic.md for what it saw and what came out.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.console import cli


def main() -> None:
    """Parse the command line, train and save."""
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = cli.parse(parser)

    from pipelines.maintenance.pretraining import pretrain

    pretrain(arguments.out, arguments.seed)
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    cli.run(main)
