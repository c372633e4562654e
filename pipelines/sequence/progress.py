"""How far a stage is: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(name: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A callback that is told (steps done, steps in all).

    Args:
        name: of the stage.
        shown: false on workers that have nothing to say, which get no callback.
    """
    if not shown:
        yield None
        return
    with tqdm(desc=name, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        start = last = time.monotonic()
        resumed: int | None = None

        def on_step(done: int, total: int) -> None:
            nonlocal last, resumed
            if resumed is None:
                # Steps that an earlier process did are no measure of how fast this one is.
                resumed = bar.initial = done - 1
            bar.total = total
            bar.update(done - bar.n)
            now = time.monotonic()
            if bar.disable and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                rate = (done - resumed) / (now - start)
                left = tqdm.format_interval((total - done) / rate)
                print(f"{name}: step {done}/{total}, {rate:.1f} steps/s, {left} left", flush=True)

        yield on_step
