"""One task's training loop, on Accelerate, resumable to the bit.

Everything random in a step is a pure function of the seed and the step: the order of the rows, what
a method's terms draw and, for each rank, dropout. A checkpoint therefore holds weights, optimizer state
and the number of steps done, and a run that goes on from it equals one that was never interrupted.

Batches are counted over all workers, the loss is normalised by the label tokens of the whole batch,
and a method's own terms are evaluated once a step (unless asked otherwise) on what all workers
draw alike, so neither the number of workers nor gradient accumulation changes what is learnt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sapt_core.backbones.device import autocast, keep_freed_memory
from sapt_core.blobs import Checkpoints
from sapt_core.data.collate import Batch, Collator, epoch_batches
from sapt_core.pool.model import SaptModel
from sapt_core.settings import TrainConfig

Row = Mapping[str, Any]


class Term(Protocol):
    """A part of the loss that a method adds to the task's cross-entropy.

    Attributes:
        name: of its values in the training curve.
        weight: it is multiplied by this.
        per_micro_batch: whether it is added in every micro-batch instead of once a step.
    """

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def per_micro_batch(self) -> bool: ...

    def draw(self, generator: torch.Generator) -> Any:
        """What a step looks at, decided by ``generator`` (CPU) alone."""
        ...

    def value(self, model: SaptModel, drawn: Any) -> Tensor:
        """The term, a scalar, not yet times its weight."""
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

    def per_row(self, model: SaptModel) -> Tensor:
        """The penalty of each row (B,) of the batch that the model has just seen."""
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


@dataclass
class _Position:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    best_score: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


class _Step(nn.Module):
    """Loss of one micro-batch; a module, because DistributedDataParallel hooks into ``forward``."""

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
        self, batch: Batch, token_scale: float, row_scale: float, drawn: Mapping[int, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss to minimise, cross-entropy summed over label tokens, weights (B, T), and every term and penalty.

        Args:
            batch: rows of the task.
            token_scale, row_scale: what a token's cross-entropy and a row's penalty count.
            drawn: what each term looks at by its index; one that is not there is left out, as 0.
        """
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        logits = self.model(batch)
        weights = self.model.weights
        assert weights is not None  # noqa: S101 - set by the forward above
        summed = self.model.token_loss(logits, batch.labels)
        loss = summed * token_scale
        values = summed.new_zeros(len(self.terms) + len(self.penalties))
        for index, penalty in enumerate(self.penalties, start=len(self.terms)):
            value = penalty.per_row(self.model).sum()
            loss = loss + penalty.weight * row_scale * value
            values[index] = value.detach()
        for index, what in drawn.items():
            value = self.terms[index].value(self.model, what)
            loss = loss + self.terms[index].weight * value
            values[index] = value.detach()
        return loss, summed.detach(), weights.detach(), values


def step_seed(*parts: int | str) -> int:
    """A seed (63 bits) that is a pure function of its parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def train(
    model: SaptModel,
    rows: Sequence[Row],
    collator: Collator,
    config: TrainConfig,
    *,
    seed: int,
    objective: Objective,
    checkpoints: Checkpoints,
    score_dev: Callable[[], float] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, float]]:
    """Train the pool's current block, its key and the query projection; leaves the result in ``model``.

    Args:
        model: backbone with a pool whose last block is being learnt.
        rows: tokenised rows with ``prompt_ids`` and ``answer_ids``.
        collator: makes batches of rows.
        config: rates, lengths, batch sizes, precision.
        seed: of this task's run.
        objective: the method's terms, rates and routing schedule.
        checkpoints: where to resume from and to keep the state.
        score_dev: scores the model on dev; needed with ``eval_every_epochs``. Every worker calls it.
        on_step: told (steps done, steps in all) after every step.

    Returns:
        Curve: one entry a step with ``step``, ``loss`` (mean cross-entropy a label token, nats),
        ``gate`` (mean weight of the new block in the mixture), every term by its name (summed over
        micro-batches), every penalty (mean over rows) and, where dev was scored, ``dev``.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    device, rank = accelerator.device, accelerator.process_index
    keep_freed_memory(device.type)
    model.to(device)
    terms = [term.to(device) for term in objective.terms]
    if config.gradient_checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
        # Needed by re-entrant checkpointing alone, and left on the embeddings it would cost every later task.
        model.backbone.disable_input_require_grads()  # type: ignore[no-untyped-call]
    trainable = {name: parameter for name, parameter in model.pool.named_parameters() if parameter.requires_grad}
    optimizer = _optimizer(trainable, config, objective)
    restored = checkpoints.load(lambda folder: _restore(folder, trainable, optimizer))
    position, best = restored or (_Position(), {})
    step_module = accelerator.prepare(_Step(model, terms, objective.penalties))

    steps_an_epoch = math.ceil(len(rows) / config.batch_size)
    total = max(1, round(config.epochs * steps_an_epoch))
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows]
    batches: list[list[int]] = []
    while position.step < total:
        epoch, within = divmod(position.step, steps_an_epoch)
        if within == 0 or not batches:
            batches = epoch_batches(lengths, config.batch_size, seed, epoch)
        model.train()
        model.pool.hold = max(0.0, 1 - position.step / (objective.hold * total)) if objective.hold else 0.0
        torch.manual_seed(step_seed(seed, "dropout", position.step, rank))
        draws = torch.Generator().manual_seed(step_seed(seed, "reflection", position.step))
        batch = [rows[i] for i in batches[within]]
        entry = {"step": position.step + 1, **_step(accelerator, step_module, batch, collator, config, draws=draws)}
        _update(accelerator, optimizer, config, left=1 - position.step / total)
        position.step += 1
        model.pool.hold = 0.0

        done = position.step == total
        if (
            config.eval_every_epochs
            and score_dev is not None
            and (done or position.step % (config.eval_every_epochs * steps_an_epoch) == 0)
        ):
            model.eval()
            entry["dev"] = score_dev()
            if position.best_score is None or entry["dev"] > position.best_score:
                position.best_score = entry["dev"]
                best = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        position.curve.append(entry)
        if on_step is not None:
            on_step(position.step, total)
        if not done and position.step % config.checkpoint_every_steps == 0:
            checkpoints.save(partial(_keep, position=position, trainable=trainable, optimizer=optimizer, best=best))
    with torch.no_grad():
        for name, value in best.items():
            trainable[name].copy_(value)
    if config.gradient_checkpointing:
        model.backbone.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
    model.eval()
    return position.curve


