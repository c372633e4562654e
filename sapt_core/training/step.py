"""Gradients of one optimizer step, over micro-batches, a method's terms and all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sapt_core.backbones.device import autocast
from sapt_core.data.collate import Batch, Collator, Together, parted
from sapt_core.pool.model import SaptModel
from sapt_core.settings import TrainConfig
from sapt_core.training.objective import Penalty, Row, Term


class StepLoss(nn.Module):
    """Loss of one pass; a module, because DistributedDataParallel hooks into ``forward``."""

    def __init__(self, model: SaptModel, terms: Sequence[Term], penalties: Sequence[Penalty]) -> None:
        super().__init__()
        self.model = model
        self.terms = terms
        self.penalties = penalties

    @property
    def names(self) -> list[str]:
        """Of the terms and penalties, in the order of their values."""
        return [*(term.name for term in self.terms), *(penalty.name for penalty in self.penalties)]

    def forward(
        self, batch: Batch | None, token_scale: float, row_scale: float, term_scale: float, drawn: Sequence[_Drawn]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss to minimise; cross-entropy and weight of the new block, summed (2); every term and penalty.

        Args:
            batch: rows of the task; None: the terms alone.
            token_scale, row_scale, term_scale: what a token's cross-entropy, a row's penalty and a term count.
            drawn: what the terms look at; one that is not there is left out, as 0.
        """
        sums, values = self._zeros(2), self._zeros(len(self.names))
        losses: list[Tensor] = []
        if batch is not None:
            assert batch.labels is not None  # noqa: S101 - a training batch has labels
            logits, call = self.model.run(batch)
            weights = self.model.pool.blocks.mixed(call)
            summed = self.model.token_loss(logits, batch.labels)
            losses.append(summed * token_scale)
            sums = torch.stack([summed, weights[:, -1].sum()]).detach()
            for index, penalty in enumerate(self.penalties, start=len(self.terms)):
                value = penalty.per_row(self.model, call).sum()
                losses.append(penalty.weight * row_scale * value)
                values[index] = value.detach()
        for each in drawn:
            term = self.terms[each.term]
            value = term.value(self.model, each.what)
            losses.append(term.weight * term_scale * value)
            values[each.term] += value.detach()
        return sum(losses[1:], losses[0]), sums, values

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, device=next(self.parameters()).device)


@dataclass(frozen=True)
class _Drawn:
    """What a term of some index, or a part of it, looks at in one of the step's micro-batches."""

    micro_batch: int
    term: int
    what: Any


def run_step(  # noqa: PLR0917
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    collator: Collator,
    config: TrainConfig,
    *,
    draws: torch.Generator,
) -> tuple[dict[str, float], float]:
    """Clipped gradients of one optimizer step over all workers; its figures over all workers, and the gradients' norm.

    ``draws`` decides, alike on all workers, what the terms look at.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    step: StepLoss = accelerator.unwrap_model(module)
    terms = len(step.terms)
    tokens = sum(len(row["answer_ids"]) for row in rows)
    # A worker without rows in a short last batch runs one that counts nothing, to take part in the reduction.
    mine, counts = (rows[rank::world], 1.0) if rank < len(rows) else (rows[:1], 0.0)
    loss, gate = torch.zeros(2, device=device).unbind()
    values = torch.zeros(len(step.names), device=device)
    together = step.model.sharing.training
    drawn_alike = _draw(step.terms, len(rows), config, draws, world, together)
    passes = _passes(mine, drawn_alike[rank::world], step.terms, config, together)
    for number, (part, drawn) in enumerate(passes, start=1):
        batch = None if part is None else collator(part).to(device)
        with nullcontext() if number == len(passes) else accelerator.no_sync(module):
            with autocast(device, config.precision):
                # DistributedDataParallel averages over workers, and all of this is a sum over them.
                total, (summed, opened), added = module(
                    batch, counts * world / tokens, counts * world / len(rows), world, drawn
                )
            accelerator.backward(total)
        loss = loss + counts * summed / tokens
        gate = gate + counts * opened / len(rows)
        values = values + added
    own = torch.stack([loss, gate, *values[:terms], *(counts * values[terms:] / len(rows))])
    figures = accelerator.reduce(own, reduction="sum")
    norm = _clip(accelerator, optimizer, config)
    # All figures in one wait for the device.
    *found, length = torch.cat([figures, norm.reshape(1)]).tolist()
    return dict(zip(["loss", "gate", *step.names], found, strict=True)), length


def _draw(  # noqa: PLR0917
    terms: Sequence[Term], rows: int, config: TrainConfig, draws: torch.Generator, world: int, together: Together
) -> list[_Drawn]:
    """What the terms look at in a step of so many rows, over all workers and whatever their number."""
    micro_batches = math.ceil(rows / (config.micro_batch_size or rows))
    found = []
    for number in range(micro_batches):
        for index, term in enumerate(terms):
            if not term.per_micro_batch and number < micro_batches - 1:
                continue
            what = term.draw(draws)
            if not term.runs_rows:
                found.append(_Drawn(number, index, what))
            elif what:
                # Of what a term draws only it knows the lengths.
                size = 1 if together != "any" else config.micro_batch_size or math.ceil(len(what) / world)
                found += [_Drawn(number, index, what[at : at + size]) for at in range(0, len(what), size)]
    return found


def _passes(
    rows: Sequence[Row], drawn: Sequence[_Drawn], terms: Sequence[Term], config: TrainConfig, together: Together
) -> list[tuple[Sequence[Row] | None, list[_Drawn]]]:
    """What one worker runs forward and backward in a step: its rows last, for all parameters to be reached then.

    Rows that may not share a forward are in passes of their own: the gradients add up to the same. Where micro-batches
    are asked for, rows that a term runs are one of their own: memory is to hold no more.
    """
    alone: list[tuple[None, list[_Drawn]]] = []
    own: list[tuple[Sequence[Row], list[_Drawn]]] = [
        (part, []) for part in parted(rows, config.micro_batch_size or len(rows), together)
    ]
    for each in drawn:
        if config.micro_batch_size and terms[each.term].runs_rows:
            alone.append((None, [each]))
        else:
            own[min(each.micro_batch, len(own) - 1)][1].append(each)
    return [*alone, *own]


def _clip(accelerator: Accelerator, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Tensor:
    """Clip the gradients, if that is asked for; returns their norm before, a scalar."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if config.max_grad_norm is None:
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm: Tensor = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    return norm
