"""Plots are PNGs whatever the number of tasks, and leave no state behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from sapt_core.judging import plots

PNG = b"\x89PNG\r\n\x1a\n"


def triangle(size: int, value: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) * (i + 1) for i in range(size))


def names(size: int) -> list[str]:
    return [f"task{number}_some_long_name" for number in range(size)]


DRAWN: dict[str, Callable[[int], bytes]] = {
    "scores": lambda size: plots.score_map(names(size), triangle(size, 50.0), names(size)),
    "attention": lambda size: plots.weight_maps(names(size), names(size), [("then", triangle(size, 0.5))] * 2),
    "history": lambda size: plots.weight_history(
        names(size), [None, *(triangle(i + 1, 0.5) for i in range(1, size))], names(size)
    ),
    "alignment": lambda size: plots.alignment_map(names(size), [None, *triangle(size, 2.0)[1:]], 0.5, names(size)),
    "grid": lambda size: plots.grid_map(
        ("λ", names(size)), ("τ", ["1", "2"]), [[50.0] * size, [float("nan")] * size], "AP"
    ),
    "curves": lambda size: plots.curves(
        names(size), [[{"step": s, "loss": 1.0, "kl": 0.0, "gate": 0.5} for s in range(1, 450)]] * size
    ),
}


@pytest.mark.parametrize("plot", DRAWN)
def test_names_are_text_and_no_tex(plot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "names", lambda size: [f"price_in_$_{n}_of_{{x_$" for n in range(size)])
    assert DRAWN[plot](3).startswith(PNG)


@pytest.mark.parametrize("size", [1, 2, 17])
@pytest.mark.parametrize("plot", DRAWN)
def test_any_number_of_tasks(plot: str, size: int) -> None:
    assert DRAWN[plot](size).startswith(PNG)


def test_equal_figures_give_equal_bytes() -> None:
    assert DRAWN["scores"](3) == DRAWN["scores"](3)


def test_long_curves_are_averaged_over_neighbours() -> None:
    curve = [{"step": step, "loss": float(step)} for step in range(1, 401)]
    steps, values = plots._binned(curve, "loss")
    assert (len(steps), steps[0], values[0]) == (200, 2, 1.5)
    assert plots._binned(curve[:3], "loss") == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_no_state_of_the_process_is_used() -> None:
    code = "import sys, sapt_core.judging.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
