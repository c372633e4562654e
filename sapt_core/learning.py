"""Learning one task of a sequence: from the version before to the version after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core import metrics
from sapt_core.backbone import BackboneRef
from sapt_core.benchmarks.prepare import PreparedTask, PromptEncoder
from sapt_core.blobs import BlobStore, Checkpoints
from sapt_core.config import (
    AttentionConfig,
    EvaluationConfig,
    MethodConfig,
    PETConfig,
    ReflectionConfig,
    TrainConfig,
)
from sapt_core.device import Precision
from sapt_core.errors import SnapshotError
from sapt_core.evaluation import answer, pooled_embeddings
from sapt_core.model import SaptModel
from sapt_core.pool import PETPool
from sapt_core.reflection import GaussianQueries, Memory, RecordedAttention, Reflection, StoredQueries
from sapt_core.snapshot import (
    LearntTask,
    Manifest,
    embedding_matrix,
    load_blob,
    load_pool,
    load_router,
    new_pool,
    require_backbone,
    store_block,
    store_router,
)
from sapt_core.trainer import Objective, step_seed, train

Kept: TypeAlias = Sequence[str] | GaussianQueries


def learn_task(  # noqa: PLR0917 - the inputs, in the order they are named in the docstring
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    learnt: LearntTask,
    parent: Manifest | None,
    kept: Sequence[Kept],
    *,
    ref: BackboneRef,
    method: MethodConfig,
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
    """Learn ``task`` on top of ``parent`` and store the next version.

    With shared attention a new block, its key and the query projection are trained, under reflection
    on what was kept of the earlier tasks. With method sequential the one block there is goes on training.

    Args:
        backbone, tokenizer: loaded from ``ref``.
        task: tokenised rows.
        learnt: what the manifest keeps of the task.
        parent: the version before; None for the first task.
        kept: what there is to reflect on of every earlier task, oldest first: inputs as text (none: the
            task is not reflected on) or the statistics of their pooled embeddings. Empty: no reflection.
        seed: of the sequence; the task's place in it is mixed in, so that no two blocks and keys start alike.
        store: receives the block, the router and the manifest.

    Returns:
        The new version and the training curve (see ``sapt_core.trainer.train``).

    Raises:
        SnapshotError: ``parent`` belongs to another backbone, method or kind of pool.
    """
    shared_attention = attention if method.shared_attention else None
    if parent is not None:
        require_backbone(parent, ref)
        _require_same_kind(parent, method, pet, shared_attention)
    seed = step_seed(seed, "task", 0 if parent is None else len(parent.tasks))
    torch.manual_seed(step_seed(seed, "init"))
    pool = _start(backbone, parent, pet, shared_attention, store)
    model = SaptModel(backbone, pool)
    try:
        rows = list(task.train)
        pooled = pooled_embeddings(model, tokenizer, rows)
        _start_routing(model, pooled, attention, first=parent is None)
        curve = train(
            model,
            rows,
            model.collator(tokenizer.pad_token_id),
            config,
            seed=seed,
            objective=_objective(model, tokenizer, parent, kept, shared_attention, reflection, store),
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
        pool.cpu()
        if reflection.target_split == "dev":
            pooled = pooled_embeddings(model, tokenizer, list(task.dev))
        with torch.no_grad():
            target = tuple(pool.attend(pooled).mean(dim=0).tolist())
        block = store_block(pool, store)
        manifest = Manifest(
            method=method.name,
            backbone=ref,
            pet=pet,
            attention=shared_attention,
            tasks=(*(parent.tasks if parent else ()), learnt),
            blocks=(*(parent.blocks if parent and shared_attention else ()), block),
            router=store_router(pool, store),
            targets=(*(parent.targets if parent else ()), target),
            parent=parent.digest if parent else None,
        )
        store.put(manifest.to_bytes())
    finally:
        model.detach()
    return manifest, curve


def _require_same_kind(
    parent: Manifest, method: MethodConfig, pet: PETConfig, attention: AttentionConfig | None
) -> None:
    """Refuse to go on from a pool that these settings would read as another one."""
    before, given = _kind(parent.method, parent.pet, parent.attention), _kind(method.name, pet, attention)
    differing = [name for name in sorted({*before, *given}) if before.get(name) != given.get(name)]
    if differing:
        settings = ", ".join(f"{name} {given.get(name)} (was {before.get(name)})" for name in differing)
        raise SnapshotError(
            f"A sequence cannot go on with other settings than it was started with: {settings}. "
            "Use those of the version before, or start the sequence anew"
        )


def _kind(method: str, pet: PETConfig, attention: AttentionConfig | None) -> dict[str, Any]:
    """The settings that say what a pool's tensors mean; the others may change from task to task."""
    kind = {"method.name": method}
    kind |= {f"pet.{name}": value for name, value in pet.model_dump(exclude={"lora_dropout", "detach_frozen"}).items()}
    if attention is not None:
        read = attention.model_dump(exclude={"key_init", "centre", "hold", "learning_rate_ratio"})
        kind |= {f"attention.{name}": value for name, value in read.items()}
    return kind


