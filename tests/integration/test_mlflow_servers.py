"""A sequence's whole MLflow life against real servers, artifacts proxied through them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster.tracking.lines import Lineage
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.runs import Tracker
from cluster.tracking.service import check, client_of
from sapt_core.settings import StoreConfig, TrackingConfig

pytest_plugins = ["tests.mlflow_servers"]
pytestmark = pytest.mark.integration

STORE = StoreConfig(uri="s3://pools/sapt", endpoint_url="http://127.0.0.1:9000")


@pytest.fixture(params=["mlflow_on_sqlite", "mlflow_on_postgres"])
def config(request: pytest.FixtureRequest) -> TrackingConfig:
    return check(TrackingConfig(uri=request.getfixturevalue(request.param), experiment="servers"))


def manifest(number: int) -> bytes:
    return json.dumps({"schema_version": 1, "tasks": [{"name": f"task{each}"} for each in range(number)]}).encode()


def run_sequence(config: TrackingConfig) -> tuple[str, list[str], list[int]]:
    """What a driver does, in small; it is called twice, as a command is submitted twice."""
    tracker, registry = Tracker(config), PoolRegistry(config)
    parent = tracker.start_sequence("sapt", key="a1", params={"seed": 0, "method": "sapt"}, tags={"git_commit": "abc"})
    stages, versions = [], []
    for number in (1, 2):
        curve = [(step, 1 / (step + 1)) for step in range(1500)]
        stages.append(
            tracker.log_stage(
                parent, f"train[{number}]", key=f"f{number}", metrics={"loss": 0.1}, curves={"loss": curve}, seconds=3.0
            )
        )
        scores = {"AP": 40.0 * number, "score/task+1": 80.0}
        tracker.log_scores(parent, number, scores)
        versions.append(
            registry.publish(
                manifest(number),
                STORE,
                lineage=Lineage("sapt", ("first", "second")),
                digest=f"{number:064x}",
                index=number,
                run_id=parent,
                description=f"sapt after {number} tasks",
                tags={"task": f"task{number}", "method": "sapt"},
                metrics=scores,
            )
        )
    tracker.log_artifacts(parent, {"report.html": "<p>τ</p>", "plots/scores.png": b"\x89PNG"})
    tracker.finish(parent, "FINISHED")
    return parent, stages, versions


def test_sequence_and_its_versions(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parent, stages, versions = run_sequence(config)
    assert run_sequence(config) == (parent, stages, versions)
    assert versions == [1, 2]
    assert config.uri not in "".join(capfd.readouterr())

    client = client_of(config.uri)
    experiment = client.get_experiment_by_name("servers").experiment_id
    assert len(client.search_runs([experiment])) == 3
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_id for run in children} == set(stages)
    run = client.get_run(parent)
    assert (run.info.status, run.data.metrics["AP"]) == ("FINISHED", 80.0)
    assert [point.value for point in client.get_metric_history(parent, "AP")] == [40.0, 80.0]
    assert len(client.get_metric_history(stages[0], "loss")) == 1501
    local = Path(client.download_artifacts(parent, "", str(tmp_path)))
    assert (local / "report.html").read_text(encoding="utf-8") == "<p>τ</p>"

    (found,) = client.search_model_versions("name = 'sapt' and tags.task = 'task2'")
    model = client.get_logged_model(found.source.removeprefix("models:/"))
    assert model.status == "READY"
    assert {metric.key: (metric.value, metric.step) for metric in model.metrics}["AP"] == (80.0, 2)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "sapt", "version": "2"}]

    client.set_registered_model_alias("sapt", "champion", "1")
    registry = PoolRegistry(config)
    content, store, version = registry.load_manifest("models:/sapt@champion", STORE.endpoint_url)
    assert (content, store, version.version, version.aliases) == (manifest(1), STORE, 1, ("champion",))
    assert registry.load_manifest("latest", STORE.endpoint_url)[0] == manifest(2)
    assert {path.name for path in tmp_path.iterdir()} <= {"report.html", "plots"}
    assert sys.modules["mlflow"].is_tracking_uri_set() is False
