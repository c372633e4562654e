"""One command, every way to start it: local Ray, a job, two nodes; sqlite, servers, S3."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import requests

from cluster.tracking.service import client_of
from tests.conftest import free_port
from tests.sequences import ROOT, TASKS, Cluster, Outcome, command, environment, read_summary, records, run

pytest_plugins = ["tests.mlflow_servers", "tests.ray_cluster"]
pytestmark = pytest.mark.integration

NOISE = re.compile(r"Traceback|Warning|it/s")


@dataclass(frozen=True)
class Finished:
    """A sequence that has run to its end on a local Ray, with sqlite and a local store."""

    folder: Path
    outcome: Outcome

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def command(self) -> list[str]:
        return command(str(self.store), self.tracking, "--summary", str(self.folder / "summary.json"))


@pytest.fixture(scope="module")
def finished(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("local")
    shutil.copy(migrated_database, folder)
    # A home of its own: Ray makes its token there.
    begun = Finished(folder, Outcome(0, "", ""))
    outcome = run(begun.command, environment(HOME=str(folder)))
    assert outcome.code == 0, outcome.out + outcome.err
    return Finished(folder, outcome)


@pytest.fixture
def predicting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's own calls use the process's tracking URI."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def published(tracking: str, model: str = "quickstart") -> list[dict[str, str]]:
    """Tags of every version, oldest first."""
    found = client_of(tracking).search_model_versions(f"name = '{model}'")
    return [dict(each.tags) for each in sorted(found, key=lambda each: int(each.version))]


def runs(tracking: str) -> list[mlflow.entities.Run]:
    client = client_of(tracking)
    experiment = client.get_experiment_by_name("quickstart")
    return list(client.search_runs([experiment.experiment_id]))


def test_local_ray_with_sqlite(finished: Finished, predicting: None) -> None:
    outcome, summary = finished.outcome, read_summary(finished.folder / "summary.json")
    assert outcome.err == ""
    assert not NOISE.search(outcome.out), outcome.out
    stages = [
        f"{kind}[{index:02d} {name}]" for kind in ("prepare", "train", "single") for index, name in enumerate(TASKS)
    ]
    assert sorted(outcome.started) == sorted(
        [*stages, *(f"pseudo_samples[{index:02d} {name}]" for index, name in enumerate(TASKS))]
    )
    assert f"registered: quickstart version {len(TASKS)}" in outcome.out
    assert (summary["version"], len(summary["scores"]), len(summary["single"])) == (2, 2, 2)

    versions = published(finished.tracking)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [(each["index"], each["task"]) for each in versions] == [("1", "animal"), ("2", "ticket")]
    for tags in versions:
        assert (tags["method"], tags["backbone"].rpartition("/")[2]) == ("sapt", "tiny")
    assert versions[-1]["sapt.snapshot"] == summary["snapshot"]

    parent, *others = [each for each in runs(finished.tracking) if "mlflow.parentRunId" not in each.data.tags]
    children = [each for each in runs(finished.tracking) if "mlflow.parentRunId" in each.data.tags]
    assert others == []
    assert parent.data.tags["git_commit"] == head.stdout.strip()
    assert all(re.fullmatch("[0-9a-f]{64}", parent.data.tags[name]) for name in ("config_hash", "data_digest"))
    assert (parent.info.status, parent.data.metrics["ap"]) == ("FINISHED", pytest.approx(summary["ap"]))
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parent.info.run_id}
    trained = {each.info.run_name: each for each in children}["train[01 ticket]"]
    curve = client_of(finished.tracking).get_metric_history(trained.info.run_id, "loss")
    assert len(curve) > 1
    assert curve[-1].step > curve[0].step
    assert [
        point.value for point in client_of(finished.tracking).get_metric_history(parent.info.run_id, "score/animal")
    ] == [row[0] for row in summary["scores"]]

    mlflow.set_tracking_uri(finished.tracking)
    model = mlflow.pyfunc.load_model("models:/quickstart@latest")
    answers = model.predict(pd.DataFrame({"prompt": ["ada saw a fox by the river"]}))
    assert list(answers.columns) == ["answer", "weights"]
    assert len(answers) == 1


# The project is on no path, however it is installed.
WITHOUT_PROJECT = """
import sys
from pathlib import Path

