"""Learn a sequence of tasks: train, score and publish the PET pool after each of them.

    python pipelines/continual.py --config pipelines/configs/quickstart.yaml [key=value ...]

Submitted again after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

from pipelines.console import cli
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line and run the sequence."""
    parser = cli.parser(__doc__ or "", pasted("learn", "--config", "superni_mini", "seed=1"))
    cli.add_print_config(parser)
    cli.add_run(parser)
    arguments = cli.parse(parser)

    from pipelines.running.sequence import carry_out
    from pipelines.sequence.experiment import load_experiment

    cli.check_output(arguments.summary)
    carry_out(load_experiment(arguments.config, arguments.overrides), arguments)


if __name__ == "__main__":
    cli.run(main)
