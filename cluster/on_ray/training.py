"""A Ray Train run whose workers do the bodies of training stages, resumable from the stages' last checkpoints."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.stages import Stage, StageContext
from cluster.store import open_store
from sapt_core.errors import ClusterError, SaptError
from sapt_core.io.blobs import Checkpoints
from sapt_core.settings import StoreConfig

# Read by Ray Train in the process that calls fit(). A death is seen at the controller's next poll,
# and the watcher and the metrics cost seconds at every start.
_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # It would log every print as well, even one into a string.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}

T = TypeVar("T")


def fit(run: str, stage: Stage, jobs: Any, store: StoreConfig, max_failures: int) -> None:
    """Do jobs until there are none.

    Args:
        run: its name, which no other run has.
        stage: says how many workers there are, and what each takes.
        jobs: the ``WarmWorkers`` that has them.
        store: of the jobs.
        max_failures: how often the workers are started again.

    Raises:
        ray.train.TrainingFailedError: they have failed once more, or raised a ``SaptError``. See ``told``.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="training-") as folder:  # Ray Train's own state, which nothing reads
        trainer: Any = TorchTrainer(  # typed for Train V1
            cast(Any, lambda: _work(run, jobs, store)),
            torch_config=TorchConfig(backend="nccl" if stage.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=stage.workers,
                use_gpu=stage.gpus > 0,
                resources_per_worker={"CPU": stage.cpus, **({"GPU": stage.gpus} if stage.gpus else {})},
            ),
            run_config=cast(Any, RunConfig)(
                name=run,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=[_RaiseUserErrors()],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        trainer.fit()


def told(error: BaseException | None, stage: Stage, max_failures: int) -> BaseException | None:
    """What a run's failure in a stage is for people."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, SaptError):
        return error.controller_failure
    if isinstance(error, WorkerGroupError):
        deaths = [getattr(each, "health_check_failure", None) for each in error.worker_failures.values()]
        if any(isinstance(death, RayActorError) for death in deaths):
            return ClusterError(
                f"Stage {stage.name} lost a training worker {max_failures + 1} times. Look at memory and at the "
                "worker's log in the Ray dashboard; the same command goes on from its last checkpoint."
            )
    return error


def _work(run: str, jobs: Any, store_config: StoreConfig) -> None:
    """What every worker does."""
    # What accelerate has to change in its call of torch is nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate\.")
    # Ray Train shows its own and all libraries' INFO on the console; its log files keep it.
    for name in ("", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    first = True
    while broadcast_from_rank_zero(ray.get(jobs.take.remote(run, first=first)) if rank == 0 else None):
        first = False
        stage, key, inputs = ray.get(jobs.job.remote())
        store = open_store(store_config)
        result = stage.body(
            StageContext(
                name=stage.name,
                key=key,
                reads=stage.reads,
                told=stage.told,
                inputs=inputs,
                store=store,
                checkpoints=_SharedCheckpoints(store.checkpoints(key), is_main=rank == 0),
                rank=rank,
                world_size=context.get_world_size(),
            )
        )
        barrier()  # a stage is done when all its workers are
        if rank == 0:
            ray.get(jobs.finish.remote(run, result))


class _SharedCheckpoints:
    """A stage's checkpoints in the store, used by all its workers. See ``sapt_core.io.blobs.Checkpoints``."""

    def __init__(self, kept: Checkpoints, *, is_main: bool) -> None:
        self._kept = kept
        self._is_main = is_main

    def load(self, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of the files of the newest complete checkpoint; None before the first."""
        found = self._kept.load(read)
        barrier()  # before one of them goes on and saves the next
        return found

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep the files that rank 0's ``write`` puts into an empty folder. All workers meet here."""
        if self._is_main:
            self._kept.save(write)
        barrier()


class _RaiseUserErrors(UserCallback):
    """End the run at an error that a restart would only meet again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, SaptError):
                raise error  # from a callback Ray Train takes it as final
