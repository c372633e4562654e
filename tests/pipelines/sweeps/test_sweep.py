"""Sweeps: what is refused, what trials share, how they are ranked, and a tiny one in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import closure
from pipelines import sweep as command
from pipelines.console.machine import Machine
from pipelines.sequence.experiment import assemble
from pipelines.sweeps import trials
from pipelines.sweeps.run import Points
from pipelines.sweeps.space import Point, describe, load_sweep
from pipelines.sweeps.surfaces import draw
from pipelines.sweeps.trials import Setup, TrialRecord, best, cost, front, sweep_key
from sapt_core.errors import ConfigError, SaptError
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
CONFIGS = sorted((ROOT / "pipelines/configs/sweeps").glob("*.yaml"))

SPACE = """
  reflection.weight: {values: [0.1, 2.0]}
  attention.temperature: {values: [0.1, 1.0]}
"""


RANGES = "\n  reflection.weight: {low: 0.1, high: 9, log: true}\n  attention.temperature: {low: 0.1, high: 9}"


def written(folder: Path, *, space: str = SPACE, more: str = "search: grid") -> Path:
    """A sweep of the tiny sequence."""
    path = folder / "sweep_tiny.yaml"
    overrides = json.dumps([*TINY, "evaluation.single_task=false", f"store.uri={folder}/store"])
    path.write_text(f"base: {QUICKSTART}\noverrides: {overrides}\nspace:{space}\n{more}\nresults: {folder}/results\n")
    return path


def kept(path: Path) -> list[TrialRecord]:
    """Records of the sweep in ``path``."""
    sweep = load_sweep(path)
    return trials.read_trials(sweep, sweep_key(sweep, assemble(sweep.experiment({}), "x")))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sweep_config_is_valid(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = load_sweep(path)
    assert caplog.messages == []  # nothing is set in vain
    assert set(sweep.distributions) == set(sweep.config.space)
    planned = sweep.planned()
    assert planned is None or len(planned) == len({describe(point) for point in planned})


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ("\n  reflection.wieght: {low: 0.1, high: 1}", "trials: 2", "did you mean reflection.weight?"),
        ("\n  reflection: {values: [1, 2]}", "trials: 2", "space.reflection: is a section, not one value"),
        ("\n  pet.target_modules: {values: [q, v]}", "trials: 2", "pet.target_modules: is a list, not one value"),
        ("\n  seed: {values: [1, 2]}", "trials: 2", "space.seed: is the same for all trials of a sweep"),
        ("\n  benchmark.order: {values: [1, 2]}", "trials: 2", "space.benchmark.order: is the same for all trials"),
        ("\n  reflection.weight: {low: 1, high: 1}", "trials: 2", "low 1 is not below high 1"),
        ("\n  reflection.weight: {low: 0, high: 1, log: true}", "trials: 2", "a log range cannot start at 0"),
        ("\n  reflection.weight: {low: 1}", "trials: 2", "give both low and high"),
        (
            "\n  reflection.weight: {low: 1, high: 2, values: [1, 2]}",
            "trials: 2",
            "give either low and high, or values",
        ),
        ("\n  reflection.weight: {low: -1, high: 2}", "trials: 2", "at reflection.weight=-1: reflection.weight: Input"),
        ("\n  reflection.weight: {low: 1, high: 2}", "search: random", "search random needs trials"),
        ("\n  reflection.weight: {low: 1, high: 2}", "search: grid", "a grid needs values, not ranges"),
        (SPACE, "search: grid\ntrials: 3", "leave trials out"),
        (SPACE, "trials: 2\nobjectives: [ap, f_rra]", "objectives.1: Input should be 'ap' or 'f_ra'"),
        (SPACE, "trials: 2\nobjectives: [ap, f_ra]\nstop: asha", "with two objectives set stop: none"),
        (SPACE, "trials: 0", "trials: Input should be greater than or equal to 1"),
        (SPACE, "trials: 2\nconcurent: 2", "concurent: no such field; did you mean concurrent?"),
    ],
)
def test_sweeps_that_make_no_sense(tmp_path: Path, space: str, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(written(tmp_path, space=space, more=more))
    assert said in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    space = "\n  reflection.wieght: {values: [1, 2]}\n  seed: {values: [1, 2]}"
    with pytest.raises(ConfigError) as caught:
        load_sweep(written(tmp_path, space=space, more="trials: 2"), ["seed=3"])
    assert len(caught.value.faults) == 3
    assert "seed is swept: leave it out" in str(caught.value)


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, space="\n  pet.r: {low: 2, high: 9}", more="search: random\ntrials: 6"))
    planned = sweep.planned()
    assert planned is not None
    assert all(isinstance(point["pet.r"], int) and 2 <= point["pet.r"] <= 9 for point in planned)
    assert sweep.experiment(planned[0]).pet.r == planned[0]["pet.r"]  # type: ignore[union-attr]


def test_a_trial_is_scored_on_dev_and_is_the_same_wherever_it_is_read(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    point: Point = {"reflection.weight": 0.1 + 0.2, "attention.temperature": 1e-7}
    config = sweep.experiment(point)
    assert config.evaluation.split == "dev"
    assert (config.reflection.weight, config.attention.temperature) == (0.1 + 0.2, 1e-7)


def test_points_of_a_random_search_are_decided_beforehand(tmp_path: Path) -> None:
    ranged = "\n  reflection.weight: {low: 0.1, high: 9, log: true}"
    few, many = (
        load_sweep(written(tmp_path, space=ranged, more=f"search: random\ntrials: {trials}")).planned()
        for trials in (3, 8)
    )
    assert few is not None
    assert many is not None
    assert many[:3] == few
    assert len({point["reflection.weight"] for point in many}) == 8


MACHINE = Machine(cpu="A CPU", cores=2, gpu=None, dtype="float32")


def record(weight: float, ap: tuple[float, ...], f_ra: float = 0.0, **changes: Any) -> TrialRecord:
    given: dict[str, Any] = {
        "sweep": "key",
        "point": {"reflection.weight": weight, "attention.temperature": 0.1},
        "state": "finished",
        "ap": ap,
        "f_ra": (0.0,) * (len(ap) - 1) + (f_ra,),
        "run_seconds": 10.0,
        "run_stages": 5,
        "shared_seconds": 30.0,
        "shared_stages": 3,
        "error": None,
        "commit": "0123456789",
        "written_at": datetime(2026, 11, 25, tzinfo=UTC) + timedelta(seconds=weight),
        "machine": MACHINE,
        **changes,
    }
    return TrialRecord(**given)


def test_the_best_trial_is_chosen_by_a_stated_rule(tmp_path: Path) -> None:
    there = [
        record(0.1, (50.0, 40.0), 2.0),
        record(0.5, (50.0, 41.0), 5.0),
        record(1.0, (50.0, 41.0), 4.0),
        record(2.0, (99.0,), state="stopped"),
        record(3.0, (99.0,), state="failed", error="no"),
    ]
    chosen = best(there)
    assert chosen is not None
    assert chosen.point["reflection.weight"] == 1.0
    sweep = load_sweep(written(tmp_path, space=RANGES, more="trials: 5"))
    assert [point["reflection.weight"] for point in front(sweep, there)] == [1.0, 0.1]
    assert best(there[3:]) is None


def test_cost_by_hand() -> None:
    there = [record(0.1, (1.0, 2.0)), record(0.2, (1.0, 2.0)), record(0.3, (1.0,), state="stopped", run_seconds=4.0)]
    spent = cost(there, 20.0)
    assert (spent.shared, spent.run, spent.alone) == (20.0, 44.0, 120.0)
    assert spent.ratio == pytest.approx(44 / 120)
    assert cost([], 1.0).ratio is None


def test_what_no_swept_field_reaches_is_shared(tmp_path: Path) -> None:
    def shared(space: str) -> set[str]:
        sweep = load_sweep(written(tmp_path, space=space))
        experiment = assemble(sweep.experiment({}), "x")
        setup = Setup(
            sweep, experiment.tasks, experiment.backbone, experiment.config.train.precision, {}, experiment.config.store
        )
        found = setup.shared(sweep.lattice())
        assert set(closure(found)) == set(found)  # what they need is shared too, and is there once
        return {stage.name for stage in found}

    prepared = {"probe", "prepare[00 animal]", "prepare[01 basket]", "pseudo_samples[00 animal]"}
    first = {"train[00 animal]", "evaluate[v00 on 00 animal]"}
    # λ has nothing to act on in the first task; the temperature has.
    assert shared("\n  reflection.weight: {values: [0.1, 2.0]}") == prepared | first
    assert shared("\n  attention.temperature: {values: [0.1, 2.0]}") == prepared
    # With both, each temperature's first task is shared by the trials that differ in λ.
    assert shared(SPACE) == prepared | first | {f"{name} 2" for name in first}
    assert shared("\n  generator.top_k: {values: [5, 20]}") == prepared - {"pseudo_samples[00 animal]"} | first


def test_a_sweep_in_one_process(tmp_path: Path, call: Call) -> None:
    """Four trials; what they share runs once; submitted again nothing runs; one more value adds its trials."""
    path = written(tmp_path)
    ended = call(command.main, ["--config", str(path), "--inline"])
    assert ended.code == 0, ended.out + ended.err
    assert "4 trials to run, 0 have their record" in ended.out
    there = kept(path)
    assert len(there) == 4
    assert {each.state for each in there} == {"finished"}
    # The first task of each temperature was learnt before; left are the second and its two scores.
    assert [each.run_stages for each in there] == [3, 3, 3, 3]
    assert all(len(each.ap) == 2 for each in there)
    assert "Best: " in ended.out
    names = {file.name for file in (tmp_path / "results").glob("*.png")}
    apart = {"ap", "f_ra"} - trials.level(there).keys()
    drawn = {name.split("_weight")[0].removeprefix("surface_") for name in names if name.startswith("surface")}
    assert drawn == apart
    before = {file.name: file.read_bytes() for file in (tmp_path / "results").glob("*.json")}
    again = call(command.main, ["--config", str(path), "--inline"])
    assert again.code == 0
    assert "0 trials to run, 4 have their record" in again.out
    more = "\n  reflection.weight: {values: [0.1, 2.0, 3.0]}\n  attention.temperature: {values: [0.1, 1.0]}"
    added = call(command.main, ["--config", str(written(tmp_path, space=more)), "--inline"])
    assert added.code == 0, added.err
    assert "2 trials to run, 4 have their record" in added.out
    after = {file.name: file.read_bytes() for file in (tmp_path / "results").glob("*.json")}
    assert len(after) == 6
    assert {name: after[name] for name in before} == before


def test_a_trial_that_fails_is_shown_and_the_others_go_on(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = trials.try_point

    def failing(setup: Any, point: Point, *given: Any) -> None:
        if point["attention.temperature"] == 1.0:
            raise SaptError("too hot")
        usual(setup, point, *given)

    monkeypatch.setattr(trials, "try_point", failing)
    ended = call(command.main, ["--config", str(written(tmp_path)), "--inline"])
    assert ended.code == 0, ended.err
    states = [each.state for each in kept(written(tmp_path))]
    assert sorted(states) == ["failed", "failed", "finished", "finished"]
    assert "failed: too hot" in " ".join(ended.out.split())
    monkeypatch.undo()
    again = call(command.main, ["--config", str(written(tmp_path)), "--inline"])
    assert "2 trials to run, 2 have their record" in again.out
    assert [each.state for each in kept(written(tmp_path))] == ["finished"] * 4


def test_a_rate_that_diverges_fails_its_trials_and_not_the_sweep(tmp_path: Path, call: Call) -> None:
    """Although both trials of that rate share the stage that diverges, which runs before the first trial."""
    space = "\n  train.learning_rate: {values: [1.0e+30, 0.003]}\n  reflection.weight: {values: [0.1, 2.0]}"
    path = written(tmp_path, space=space)
    ended = call(command.main, ["--config", str(path), "--inline"])
    assert ended.code == 0, ended.err
    assert {each.state for each in kept(path) if each.point["train.learning_rate"] > 1} == {"failed"}
    assert [each.state for each in kept(path) if each.point["train.learning_rate"] < 1] == ["finished", "finished"]
    assert "Training has diverged at step 2" in " ".join(ended.out.split())


def test_no_trial_to_the_end(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise SaptError("never")

    monkeypatch.setattr(trials, "try_point", failing)
    ended = call(command.main, ["--config", str(written(tmp_path)), "--inline"])
    assert ended.code == 2
    assert "learnt all tasks: the table says what became of each" in ended.err


def test_stopping_early_needs_ray(tmp_path: Path, call: Call) -> None:
    path = written(tmp_path, more="search: grid\nstop: asha")
    ended = call(command.main, ["--config", str(path), "--inline"])
    assert ended.code == 2
    assert "set stop: none, or run on Ray" in ended.err


def test_a_dry_run_starts_nothing(tmp_path: Path, call: Call) -> None:
    ended = call(command.main, ["--config", str(written(tmp_path)), "--dry-run"])
    assert ended.code == 0, ended.err
    assert "4 trials to run" in ended.out
    assert "8 stages, of which several trials have need, run first: 0 are done" in " ".join(ended.out.split())
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "results").exists()


def test_optuna_learns_from_the_records(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, space=RANGES, more="trials: 20"))
    there = [record(0.2 + index / 10, (1.0, 50.0 - index)) for index in range(12)]
    points = Points.after(sweep, there, tasks=2)
    assert points.count(there) == 8
    assert len(points.study.trials) == 12
    asked = [points.ask(str(number)) for number in range(3)]
    assert all(point is not None and 0.1 <= point["reflection.weight"] <= 9 for point in asked)
    points.tell("0", {"tasks": 2, "ap": 60.0, "f_ra": 0.0})
    points.tell("2", {"tasks": 1, "ap": 99.0, "f_ra": 0.0})
    points.tell("1", None)
    assert [trial.state.name for trial in points.study.trials[12:]] == ["COMPLETE", "FAIL", "PRUNED"]


def test_few_values_are_each_tried_once(tmp_path: Path) -> None:
    space = "\n  reflection.weight: {values: [0.1, 1.0, 2.0]}\n  reflection.batch_size: {low: 1, high: 3}"
    sweep = load_sweep(written(tmp_path, space=space, more="trials: 10"))
    points = Points.after(sweep, [], tasks=2)
    assert points.count([]) == sweep.size == 9
    asked = []
    for number in range(9):
        point = points.ask(str(number))
        assert point is not None
        asked.append(describe(point))
        points.tell(str(number), {"tasks": 2, "ap": 50.0, "f_ra": 0.0})
    assert len(set(asked)) == 9


def test_points_drawn_at_random_are_each_tried_once(tmp_path: Path) -> None:
    sweep = load_sweep(
        written(tmp_path, space="\n  reflection.batch_size: {low: 1, high: 3}", more="search: random\ntrials: 9")
    )
    planned = sweep.planned()
    assert planned is not None
    assert 1 <= len({describe(point) for point in planned}) == len(planned) <= 3


def test_a_trial_of_other_settings_keeps_its_file(tmp_path: Path) -> None:
    for sweep in ("one", "another"):
        trials.write_trial(record(0.5, (1.0, 40.0), sweep=sweep), tmp_path / "results")
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_a_narrower_space_leaves_out_the_trials_beyond_it(tmp_path: Path) -> None:
    def left(space: str, more: str) -> list[float]:
        path = written(tmp_path, space=space, more=more)
        sweep = load_sweep(path)
        key = sweep_key(sweep, assemble(sweep.experiment({}), "x"))
        for weight in (0.1, 2.0):
            trials.write_trial(record(weight, (1.0, 40.0), sweep=key), tmp_path / "results")
        there = kept(path)
        assert len(trials.study_of(sweep, there, ("ap",)).trials) == len(there)
        return [float(each.point["reflection.weight"]) for each in there]

    temperature = "\n  attention.temperature: {values: [0.1, 1.0]}"
    assert left(f"\n  reflection.weight: {{values: [0.1, 2.0]}}{temperature}", "search: grid") == [0.1, 2.0]
    assert left(f"\n  reflection.weight: {{values: [1.0, 2.0]}}{temperature}", "search: grid") == [2.0]
    assert left(f"\n  reflection.weight: {{low: 0.05, high: 1}}{temperature}", "trials: 3") == [0.1]


@pytest.mark.parametrize("objectives", ["[ap]", "[ap, f_ra]"])
def test_a_sweep_that_was_broken_off_tries_the_points_it_would_have_tried(tmp_path: Path, objectives: str) -> None:
    sweep = load_sweep(written(tmp_path, space=RANGES, more=f"trials: 14\nobjectives: {objectives}"))

    def tried(starts: tuple[int, ...]) -> list[Point]:
        """Points of a sweep, one trial at a time, that is started anew after so many trials."""
        there: list[TrialRecord] = []
        points = Points.after(sweep, there, tasks=2)
        for number in range(14):
            if number in starts:
                points = Points.after(sweep, there, tasks=2)
            point = points.ask(str(number))
            assert point is not None
            weight = float(point["reflection.weight"])
            there.append(record(weight, (1.0, 50.0 - weight), weight / 2, point=dict(point)))
            points.tell(str(number), {"tasks": 2, "ap": 50.0 - weight, "f_ra": weight / 2})
        return [each.point for each in there]

    undisturbed = tried(())
    assert len({describe(point) for point in undisturbed}) == 14
    assert tried((1, 11, 13)) == undisturbed


def test_plots_of_a_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    there = [
        record(weight, (1.0, 40.0 + weight), weight, point={"reflection.weight": weight, "attention.temperature": t})
        for weight in (0.1, 2.0)
        for t in (0.1, 1.0)
    ]
    made = draw(sweep, there)
    assert len(made) == 5
    assert all(png.startswith(b"\x89PNG") for png in made.values())


def test_what_does_not_spread_is_told_and_not_drawn(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    points = [{"reflection.weight": weight, "attention.temperature": t} for weight in (0.1, 2.0) for t in (0.1, 1.0)]
    noise = [record(1.0, (1.0, 100.0 - n / 1000), 0.0, point=point) for n, point in enumerate(points)]
    assert trials.level(noise) == {"ap": 100.0, "f_ra": 0.0}
    assert draw(sweep, noise) == {}
    said = trials.remarks(noise, 0.0)
    assert sum("so there is no plot of it" in each for each in said) == 2
    assert any(each.startswith("AP (dev) is 100.00 in every trial") for each in said)
    half = [record(1.0, (1.0, 90.0 + n), 0.0, point=point) for n, point in enumerate(points)]
    assert set(draw(sweep, half)) == {
        "surface_ap_weight_temperature.png",
        "pareto_front.png",
        "parallel_coordinates.png",
        "importance.png",
    }


def test_a_record_is_named_by_its_sweep_and_point() -> None:
    names = {record(weight, (1.0,), sweep=sweep).file for weight in (0.1, 0.2) for sweep in ("one", "another")}
    assert len(names) == 4
    assert record(0.1, (1.0,), sweep="one").file in names
    assert record(0.1, (2.0, 3.0), sweep="one").file in names


def test_what_is_swept_in_vain_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_sweep(written(tmp_path, space="\n  reflection.share: {values: [0.1, 0.2]}\n"))
    assert caplog.messages == ["reflection.share has no effect: reflection.source is generated"]
