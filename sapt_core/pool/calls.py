"""Passes through a backbone that models and threads share: whose turn it is, and what the blocks read meanwhile.

What belongs to one pass is bound to the thread that runs it and to the layers that are run again for it, never
kept on a model: other threads answer with the same one, and a step may hold several passes before its backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """One forward of a batch, or the generation of its answers.

    Attributes:
        weights: mixture of the blocks (B, T).
        used: ascending indices (U,) of the blocks that take part; the one being learnt is among them.
        noted: what a module of the pool saw of the batch, for whoever called, by the module.
    """

    weights: Tensor
    used: Tensor
    noted: dict[nn.Module, Tensor] = field(default_factory=dict)


_running: ContextVar[Call | None] = ContextVar("running", default=None)


def running() -> Call:
    """The call that this thread is in.

    Raises:
        RuntimeError: it is in none.
    """
    call = _running.get()
    if call is None:
        raise RuntimeError("a backbone with a pool on it runs through SaptModel.forward or generate only")
    return call


class During:
    """Makes a call the running one of the thread that enters; may be entered again."""

    def __init__(self, call: Call | None) -> None:
        self._call = call
        self._before: list[Token[Call | None]] = []

    def __enter__(self) -> None:
        self._before.append(_running.set(self._call))

    def __exit__(self, *_: object) -> None:
        _running.reset(self._before.pop())


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer and of its recomputation, for ``torch.utils.checkpoint``'s ``context_fn``.

    Backward may run a layer again in a thread of its own, and after later calls: it reads the call it was first run in.
    """
    call = _running.get()
    # Without its notes: they would hold the graph that holds this context, and neither would be freed.
    return nullcontext(), During(None if call is None else replace(call, noted={}))


class _Turn:
    """Whose turn on a backbone it is."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holder: object | None = None


_turns: WeakKeyDictionary[PreTrainedModel, _Turn] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def _turn(backbone: PreTrainedModel) -> _Turn:
    with _turns_lock:
        return _turns.setdefault(backbone, _Turn())


@contextmanager
def reading(backbone: PreTrainedModel) -> Iterator[None]:
    """Look at a backbone while no other thread has anything on it."""
    with _turn(backbone).lock:
        yield


@contextmanager
def holding(backbone: PreTrainedModel, holder: object) -> Iterator[bool]:
    """Have a backbone for ``holder`` alone; other threads wait. It is found, and must be left, as it was loaded.

    Yields:
        Whether ``holder`` has had it already, further up in this thread.

    Raises:
        RuntimeError: somebody else has it in this thread.
    """
    turn = _turn(backbone)
    with turn.lock:
        before = turn.holder
        if before is not None and before is not holder:
            raise RuntimeError("another pool is on this backbone for as long as its layers may be recomputed")
        turn.holder = holder
        try:
            yield before is not None
        finally:
            turn.holder = before
