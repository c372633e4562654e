"""SEEKR (arXiv 2411.06171): replay, with the logits and the most valuable attention heads of earlier models kept.

A teacher is the model right after a task. Kept of it, for a few rows of the task: the answers' logits, and
the attention of the heads that matter most, at some query positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from sapt_core.backbones.device import autocast, default_device
from sapt_core.data.collate import Batch, Collator
from sapt_core.errors import BackboneError
from sapt_core.methods.base import Lesson, Method, Plan, packed
from sapt_core.methods.replay import memory_name, remembered
from sapt_core.pool.model import SaptModel
from sapt_core.training.objective import Objective, Row
from sapt_core.training.rehearsal import choose, pack
from sapt_core.training.trainer import step_seed

IMPORTANCE = "importance"
EAGER = "eager"  # the only kind of attention that keeps its maps


class Seekr(Method):
    """``L = L_task + λ₁ L_replay + (1 − λ₁) L_logits + λ₂ L_attention`` (equation 13), one block or a whole model.

    Rows of memory are drawn in proportion to their number, and their answers weighed by tokens, as if they were
    mixed into the task's rows.
    """

    name: Literal["seekr"] = "seekr"

    version: ClassVar[int] = 3
    summary: ClassVar[str] = "replay that distils logits and selected attention heads (SEEKR, arXiv 2411.06171)"
    pet_types: ClassVar[tuple[str, ...]] = ("lora", "full")

    share: float = Field(0.01, gt=0, le=1, description="Kept share of a task's train rows, at least one.")
    replay: float = Field(0.5, ge=0, le=1, description="λ₁: cross-entropy on kept rows, against 1 - λ₁ of logits.")
    attention: float = Field(1000.0, ge=0, description="λ₂, weight of the attention term.")
    layers: int = Field(24, ge=1, description="B_L: layers that heads are chosen from.")
    heads: int = Field(128, ge=1, description="B_H: heads that are kept.")
    queries: int = Field(100, ge=1, description="B_T: query positions of a row that are kept.")

    @property
    def kept_share(self) -> float:
        """The memory's."""
        return self.share

    def check_backbone(self, config: PretrainedConfig) -> None:
        """Refuse budgets beyond what the model has."""
        layers, heads = attention_layers(config)
        most = min(self.layers, layers) * heads
        faults = []
        if self.layers > layers:
            faults.append(f"method.layers asks for {self.layers} of {layers} attention layers")
        if self.heads > most:
            faults.append(f"method.heads asks for {self.heads} of the {most} heads in method.layers={self.layers}")
        if faults:
            raise BackboneError(f"SEEKR's budgets are larger than the model: {'; '.join(faults)}")

    def begin(self, lesson: Lesson) -> Plan:
        """Choose the task's own memory, note its attention before, and replay that of the earlier ones."""
        lesson.model.to(default_device())
        lesson.until_end.enter_context(eager_attention(lesson.model.backbone))
        rows = choose(lesson.rows, self.share, step_seed(lesson.seed, "memory"))
        queries = torch.Generator().manual_seed(step_seed(lesson.seed, "queries"))
        with lesson.model.mode(training=False):
            views = [_View.first(lesson, row, self.queries, queries) for row in rows]
        lesson.notes.update(rows=rows, views=views)
        taught: list[_Taught] = []
        for task, kept in enumerate(remembered(lesson)):
            saved = lesson.state(teacher_name(task))
            teacher = {} if saved is None else load_tensors(saved)
            taught += [_Taught.read(row, teacher, index) for index, row in enumerate(kept)]
        if not taught:
            return Plan(lesson.rows)
        term = Distillation(
            tuple(taught),
            lesson.model.collator(lesson.tokenizer.pad_token_id),
            rows=lesson.train.batch_size * len(taught) / len(lesson.rows),
            batch_size=lesson.train.batch_size,
            length=sum(len(row["answer_ids"]) for row in lesson.rows) / len(lesson.rows),
            replay=self.replay,
            attention=self.attention,
        )
        return Plan(lesson.rows, Objective((term,)))

    def end(self, lesson: Lesson) -> Mapping[str, bytes]:
        """Measure the heads, choose those to keep, and save memory and teacher."""
        rows: list[Row] = lesson.notes["rows"]
        views: list[_View] = lesson.notes["views"]
        lesson.model.eval()
        after = [view.maps(lesson) for view in views]
        sensitivity = torch.stack([head_sensitivity(lesson, row) for row in rows]).mean(dim=0)
        moved = torch.stack([forgettability(view.before, now) for view, now in zip(views, after, strict=True)])
        saved = lesson.state(IMPORTANCE)
        sums = load_tensors(saved) if saved is not None else {}
        found = {"sensitivity": within_layers(sensitivity), "forgettability": moved.mean(dim=0)}
        sums = {name: value + sums.get(name, torch.zeros_like(value)) for name, value in found.items()}
        chosen = choose_heads(sums["sensitivity"] * sums["forgettability"], self.layers, self.heads)
        teacher: dict[str, Tensor] = {"heads": chosen}
        for index, (row, view, maps) in enumerate(zip(rows, views, after, strict=True)):
            teacher[f"{index}/logits"] = lesson.answer_logits(row).half()
            for layer, heads in by_layer(chosen).items():
                teacher[f"{index}/queries {layer}"] = view.queries[layer]
                teacher[f"{index}/map {layer}"] = maps[layer][heads].half()
        return {
            memory_name(lesson.index): pack(rows),
            teacher_name(lesson.index): packed("What the model answered", teacher),
            IMPORTANCE: packed("The heads' importance", sums),
        }


