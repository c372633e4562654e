"""Run stages on Ray: plain ones as tasks, training ones as a Ray Train run each."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.session import capacity
from cluster.stages import Outcome, Stage, StageRecord, run_alone
from cluster.store import open_store, resolved
from sapt_core.errors import ClusterError, SaptError
from sapt_core.settings import ClusterConfig, StoreConfig

# How long a stage may take to unwind before its process is killed.
CANCEL_SECONDS = 30

Ref: TypeAlias = "ray.ObjectRef[StageRecord]"


class RayExecutor:
    """Submits as many stages as the cluster holds, and lets Ray place and repeat them.

    Ray queues what it cannot start in the order it came, and a group of training workers waits until
    all its places are free at once. So nothing is queued there: the first of the ready stages waits here.

    Args:
        store: where the workers find the store; a relative folder counts from this process's.
        cluster: restarts of stages whose worker died.
    """

    def __init__(self, store: StoreConfig, cluster: ClusterConfig) -> None:
        self._store = resolved(store)
        self._cluster = cluster
        self._running: dict[Ref, Stage] = {}

    def has_room(self, stage: Stage) -> bool:
        there = capacity()
        return not self._running or all(
            sum(_needs(each)[name] for each in (*self._running.values(), stage)) <= there[name] for name in there
        )

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> Ref:
        alone = replace(stage, inputs={})  # their records travel, not the graph behind them
        options: dict[str, Any] = {"name": stage.name, "max_retries": self._cluster.max_failures}
        if stage.workers:
            # Actors do not inherit the driver's address, and Ray Train's clean-up asks the cluster by it.
            address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            train = _train.options(**options, num_cpus=0, runtime_env={"env_vars": address})
            handle = train.remote(alone, key, dict(inputs), self._store, self._cluster)
        else:
            run = _run.options(**options, num_cpus=stage.cpus, num_gpus=stage.gpus)
            handle = run.remote(alone, key, dict(inputs), self._store)
        self._running[handle] = alone
        return handle

    def wait(self, handles: Sequence[Ref]) -> list[tuple[Ref, Outcome]]:
        ray.wait(list(handles), num_returns=1)
        ended, _ = ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return [(handle, self._outcome(handle)) for handle in ended]

    def cancel(self, handles: Sequence[Ref]) -> None:
        # Not what a stage has started itself: Ray Train's controller would take its workers' end for a failure and
        # start them anew while it is told to stop, and the new ones would keep their places in the cluster.
        for handle in handles:
            ray.cancel(handle, recursive=False)
        # The request is on its way only; a driver that leaves now could leave a busy worker behind.
        _, left = ray.wait(list(handles), num_returns=len(handles), timeout=CANCEL_SECONDS) if handles else ([], [])
        for handle in left:
            ray.cancel(handle, force=True, recursive=False)

    def _outcome(self, handle: Ref) -> Outcome:
        name = self._running.pop(handle).name
        try:
            record: StageRecord = ray.get(handle)
            return record
        except RayTaskError as error:
            # Ray wraps what a task raised; a message made for people must come out as it was made.
            return error.cause if isinstance(error.cause, SaptError) else error
        except RayError as error:
            return ClusterError(
                f"Stage {name} lost its worker {self._cluster.max_failures + 1} times: {error} "
                "Look at the node's memory in the Ray dashboard; the same command goes on where it stopped."
            )


def _needs(stage: Stage) -> dict[str, float]:
    """What a stage takes of the cluster while it runs."""
    workers = max(stage.workers, 1)
    return {"CPU": workers * stage.cpus, "GPU": workers * stage.gpus}


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Interrupt the main thread once more where Python has dropped an interrupt.

    Cancelling a Ray task raises KeyboardInterrupt wherever its process is. In a destructor, or a callback
    of one, Python prints and forgets it: the user would read a traceback and the stage would go on.
    """

    def insist(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            before(dropped)
            return
        begun = False
        while not begun:
            # From a thread: raised in here, it would be dropped again. A busy machine can take that long to start one.
            with suppress(KeyboardInterrupt):
                threading.Timer(0.1, _thread.interrupt_main).start()
                begun = True

    before, sys.unraisablehook = sys.unraisablehook, insist
    try:
        yield
    finally:
        sys.unraisablehook = before


@ray.remote
def _run(stage: Stage, key: str, inputs: dict[str, StageRecord], store: StoreConfig) -> StageRecord:
    with heeding_interrupts():
        return run_alone(stage, key, inputs, open_store(store))


@ray.remote
def _train(
    stage: Stage, key: str, inputs: dict[str, StageRecord], store: StoreConfig, cluster: ClusterConfig
) -> StageRecord:
    from cluster.training import fit  # noqa: PLC0415  Ray Train and torch only in the worker

    with heeding_interrupts():
        return fit(stage, key, inputs, store, cluster)
