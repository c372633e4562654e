"""Run a training stage's body on N Ray Train workers, resumable from its last checkpoint."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import ray.train
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.stages import Stage, StageContext, StageRecord, StageResult, commit, find_record
from cluster.store import open_store
from cluster.store.checkpoints import KEPT
from sapt_core.errors import ClusterError, SaptError
from sapt_core.settings import ClusterConfig, StoreConfig

# Read by Ray Train in the process that calls fit(). A report blocks until the controller's next poll,
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


def fit(
    stage: Stage,
    key: str,
    inputs: Mapping[str, StageRecord],
    store_config: StoreConfig,
    cluster_config: ClusterConfig,
) -> StageRecord:
    """Run the stage's body on its workers and commit rank 0's result.

    The run's name holds the key, so a second call for the same work resumes from the checkpoints the
    first one left. They are deleted once the record is there.

    Raises:
        SaptError: raised by the body; such errors are not retried.
        ClusterError: workers died more often than ``cluster.max_failures``.
        ray.train.TrainingFailedError: any other failure, with the worker's trace.
    """
    store = open_store(store_config)
    done = find_record(store, key)
    if done is not None:
        return done
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    run = f"{stage.kind}-{key[:16]}"
    start = time.monotonic()

    def work() -> StageResult | None:
        # What accelerate has to change in its call of torch is nothing that a user could mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"accelerate\.")
        # Ray Train shows its own and all libraries' INFO on the console; its log files keep it.
        for name in ("", "ray.train"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setLevel(logging.WARNING)
        context = ray.train.get_context()
        rank = context.get_world_rank()
        result = stage.body(
            StageContext(
                name=stage.name,
                key=key,
                reads=stage.reads,
                told=stage.told,
                inputs=inputs,
                store=open_store(store_config),
                checkpoints=TrainCheckpoints(is_main=rank == 0),
                rank=rank,
                world_size=context.get_world_size(),
            )
        )
        return result if rank == 0 else None

    path, filesystem = store.train_storage()
    trainer: Any = TorchTrainer(  # typed for Train V1
        cast(Any, work),
        torch_config=TorchConfig(backend="nccl" if stage.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=stage.workers,
            use_gpu=stage.gpus > 0,
            resources_per_worker={"CPU": stage.cpus, **({"GPU": stage.gpus} if stage.gpus else {})},
        ),
        run_config=cast(Any, RunConfig)(
            name=run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster_config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            callbacks=[_RaiseUserErrors()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit().return_value
    except ControllerError as error:
        if isinstance(error.controller_failure, SaptError):
            raise error.controller_failure from None
        raise
    except WorkerGroupError as error:
        raise _lost_workers(stage, error, cluster_config.max_failures) or error from None
    seconds = time.monotonic() - start
    record = commit(stage, key, inputs, result, store, seconds=seconds, world_size=stage.workers)
    store.discard(f"train/{run}")
    return record


class TrainCheckpoints:
    """Checkpoints of a Ray Train run. See ``sapt_core.io.blobs.Checkpoints``."""

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main

    def load(self, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of the files of the newest complete checkpoint; None before the first."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return read(Path(folder))

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep the files that rank 0's ``write`` puts into an empty folder. All workers meet here.

        They count from the controller's next poll on: a death right after may fall back to the checkpoint before.
        """
        if not self._is_main:
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray.train.report({}, checkpoint=Checkpoint.from_directory(folder))


class _RaiseUserErrors(UserCallback):
    """End the run at an error that a restart would only meet again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, SaptError):
                raise error  # from a callback Ray Train takes it as final


def _lost_workers(stage: Stage, error: WorkerGroupError, max_failures: int) -> ClusterError | None:
    """The error for people if workers died, None if one of them raised something."""
    deaths = {rank: getattr(failure, "health_check_failure", None) for rank, failure in error.worker_failures.items()}
    if not deaths or not any(isinstance(death, RayActorError) for death in deaths.values()):
        return None
    return ClusterError(
        f"Stage {stage.name} lost a training worker {max_failures + 1} times. Look at memory and at the worker's "
        "log in the Ray dashboard; the same command goes on from its last checkpoint."
    )