@contextmanager
def eager_attention(backbone: PreTrainedModel) -> Iterator[None]:
    """Have the backbone compute its attention maps for a while."""
    usual = backbone.config._attn_implementation
    backbone.set_attn_implementation(EAGER)
    try:
        yield
    finally:
        backbone.set_attn_implementation(usual)


def teacher_name(task: int) -> str:
    """Under which name what the model answered after the ``task``-th task is saved."""
    return f"teacher {task:02d}"


def attention_layers(config: PretrainedConfig) -> tuple[int, int]:
    """How many layers of attention a model has, self and cross counted each, and heads in each."""
    if config.is_encoder_decoder:
        decoder = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
        return config.num_hidden_layers + 2 * decoder, config.num_attention_heads
    return config.num_hidden_layers, config.num_attention_heads


def within_layers(values: Tensor) -> Tensor:
    """Sensitivity (layers, heads) as shares of its layer's sum (equation 8); of none where the layer has none."""
    return values / values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def choose_heads(importance: Tensor, layers: int, heads: int) -> Tensor:
    """The most important heads of the most important layers.

    Args:
        importance: (layers, heads).
        layers, heads: the budgets B_L and B_H.

    Returns:
        (B_H, 2) layer and head of each, ascending.
    """
    best = importance.sum(dim=1).topk(layers).indices
    within = torch.full_like(importance, -math.inf)
    within[best] = importance[best]
    flat = within.flatten().topk(heads).indices.sort().values
    return torch.stack([flat // importance.shape[1], flat % importance.shape[1]], dim=1)


def by_layer(chosen: Tensor) -> dict[int, list[int]]:
    """Chosen heads (n, 2), layer by layer."""
    found: dict[int, list[int]] = {}
    for layer, head in chosen.tolist():
        found.setdefault(layer, []).append(head)
    return found


def forgettability(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """``‖A^k − A^{k−1}‖_F`` of every head (layers, heads) on one row (equation 9); maps (heads, q, K) a layer."""
    parts = [(new - old).flatten(1).norm(dim=1) for old, new in zip(before, after, strict=True)]
    return torch.stack(parts)


def head_sensitivity(lesson: Lesson, row: Row) -> Tensor:
    """``‖∂L/∂A‖_F`` of every head (layers, heads) on one row (equation 7), L the row's cross-entropy."""
    batch = lesson.batch(row)
    # Maps that no trained parameter reaches have a gradient too.
    frozen = [parameter for parameter in lesson.model.backbone.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with autocast(batch.input_ids.device, lesson.train.precision):
            logits, maps = lesson.model.attend(batch)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        loss = lesson.model.token_loss(logits, batch.labels) / (batch.labels >= 0).sum()
        gradients = torch.autograd.grad(loss, maps)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return torch.stack([gradient[0].float().flatten(1).norm(dim=1) for gradient in gradients]).cpu()


@dataclass(frozen=True)
class _View:
    """A row of the task's memory and the query positions at which its attention is looked at.

    Attributes:
        row: token ids.
        queries: (≤ B_T) a layer.
        before: attention (heads, q, K) of every layer at these positions before the task was learnt.
    """

    row: Row
    queries: tuple[Tensor, ...]
    before: tuple[Tensor, ...]

    @classmethod
    def first(cls, lesson: Lesson, row: Row, most: int, generator: torch.Generator) -> _View:
        """At random positions, at most so many a layer."""
        maps = _maps(lesson, row)
        drawn = [torch.randperm(each.shape[1], generator=generator)[:most].sort().values for each in maps]
        return cls(row, tuple(drawn), tuple(_at(drawn, maps)))

    def maps(self, lesson: Lesson) -> list[Tensor]:
        """Attention (heads, q, K) of every layer at these positions now."""
        return _at(self.queries, _maps(lesson, self.row))


@torch.no_grad()
def _maps(lesson: Lesson, row: Row) -> list[Tensor]:
    """Attention (heads, Q, K) of every layer on one row."""
    batch = lesson.batch(row)
    with autocast(batch.input_ids.device, lesson.train.precision):
        _, maps = lesson.model.attend(batch)
    return [each[0] for each in maps]


def _at(queries: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
    """Of every layer's map (heads, Q, K) some query positions, on the CPU in float32: whole maps are gigabytes."""
    return [each[:, at].float().cpu() for each, at in zip(maps, queries, strict=True)]


@dataclass(frozen=True)
class _Taught:
    """One row of memory with what its teacher said of it.

    Attributes:
        row: token ids.
        logits: (L, V) at the places of the answer's tokens.
        maps: by layer: heads (h), query positions (q) and attention (h, q, K).

    On the CPU in half precision, as they are saved: on a GPU the teachers of some tasks are gigabytes.
    """

    row: Row
    logits: Tensor
    maps: Mapping[int, tuple[list[int], Tensor, Tensor]]

    @classmethod
    def read(cls, row: Row, tensors: Mapping[str, Tensor], index: int) -> _Taught:
        """The ``index``-th row of a task, with what was saved of the task's teacher."""
        maps = {
            layer: (heads, tensors[f"{index}/queries {layer}"], tensors[f"{index}/map {layer}"])
            for layer, heads in by_layer(tensors["heads"]).items()
        }
        return cls(row, tensors[f"{index}/logits"], maps)

    def to(self, device: torch.device) -> _Taught:
        """The same there and in float32, which holds every half to the last bit, so that sums lose nothing."""
        maps = {
            layer: (heads, at.to(device), kept.to(device, torch.float32))
            for layer, (heads, at, kept) in self.maps.items()
        }
        return replace(self, logits=self.logits.to(device, torch.float32), maps=maps)


@dataclass(frozen=True)
class Distillation:
    """What a step adds for the rows of memory that it draws; a ``sapt_core.training.objective.Term``.

    Attributes:
        taught: all rows of memory.
        collator: of the model.
        rows: drawn in a step on average, so that an epoch draws each row once.
        batch_size: rows in a step of the task, which the drawn rows' attention is weighed against.
        length: tokens in an answer of the task on average, which with the batch size the drawn rows' answers are.
        replay, attention: λ₁ and λ₂.
    """

    taught: tuple[_Taught, ...]
    collator: Collator
    rows: float
    batch_size: int
    length: float
    replay: float
    attention: float
    weight: float = 1.0
    name = "seekr"
    per_micro_batch = False
    runs_rows = True

    def draw(self, generator: torch.Generator) -> list[int]:
        """Different rows; a fraction of a row is one row so often."""
        whole, fraction = divmod(self.rows, 1)
        count = int(whole) + int(torch.rand((), generator=generator).item() < fraction)
        return torch.randperm(len(self.taught), generator=generator)[:count].tolist()

    def value(self, model: SaptModel, drawn: Sequence[int]) -> Tensor:
        device = next(model.backbone.parameters()).device
        rows = [self.taught[index].to(device) for index in drawn]
        batch = self.collator([each.row for each in rows])
        logits, maps = model.attend(batch.to(device))
        parts = self.parts(model, batch, logits, maps, rows)
        answers = self.replay * parts["replay"] + (1 - self.replay) * parts["logits"]
        # By tokens, as in the trainer's batches: by rows, long answers count for too little beside a task of labels.
        tokens = sum(len(each.logits) for each in rows)
        weighed = answers * tokens / self.length + self.attention * parts["attention"] * len(rows)
        return weighed / self.batch_size

    def parts(
        self, model: SaptModel, batch: Batch, logits: Tensor, maps: Sequence[Tensor], rows: Sequence[_Taught]
    ) -> dict[str, Tensor]:
        """The three terms: means over tokens, and over rows, layers, heads and query positions.

        The batch is on the CPU, where its labels say where the answers are without waiting for the device.
        """
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        tokens = sum(len(each.logits) for each in rows)
        soft, held = [], []
        for index, each in enumerate(rows):
            own = model.answer_logits(logits[index], batch.labels[index])
            soft.append(F.kl_div(own.log_softmax(-1), each.logits.softmax(-1), reduction="sum"))
            for layer, (heads, at, kept) in each.maps.items():
                now = maps[layer][index, heads][:, at, : kept.shape[2]].float()
                divergence = torch.xlogy(kept, kept) - kept * now.clamp_min(torch.finfo(now.dtype).tiny).log()
                held.append(divergence.sum(dim=-1).mean() / len(each.maps))
        return {
            "replay": model.token_loss(logits, batch.labels.to(logits.device)) / tokens,
            "logits": torch.stack(soft).sum() / tokens,
            "attention": torch.stack(held).sum() / len(rows),
        }

    def to(self, device: torch.device) -> Distillation:
        """Itself: only what is drawn is moved."""
        return self