def _start(
    backbone: PreTrainedModel,
    parent: Manifest | None,
    pet: PETConfig,
    attention: AttentionConfig | None,
    store: BlobStore,
) -> PETPool:
    if parent is not None and attention is not None:
        pool = load_pool(parent, store, backbone)
        pool.add()
        return pool
    pool = new_pool(backbone, pet, attention)
    pool.add()
    if parent is not None:
        pool.blocks.load_current(load_blob(parent.blocks[-1], store))
    return pool


def _start_routing(model: SaptModel, pooled: Tensor, config: AttentionConfig, *, first: bool) -> None:
    """Centre of the queries, and a new block's key from the task's own pooled embeddings (N, D)."""
    pool = model.pool
    if pool.attention is None or pool.key is None:
        return
    with torch.no_grad():
        if first:
            pool.attention.start(embedding_matrix(model.backbone))
        if config.key_init == "task_mean":
            # Keys of one length: a task of varied inputs, whose mean is short, would lose to one of similar inputs.
            mean = pool.attention.query(pooled).mean(dim=0)
            pool.key.copy_(F.normalize(mean, dim=0) * math.sqrt(len(mean)))


def _objective(  # noqa: PLR0917
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: Manifest | None,
    kept: Sequence[Kept],
    attention: AttentionConfig | None,
    reflection: ReflectionConfig,
    store: BlobStore,
) -> Objective:
    if attention is None or parent is None:  # one block has the whole weight, whatever the router does
        return Objective()
    memories = _memories(model, tokenizer, parent, kept, reflection=reflection, store=store)
    terms = (
        (Reflection(memories, reflection.batch_size, reflection.weight, per_micro_batch=reflection.per_micro_batch),)
        if memories
        else ()
    )
    router = dict.fromkeys(("key", "attention"), attention.learning_rate_ratio)
    return Objective(terms, router, attention.hold)


def _memories(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: Manifest,
    kept: Sequence[Kept],
    *,
    reflection: ReflectionConfig,
    store: BlobStore,
) -> list[Memory]:
    """What there is to reflect on: a memory of every earlier task of which inputs or statistics were kept."""
    if not kept or not reflection.weight:
        return []
    memories = []
    for task, of_task, target in zip(parent.tasks, kept, _targets(parent, reflection, store), strict=True):
        if isinstance(of_task, GaussianQueries):
            memories.append(Memory(of_task, target))
        elif of_task:
            encoder = PromptEncoder(
                tokenizer, max_source_tokens=task.max_source_tokens, is_encoder_decoder=model.is_encoder_decoder
            )
            rows = [prompt.row for prompt in encoder.prompts(task.template, task.definition, of_task)]
            memories.append(Memory(StoredQueries(pooled_embeddings(model, tokenizer, rows)), target))
    return memories


def _targets(parent: Manifest, reflection: ReflectionConfig, store: BlobStore) -> Sequence[Tensor | RecordedAttention]:
    """The attention to hold of every task of ``parent``, oldest first."""
    if reflection.target == "task_mean":
        return [torch.tensor(target) for target in parent.targets]
    recorded = []
    version: Manifest | None = parent
    while version is not None:
        recorded.append(RecordedAttention(*load_router(version, store)))
        version = None if version.parent is None else Manifest.from_bytes(store.get(version.parent))
    return recorded[::-1]


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
