"""What one task's training minimises: the cross-entropy of its rows, and what a method adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel

Row = Mapping[str, Any]


class Term(Protocol):
    """A part of the loss that a method adds to the task's cross-entropy.

    Attributes:
        name: of its values in the training curve.
        weight: it is multiplied by this.
        per_micro_batch: whether it is added in every micro-batch instead of once a step.
        runs_rows: whether it draws a sequence of rows and runs them through the backbone. They are cut into parts
            of at most ``micro_batch_size`` rows, which the workers share, so the values of parts have to add up.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def per_micro_batch(self) -> bool: ...
    @property
    def runs_rows(self) -> bool: ...

    def draw(self, generator: torch.Generator) -> Any:
        """What a step looks at, decided by ``generator`` (CPU) alone."""
        ...

    def value(self, model: SaptModel, drawn: Any) -> Tensor:
        """The term, a scalar, not yet times its weight; of a part of the rows, that part of it."""
        ...

    def to(self, device: torch.device) -> Term:
        """The same term with its tensors on ``device``."""
        ...


class Penalty(Protocol):
    """A part of the loss that a method takes from the forward of the task's own rows.

    Attributes:
        name: of its values in the training curve.
        weight: its mean over the rows of a step is multiplied by this.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...

    def per_row(self, model: SaptModel, call: Call) -> Tensor:
        """The penalty of each row (B,) of the batch that the model saw in ``call``."""
        ...


@dataclass(frozen=True)
class Objective:
    """What one task's training minimises, and how its parts move.

    Attributes:
        terms: what is added to the task's cross-entropy.
        rates: multiples of the learning rate by the first part of a parameter's name in the pool; 1 if not named.
        hold: share of the steps over which the new block's held weight falls from 1 to 0.
        penalties: what is added of the rows' own forward.
    """

    terms: tuple[Term, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    hold: float = 0.0
    penalties: tuple[Penalty, ...] = ()
