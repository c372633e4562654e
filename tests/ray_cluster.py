"""A Ray cluster for tests, as a pytest plugin: two nodes on this machine, one logical CPU each.

Use it with ``pytest_plugins = ["tests.ray_cluster"]``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port
from tests.sequences import Cluster, environment


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """Two nodes on this machine, token authentication on."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    port, dashboard = free_port(), free_port()
    told = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(16),
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        AWS_ACCESS_KEY_ID="tester",
        AWS_SECRET_ACCESS_KEY="not-a-secret-of-anyone",  # noqa: S106
        AWS_DEFAULT_REGION="us-east-1",
    )
    head = [
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        f"--temp-dir={folder}/1",
        "--num-cpus=1",
    ]
    try:
        with _node(head, told, folder / "head.log") as first:
            address = f"127.0.0.1:{port}"
            join = [f"--address={address}", f"--temp-dir={folder}/2", "--num-cpus=1"]
            with _node(join, told, folder / "node.log") as second:
                yield Cluster(
                    address, f"http://127.0.0.1:{dashboard}", {**told, "RAY_ADDRESS": address}, (first, second)
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _node(arguments: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One ``ray start``; its own process group ends with it."""
    ray = str(Path(sys.executable).with_name("ray"))
    ports = [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ray, "start", "--block", "--disable-usage-stats", *ports, *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 180
            while "Ray runtime started" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ray start did not come up:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a node's processes: nothing of a test's cluster is worth a farewell."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait(10)
    for left in family:
        try:
            left.kill()
        except psutil.NoSuchProcess:
            continue
