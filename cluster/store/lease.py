"""One run at a time at a stage: a second one waits for the first one's result.

A lease is an object in the store that its owner changes every few seconds for as long as it works. It saves work
and decides nothing: results are safe however many runs are at one stage, because the first record wins. So a
lease that is lost or held twice, after a machine slept or a network was gone, costs time alone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from cluster.store.base import ArtifactStore, checked
from sapt_core.errors import StoreError

RENEW_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
POLL_SECONDS = 2.0
SETTLE_SECONDS = 1.0

log = logging.getLogger(__name__)


@contextmanager
def leased(store: ArtifactStore, key: str, name: str) -> Iterator[None]:
    """Be the only run at a stage while the block runs, as far as the others can be seen; waits for theirs to end.

    Args:
        store: that all of them share.
        key: of the stage.
        name: of the stage, for people.

    Raises:
        StoreError: the lease cannot be read or written.
    """
    lease = _Lease(store, key)
    lease.acquire(name)
    ended = Event()
    renewing = Thread(target=lease.renew_until, args=(ended,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        lease.release()


class _Lease:
    """A lease of this process's. What others hold is judged by whether it changes: no two clocks are compared."""

    def __init__(self, store: ArtifactStore, key: str) -> None:
        self._store = store
        self._name = f"leases/{checked(key)}.json"
        self._owner = {"id": uuid.uuid4().hex, **this_process()}
        self._renewals = 0

    def acquire(self, stage: str) -> None:
        seen, since, told = b"", time.monotonic(), False
        while not self._store._create(self._name, self._content()):
            while (held := self._store._read(self._name)) is not None:
                owner = _owner(held)
                if held != seen:
                    seen, since = held, time.monotonic()
                if has_died(owner) or time.monotonic() - since > EXPIRY_SECONDS:
                    # Of several that find it dead, the last to write has it.
                    self._store._write(self._name, self._content())
                    time.sleep(SETTLE_SECONDS)
                    if self._is_mine():
                        return
                    continue
                if not told:
                    log.warning(
                        "%s waits: another run (process %s on %s) is at the same stage. It goes on when that one is "
                        "done, or has shown no sign of life for %.0f s",
                        stage,
                        owner.get("process"),
                        owner.get("host"),
                        EXPIRY_SECONDS,
                    )
                    told = True
                time.sleep(POLL_SECONDS)

    def renew_until(self, ended: Event) -> None:
        while not ended.wait(RENEW_SECONDS):
            self._renewals += 1
            try:
                if not self._is_mine():
                    return  # taken by who thought this run dead
                self._store._write(self._name, self._content())
            except StoreError as error:
                log.debug("lease not renewed: %s", error)

    def release(self) -> None:
        try:
            if self._is_mine():
                self._store._delete(self._name)
        except StoreError as error:  # it expires
            log.debug("lease not released: %s", error)

    def _is_mine(self) -> bool:
        held = self._store._read(self._name)
        return held is not None and _owner(held).get("id") == self._owner["id"]

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewals": self._renewals}).encode()


def _owner(held: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(held)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def this_process() -> dict[str, Any]:
    """What ``has_died`` tells a process by, as JSON."""
    return {"host": socket.gethostname(), "process": os.getpid()}


def has_died(owner: Mapping[str, Any]) -> bool:
    """Whether the owner (``host``, ``process``) was a process of this machine and is none any more."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("process"), int):
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or no process at all
        return False
    return False
