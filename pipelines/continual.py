"""Learn a sequence of tasks: train, score and publish the PET pool after each of them.

    python pipelines/continual.py --config pipelines/configs/quickstart.yaml [key=value ...]

Submitted again after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.stages import Executor, InlineExecutor, plan, run_graph
from cluster.store import ArtifactStore, open_store
from pipelines import cli
from pipelines.experiment import Experiment, load_experiment
from pipelines.reporter import Reporter


def main() -> None:
    """Parse the command line and run the sequence."""
    parser = cli.parser(
        __doc__ or "", "python pipelines/continual.py --config pipelines/configs/superni_mini.yaml seed=1"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--inline", action="store_true", help="one process: no Ray, no MLflow")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the end as JSON")
    arguments = parser.parse_intermixed_args()
    cli.check_output(arguments.summary)
    experiment = load_experiment(arguments.config, arguments.overrides)
    store = open_store(experiment.config.store)
    if arguments.dry_run:
        Reporter(experiment, store, None).show_plan(plan(experiment.graph.stages, store))
        return
    store.check()
    if arguments.inline:
        reporter = Reporter(experiment, store, None)
        _run(experiment, store, reporter, lambda _: InlineExecutor(store))
    else:
        reporter = _run_published(experiment, store)
    reporter.show_end()
    if arguments.summary is not None:
        cli.write_output(arguments.summary, json.dumps(reporter.summary(), indent=1))


def _run_published(experiment: Experiment, store: ArtifactStore) -> Reporter:
    """Run on Ray and publish to MLflow."""
    from cluster import tracking  # noqa: PLC0415  not with --inline
    from pipelines.publishing import MLflowPublisher  # noqa: PLC0415

    publisher = MLflowPublisher(experiment, tracking.check(experiment.config.tracking))
    reporter = Reporter(experiment, store, publisher)
    summary = None
    try:
        with ExitStack() as stack:
            _run(experiment, store, reporter, lambda all_done: _executor(experiment, store, stack, all_done))
        summary = reporter.summary()
    finally:
        publisher.finish(summary)
    return reporter


def _executor(experiment: Experiment, store: ArtifactStore, stack: ExitStack, all_done: bool) -> Executor[Any]:
    """Ray, unless nothing is left to run."""
    if all_done:
        return InlineExecutor(store)
    from cluster.session import check_resources, connect  # noqa: PLC0415  not with --inline

    config = experiment.config
    stack.enter_context(connect(config.cluster))
    check_resources(config.cluster)
    from cluster.ray_executor import RayExecutor  # noqa: PLC0415

    return RayExecutor(config.store, config.cluster)


def _run(
    experiment: Experiment,
    store: ArtifactStore,
    reporter: Reporter,
    executor: Callable[[bool], Executor[Any]],
) -> None:
    states = plan(experiment.graph.stages, store)
    reporter.show_plan(states)
    running = executor(all(state == "done" for state in states.values()))
    experiment.upload(store)
    run_graph(experiment.graph.stages, store, running, reporter.on_event)


if __name__ == "__main__":
    cli.run(main)
