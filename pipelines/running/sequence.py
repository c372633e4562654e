"""Running a sequence: here or on Ray, published to MLflow with its report."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from rich.console import Console

from cluster.processes import stage_processes
from cluster.stages import Executor, InlineExecutor, Stage, StageRecord, plan, run_graph
from cluster.store import ArtifactStore, open_store
from cluster.store.lookups import Lookups
from pipelines.console.cli import write_output
from pipelines.console.places import check_lasting, is_passing
from pipelines.reports import page
from pipelines.reports.findings import bare_scores
from pipelines.running.monitor import Monitor
from pipelines.sequence.experiment import Experiment
from pipelines.sequence.retention import enforce
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.errors import ServiceError, TrackingError
from sapt_core.settings import StoreConfig

log = logging.getLogger(__name__)


def carry_out(experiment: Experiment, arguments: Namespace) -> None:
    """Plan, run and publish an experiment, and print what came of it, as the options of ``cli.add_run`` say.

    Raises:
        ConfigError: what comes of it would not outlive a Ray job.
        LineageError: the registered model holds a pool that the sequence does not go on from.
        ServiceError: MLflow, the store or Ray cannot be used.
    """
    check_lasting({"--summary": arguments.summary}, experiment.config, inline=arguments.inline)
    store = open_store(experiment.config.store)
    if not arguments.dry_run:
        store.check()
    known = Lookups(store, [experiment.key])
    states = plan(experiment.graph.published, known)
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
    if keep_to_retention([(experiment, monitor.records)], known, monitor.console):
        known.pack(experiment.key, [record.key for record in monitor.records.values()])
    monitor.show_end()
    if arguments.summary is not None:
        write_output(arguments.summary, json.dumps(monitor.summary(), indent=1, allow_nan=False))


def check_registry(experiment: Experiment) -> None:
    """Say before anything is started whether the sequence may be published; nothing is written.

    Raises:
        LineageError: the registered model holds a pool that the sequence does not go on from.
    """
    from cluster.tracking import registry, service  # noqa: PLC0415  not with --inline
    from pipelines.running.publishing import lineage_of  # noqa: PLC0415

    try:
        if service.is_there(experiment.config.tracking):
            readable = service.check_readable(experiment.config.tracking)
            registry.PoolRegistry(readable).check_continuation(lineage_of(experiment))
    except TrackingError as error:
        log.warning("Not checked whether tracking.model is free: %s", error)


def publish_sequence(experiment: Experiment, known: Lookups, *, all_done: bool, sweep: str | None = None) -> Monitor:
    """Run on Ray, unless nothing is left to run, and publish to MLflow.

    Args:
        experiment: the sequence.
        known: what is known of the store that holds what its stages give.
        all_done: nothing is left to run.
        sweep: whose best trial it is.

    Raises:
        LineageError: the registered model holds a pool that the sequence does not go on from.
        ServiceError: MLflow, the store or Ray cannot be used.
    """
    from cluster.tracking import registry, service  # noqa: PLC0415  not with --inline
    from cluster.tracking.outbox import Outbox  # noqa: PLC0415
    from pipelines.running.publishing import MLflowPublisher, lineage_of, registered_as  # noqa: PLC0415

    checked = service.check(experiment.config.tracking)
    registry.PoolRegistry(checked).check_continuation(lineage_of(experiment, sweep))
    with ExitStack() as stack:
        executor = InlineExecutor(known.store) if all_done else ray_executor(experiment.config, stack)
        outbox = stack.enter_context(Outbox())
        # MLflow sees the run once nothing forbids it.
        publisher = MLflowPublisher(experiment, checked, outbox, sweep=sweep)
        monitor = Monitor(experiment, known.store, publisher)
        try:
            run(experiment, known, executor, monitor)
            outbox.flush()  # the summary names the last version
            opened = publisher.run
            monitor.registered = registered_as(monitor.findings.manifest.digest, experiment, opened.tracker)
            files, said, kept = report(monitor, opened.links(monitor.version))
            publisher.finish(monitor, lambda: files)
            monitor.console.print(f"report: {said if kept else f'in MLflow alone, for {said}'}", soft_wrap=True)
            outbox.flush()
        except BaseException as error:
            with suppress(TrackingError):  # the first error is the one to tell
                publisher.abandon(killed=not isinstance(error, Exception))
            raise
    return monitor


def report(monitor: Monitor, links: Sequence[page.Link] = ()) -> tuple[dict[str, bytes], str, bool]:
    """The report of a sequence that has ended, kept in the working directory.

    Returns:
        Its files by name, then where its page lies and True, or why it could not be kept and False.
    """
    folder = page.default_folder(monitor.experiment)
    files = page.standing(folder, monitor.findings, monitor.verdict, links)
    if files is None:
        files = page.build(monitor.findings, monitor.verdict, links)
        if is_passing(folder):
            return files, "the working directory goes with the job", False
        try:
            page.write(folder, files)
        except ServiceError as error:
            return files, str(error), False
    return files, str(folder / page.PAGE), True


def inline_executor(arguments: Namespace, config: StoreConfig, store: ArtifactStore, stack: ExitStack) -> Executor[Any]:
    """What runs the stages with ``--inline`` until ``stack`` is closed: this process or ``--processes`` others."""
    if arguments.processes is None:
        return InlineExecutor(store)
    return stack.enter_context(stage_processes(arguments.processes, config))


def ray_executor(config: ExperimentConfig, stack: ExitStack) -> Executor[Any]:
    """Connect to Ray until ``stack`` is closed, and see that it has what the config asks for."""
    from cluster.on_ray.session import check_resources, connect  # noqa: PLC0415  not with --inline

    stack.enter_context(connect(config.cluster))
    check_resources(config.cluster)
    from cluster.on_ray.executor import RayExecutor  # noqa: PLC0415

    return stack.enter_context(closing(RayExecutor(config.store, config.cluster)))


def run(experiment: Experiment, known: Lookups, executor: Executor[Any], monitor: Monitor) -> None:
    stages = experiment.graph.published
    experiment.upload(known, all_done=set(plan(stages, known).values()) == {"done"})
    records = run_graph(stages, known, executor, monitor.on_event)
    known.pack(experiment.key, [record.key for record in records.values()])
    monitor.bare = bare_scores(experiment, known)


def keep_to_retention(
    finished: Sequence[tuple[Experiment, Mapping[Stage, StageRecord]]], known: Lookups, console: Console
) -> bool:
    """Remove from the store what may not stay of sequences that have ended, and say what became of it.

    Returns:
        Whether records were changed, so that a pack with copies of them is outdated.

    Raises:
        StoreError: the store cannot be read or written.
    """
    removal = enforce(finished, known)
    if removal is None:
        return False
    for line in removal.told(known.store.uri):
        console.print(line, style="yellow" if line.startswith("warning") else None, soft_wrap=True)
    return bool(removal.erased.marked)
