"""One task's training loop, on Accelerate, resumable to the bit.

Everything random in a step is a pure function of the seed and the step: the order of the rows, what
a method's terms draw and, for each rank, dropout. A checkpoint therefore holds weights, optimizer state
and the number of steps done, and a run that goes on from it equals one that was never interrupted.

Batches are counted over all workers, the loss is normalised by the label tokens of the whole batch,
and a method's own terms are evaluated once a step (unless asked otherwise) on what all workers draw
alike and share among them. So neither the number of workers nor gradient accumulation changes what is
learnt, up to rounding and to dropout, whose masks are drawn forward by forward on every worker.

A figure that is no finite number ends the training before the parameters have moved by it.
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

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sapt_core.backbones.device import autocast, computed_in, keep_freed_memory
from sapt_core.data.collate import Collator, epoch_batches
from sapt_core.errors import DivergenceError
from sapt_core.io.blobs import Checkpoints
from sapt_core.pool.model import SaptModel
from sapt_core.settings import TrainConfig
from sapt_core.training.objective import Objective, Row
from sapt_core.training.step import StepLoss, run_step


@dataclass
class _Position:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    best_score: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


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
    section: str = "train",
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
        section: of the experiment's config that the rate comes from, for those who have to lower it.

    Returns:
        Curve: one entry a step with ``step``, ``loss`` (mean cross-entropy a label token, nats),
        ``gate`` (mean weight of the new block in the mixture), every term by its name (summed over
        micro-batches), every penalty (mean over rows) and, where dev was scored, ``dev``.

    Raises:
        DivergenceError: a figure, the norm of the gradients or the loss after the last step is no finite number.
            All workers raise it at the same step, and no checkpoint holds what came of it.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    device, rank = accelerator.device, accelerator.process_index
    keep_freed_memory(device.type)
    model.to(device)
    terms = [term.to(device) for term in objective.terms]
    trainable = {name: parameter for name, parameter in model.pool.named_parameters() if parameter.requires_grad}
    optimizer = _optimizer(trainable, config, objective)
    position, best = checkpoints.load(lambda folder: _restore(folder, trainable, optimizer)) or (_Position(), {})
    step_module = StepLoss(model, terms, objective.penalties)
    # All workers loaded the backbone from the same bytes; DistributedDataParallel would send it to each, every task.
    frozen = [f"model.backbone.{name}" for name in model.backbone.state_dict()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step_module, frozen)  # type: ignore[no-untyped-call]
    step_module = accelerator.prepare(step_module)

    steps_an_epoch = math.ceil(len(rows) / config.batch_size)
    total = max(1, round(config.epochs * steps_an_epoch))
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows]
    batches: list[list[int]] = []
    with model.mode(training=True), model.checkpointing() if config.gradient_checkpointing else nullcontext():
        while position.step < total:
            epoch, within = divmod(position.step, steps_an_epoch)
            if within == 0 or not batches:
                batches = epoch_batches(lengths, config.batch_size, seed, epoch)
            model.pool.hold = max(0.0, 1 - position.step / (objective.hold * total)) if objective.hold else 0.0
            torch.manual_seed(step_seed(seed, "dropout", position.step, rank))
            draws = torch.Generator().manual_seed(step_seed(seed, "reflection", position.step))
            batch = [rows[i] for i in batches[within]]
            figures, norm = run_step(accelerator, step_module, optimizer, batch, collator, config, draws=draws)
            _require_finite(
                {**figures, "gradient norm": norm}, f"at step {position.step + 1} of {total}", config, device, section
            )
            entry = {"step": position.step + 1, **figures}
            _update(optimizer, config, left=1 - position.step / total)
            position.step += 1
            model.pool.hold = 0.0

            done = position.step == total
            if (
                config.eval_every_epochs
                and score_dev is not None
                and (done or position.step % (config.eval_every_epochs * steps_an_epoch) == 0)
            ):
                with model.mode(training=False):
                    entry["dev"] = score_dev()
                if position.best_score is None or entry["dev"] > position.best_score:
                    position.best_score = entry["dev"]
                    best = {name: parameter.detach().clone() for name, parameter in trainable.items()}
            position.curve.append(entry)
            if on_step is not None:
                on_step(position.step, total)
            if not done and position.step % config.checkpoint_every_steps == 0:
                checkpoints.save(partial(_keep, position=position, trainable=trainable, optimizer=optimizer, best=best))
    _overwrite(trainable, best)
    # No later step meets what the last one did.
    with model.mode(training=False):
        last = {"loss": _loss(model, rows[0], collator, device, config)}
    _require_finite(last, f"after the last of {total} steps", config, device, section)
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


def _update(optimizer: torch.optim.Optimizer, config: TrainConfig, *, left: float) -> None:
    """Move the parameters by their gradients, with a share ``left`` of the steps still to go."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (left if config.schedule == "linear" else 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _loss(model: SaptModel, row: Row, collator: Collator, device: torch.device, config: TrainConfig) -> float:
    """Cross-entropy of a row, summed over its label tokens."""
    batch = collator([row]).to(device)
    assert batch.labels is not None  # noqa: S101 - a training batch has labels
    with autocast(device, config.precision):
        return model.token_loss(model(batch), batch.labels).item()


def _require_finite(
    figures: Mapping[str, float], where: str, config: TrainConfig, device: torch.device, section: str
) -> None:
    """Refuse to go on from a figure that is none: every parameter would take it on, and every later version."""
    found = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    if found:
        precision = computed_in(device, config.precision)
        cures = [f"lower {section}.learning_rate"]
        cures += ["set train.max_grad_norm"] if config.max_grad_norm is None else []
        cures += ["set train.precision=float32"] if precision != "float32" else []
        raise DivergenceError(
            f"Training has diverged {where}: {', '.join(found)}. It ran in {precision} at a learning rate of "
            f"{config.learning_rate:g}. Nothing of it is recorded: {' or '.join(cures)}, and run again."
        )


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
    (folder / "state.json").write_text(json.dumps(meta, allow_nan=False))


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


@torch.no_grad()
def _overwrite(trainable: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        trainable[name].copy_(value)