sys.path[:] = [place for place in sys.path if not Path(place, "sapt_core").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


def test_served_where_the_project_is_not_installed(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text(WITHOUT_PROJECT)
    port = free_port()
    serve = ["models", "serve", "--model-uri", "models:/quickstart/2", "--env-manager", "local", "--port", str(port)]
    told = environment(
        PYTHONPATH=str(tmp_path / "without"), MLFLOW_TRACKING_URI=finished.tracking, MLFLOW_DISABLE_TELEMETRY="true"
    )
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *serve],
            cwd=tmp_path,
            env={**told, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        rows = [{"prompt": "ada saw a fox by the river"}, {"input": "ada saw a fox by the river", "task": TASKS[0]}]
        body = {"dataframe_records": rows, "params": {"num_beams": 2}}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)
    assert answer.ok, answer.text
    answers = answer.json()["predictions"]
    assert [set(json.loads(row["weights"])) for row in answers] == [set(TASKS)] * 2


def is_up(address: str) -> bool:
    try:
        return requests.get(address, timeout=2).ok
    except requests.RequestException:
        return False


def test_submitting_a_finished_run_again_does_no_work(finished: Finished) -> None:
    before = {each.info.run_id for each in runs(finished.tracking)}, published(finished.tracking)
    times = {path: path.stat().st_mtime_ns for path in records(finished.store).values()}
    start = time.monotonic()
    # Where nobody listens: a run that wanted Ray would end with exit code 3.
    again = run(finished.command, environment(RAY_ADDRESS="127.0.0.1:1"))
    print(f"submitted again: {time.monotonic() - start:.1f} s")
    assert (again.code, again.err, again.started) == (0, "", [])
    assert f"registered: quickstart version {len(TASKS)}" in again.out
    assert ({each.info.run_id for each in runs(finished.tracking)}, published(finished.tracking)) == before
    assert {path: path.stat().st_mtime_ns for path in records(finished.store).values()} == times


def test_a_deleted_record_runs_that_stage_alone(finished: Finished, ray_cluster: Cluster) -> None:
    """Its result is the same, so what depends on it is still valid: nothing else runs, nothing is published twice."""
    before = {name: path.read_bytes() for name, path in records(finished.store).items()}
    versions, summary = published(finished.tracking), read_summary(finished.folder / "summary.json")
    records(finished.store)["train[00 animal]"].unlink()
    again = run(finished.command, ray_cluster.environment)
    assert (again.code, again.started) == (0, ["train[00 animal]"]), again.out + again.err
    after = {name: path.read_bytes() for name, path in records(finished.store).items()}
    assert {name for name in before if after[name] != before[name]} == {"train[00 animal]"}
    assert (published(finished.tracking), read_summary(finished.folder / "summary.json")) == (versions, summary)


def test_a_change_runs_what_depends_on_it(finished: Finished, ray_cluster: Cluster) -> None:
    again = run([*finished.command[:-2], "reflection.weight=0.25", "tracking.line=lighter"], ray_cluster.environment)
    assert (again.code, again.started) == (0, ["train[01 ticket]"]), again.out + again.err


RAY = str(Path(sys.executable).with_name("ray"))


def submitted(cluster: Cluster, name: str, script: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """What became of a job of ``ray job submit`` with this checkout as its working directory."""
    submit = [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--submission-id", name]
    return subprocess.run(
        [*submit, *options, "--", "python", *script],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=480,
    )


def test_submitted_job(
    ray_cluster: Cluster, mlflow_on_sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = command(
        str(tmp_path / "store"),
        mlflow_on_sqlite,
        "evaluation.single_task=false",
        "tracking.model=job",
        "cluster.train_workers=1",
    )
    job = submitted(ray_cluster, "tiny", script, "--runtime-env-json", '{"env_vars": {"GIT_COMMIT": "of the job"}}')
    assert job.returncode == 0, job.stdout + job.stderr
    assert "registered: job version 2" in job.stdout
    asked = subprocess.run(
        [RAY, "job", "status", "--address", ray_cluster.dashboard, "tiny"],
        env=ray_cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SUCCEEDED" in (asked.stdout + asked.stderr).upper()
    assert len(published(mlflow_on_sqlite, "job")) == 2
    assert "of the job" in {each.data.tags.get("git_commit") for each in runs(mlflow_on_sqlite)}
    without = {name: value for name, value in ray_cluster.environment.items() if name != "RAY_AUTH_TOKEN"}
    refused = subprocess.run(
        [RAY, "job", "status", "--address", ray_cluster.dashboard, "tiny"],
        env={**without, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0


def test_a_job_whose_results_would_go_with_the_cluster_is_refused(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Submitted from a checkout that has a finished store: the job has a copy of the checkout without it."""
    script = command("runs/store", "sqlite:///runs/mlflow.db", "--summary", "summary.json")
    job = submitted(ray_cluster, "passing", script)
    said = job.stdout + job.stderr
    assert job.returncode != 0, said
    for fault in (
        "- store.uri=runs/store: give",
        "- tracking.uri=sqlite:///runs/mlflow.db: give",
        "- --summary summary",
    ):
        assert fault in said
    assert "failed with exit code 2" in said
    assert "Plan:" not in said
