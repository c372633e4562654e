"""Learn a sequence of tasks: train, score and publish the PET pool after each of them.

    python pipelines/continual.py --config pipelines/configs/quickstart.yaml [key=value ...]

Submitted again after any interruption, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.stages import Executor, InlineExecutor, plan, run_graph
from cluster.store import ArtifactStore, open_store
from pipelines import cli, report
from pipelines.experiment import Experiment, load_experiment
from pipelines.reporter import Reporter
from sapt_core.config import ExperimentConfig
from sapt_core.errors import ServiceError, TrackingError

if TYPE_CHECKING:
    from pipelines.publishing import MLflowPublisher


def main() -> None:
    """Parse the command line and run the sequence."""
    parser = cli.parser(
        __doc__ or "", "python pipelines/continual.py --config pipelines/configs/superni_mini.yaml seed=1"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    cli.add_inline(parser)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the end as JSON")
    arguments = cli.parse(parser)
    cli.check_output(arguments.summary)
    experiment = load_experiment(arguments.config, arguments.overrides)
    store = open_store(experiment.config.store)
    if not arguments.dry_run:
        store.check()
    states = plan(experiment.graph.stages, store)
    Reporter(experiment, store, None).show_plan(states)
    if arguments.dry_run:
        return
    if arguments.inline:
        reporter = Reporter(experiment, store, None)
        with ExitStack() as stack:
            executor = cli.inline_executor(arguments, experiment.config.store, store, stack)
            _run(experiment, store, executor, reporter)
    else:
        reporter = publish_sequence(experiment, store, all_done=set(states.values()) == {"done"})
    reporter.show_end()
    if arguments.summary is not None:
        cli.write_output(arguments.summary, json.dumps(reporter.summary(), indent=1))


def publish_sequence(experiment: Experiment, store: ArtifactStore, *, all_done: bool) -> Reporter:
    """Run on Ray, unless nothing is left to run, and publish to MLflow."""
    from cluster import tracking  # noqa: PLC0415  not with --inline
    from pipelines.publishing import MLflowPublisher  # noqa: PLC0415

    checked = tracking.check(experiment.config.tracking)
    with ExitStack() as stack:
        executor = InlineExecutor(store) if all_done else ray_executor(experiment.config, stack)
        publisher = MLflowPublisher(experiment, checked)  # MLflow sees the run once nothing forbids it
        reporter = Reporter(experiment, store, publisher)
        try:
            _run(experiment, store, executor, reporter)
            _report(reporter, publisher)
        except BaseException as error:
            with suppress(TrackingError):  # the first error is the one to tell
                publisher.abandon(killed=not isinstance(error, Exception))
            raise
    return reporter


def _report(reporter: Reporter, publisher: MLflowPublisher) -> None:
    """Close the run in MLflow with its report, which is kept in the working directory too."""
    folder = report.default_folder(reporter.experiment)
    where = str(folder / report.PAGE)
    files = report.standing(folder, reporter.findings)
    if files is None:
        files = report.build(reporter.findings)
        try:
            report.write(folder, files)
        except ServiceError as error:
            where = f"in MLflow alone, for {error}"
    publisher.finish(reporter.summary(), files)
    reporter.console.print(f"report: {where}", markup=False)


def ray_executor(config: ExperimentConfig, stack: ExitStack) -> Executor[Any]:
    """Connect to Ray until ``stack`` is closed, and see that it has what the config asks for."""
    from cluster.session import check_resources, connect  # noqa: PLC0415  not with --inline

    stack.enter_context(connect(config.cluster))
    check_resources(config.cluster)
    from cluster.ray_executor import RayExecutor  # noqa: PLC0415

    return RayExecutor(config.store, config.cluster)


def _run(experiment: Experiment, store: ArtifactStore, executor: Executor[Any], reporter: Reporter) -> None:
    experiment.upload(store)
    run_graph(experiment.graph.stages, store, executor, reporter.on_event)


if __name__ == "__main__":
    cli.run(main)
