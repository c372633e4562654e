"""What must not be broken off in its middle is finished before an interrupt is heard."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt (Ctrl-C, or SIGTERM where it interrupts too) back until the block is left.

    A second one breaks into the block, for what hangs. Only the main thread is ever interrupted: elsewhere this
    changes nothing.

    Raises:
        KeyboardInterrupt: on leaving, if an interrupt came meanwhile; it replaces what the block raised.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            signal.default_int_handler(number, frame)
        held.append(number)

    interrupting = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is signal.default_int_handler
        and threading.current_thread() is threading.main_thread()
    ]
    for number in interrupting:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number in interrupting:
            signal.signal(number, signal.default_int_handler)
        if held:
            signal.raise_signal(held[0])
