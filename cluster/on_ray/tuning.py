"""Trials on Ray Tune: points that a search proposes, each tried in a process of its own that reports as it goes.

A trial asks for no CPU: what it runs are stages, which ask for their own, so that trials and the training
workers they start never wait for each other's places. It lives on the head node, and with it end its stages.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from cluster.on_ray.session import capacity
from sapt_core.errors import ClusterError
from sapt_core.settings import ClusterConfig

Point: TypeAlias = Mapping[str, Any]
Result: TypeAlias = Mapping[str, Any]
Body: TypeAlias = Callable[[Point, Callable[[Result], None]], None]
"""Tries a point; calls its second argument with every result, which has ``tasks`` and ``ap``."""

HEAD = "node:__internal_head__"
SHARE_OF_HEAD = 0.001
REDUCTION = 3


class Search(Protocol):
    """Where points come from."""

    def ask(self, trial: str) -> Point | None:
        """The next point; None when there is none left."""
        ...

    def tell(self, trial: str, result: Result | None) -> None:
        """The last result of a trial, None if it failed."""
        ...


class News(Protocol):
    """Who follows the trials, in the driver's process."""

    def result(self, trial: str, point: Point, result: Result) -> None:
        """A trial has learnt another task."""
        ...

    def ended(self, trial: str, point: Point, results: list[Result], error: str | None) -> None:
        """A trial has ended: by itself, stopped early, or failed for good."""
        ...


def check_room(config: ClusterConfig, concurrent: int) -> None:
    """Refuse more trials at once than the connected cluster can train at once.

    Raises:
        ClusterError: with what was asked and what is there.
    """
    there = capacity()
    workers = max(config.train_workers, 1)
    asked = {"CPU": concurrent * workers * config.cpus_per_worker, "GPU": concurrent * workers * config.gpus_per_worker}
    short = [f"{asked[name]:g} {name}s of {there[name]:g}" for name in asked if asked[name] > there[name]]
    if short:
        raise ClusterError(
            f"The Ray cluster is too small for concurrent: {concurrent}: its trials train on {' and '.join(short)} at "
            "once. Lower concurrent or what the cluster section asks for, or connect to a larger cluster."
        )


def run_trials(
    body: Body,
    search: Search,
    news: News,
    *,
    trials: int,
    concurrent: int,
    stop: Literal["none", "asha", "median"],
    grace: int,
    tasks: int,
    retries: int,
) -> None:
    """Try ``trials`` points, so many at once.

    Args:
        body: of a trial; travels to its process.
        search: proposes points.
        news: follows them.
        trials: how many points.
        concurrent: how many at once.
        stop: which trials end early, by AP over the tasks so far.
        grace: tasks that none is stopped before.
        tasks: of a whole trial.
        retries: how often a trial that fails is begun again; its finished stages are not repeated.
    """
    # Tune's newer output names its folder, which is gone at the end, however silent it is asked to be.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # At Ctrl-C Tune would end as if all had been tried, and the sweep would be reported and crowned as a whole one.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:  # Tune's own state, which nothing is restored from
        tune.Tuner(
            tune.with_resources(_trainable(body), tune.PlacementGroupFactory([{HEAD: SHARE_OF_HEAD}])),
            tune_config=tune.TuneConfig(
                num_samples=trials,
                max_concurrent_trials=concurrent,
                search_alg=_Search(search),
                scheduler=_scheduler(stop, grace, tasks),
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                callbacks=[_News(news)],
                failure_config=tune.FailureConfig(max_failures=retries),
                verbose=0,
            ),
        ).fit()


def _trainable(body: Body) -> Callable[[dict[str, Any]], None]:
    kept = ray.put(body)

    def trial(point: dict[str, Any]) -> None:
        ray.get(kept)(point, tune.report)

    return trial


def _scheduler(stop: Literal["none", "asha", "median"], grace: int, tasks: int) -> TrialScheduler:
    given: dict[str, Any] = {"time_attr": "tasks", "metric": "ap", "mode": "max", "grace_period": grace}
    if stop == "asha":
        # Above the last report: a trial that has learnt all tasks ends by itself.
        return ASHAScheduler(**given, max_t=tasks + 1, reduction_factor=REDUCTION)
    if stop == "median":
        return MedianStoppingRule(**given, min_samples_required=REDUCTION)
    return FIFOScheduler()  # type: ignore[no-untyped-call]


class _OfThisProcess:
    """Is not kept in the state that Tune writes of itself, and which nothing is restored from."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Search(_OfThisProcess, Searcher):
    """A ``Search`` as Tune asks it."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search

    def suggest(self, trial_id: str) -> Any:
        point = self._search.ask(trial_id)
        return Searcher.FINISHED if point is None else dict(point)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._search.tell(trial_id, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its trials' records."""


class _News(_OfThisProcess, tune.Callback):
    """Tells a ``News`` what Tune reports."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._results: dict[str, list[Result]] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        results = self._results.setdefault(trial.trial_id, [])
        # A trial that was begun again tells of its first tasks once more.
        del results[result["tasks"] - 1 :]
        results.append(result)
        self._news.result(trial.trial_id, trial.config, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._news.ended(trial.trial_id, trial.config, self._results.get(trial.trial_id, []), None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = trial.get_error()
        lines = str(error).strip().splitlines() if error else []
        said = lines[-1] if lines else "it left no message"
        self._news.ended(trial.trial_id, trial.config, self._results.get(trial.trial_id, []), said)
