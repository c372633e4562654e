"""Learn a sequence of tasks: train, score and publish the PET pool after each of them.

    python pipelines/continual.py --config pipelines/configs/quickstart.yaml [key=value ...]

Submitted again after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from pipelines.console import cli, places
from pipelines.console.commands import pasted


def main() -> None:
    """Parse the command line and run the sequence."""
    parser = cli.parser(__doc__ or "", pasted("learn", "--config", "superni_mini", "seed=1"))
    cli.add_print_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    cli.add_inline(parser)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the end as JSON")
    arguments = cli.parse(parser)

    from cluster.stages import plan
    from cluster.store import open_store
    from cluster.store.lookups import Lookups
    from pipelines.running.monitor import Monitor
    from pipelines.running.sequence import check_registry, inline_executor, publish_sequence, report, run
    from pipelines.sequence.experiment import load_experiment

    cli.check_output(arguments.summary)
    experiment = load_experiment(arguments.config, arguments.overrides)
    places.check_lasting({"--summary": arguments.summary}, experiment.config, inline=arguments.inline)
    store = open_store(experiment.config.store)
    if not arguments.dry_run:
        store.check()
    known = Lookups(store, [experiment.key])
    states = plan(experiment.graph.stages, known)
    Monitor(experiment, store, None).show_plan(states)
    if arguments.dry_run:
        if not arguments.inline:
            check_registry(experiment)
        return
    if arguments.inline:
        monitor = Monitor(experiment, store, None)
        with ExitStack() as stack:
            executor = inline_executor(arguments, experiment.config.store, store, stack)
            run(experiment, known, executor, monitor)
        _, said, kept = report(monitor)
        monitor.console.print(f"report: {said if kept else f'not written, for {said}'}", soft_wrap=True)
    else:
        monitor = publish_sequence(experiment, known, all_done=set(states.values()) == {"done"})
    monitor.show_end()
    if arguments.summary is not None:
        cli.write_output(arguments.summary, json.dumps(monitor.summary(), indent=1, allow_nan=False))


if __name__ == "__main__":
    cli.run(main)
