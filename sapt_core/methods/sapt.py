"""SAPT (arXiv 2401.08295): a block a task, mixed by shared attention, which reflection keeps in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sapt_core.judging.decoding import pooled_embeddings
from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.training.objective import Objective
from sapt_core.training.reflection import GaussianQueries, Memory, RecordedAttention, Reflection, StoredQueries


class SharedAttentiveLearning(Method):
    """What both of SAPT's names share: sections 3.2 (learning and selection) and 3.3 (reflection)."""

    pool: ClassVar[Literal["block per task"]] = "block per task"
    shared_attention: ClassVar[bool] = True
    again: ClassVar[bool] = True

    def begin(self, lesson: Lesson) -> Plan:
        """Start centre and key; train block, key and query projection, reflecting on earlier tasks."""
        assert lesson.attention is not None  # noqa: S101 - a method with shared attention is given its settings
        _start_routing(lesson)
        if not lesson.earlier:  # one block has the whole weight, whatever the router does
            return Plan(lesson.rows)
        memories, settings = _memories(lesson), lesson.reflection
        terms = (
            (
                Reflection(
                    memories,
                    settings.batch_size,
                    settings.weight,
                    per_micro_batch=settings.per_micro_batch,
                    order=lesson.order,
                ),
            )
            if memories
            else ()
        )
        router = dict.fromkeys(("key", "attention"), lesson.attention.learning_rate_ratio)
        return Plan(lesson.rows, Objective(terms, router, lesson.attention.hold))

    def mixture(self, lesson: Lesson) -> tuple[float, ...]:
        """Mean attention of the task's rows: what reflection holds from now on."""
        pooled = lesson.pooled
        if lesson.reflection.target_split == "dev":
            pooled = pooled_embeddings(lesson.model, lesson.tokenizer, list(lesson.task.dev))
        with torch.no_grad():
            return tuple(lesson.model.pool.attend(pooled).mean(dim=0).tolist())


class Sapt(SharedAttentiveLearning):
    """SAPT with the routing that this project found to hold (docs/decisions.md)."""

    name: Literal["sapt"] = "sapt"

    summary: ClassVar[str] = "SAPT with the routing found to hold here (arXiv 2401.08295, docs/decisions.md)"
    attention_defaults: ClassVar[Mapping[str, Any]] = {
        "key_init": "task_mean",
        "centre": "vocabulary",
        "residual": True,
        "temperature": 0.1,
        "hold": 0.5,
        "learning_rate_ratio": 0.1,
    }


class SaptPaper(SharedAttentiveLearning):
    """SAPT with the paper's own settings."""

    name: Literal["sapt_paper"] = "sapt_paper"

    summary: ClassVar[str] = "SAPT as in the paper: uniform keys, τ = √D (arXiv 2401.08295)"


def _start_routing(lesson: Lesson) -> None:
    """Centre of the queries, and a new block's key from the task's own pooled embeddings."""
    pool = lesson.model.pool
    if pool.attention is None or pool.key is None:
        return
    with torch.no_grad():
        if not lesson.earlier:
            pool.attention.start(embedding_matrix(lesson.model.backbone))
        if pool.attention.config.key_init == "task_mean" and not lesson.further:
            pool.key.copy_(pool.attention.task_key(lesson.pooled))


def _memories(lesson: Lesson) -> list[Memory]:
    """What there is to reflect on: a memory of every earlier task of which inputs or statistics were kept."""
    reflection, model = lesson.reflection, lesson.model
    if not lesson.kept or not reflection.weight:
        return []
    memories = []
    targets: Sequence[Tensor | RecordedAttention] = (
        [torch.tensor(target) for target in lesson.targets] if reflection.target == "task_mean" else lesson.routers()
    )
    for task, of_task, target in zip(lesson.earlier, lesson.kept, targets, strict=True):
        if isinstance(of_task, GaussianQueries):
            memories.append(Memory(of_task, target))
        elif of_task:
            prompts = lesson.encoder(task).prompts(task.template, task.definition, of_task)
            rows = [prompt.row for prompt in prompts]
            memories.append(Memory(StoredQueries(pooled_embeddings(model, lesson.tokenizer, rows)), target))
    return memories
