"""Run stages in several processes of this machine, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import TypeAlias

import torch

from cluster.stages import Outcome, Stage, StageRecord, run_alone
from cluster.store import open_store, resolved
from sapt_core.errors import ServiceError
from sapt_core.settings import StoreConfig

Running: TypeAlias = Future[StageRecord]


class ProcessExecutor:
    """Runs as many stages at once as there are processes, whatever number of workers they ask for.

    Args:
        pool: of ``processes`` processes.
        store: where they find the store.
    """

    def __init__(self, pool: ProcessPoolExecutor, processes: int, store: StoreConfig) -> None:
        self._pool = pool
        self._processes = processes
        self._store = store
        self._running: set[Running] = set()

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        return len(self._running) < self._processes

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> Running:
        alone = replace(stage, inputs={})  # their records travel, not the graph behind them
        try:
            handle = self._pool.submit(_run, alone, key, dict(inputs), self._store)
        except BrokenProcessPool as error:
            raise _lost() from error
        self._running.add(handle)
        return handle

    def wait(self, handles: Sequence[Running]) -> list[tuple[Running, Outcome]]:
        ended, _ = wait(handles, return_when=FIRST_COMPLETED)
        self._running -= ended
        return [(handle, _outcome(handle)) for handle in ended]


@contextmanager
def stage_processes(processes: int, store: StoreConfig) -> Iterator[ProcessExecutor]:
    """An executor with processes of its own, which share the machine's cores and its GPU.

    When an error or an interrupt leaves the context, what they are at is not waited for.

    Args:
        processes: how many.
        store: a relative folder counts from this process's.
    """
    cores = max(1, torch.get_num_threads() // processes)
    # Spawned: a forked process cannot use CUDA, nor the threads of a library that had started some.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(cores,)) as pool:
        try:
            yield ProcessExecutor(pool, processes, resolved(store))
        except BaseException:
            for child in active_children():
                child.kill()
            raise


def _start(cores: int) -> None:
    torch.set_num_threads(cores)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A driver that is killed must not leave processes behind that go on with its stages."""
    parent = parent_process()
    assert parent is not None  # noqa: S101 - this process was spawned
    parent.join()
    os._exit(1)


def _run(stage: Stage, key: str, inputs: dict[str, StageRecord], store: StoreConfig) -> StageRecord:
    return run_alone(stage, key, inputs, open_store(store))


def _outcome(handle: Running) -> Outcome:
    try:
        return handle.result()
    except BrokenProcessPool:
        return _lost()
    except Exception as error:
        return error


def _lost() -> ServiceError:
    return ServiceError(
        "A process that ran stages was killed, which ends the others. Mostly that is for want of memory: give fewer "
        "--processes. The same command goes on where it stopped"
    )
