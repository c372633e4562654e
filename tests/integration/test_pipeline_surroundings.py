"""What a run needs and does not find: one message, exit code 3, and nothing is left behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.tracking.service import client_of
from pipelines import continual
from pipelines.console import cli
from tests.sequences import ROOT, Cluster, Outcome, command, run

pytest_plugins = ["tests.mlflow_servers", "tests.ray_cluster"]
pytestmark = pytest.mark.integration

SECRET = "not-a-secret-of-anyone"  # noqa: S105
Submit = Callable[..., Outcome]


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Submit:
    """Run the pipeline in this process, where nobody would answer a call for Ray."""

    def submitted(store: str, tracking: str, *arguments: str) -> Outcome:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setattr(sys, "argv", command(store, tracking, *arguments))
        with pytest.raises(SystemExit) as ended:
            cli.run(continual.main)
        captured = capsys.readouterr()
        return Outcome(int(str(ended.value.code)), captured.out, captured.err)

    return submitted


def is_refused(outcome: Outcome, pattern: str) -> None:
    """Exit code 3 and one message, before any stage."""
    assert outcome.code == 3, outcome.out + outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in outcome.err + outcome.out
    assert SECRET not in outcome.err + outcome.out
    assert outcome.started == []


def is_empty(database: Path) -> bool:
    """Whether the tracking database knows of no run and no model."""
    client = client_of(f"sqlite:///{database}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return not client.search_runs(experiments) and not client.search_registered_models()


def test_unreachable_mlflow(submit: Submit, unused_port: int, tmp_path: Path) -> None:
    outcome = submit(str(tmp_path / "store"), f"http://me:{SECRET}@127.0.0.1:{unused_port}")
    is_refused(outcome, rf"MLflow at http://\*\*\*@127\.0\.0\.1:{unused_port} cannot be reached")
    assert not any((tmp_path / "store").rglob("*.json"))


def test_unreachable_s3(submit: Submit, unused_port: int, aws_environment: None, tmp_path: Path) -> None:
    endpoint = f"store.endpoint_url=http://127.0.0.1:{unused_port}"
    is_refused(submit("s3://pools/sapt", f"sqlite:///{tmp_path}/mlflow.db", endpoint), "does not answer")
    assert not (tmp_path / "mlflow.db").exists()


def test_missing_bucket(submit: Submit, s3_endpoint: str, aws_environment: None, tmp_path: Path) -> None:
    endpoint = f"store.endpoint_url={s3_endpoint}"
    is_refused(
        submit("s3://no-such-bucket/x", f"sqlite:///{tmp_path}/mlflow.db", endpoint), "no-such-bucket.* no such bucket"
    )
    assert not (tmp_path / "mlflow.db").exists()


def test_wrong_s3_credentials(submit: Submit, strict_s3_endpoint: str, aws_environment: None, tmp_path: Path) -> None:
    endpoint = f"store.endpoint_url={strict_s3_endpoint}"
    is_refused(submit("s3://pools/sapt", f"sqlite:///{tmp_path}/mlflow.db", endpoint), "credentials are refused")
    assert not (tmp_path / "mlflow.db").exists()


def test_nobody_answers_for_ray(submit: Submit, tmp_path: Path, migrated_database: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(migrated_database.read_bytes())
    is_refused(submit(str(tmp_path / "store"), f"sqlite:///{database}"), "No Ray cluster answers at 127.0.0.1:1")
    assert is_empty(database)
    assert not (tmp_path / "store/blobs").exists()


def test_more_workers_than_the_cluster_has(ray_cluster: Cluster, tmp_path: Path, migrated_database: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(migrated_database.read_bytes())
    arguments = command(str(tmp_path / "store"), f"sqlite:///{database}", "cluster.train_workers=3")
    is_refused(run(arguments, ray_cluster.environment), r"train_workers=3 .* need 3 CPUs, the cluster has 2")
    assert is_empty(database)
    assert not (tmp_path / "store/blobs").exists()
