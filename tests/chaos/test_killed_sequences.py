"""Processes die in the middle of a sequence; the same command goes on, to the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from cluster.tracking.service import client_of
from tests.sequences import Cluster, command, environment, read_summary, read_until, records, run, start

pytest_plugins = ["tests.mlflow_servers", "tests.ray_cluster"]
pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NO_SINGLE = "evaluation.single_task=false"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the last version of a run that nothing happened to, in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = [*command(str(folder / "store"), "sqlite:///unused/db"), "--inline", NO_SINGLE]
    outcome = run([*arguments, "--summary", str(folder / "summary.json")], environment())
    assert outcome.code == 0, outcome.err
    return str(read_summary(folder / "summary.json")["snapshot"])


@pytest.fixture
def arguments(migrated_database: Path, tmp_path: Path) -> list[str]:
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    summary = ["--summary", str(tmp_path / "summary.json")]
    return [*command(str(tmp_path / "store"), f"sqlite:///{tmp_path}/mlflow.db"), NO_SINGLE, *summary]


def statuses(folder: Path) -> dict[str, str]:
    """Status of every MLflow run by its name."""
    client = client_of(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    found = client.search_runs([experiment.experiment_id])
    assert len({each.info.run_name for each in found}) == len(found)
    return {each.info.run_name: each.info.status for each in found}


def versions(folder: Path) -> list[int]:
    client = client_of(f"sqlite:///{folder}/mlflow.db")
    return sorted(int(each.version) for each in client.search_model_versions("name = 'quickstart'"))


def await_file(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 400  # the workers start within it, on a machine that is busy otherwise too
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.05)


def kill_worker(cluster: Cluster, title: str) -> None:
    workers = cluster.workers(title)
    assert workers, f"no process is called ray::{title}"
    workers[0].send_signal(signal.SIGKILL)


def test_killed_worker_and_driver(ray_cluster: Cluster, arguments: list[str], undisturbed: str, tmp_path: Path) -> None:
    """A worker dies and is replaced in the first task; in the second the driver dies, and is started again."""
    driver = start(arguments, ray_cluster.environment)
    read_until(driver, "train[00 animal] started")
    await_file(tmp_path / "store/checkpoints", "*/*/manifest.json")
    kill_worker(ray_cluster, "train[00 animal]")
    read_until(driver, "train[01 ticket] started")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(10)
    finished = {name: path.read_bytes() for name, path in records(tmp_path / "store").items()}
    assert "train[00 animal]" in finished
    assert "RUNNING" in statuses(tmp_path).values()
    again = run(arguments, ray_cluster.environment)
    assert again.code == 0, again.out + again.err
    assert not finished.keys() & set(again.started)
    after = {name: path.read_bytes() for name, path in records(tmp_path / "store").items()}
    assert {name: after[name] for name in finished} == finished
    assert read_summary(tmp_path / "summary.json")["snapshot"] == undisturbed
    assert set(statuses(tmp_path).values()) == {"FINISHED"}
    assert versions(tmp_path) == [1, 2]


def test_killed_worker_of_two(ray_cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    """Both workers start again from the last checkpoint, and end as two that were left alone."""
    two = [*arguments, "cluster.train_workers=2", "benchmark.tasks=animal"]
    left_alone = run([*two, f"store.uri={tmp_path}/other"], ray_cluster.environment)
    assert left_alone.code == 0, left_alone.out + left_alone.err
    expected = read_summary(tmp_path / "summary.json")["snapshot"]
    driver = start([*two, "tracking.experiment=killed"], ray_cluster.environment)
    await_file(tmp_path / "store/checkpoints", "*/*/manifest.json")
    kill_worker(ray_cluster, "RayTrainWorker")
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, out + err
    assert read_summary(tmp_path / "summary.json")["snapshot"] == expected
    assert not any((tmp_path / "store/checkpoints").glob("*/*"))


@pytest.mark.parametrize(("workers", "sent"), [(0, signal.SIGTERM), (2, signal.SIGINT)], ids=["stopped", "interrupted"])
def test_interrupt(
    ray_cluster: Cluster, arguments: list[str], tmp_path: Path, *, workers: int, sent: signal.Signals
) -> None:
    """Ctrl-C, or a job that is stopped, ends within seconds, says how to go on, and the cluster is free again."""
    driver = start([*arguments, "train.epochs=500", f"cluster.train_workers={workers}"], ray_cluster.environment)
    read_until(driver, "train[00 animal] started")
    await_file(tmp_path / "store/checkpoints", "*/*/manifest.json")
    begun = time.monotonic()
    driver.send_signal(sent)
    _, err = driver.communicate(timeout=60)
    print(f"interrupted: {time.monotonic() - begun:.1f} s")
    assert driver.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: the same command goes on where it stopped"
    assert "Traceback" not in err
    ended = statuses(tmp_path)
    assert [status for name, status in ended.items() if "[" not in name] == ["KILLED"]
    assert "train[00 animal]" not in ended
    assert "RUNNING" not in ended.values()  # pseudo-samples of the same task may be done by then
    deadline = time.monotonic() + 30
    while any(
        ray_cluster.workers(title)
        for title in ("train[00 animal]", "WarmWorkers.run", "RayTrainWorker", "TrainController")
    ):
        assert time.monotonic() < deadline, "the stage still runs"
        time.sleep(0.2)
