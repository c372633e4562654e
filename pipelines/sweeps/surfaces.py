"""Plots of a sweep in PNG bytes: as Optuna draws them, but for surfaces over listed values."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
import optuna

from pipelines.sweeps.space import Scalar, Sweep, shown
from pipelines.sweeps.trials import LABELS, TrialRecord, level, study_of
from sapt_core.judging.plots import grid_map

DPI = 110
MOST_SURFACES = 3  # pairs of fields; more are told by the parallel coordinates


def draw(sweep: Sweep, trials: Sequence[TrialRecord]) -> dict[str, bytes]:
    """Plots by name, of trials that learnt all tasks.

    Response surfaces of AP and F.Ra over pairs of fields, the Pareto front, parallel coordinates of AP, and how much
    of AP's variance each field explains. A figure in which all trials agree is drawn in none of them.
    """
    mpl.use("agg")
    from optuna.visualization import matplotlib as plots  # noqa: PLC0415  after the backend is chosen

    whole = [each for each in trials if each.state == "finished"]
    told_apart = [name for name in LABELS if name not in level(whole)]
    study = study_of(sweep, whole, ("ap", "f_ra"))
    fields = list(sweep.config.space)
    found: dict[str, bytes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for first, second in itertools.islice(itertools.combinations(fields, 2), MOST_SURFACES):
            for index, name in enumerate(LABELS):
                if name not in told_apart:
                    continue
                file = f"surface_{name}_{_short(first)}_{_short(second)}.png"
                values = sweep.config.space[first].values, sweep.config.space[second].values
                if values[0] is not None and values[1] is not None:
                    found[file] = _listed(whole, name, (first, values[0]), (second, values[1]))
                else:
                    told = {"params": [first, second], "target": _value(index), "target_name": LABELS[name]}
                    found[file] = _png(plots.plot_contour, study, **told)
        if told_apart:
            found["pareto_front.png"] = _png(plots.plot_pareto_front, study, target_names=list(LABELS.values()))
        if "ap" in told_apart:
            of_ap = {"target": _value(0), "target_name": LABELS["ap"]}
            found["parallel_coordinates.png"] = _png(plots.plot_parallel_coordinate, study, **of_ap)
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found["importance.png"] = _png(plots.plot_param_importances, study, evaluator=evaluator, **of_ap)
    return found


def _listed(
    whole: Sequence[TrialRecord], name: str, down: tuple[str, Sequence[Scalar]], across: tuple[str, Sequence[Scalar]]
) -> bytes:
    """A map with a cell a pair of values: a contour would make up what lies between, also where trials ended early."""
    at: dict[tuple[Scalar, Scalar], list[float]] = {}
    for each in whole:
        at.setdefault((each.point[down[0]], each.point[across[0]]), []).append(getattr(each, name)[-1])
    cells = [[fmean(at.get((one, other), [math.nan])) for other in across[1]] for one in down[1]]
    told_across, told_down = ((field, [shown(value) for value in values]) for field, values in (across, down))
    return grid_map(told_across, told_down, cells, f"{LABELS[name]}; empty: not to the end")


def _value(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: float(trial.values[index])


def _short(field: str) -> str:
    return field.rpartition(".")[2]


def _png(plot: Callable[..., Any], study: optuna.Study, **told: Any) -> bytes:
    from matplotlib import pyplot  # noqa: PLC0415  after the backend is chosen

    file = io.BytesIO()
    with mpl.rc_context():  # Optuna sets a style, which would be that of all figures drawn later
        figure = plot(study, **told).get_figure()
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()
