"""Run stages on Ray: plain ones as tasks, training ones as a Ray Train run each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from cluster.on_ray.session import capacity, largest
from cluster.stages import Outcome, Stage, StageContext, StageRecord, StageResult, run_alone
from cluster.store import open_store, resolved
from cluster.store.lease import leased
from cluster.store.patience import patiently
from sapt_core.errors import ClusterError, SaptError
from sapt_core.settings import ClusterConfig, StoreConfig

LARGE = 2**30
"""Bytes of weights from which a process that has loaded them is worth ending."""

Ref: TypeAlias = "ray.ObjectRef[StageRecord]"


class RayExecutor:
    """Submits as many stages as the cluster holds, and lets Ray place and repeat them.

    Ray queues what it cannot start in the order it came, and a group of training workers waits until
    all its places are free at once. So nothing is queued there: the first of the ready stages waits here.
    Nor is anything cancelled: Ray kills the workers of a driver that disconnects, while ``ray.cancel``, when a
    task ends at that very moment, aborts the driver (Ray 2.60).

    Args:
        store: where the workers find the store; a relative folder counts from this process's.
        cluster: restarts of stages whose worker died.
    """

    def __init__(self, store: StoreConfig, cluster: ClusterConfig) -> None:
        self._store = resolved(store)
        self._cluster = cluster
        self._running: dict[Ref, Stage] = {}

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        there = capacity()
        together = [_needs(each) for each in (*self._running.values(), *ahead, stage)]
        return not self._running or all(
            sum(each[name] for each in together) <= there[name] for name, need in together[-1].items() if need
        )

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> Ref:
        alone = replace(stage, inputs={})  # their records travel, not the graph behind them
        # By name, so that stages that a trial starts are not squeezed into the place that Tune holds for the trial.
        options: dict[str, Any] = {
            "name": stage.name,
            "max_retries": self._cluster.max_failures,
            "scheduling_strategy": "DEFAULT",
        }
        if stage.workers:
            # Actors do not inherit the driver's address, and Ray Train's clean-up asks the cluster by it.
            address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            train = _train.options(**options, num_cpus=0, runtime_env={"env_vars": address})
            body = _Unopened(cloudpickle.dumps(stage.body))  # type: ignore[no-untyped-call]
            handle = train.remote(replace(alone, body=body), key, dict(inputs), self._store, self._cluster)
        else:
            task = _run_and_end if stage.gpus or stage.memory >= LARGE else _run
            # No more memory than a node has: Ray would wait for a larger one for ever.
            memory = min(stage.memory, int(largest("memory")))
            run = task.options(**options, num_cpus=stage.cpus, num_gpus=stage.gpus, memory=memory or None)
            handle = run.remote(alone, key, dict(inputs), self._store)
        self._running[handle] = alone
        return handle

    def wait(self, handles: Sequence[Ref]) -> list[tuple[Ref, Outcome]]:
        ray.wait(list(handles), num_returns=1)
        ended, _ = ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return [(handle, self._outcome(handle)) for handle in ended]

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


@ray.remote
def _train(
    stage: Stage, key: str, inputs: dict[str, StageRecord], store: StoreConfig, cluster: ClusterConfig
) -> StageRecord:
    from cluster.on_ray.training import fit  # noqa: PLC0415  Ray Train and torch only in the worker

    def attempt() -> StageRecord:
        with leased(open_store(store), key, stage.name):  # Ray Train's folder, too, is one run's at a time
            return fit(stage, key, inputs, store, cluster)

    return patiently(attempt)
