"""Calls to MLflow in a thread of their own: who makes them never waits, and an outage is sat out.

Everything that is told is kept in the store as well, and telling it twice is harmless: so a call that failed is made
again, what is still waiting when the process ends is told by the next one, and nothing is written to disk here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from cluster.tracking.service import environment_set
from sapt_core.errors import ServiceError, TrackingError

PATIENCE = 60.0
"""Seconds that a finished run waits for MLflow to take anything."""

_FAREWELL = 10.0  # seconds for one that failed, whose error is the one to tell
_PAUSE, _LONGEST_PAUSE = 1.0, 15.0
_MOST = 10_000
# MLflow's own repetitions would hold one call for minutes, and an end of the run with it.
_TRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

log = logging.getLogger(__name__)


class Outbox:
    """Makes calls one after another in the order they were given, each until it succeeds.

    As a context it is open inside. On leaving, what waits is delivered: patiently after success, for seconds after a
    failure; an interrupt waits for nothing but the call in hand.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._lost = 0
        self._away: ServiceError | None = None
        self._defect: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._settings = ExitStack()

    def __enter__(self) -> Outbox:
        unset = {name: value for name, value in _TRIES.items() if name not in os.environ}
        self._settings.enter_context(environment_set(unset))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.flush()
            elif isinstance(error, Exception):
                self._wait(_FAREWELL)
        finally:
            self.stop()
            self._settings.close()

    def put(self, call: Callable[[], object]) -> None:
        """Have a call made. It may be made again, so making it twice must be harmless.

        After more than MLflow could ever be behind with, no more are taken, so that none overtakes another;
        ``flush`` tells.
        """
        with self._changed:
            if self._lost or len(self._waiting) >= _MOST:
                self._lost += 1
            else:
                self._waiting.append(call)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all calls are made.

        Raises:
            TrackingError: MLflow could not be used for ``PATIENCE`` seconds.
            Exception: what a call raised that is no matter of a service; those behind it were dropped.
        """
        self._wait(PATIENCE)
        with self._changed:
            defect, self._defect = self._defect, None
            left = len(self._waiting) + self._lost
            if defect is not None:
                raise defect
            if left:
                raise TrackingError(
                    f"{left} pieces of news are not in MLflow. All results are in the store: once MLflow can be used, "
                    f"the same command publishes them without learning again. {self._away or ''}".rstrip()
                )

    def stop(self) -> None:
        """Drop what waits, and wait some seconds for the call in hand."""
        with self._changed:
            self._waiting.clear()
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(_FAREWELL)

    def _wait(self, patience: float) -> None:
        """Wait until nothing waits, or MLflow has taken nothing for so many seconds, or a call raised a defect."""
        with self._changed:
            left, since = len(self._waiting), time.monotonic()
            while self._waiting and self._defect is None and not self._stopped:
                if len(self._waiting) < left:
                    left, since = len(self._waiting), time.monotonic()
                if self._away is not None and time.monotonic() - since >= patience:
                    return
                self._changed.wait(1.0)

    def _work(self) -> None:
        pause = _PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                call = self._waiting[0]
            try:
                call()
            except ServiceError as error:
                self._sit_out(error, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            except Exception as error:
                with self._changed:
                    self._defect = self._defect or error
                    self._waiting.clear()
                    self._changed.notify_all()
                continue
            pause = _PAUSE
            with self._changed:
                self._away = None
                if self._waiting:  # not after stop
                    self._waiting.popleft()
                self._changed.notify_all()

    def _sit_out(self, error: ServiceError, pause: float) -> None:
        with self._changed:
            if self._away is None:
                log.warning("The run goes on without MLflow, which is told later: %s", error)
            self._away = error
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped, timeout=pause)
