"""Plots of a sweep, as Optuna draws them, in PNG bytes."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import optuna

from pipelines.space import Sweep
from pipelines.trials import TrialRecord, study_of

LABELS = {"ap": "AP (dev)", "f_ra": "F.Ra (dev)"}
DPI = 110
MOST_SURFACES = 3  # pairs of fields; more are told by the parallel coordinates


def draw(sweep: Sweep, trials: Sequence[TrialRecord]) -> dict[str, bytes]:
    """Plots by name, of trials that learnt all tasks.

    Response surfaces of AP and F.Ra over pairs of fields, the Pareto front, parallel coordinates of AP, and how much
    of AP's variance each field explains.
    """
    mpl.use("agg")
    from optuna.visualization import matplotlib as plots  # noqa: PLC0415  after the backend is chosen

    study = study_of(sweep, [each for each in trials if each.state == "finished"], ("ap", "f_ra"))
    fields = list(sweep.config.space)
    found: dict[str, bytes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for first, second in itertools.islice(itertools.combinations(fields, 2), MOST_SURFACES):
            for index, name in enumerate(("ap", "f_ra")):
                axes = plots.plot_contour(study, params=[first, second], target=_value(index), target_name=LABELS[name])
                found[f"surface_{name}_{_short(first)}_{_short(second)}.png"] = _png(axes)
        found["pareto_front.png"] = _png(plots.plot_pareto_front(study, target_names=list(LABELS.values())))
        found["parallel_coordinates.png"] = _png(
            plots.plot_parallel_coordinate(study, target=_value(0), target_name=LABELS["ap"])
        )
        if len({trial.values[0] for trial in study.trials}) > 1:  # of one value nothing is explained
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            importances = plots.plot_param_importances(
                study, evaluator=evaluator, target=_value(0), target_name=LABELS["ap"]
            )
            found["importance.png"] = _png(importances)
    return found


def _value(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: float(trial.values[index])


def _short(field: str) -> str:
    return field.rpartition(".")[2]


def _png(axes: Any) -> bytes:
    from matplotlib import pyplot  # noqa: PLC0415  after the backend is chosen

    figure = axes.get_figure()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()
