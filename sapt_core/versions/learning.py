"""Learning one task of a sequence: from the version before to the version after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.device import Precision
from sapt_core.backbones.reference import BackboneRef
from sapt_core.blobs import BlobStore, Checkpoints
from sapt_core.data.prepare import PreparedTask
from sapt_core.data.task import LearntTask
from sapt_core.errors import SnapshotError
from sapt_core.judging import metrics
from sapt_core.judging.decoding import answer
from sapt_core.methods.base import Kept, Lesson, Method
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool
from sapt_core.settings import AttentionConfig, EvaluationConfig, PETConfig, ReflectionConfig, TrainConfig
from sapt_core.training.reflection import RecordedAttention
from sapt_core.training.trainer import step_seed, train
from sapt_core.versions.loading import empty_pool, load_blob, load_blocks, load_router, store_block, store_router
from sapt_core.versions.manifest import Manifest, require_backbone


def learn_task(  # noqa: PLR0917 - the inputs, in the order they are named in the docstring
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    learnt: LearntTask,
    parent: Manifest | None,
    kept: Sequence[Kept],
    *,
    ref: BackboneRef,
    method: Method,
    pet: PETConfig,
    attention: AttentionConfig,
    reflection: ReflectionConfig,
    config: TrainConfig,
    evaluation: EvaluationConfig,
    seed: int,
    store: BlobStore,
    checkpoints: Checkpoints,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, list[dict[str, float]]]:
    """Learn ``task`` on top of ``parent``, as the method says, and store the next version.

    Args:
        backbone, tokenizer: loaded from ``ref``.
        task: tokenised rows.
        learnt: what the manifest keeps of the task.
        parent: the version before; None for the first task.
        kept: what there is to reflect on of every earlier task, oldest first: inputs as text (none: the
            task is not reflected on) or the statistics of their pooled embeddings. Empty: no reflection.
        method: how; the same one that learnt ``parent``.
        seed: of the sequence; the task's place in it is mixed in, so that no two blocks and keys start alike.
        store: receives the block, the router, the method's state and the manifest.

    Returns:
        The new version and the training curve (see ``sapt_core.training.trainer.train``).

    Raises:
        SnapshotError: ``parent`` belongs to another backbone, method or kind of pool.
    """
    shared_attention = attention if method.shared_attention else None
    if parent is not None:
        require_backbone(parent, ref)
        if parent.backbone.joined != ref.joined:
            raise SnapshotError(
                "The version before was learnt by an earlier release, which tokenised prompts and answers of a "
                "decoder-only backbone apart: start the sequence anew"
            )
        _require_same_kind(parent, method, pet, shared_attention)
    index = 0 if parent is None else len(parent.tasks)
    seed = step_seed(seed, "task", index)
    torch.manual_seed(step_seed(seed, "init"))
    pool = _start(backbone, parent, method, pet, shared_attention, store)
    model = SaptModel(backbone, pool)
    lesson = Lesson(
        model=model,
        tokenizer=tokenizer,
        task=task,
        learnt=learnt,
        earlier=parent.tasks if parent else (),
        targets=parent.targets if parent else (),
        saved=parent.state if parent else {},
        routers=lambda: _routers(parent, store),
        kept=kept,
        attention=shared_attention,
        reflection=reflection,
        train=config,
        seed=seed,
        store=store,
    )
    try:
        plan = method.begin(lesson)
        curve = train(
            model,
            plan.rows,
            model.collator(tokenizer.pad_token_id),
            config,
            seed=seed,
            objective=plan.objective,
            checkpoints=checkpoints,
            score_dev=lambda: _score_dev(
                model,
                tokenizer,
                task,
                max_new_tokens=learnt.max_target_tokens,
                evaluation=evaluation,
                precision=config.precision,
            ),
            on_step=on_step,
        )
        saved = {name: store.put(data) for name, data in method.end(lesson).items()}
        pool.cpu()
        target = method.mixture(lesson)
        block = store_block(pool, store)
        grows = method.pool == "block per task"
        manifest = Manifest(
            method=method,
            backbone=ref,
            pet=pet,
            attention=shared_attention,
            tasks=(*(parent.tasks if parent else ()), learnt),
            blocks=(*(parent.blocks if parent and grows else ()), block),
            router=store_router(pool, store),
            targets=(*(parent.targets if parent else ()), target),
            state={**(parent.state if parent else {}), **saved},
            parent=parent.digest if parent else None,
        )
        store.put(manifest.to_bytes())
    finally:
        model.detach()
    return manifest, curve


def _routers(version: Manifest | None, store: BlobStore) -> list[RecordedAttention]:
    """The shared attention right after each task that a version has learnt, oldest first."""
    recorded = []
    while version is not None:
        recorded.append(RecordedAttention(*load_router(version, store)))
        version = None if version.parent is None else Manifest.from_bytes(store.get(version.parent))
    return recorded[::-1]


def _require_same_kind(parent: Manifest, method: Method, pet: PETConfig, attention: AttentionConfig | None) -> None:
    """Refuse to go on from a pool that these settings would read as another one."""
    before, given = _kind(parent.method, parent.pet, parent.attention), _kind(method, pet, attention)
    differing = [name for name in sorted({*before, *given}) if before.get(name) != given.get(name)]
    if differing:
        settings = ", ".join(f"{name} {given.get(name)} (was {before.get(name)})" for name in differing)
        raise SnapshotError(
            f"A sequence cannot go on with other settings than it was started with: {settings}. "
            "Use those of the version before, or start the sequence anew"
        )


def _kind(method: Method, pet: PETConfig, attention: AttentionConfig | None) -> dict[str, Any]:
    """The settings that say what a pool's tensors mean; the others may change from task to task."""
    kind = {f"method.{name}": value for name, value in method.model_dump().items()}
    kind |= {f"pet.{name}": value for name, value in pet.model_dump(exclude={"lora_dropout", "detach_frozen"}).items()}
    if attention is not None:
        read = attention.model_dump(exclude={"key_init", "centre", "hold", "learning_rate_ratio"})
        kind |= {f"attention.{name}": value for name, value in read.items()}
    return kind


def _start(  # noqa: PLR0917
    backbone: PreTrainedModel,
    parent: Manifest | None,
    method: Method,
    pet: PETConfig,
    attention: AttentionConfig | None,
    store: BlobStore,
) -> PETPool:
    """The pool with the block that is to be learnt, and the finished ones that take part."""
    if parent is not None and method.pool == "block per task":
        index = len(parent.tasks)
        pool = load_blocks(parent, store, backbone, [i for i in method.active(index) if i != index])
    else:
        pool = empty_pool(backbone, method, pet, attention)
    pool.add()
    if parent is not None and method.pool == "one block":
        pool.blocks.load_current(load_blob(parent.blocks[-1], store))
    return pool


def _score_dev(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    *,
    max_new_tokens: int,
    evaluation: EvaluationConfig,
    precision: Precision,
) -> float:
    """Dev score, each worker answering its share of the rows."""
    spread = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    rows: list[dict[str, Any]] = list(task.dev)[rank::world]
    texts: list[str] = []
    if rows:
        texts, _ = answer(model, tokenizer, rows, evaluation, max_new_tokens=max_new_tokens, precision=precision)
    pairs = [(text, row["references"]) for text, row in zip(texts, rows, strict=True)]
    if spread:
        gathered: list[list[tuple[str, list[str]]]] = [[] for _ in range(world)]
        dist.all_gather_object(gathered, pairs)
        pairs = [pair for part in gathered for pair in part]
    return metrics.score(task.metric, [text for text, _ in pairs], [references for _, references in pairs])
