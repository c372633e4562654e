"""Try many settings of the same sequence and show what they are worth: AP and F.Ra on dev rows, on Ray Tune.

    python pipelines/sweep.py --config pipelines/configs/sweeps/quickstart.yaml [key=value ...]

What several trials have in common is computed once, before the first of them. Each trial leaves a JSON record in the
results folder; submitted again after any interruption, the same command goes on where it stopped, and with more trials
in the file it adds them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.console import cli, places
from pipelines.console.commands import pasted
from sapt_core.errors import SaptError


def main() -> None:
    """Parse the command line, run what has no record yet, and show what all trials say."""
    arguments = _arguments()

    from cluster.store import open_store
    from pipelines.console.tables import check_markers, wide_console, write_between_markers
    from pipelines.sequence.experiment import assemble
    from pipelines.sweeps import trials
    from pipelines.sweeps.run import SweepRun
    from pipelines.sweeps.space import load_sweep

    sweep = load_sweep(arguments.config, arguments.overrides)
    if arguments.markdown is not None:
        check_markers(arguments.markdown, f"sweep:{sweep.name}")
    folder = sweep.config.results
    cli.check_output(folder / "trial.json")
    config = sweep.experiment({})
    places.check_lasting({"results": folder, "--markdown": arguments.markdown}, config, inline=arguments.inline)
    experiment = assemble(config, str(arguments.config))
    store = open_store(experiment.config.store)
    if not arguments.dry_run:
        store.check()
    run = SweepRun(sweep, experiment, store, wide_console())
    run.show_plan()
    if arguments.dry_run:
        return
    if arguments.inline:
        run.inline()
    else:
        run.published()
    run.show_end()
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, f"sweep:{sweep.name}", run.markdown())
    if trials.best(run.after) is None:
        raise SaptError(f"No trial of {arguments.config} learnt all tasks: the table says what became of each.")


def _arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", pasted("sweep", "--config", "superni_mini"), kind="sweeps")
    cli.add_print_config(parser, "what all trials start from,")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--inline", action="store_true", help="one process, trial by trial: no Ray, no MLflow")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between its markers in FILE")
    return cli.parse(parser, _base)


def _base(arguments: argparse.Namespace) -> str:
    from pipelines.sweeps.space import load_sweep
    from sapt_core.config.experiment import written

    return written(load_sweep(arguments.config, arguments.overrides).experiment({}))


if __name__ == "__main__":
    cli.run(main)
