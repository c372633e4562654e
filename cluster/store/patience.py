"""Waiting for a store that does not answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sapt_core.errors import StoreUnavailableError

WAIT_SECONDS = (5.0, 30.0, 120.0)

T = TypeVar("T")

log = logging.getLogger(__name__)


def patiently(call: Callable[[], T]) -> T:
    """What ``call`` gives; where the store did not answer it is made again, after longer and longer waits.

    The store's client asks again by itself, within a second or so. This is for outages, where work is at stake;
    before a run they are told of at once.

    Raises:
        StoreUnavailableError: the store does not answer after all of them.
    """
    for seconds in WAIT_SECONDS:
        try:
            return call()
        except StoreUnavailableError as error:
            log.warning("%s Trying again in %.0f s.", error, seconds)
            time.sleep(seconds)
    return call()
