"""MLflow goes away while a sequence runs: the sequence goes on, and ends well if MLflow comes back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.tracking import outbox
from cluster.tracking.service import client_of
from pipelines import continual
from pipelines.running.monitor import Monitor
from tests.pipelines.commands import Finished, Outcome, command, records

pytest_plugins = ["tests.mlflow_servers"]
pytestmark = pytest.mark.integration

Call = Callable[[Callable[[], None], list[str]], Outcome]


class Line:
    """A way to a server that can be cut: connections are broken off, and new ones find nobody."""

    def __init__(self, address: str) -> None:
        target = urlsplit(address)
        line, self.cut, self.refused = self, threading.Event(), 0

        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                if line.cut.is_set():
                    line.refused += 1
                    return
                with socket.create_connection((target.hostname, target.port)) as server:
                    both = {self.request: server, server: self.request}
                    for each in both:
                        each.settimeout(0.05)
                    while not line.cut.is_set():
                        for each, other in both.items():
                            try:
                                data = each.recv(65536)
                            except TimeoutError:
                                continue
                            except OSError:
                                return
                            if not data:
                                return
                            other.sendall(data)

        self._proxy = ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.cut.set()
        self._proxy.shutdown()
        self._proxy.server_close()


@pytest.fixture(scope="module")  # one address: MLflow remembers where a run's files are
def line(mlflow_on_sqlite: str) -> Iterator[Line]:
    made = Line(mlflow_on_sqlite)
    yield made
    made.close()


@pytest.fixture
def submit(
    copied: Finished, line: Line, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Outcome]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    published = [argument for argument in command(copied.store)[2:] if argument != "--inline"]

    def submitted(model: str) -> Outcome:
        return call(continual.main, [*published, f"tracking.uri={line.address}", f"tracking.model={model}"])

    return submitted


@pytest.fixture
def cut_at_the_first_news(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Monitor.on_event

    def cut(monitor: Monitor, event: Any) -> None:
        if event.kind == "cached" and not monitor.records:
            line.cut.set()
        told(monitor, event)

    monkeypatch.setattr(Monitor, "on_event", cut)


def versions(line: Line, model: str) -> list[str]:
    found = client_of(line.address).search_model_versions(f"name = '{model}'")
    return [each.tags["tasks"] for each in sorted(found, key=lambda each: int(each.version))]


@pytest.mark.usefixtures("cut_at_the_first_news")
def test_an_outage_during_the_run_ends_it_well(
    submit: Callable[[str], Outcome], line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    threading.Timer(4, line.cut.clear).start()
    outcome = submit("returns")
    assert outcome.code == 0, outcome.err
    assert line.refused > 0
    assert [each for each in caplog.messages if "The run goes on without MLflow" in each]
    assert "registered: returns version 2" in outcome.out
    assert versions(line, "returns") == ["animal", "animal, basket"]
    client = client_of(line.address)
    own = client.get_run(client.get_model_version("returns", "2").run_id)
    assert client.get_run(own.data.tags["mlflow.parentRunId"]).info.status == "FINISHED"


@pytest.mark.usefixtures("cut_at_the_first_news")
def test_an_outage_that_lasts_loses_nothing(
    submit: Callable[[str], Outcome], line: Line, copied: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE", 2.0)
    monkeypatch.setattr(outbox, "_FAREWELL", 1.0)
    before = records(copied.store)
    refused = submit("away")
    assert refused.code == 3
    assert "pieces of news are not in MLflow" in refused.err
    assert "the same command publishes them without learning again" in refused.err
    assert "Traceback" not in refused.err
    monkeypatch.undo()
    line.cut.clear()
    assert versions(line, "away") == []
    again = submit("away")
    assert again.code == 0, again.err
    assert versions(line, "away") == ["animal", "animal, basket"]
    assert records(copied.store) == before