def _optimizer(
    trainable: Mapping[str, nn.Parameter], config: TrainConfig, objective: Objective
) -> torch.optim.Optimizer:
    """AdamW with a group for every rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault(objective.rates.get(name.partition(".")[0], 1.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": each, "initial_lr": ratio * config.learning_rate} for ratio, each in groups.items()],
        weight_decay=config.weight_decay,
    )


def _update(accelerator: Accelerator, optimizer: torch.optim.Optimizer, config: TrainConfig, *, left: float) -> None:
    """Move the parameters by their gradients, with a share ``left`` of the steps still to go."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (left if config.schedule == "linear" else 1)
    if config.max_grad_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _step(
    accelerator: Accelerator,
    module: nn.Module,
    rows: Sequence[Row],
    collator: Collator,
    config: TrainConfig,
    *,
    draws: torch.Generator,
) -> dict[str, float]:
    """Gradients of one optimizer step over all workers, and its figures over all workers.

    ``draws`` decides, alike on all workers, what the terms look at.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    step: _Step = accelerator.unwrap_model(module)
    terms = step.terms
    tokens = sum(len(row["answer_ids"]) for row in rows)
    # A worker without rows in a short last batch runs one that counts nothing, to take part in the reduction.
    mine, counts = (rows[rank::world], 1.0) if rank < len(rows) else (rows[:1], 0.0)
    size = config.micro_batch_size or len(mine)
    loss, gate = torch.zeros(2, device=device).unbind()
    values = torch.zeros(len(step.names), device=device)
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        last = start + size >= len(mine)
        drawn = {i: term.draw(draws) for i, term in enumerate(terms) if last or term.per_micro_batch}
        batch = collator(part).to(device)
        with nullcontext() if last else accelerator.no_sync(module):
            with autocast(device, config.precision):
                # DistributedDataParallel averages over workers: undone for what is a sum over them, the
                # cross-entropy and the penalties; the terms are the same on all.
                total, summed, weights, added = module(
                    batch, counts * world / tokens, counts * world / len(rows), drawn
                )
            accelerator.backward(total)
        loss = loss + counts * summed / tokens
        gate = gate + counts * weights[:, -1].sum() / len(rows)
        values = values + added
    own = counts * values[len(terms) :] / len(rows)
    loss, gate, *penalties = accelerator.reduce(torch.stack([loss, gate, *own]), reduction="sum").tolist()
    return {
        "loss": loss,
        "gate": gate,
        **dict(zip(step.names, [*values[: len(terms)].tolist(), *penalties], strict=True)),
    }


def _keep(
    folder: Path,
    *,
    position: _Position,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write what a run resumes from, tensors straight into a file: copies in memory could be more than it has."""
    tensors = {f"parameter/{name}": value.detach() for name, value in trainable.items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, parameter in trainable.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / "state.safetensors")
    meta = {"step": position.step, "best_score": position.best_score, "curve": position.curve}
    (folder / "state.json").write_text(json.dumps(meta))


def _restore(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[_Position, dict[str, Tensor]]:
    best = {}
    with torch.no_grad(), safe_open(folder / "state.safetensors", "pt") as tensors:
        for label in tensors.offset_keys():
            value = tensors.get_tensor(label)
            group, _, name = label.partition("/")
            if group == "parameter":
                trainable[name].copy_(value)
            elif group == "best":
                best[name] = value.to(trainable[name].device, copy=True)  # the file goes
            else:
                key, _, name = name.partition("/")
                # AdamW keeps its step counter on the CPU.
                device = value.device if key == "step" else trainable[name].device
                optimizer.state[trainable[name]][key] = value.to(device, copy=True)
    return _Position(**json.loads((folder / "state.json").read_text())), best
