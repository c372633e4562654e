"""Calls that are made in a thread: in order, again while a service is away, and told of when they could not be made."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.tracking import outbox as module
from cluster.tracking.outbox import Outbox
from sapt_core.errors import LineageError, StoreError, TrackingError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(module, "_FAREWELL", 0.3)
    monkeypatch.setattr(module, "_PAUSE", 0.01)


class Service:
    """Takes what it is told while it is not away."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.away: Exception | None = None
        self.asked = threading.Event()

    def call(self, number: int) -> Callable[[], None]:
        def made() -> None:
            self.asked.set()
            if self.away is not None:
                raise self.away
            self.heard.append(number)

        return made


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def away(service: Service) -> Iterator[Service]:
    service.away = TrackingError("MLflow cannot be reached")
    return service


def test_calls_are_made_in_order_while_nobody_waits(service: Service) -> None:
    held = threading.Event()
    with Outbox() as outbox:
        outbox.put(held.wait)
        for number in range(50):
            outbox.put(service.call(number))
        assert service.heard == []
        held.set()
        outbox.flush()
        assert service.heard == list(range(50))


@pytest.mark.parametrize("error", [TrackingError("MLflow cannot be reached"), StoreError("S3 does not answer")])
def test_an_outage_is_sat_out_and_told_of_once(
    error: Exception, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.away = error
    with Outbox() as outbox:
        for number in range(3):
            outbox.put(service.call(number))
        time.sleep(0.1)
        assert service.heard == []
        service.away = None
    assert service.heard == [0, 1, 2]
    assert caplog.messages == [f"The run goes on without MLflow, which is told later: {error}"]


def test_what_is_not_told_at_the_end_is_said_with_what_to_do(away: Service) -> None:
    def run() -> None:
        with Outbox() as outbox:
            outbox.put(away.call(0))
            outbox.put(away.call(1))

    with pytest.raises(TrackingError, match=r"2 pieces of news .* the same command publishes .* cannot be reached"):
        run()
    assert away.heard == []


def test_patience_begins_anew_with_everything_that_is_taken(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(number: int) -> Callable[[], None]:
        failures = iter([True] * 15)

        def made() -> None:
            if next(failures, False):
                raise TrackingError("busy")
            service.heard.append(number)

        return made

    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.01)
    with Outbox() as outbox:
        for number in range(4):  # each takes half of the patience
            outbox.put(slow(number))
    assert service.heard == [0, 1, 2, 3]


@pytest.mark.parametrize("gone", [False, True])
def test_a_failure_delivers_what_waits_and_stays_the_one_to_tell(service: Service, gone: bool) -> None:
    service.away = TrackingError("gone") if gone else None

    def run() -> None:
        with Outbox() as outbox:
            outbox.put(service.call(0))
            raise KeyError("the run's own")

    with pytest.raises(KeyError):
        run()
    assert service.heard == ([] if gone else [0])


def test_an_interrupt_waits_for_the_call_in_hand_alone(service: Service) -> None:
    held, begun = threading.Event(), threading.Event()

    def in_hand() -> None:
        begun.set()
        held.wait()
        service.heard.append(0)

    def run() -> None:
        with Outbox() as outbox:
            outbox.put(in_hand)
            outbox.put(service.call(1))
            begun.wait()
            threading.Timer(0.1, held.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert service.heard == [0]


def test_what_no_repetition_mends_is_raised_and_ends_what_is_behind_it(service: Service) -> None:
    def refuse() -> None:
        raise LineageError("holds another pool")

    def run() -> None:
        with Outbox() as outbox:
            held = threading.Event()
            outbox.put(held.wait)
            outbox.put(refuse)
            outbox.put(service.call(1))
            held.set()
            try:
                outbox.flush()
            except LineageError:
                outbox.put(service.call(2))  # the run is closed as failed
                raise

    with pytest.raises(LineageError, match="holds another pool"):
        run()
    assert service.heard == [2]


def test_no_more_are_taken_than_may_wait_and_none_overtakes(away: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)

    def run() -> None:
        with Outbox() as outbox:
            for number in range(3):
                outbox.put(away.call(number))
            away.away = None
            time.sleep(0.2)
            assert away.heard == [0, 1]
            outbox.put(away.call(3))

    with pytest.raises(TrackingError, match="2 pieces of news"):
        run()
    assert away.heard == [0, 1]


def test_mlflow_repeats_nothing_by_itself_unless_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.delenv(name, raising=False)
    with Outbox():
        assert os.environ[name] == "0"
    assert name not in os.environ
    monkeypatch.setenv(name, "4")
    with Outbox():
        assert os.environ[name] == "4"
