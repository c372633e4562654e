"""Training workers that stay for stage after stage.

A Ray Train run takes some ten seconds to start, however short its work: processes, their imports, the backbone. So
its workers ask for the next stage when they have done one. While nothing fails all stages share a run; it ends when
its workers have nothing to do for a while, when their places are asked back, and after a stage whose workers had to
be started again, so that ``cluster.max_failures`` counts for each stage anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from threading import Condition
from typing import TypeAlias

import ray

from cluster.stages import Stage, StageRecord, StageResult, run_alone
from cluster.store import open_store
from sapt_core.settings import StoreConfig

IDLE_SECONDS = 10.0
"""How long workers wait for a stage: about what it costs to start others, so that no wait is much of a loss.

It also ends what several drivers could not: each with idle workers in the places that another one's stage needs.
"""

Job: TypeAlias = tuple[Stage, str, Mapping[str, StageRecord]]


class WarmWorkers:
    """An actor that has one group of training workers do stages, one at a time, all of one shape.

    Its methods are called at the same time: ``run`` and ``rest`` by the executor, the others by the workers.

    Args:
        store: of the stages.
        max_failures: how often the workers are started again in a stage.
        idle_seconds: how long they wait for a stage.
    """

    def __init__(self, store: StoreConfig, max_failures: int, idle_seconds: float) -> None:
        self._store = store
        self._max_failures = max_failures
        self._idle_seconds = idle_seconds
        self._news = Condition()
        self._job: Job | None = None
        self._result: Future[StageResult] = Future()
        self._run: str | None = None  # the Ray Train run whose workers get jobs
        self._groups = 0  # of workers that it has had
        self._runs = ThreadPoolExecutor(1)  # a run starts when the one before has given back its places
        self._fit: Future[None] | None = None

    def run(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> StageRecord:
        """Have the workers do a stage, unless it is done, and commit rank 0's result.

        Raises:
            SaptError: raised by the body; such errors are not retried.
            ClusterError: workers died more often than ``max_failures``.
            ray.train.TrainingFailedError: any other failure, with the worker's trace.
        """
        work = replace(stage, body=lambda _: self._hand_over((stage, key, inputs)))
        return run_alone(work, key, inputs, open_store(self._store), world_size=stage.workers)

    def rest(self) -> None:
        """Let idle workers go; returns when their places are free."""
        with self._news:
            if self._job is not None or self._fit is None:
                return
            self._run = None
            self._news.notify_all()
        wait([self._fit])

    def take(self, run: str, *, first: bool) -> bool:
        """Whether there is a job for the workers of this run; waits for one. Rank 0 asks.

        Args:
            run: that the workers are of.
            first: they have just started.
        """
        with self._news:
            self._groups += first
            if self._groups == 1:
                self._news.wait_for(lambda: self._run != run or self._job is not None, self._idle_seconds)
            if self._run == run and self._job is None:
                self._run = None
            return self._run == run

    def job(self) -> Job | None:
        """What the workers are to do now."""
        return self._job

    def finish(self, run: str, result: StageResult) -> None:
        """All workers of this run have done the job."""
        with self._news:
            if self._run == run:
                self._job = None
                self._result.set_result(result)

    def _hand_over(self, job: Job) -> StageResult:
        with self._news:
            self._job, self._result = job, Future()
            result = self._result
            if self._run is None:
                self._run, self._groups = f"training-{uuid.uuid4().hex}", 0
                self._fit = self._runs.submit(self._train, self._run, job[0])
                self._fit.add_done_callback(partial(self._ended, self._run))
            self._news.notify_all()
        return result.result()

    def _train(self, run: str, stage: Stage) -> None:
        from cluster.on_ray.training import fit  # noqa: PLC0415  Ray Train and torch only where workers are started

        fit(run, stage, ray.get_runtime_context().current_actor, self._store, self._max_failures)

    def _ended(self, run: str, fit: Future[None]) -> None:
        from cluster.on_ray.training import told  # noqa: PLC0415

        with self._news:
            if self._run == run:
                self._run = None
                if self._job is not None:
                    stage, self._job = self._job[0], None
                    self._result.set_exception(told(fit.exception(), stage, self._max_failures))
