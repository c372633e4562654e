"""Run stages on Ray: plain ones as tasks, training ones on Ray Train workers that stay for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from cluster.on_ray.session import available, capacity, largest
from cluster.on_ray.warm import IDLE_SECONDS, WarmWorkers
from cluster.stages import Outcome, Stage, StageContext, StageRecord, StageResult, run_alone
from cluster.store import open_store, resolved
from sapt_core.errors import ClusterError, SaptError
from sapt_core.settings import ClusterConfig, StoreConfig

# By name, so that what a trial starts is not squeezed into the place that Tune holds for the trial.
_ANYWHERE: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}

LARGE = 2**30
"""Bytes of weights from which a process that has loaded them is worth ending."""

CLOSING_SECONDS = 10.0
CALLS = 8  # at once, of an actor that keeps training workers: two of the executor, those of the workers

Ref: TypeAlias = "ray.ObjectRef[StageRecord]"


@dataclass(eq=False)
class _Kept:
    """Training workers that stay: the actor that has them do stages, and what they do or did last."""

    actor: Any
    stage: Stage
    busy: bool = False


class RayExecutor:
    """Submits as many stages as the cluster holds, and lets Ray place and repeat them.

    Ray queues what it cannot start in the order it came, and a group of training workers waits until
    all its places are free at once. So nothing is queued there: the first of the ready stages waits here.
    Nor is anything cancelled: Ray kills the workers of a driver that disconnects, while ``ray.cancel``, when a
    task ends at that very moment, aborts the driver (Ray 2.60).

    Args:
        store: where the workers find the store; a relative folder counts from this process's.
        cluster: restarts of stages whose worker died.
        idle_seconds: how long training workers wait for a stage before they go.
    """

    def __init__(self, store: StoreConfig, cluster: ClusterConfig, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._store = resolved(store)
        self._cluster = cluster
        self._idle_seconds = idle_seconds
        self._running: dict[Ref, tuple[Stage, _Kept | None]] = {}
        self._kept: list[_Kept] = []

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        there = capacity()
        running = [each for each, _ in self._running.values()]
        together = [_needs(each) for each in (*running, *ahead, stage)]
        return not self._running or all(
            sum(each[name] for each in together) <= there[name] for name, need in together[-1].items() if need
        )

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> Ref:
        alone = replace(stage, inputs={})  # their records travel, not the graph behind them
        kept = self._workers_for(alone) if stage.workers else None
        self._make_way(stage)
        handle: Ref
        if kept is not None:
            body = _Unopened(cloudpickle.dumps(stage.body))  # type: ignore[no-untyped-call]
            run = kept.actor.run.options(name=stage.name)
            handle = run.remote(replace(alone, body=body), key, dict(inputs))
        else:
            task = _run_and_end if stage.gpus or stage.memory >= LARGE else _run
            # No more memory than a node has: Ray would wait for a larger one for ever.
            memory = min(stage.memory, int(largest("memory")))
            handle = task.options(
                name=stage.name,
                max_retries=self._cluster.max_failures,
                num_cpus=stage.cpus,
                num_gpus=stage.gpus,
                memory=memory or None,
                **_ANYWHERE,
            ).remote(alone, key, dict(inputs), self._store)
        self._running[handle] = alone, kept
        return handle

    def wait(self, handles: Sequence[Ref]) -> list[tuple[Ref, Outcome]]:
        ray.wait(list(handles), num_returns=1)
        ended, _ = ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return [(handle, self._outcome(handle)) for handle in ended]

    def close(self) -> None:
        """Let the training workers go that wait for a stage; those at work end when the driver disconnects."""
        resting = self._rest()
        if resting:
            ray.wait(resting, num_returns=len(resting), timeout=CLOSING_SECONDS)
        self._kept = []

    def _workers_for(self, stage: Stage) -> _Kept:
        """Those that have done stages that ask alike and are free now, or new ones, to be busy with this one."""
        free = [each for each in self._kept if not each.busy and _asks(each.stage) == _asks(stage)]
        if not free:
            # Actors do not inherit the driver's address, and Ray Train's clean-up asks the cluster by it.
            address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            options = _warm_workers.options(
                max_restarts=self._cluster.max_failures,
                max_task_retries=self._cluster.max_failures,
                max_concurrency=CALLS,
                runtime_env={"env_vars": address},
                **_ANYWHERE,
            )
            free = [_Kept(options.remote(self._store, self._cluster.max_failures, self._idle_seconds), stage)]
            self._kept += free
        free[0].stage, free[0].busy = stage, True
        return free[0]

    def _make_way(self, stage: Stage) -> None:
        """Let idle workers go if the stage needs what they hold: here, or in the place of other drivers' stages."""
        idle = [each.stage for each in self._kept if not each.busy]
        there, free = capacity(), available()
        held = [_needs(each) for each in (*(running for running, _ in self._running.values()), *idle)]
        if idle and any(
            need > min(there[name] - sum(each[name] for each in held), free[name])
            for name, need in _needs(stage).items()
            if need
        ):
            self._rest()

    def _rest(self) -> list[Any]:
        return [each.actor.rest.remote() for each in self._kept if not each.busy]

    def _outcome(self, handle: Ref) -> Outcome:
        stage, kept = self._running.pop(handle)
        if kept is not None:
            kept.busy = False
        try:
            record: StageRecord = ray.get(handle)
            return record
        except RayTaskError as error:
            # Ray wraps what a task raised; a message made for people must come out as it was made.
            return error.cause if isinstance(error.cause, SaptError) else error
        except RayError as error:
            return ClusterError(
                f"Stage {stage.name} lost its worker {self._cluster.max_failures + 1} times: {error} "
                "Look at the node's memory in the Ray dashboard; the same command goes on where it stopped."
            )


def _asks(stage: Stage) -> tuple[float, ...]:
    """What training workers that do one stage and another one have in common."""
    return stage.workers, stage.cpus, stage.gpus, stage.memory


def _needs(stage: Stage) -> dict[str, float]:
    """What a stage takes of the cluster while it runs."""
    workers = max(stage.workers, 1)
    return {"CPU": workers * stage.cpus, "GPU": workers * stage.gpus, "memory": workers * stage.memory}


@dataclass(frozen=True)
class _Unopened:
    """A body that is unpickled where it is called.

    What it imports takes seconds, and the training workers need it, not the process that starts them.
    """

    pickled: bytes

    def __call__(self, context: StageContext) -> StageResult:
        result: StageResult = cloudpickle.loads(self.pickled)(context)
        return result


def _run_stage(stage: Stage, key: str, inputs: dict[str, StageRecord], store: StoreConfig) -> StageRecord:
    return run_alone(stage, key, inputs, open_store(store))


_run = ray.remote(_run_stage)
# Its process ends with it. One that stays keeps the backbone that it has loaded, on the GPU or in memory that nobody
# accounts for, beside the stages that come; a new one costs seconds of imports. ``num_gpus`` ends a task's process
# where it stands in the decorator, and does not where it is an option of the call (Ray 2.60).
_run_and_end = ray.remote(max_calls=1)(_run_stage)

_warm_workers = ray.remote(num_cpus=0)(WarmWorkers)
