"""An interrupt waits for what must not be broken off; a second one does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from cluster.interrupts import uninterrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def interrupting() -> Iterator[None]:
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@BOTH
def test_an_interrupt_waits(number: signal.Signals) -> None:
    done = []

    @uninterrupted()
    def work() -> None:
        signal.raise_signal(number)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@BOTH
def test_an_interrupt_goes_before_an_error(number: signal.Signals) -> None:
    @uninterrupted()
    def work() -> None:
        signal.raise_signal(number)
        raise ValueError("x")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_a_second_interrupt_breaks_in() -> None:
    @uninterrupted()
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_nested_blocks_are_one() -> None:
    steps = []

    @uninterrupted()
    def inner() -> None:
        signal.raise_signal(signal.SIGINT)
        steps.append("inner")

    @uninterrupted()
    def outer() -> None:
        inner()
        steps.append("outer")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert steps == ["inner", "outer"]


def test_signals_with_another_meaning_are_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_have_nothing_to_hold_back() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
