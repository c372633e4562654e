"""A sweep on a local Ray with Ray Tune and a sqlite MLflow: trials, early stopping, killed drivers, the champion."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.tracking.runs import PARENT
from cluster.tracking.service import client_of
from pipelines.sequence.experiment import assemble
from pipelines.sweeps import trials
from pipelines.sweeps.space import load_sweep
from tests.sequences import ROOT, SETTINGS, environment, read_until, run, start

pytest_plugins = ["tests.mlflow_servers"]
pytestmark = pytest.mark.integration


WEIGHTS = "  reflection.weight: {values: [0.1, 2.0]}\n"
TEMPERATURES = "  attention.temperature: {values: [0.1, 1.0]}\n"


def written(folder: Path, more: str, *, space: str = WEIGHTS + TEMPERATURES, overrides: tuple[str, ...] = ()) -> Path:
    """A sweep over two tiny tasks."""
    path = folder / "sweep_tiny.yaml"
    given = [
        *SETTINGS,
        "evaluation.single_task=false",
        f"store.uri={folder}/store",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *overrides,
    ]
    path.write_text(
        f"base: {ROOT}/pipelines/configs/quickstart.yaml\noverrides: {json.dumps(given)}\n"
        f"space:\n{space}search: grid\n{more}\nresults: {folder}/results\n"
    )
    return path


@pytest.fixture
def folder(migrated_database: Path, tmp_path: Path) -> Path:
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return tmp_path


def ended(path: Path) -> list[trials.TrialRecord]:
    sweep = load_sweep(path)
    return trials.read_trials(sweep, trials.sweep_key(sweep, assemble(sweep.experiment({}), "x")))


def table(path: Path) -> list[tuple[Any, ...]]:
    """What does not depend on who ran which stage, or when."""
    return sorted((tuple(each.point.values()), each.state, each.ap, each.f_ra) for each in ended(path))


def test_a_sweep_its_runs_and_its_champion(folder: Path) -> None:
    path = written(folder, "concurrent: 2\nchampion: true")
    done = run(["pipelines/sweep.py", "--config", str(path)], environment())
    assert done.code == 0, done.out + done.err
    assert [each.state for each in ended(path)] == ["finished"] * 4
    chosen = trials.best(ended(path))
    assert chosen is not None
    client = client_of(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    (parent,) = [each for each in runs if each.info.run_name == "sweep tiny"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/ap"] == chosen.ap[-1]
    assert parent.data.metrics["best/f_ra"] == chosen.f_ra[-1]
    assert {name: float(parent.data.tags[f"best/{name}"]) for name in chosen.point} == chosen.point
    children = [each for each in runs if each.data.tags.get(PARENT) == parent.info.run_id]
    assert len(children) == 4
    assert {each.info.status for each in children} == {"FINISHED"}
    assert all({"reflection.weight", "attention.temperature"} <= set(each.data.params) for each in children)
    history = client.get_metric_history(children[0].info.run_id, "ap")
    assert [metric.step for metric in history] == [1, 2]
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    apart = {"ap", "f_ra"} - trials.level(ended(path)).keys()
    drawn = {f"surface_{name}_weight_temperature.png" for name in apart}
    assert {"tiny.md", *drawn} <= artifacts
    version = client.get_model_version_by_alias("quickstart", "champion")
    assert int(version.version) == 2
    assert "champion: quickstart version 2" in done.out


def test_training_workers_inside_of_trials(folder: Path) -> None:
    """Ray Train inside Ray Tune, two at once on all places there are, neither waits for the other for ever."""
    workers = f"cluster.cpus_per_worker={(os.cpu_count() or 2) / 2}"
    told = "stop: asha\ngrace: 1\nconcurrent: 2"
    path = written(folder, told, space=TEMPERATURES, overrides=("cluster.train_workers=1", workers))
    done = run(["pipelines/sweep.py", "--config", str(path)], environment())
    assert done.code == 0, done.out + done.err
    there = ended(path)
    assert len(there) == 2
    assert {each.state for each in there} <= {"finished", "stopped"}
    assert all(len(each.ap) == (2 if each.state == "finished" else 1) for each in there)
    best = trials.best(there)
    assert best is not None


def test_more_trials_than_the_cluster_holds(folder: Path) -> None:
    path = written(folder, f"concurrent: {2 * (os.cpu_count() or 1) + 1}")
    done = run(["pipelines/sweep.py", "--config", str(path)], environment())
    assert done.code == 3
    assert "too small for concurrent" in done.err
    assert not (folder / "results").exists()


@pytest.mark.chaos
def test_an_interrupted_sweep_is_not_told_as_a_whole_one(folder: Path) -> None:
    path = written(folder, "champion: true")
    driver = start(["pipelines/sweep.py", "--config", str(path)], environment())
    read_until(driver, "after task 1")
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, out + err
    assert err.splitlines()[-1] == "interrupted: the same command goes on where it stopped"
    assert "Best: " not in out
    client = client_of(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    statuses = {each.info.run_name: each.info.status for each in runs}
    assert statuses["sweep tiny"] == "KILLED"
    assert "RUNNING" not in statuses.values()
    assert client.search_registered_models() == []


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_killed_driver_keeps_what_ended(folder: Path) -> None:
    """Killed at moments of its run; the table is that of a sweep that nothing happened to."""
    calm = folder / "calm"
    calm.mkdir()
    shutil.copy(folder / "mlflow.db", calm / "mlflow.db")
    undisturbed = written(calm, "", space=WEIGHTS)
    done = run(["pipelines/sweep.py", "--config", str(undisturbed), "--inline"], environment())
    assert done.code == 0, done.err
    path = written(folder, "concurrent: 2", space=WEIGHTS)
    arguments = ["pipelines/sweep.py", "--config", str(path)]
    for seconds in (15, 25):
        driver = start(arguments, environment())
        try:
            driver.communicate(timeout=seconds)
        except Exception:
            before = {file.name: file.read_bytes() for file in (folder / "results").glob("*.json")}
            os.killpg(driver.pid, signal.SIGKILL)
            driver.communicate()
            time.sleep(1)
            assert {name: (folder / "results" / name).read_bytes() for name in before} == before
    last = run(arguments, environment())
    assert last.code == 0, last.out + last.err
    assert table(path) == table(undisturbed)
