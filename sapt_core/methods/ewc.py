"""EWC (arXiv 1612.00796): parameters that mattered to earlier tasks are held by a spring each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from sapt_core.backbones.device import autocast
from sapt_core.methods.base import Lesson, Method, Plan, packed
from sapt_core.pool.model import SaptModel
from sapt_core.training.objective import Objective
from sapt_core.training.rehearsal import choose
from sapt_core.training.trainer import step_seed

STATE = "fisher"


class EWC(Method):
    """One block trained on from task to task, under the quadratic penalty of all earlier tasks.

    ``λ/2 Σ_i Σ_p F_i[p] (θ[p] − θ_i[p])²``, with θ_i the parameters after task i and F_i the diagonal of its
    Fisher information. A sum of parabolas is one: what is kept is ``Σ F_i`` and ``Σ F_i θ_i``,
    two numbers a parameter however many tasks there were.
    """

    name: Literal["ewc"] = "ewc"

    summary: ClassVar[str] = "one block trained on, its parameters held by their Fisher information (arXiv 1612.00796)"
    pet_types: ClassVar[tuple[str, ...]] = ("lora", "prompt", "full")
    again: ClassVar[bool] = True

    penalty: float = Field(1000.0, gt=0, description="λ, the springs' common strength.")
    fisher_rows: int = Field(200, ge=1, description="Train rows that a task's Fisher information is averaged over.")

    def begin(self, lesson: Lesson) -> Plan:
        """Train under the penalty of the earlier tasks."""
        saved = lesson.state(STATE)
        if saved is None:
            return Plan(lesson.rows)
        tensors = load_tensors(saved)
        return Plan(lesson.rows, Objective((Springs(self.penalty, *(_part(tensors, part) for part in PARTS)),)))

    def end(self, lesson: Lesson) -> Mapping[str, bytes]:
        """Add the task's Fisher information to that of the earlier ones."""
        rows = lesson.rows
        share = min(1.0, self.fisher_rows / len(rows))
        fisher = diagonal_fisher(lesson, choose(rows, share, step_seed(lesson.seed, "fisher")))
        saved = lesson.state(STATE)
        before = {} if saved is None else load_tensors(saved)
        tensors: dict[str, Tensor] = {}
        for name, parameter in _parameters(lesson.model).items():
            value = parameter.detach().cpu()
            for part, added in zip(PARTS, (fisher[name], fisher[name] * value), strict=True):
                old = before.get(f"{part}/{name}", torch.zeros_like(added))
                tensors[f"{part}/{name}"] = old + added
        return {STATE: packed("The Fisher information", tensors)}


PARTS = ("stiffness", "pull")


@dataclass(frozen=True)
class Springs:
    """``½ Σ_p (S[p] θ[p]² − 2 P[p] θ[p] + P[p]²/S[p])``: the penalty of all tasks, but for a constant.

    Attributes:
        stiffness: S = Σ_i F_i, by parameter.
        pull: P = Σ_i F_i θ_i, by parameter.
    """

    weight: float
    stiffness: Mapping[str, Tensor]
    pull: Mapping[str, Tensor]
    name = "springs"
    per_micro_batch = False
    runs_rows = False

    def draw(self, generator: torch.Generator) -> None:
        return None

    @cached_property
    def rest(self) -> dict[str, Tensor]:
        """Where all springs together are at rest, ``P/S``, by parameter; the same in every step."""
        return {
            name: torch.where(value > 0, self.pull[name] / value.clamp_min(torch.finfo(value.dtype).tiny), 0.0)
            for name, value in self.stiffness.items()
        }

    def value(self, model: SaptModel, drawn: None) -> Tensor:
        # About the common minimum: squares of differences lose no digits where θ is near it.
        parts = [
            (self.stiffness[name] * (parameter - self.rest[name]).square()).sum()
            for name, parameter in _parameters(model).items()
        ]
        return 0.5 * torch.stack(parts).sum()

    def to(self, device: torch.device) -> Springs:
        moved = ({name: value.to(device) for name, value in part.items()} for part in (self.stiffness, self.pull))
        return Springs(self.weight, *moved)


def diagonal_fisher(lesson: Lesson, rows: list[Mapping[str, object]]) -> dict[str, Tensor]:
    """Mean over rows of the squared gradient of an answer's log-likelihood, by parameter, on the CPU.

    The empirical Fisher information: answers are those of the rows, not drawn from the model.
    """
    model = lesson.model.eval()
    parameters = _parameters(model)
    sums = [torch.zeros_like(parameter) for parameter in parameters.values()]
    for row in rows:
        batch = lesson.batch(row)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        with autocast(batch.input_ids.device, lesson.train.precision):
            loss = model.token_loss(model(batch), batch.labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        # All parameters in one go, and in place: of a whole model a copy is gigabytes.
        torch._foreach_mul_(gradients, gradients)
        torch._foreach_add_(sums, gradients)
    return {name: (total / len(rows)).cpu() for name, total in zip(parameters, sums, strict=True)}


def _parameters(model: SaptModel) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.pool.blocks.named_parameters() if value.requires_grad}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{part}/")}
