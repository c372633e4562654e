"""Learning one task of a sequence: from the version before to the version after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.device import Precision
from sapt_core.backbones.reference import BackboneRef
from sapt_core.data.collate import ALL_SHARE, Sharing
from sapt_core.data.prepare import PreparedTask
from sapt_core.data.task import LearntTask
from sapt_core.errors import DivergenceError, SnapshotError
from sapt_core.io.blobs import BlobStore, Checkpoints
from sapt_core.judging import metrics
from sapt_core.judging.decoding import answer_task
from sapt_core.methods.base import Kept, Lesson, Method
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool
from sapt_core.settings import AttentionConfig, EvaluationConfig, PETConfig, ReflectionConfig, TrainConfig
from sapt_core.training.reflection import RecordedAttention
from sapt_core.training.trainer import step_seed, train
from sapt_core.training.workers import gathered, place
from sapt_core.versions.loading import empty_pool, load_blob, load_blocks, load_router, store_block, store_router
from sapt_core.versions.manifest import SCHEMA_VERSION, TRAINED, Manifest, require_backbone

Item = TypeVar("Item")


@dataclass(frozen=True)
class LearningSettings:
    """How a task is learnt.

    Attributes:
        method: how; the same one that learnt the version before.
        pet: the new block.
        attention: how blocks are mixed; looked at where the method has shared attention.
        reflection: how earlier attention is held.
        train: the loop.
        evaluation: how dev rows are answered, where ``train`` asks for their scores.
        seed: of the sequence; the task's place in it is mixed in, so that no two blocks and keys start alike.
    """

    method: Method
    pet: PETConfig
    attention: AttentionConfig
    reflection: ReflectionConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    seed: int


@dataclass(frozen=True)
class Workplace:
    """What a task is learnt on, and where what comes of it is put.

    Attributes:
        backbone, tokenizer: loaded from ``ref``.
        ref: the backbone by content.
        store: receives the block, the router, the method's state and the manifest.
        checkpoints: what an interrupted training goes on from.
        on_step: called with the step and the number of steps.
        sharing: which rows may share a forward, as a probe of the backbone found it.
    """

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: BackboneRef
    store: BlobStore
    checkpoints: Checkpoints
    on_step: Callable[[int, int], None] | None = None
    sharing: Sharing = ALL_SHARE


def learn_task(
    place: Workplace,
    settings: LearningSettings,
    task: PreparedTask,
    learnt: LearntTask,
    *,
    parent: Manifest | None,
    kept: Sequence[Kept],
    again: Literal["further", "anew"] | None = None,
) -> tuple[Manifest, list[dict[str, float]]]:
    """Learn ``task`` on top of ``parent``, as the method says, and store the next version.

    A task that ``parent`` knows is learnt again as if it were the newest: its block, and with shared attention its key,
    are trained beside all others, which stay, and the attention of the other tasks is reflected on. Its place among the
    tasks and blocks is as before.

    Args:
        place: backbone and store.
        settings: how.
        task: tokenised rows.
        learnt: what the manifest keeps of the task.
        parent: the version before; None for the first task.
        kept: what there is to reflect on of every task of ``parent`` but the one that is learnt again, oldest first:
            inputs as text (none: the task is not reflected on) or the statistics of their pooled embeddings. Empty: no
            reflection.
        again: whether a task that ``parent`` knows is learnt further, from where its block and key stand, or anew,
            with a new block and key in their place; None for a task that it does not know.

    Returns:
        The new version and the training curve (see ``sapt_core.training.trainer.train``).

    Raises:
        SnapshotError: ``parent`` belongs to another backbone, method or kind of pool, or cannot learn the task again.
        DivergenceError: a figure of the training, or of what it made, is no finite number.
    """
    method, pet, store, tokenizer = settings.method, settings.pet, place.store, place.tokenizer
    shared_attention = settings.attention if method.shared_attention else None
    if parent is not None:
        require_backbone(parent, place.ref)
        if parent.backbone.joined != place.ref.joined:
            raise SnapshotError(
                "The version before was learnt by an earlier release, which tokenised prompts and answers of a "
                "decoder-only backbone apart: start the sequence anew"
            )
        require_same_kind(parent, method, pet, shared_attention)
    spot = None if again is None else _spot(parent, learnt, anew=again == "anew")
    grows = method.pool == "block per task"
    order = None if spot is None or parent is None or not grows else _last(spot, len(parent.blocks))
    index = 0 if parent is None else len(parent.tasks)
    seed = step_seed(settings.seed, "task", index)
    torch.manual_seed(step_seed(seed, "init"))
    pool = _start(place, settings, parent, spot, further=again == "further")
    model = SaptModel(place.backbone, pool, place.sharing)
    lesson = Lesson(
        model=model,
        tokenizer=tokenizer,
        task=task,
        learnt=learnt,
        earlier=_but(parent.tasks if parent else (), spot),
        targets=_but(parent.targets if parent else (), spot),
        saved=parent.state if parent else {},
        routers=lambda: _but(_routers(parent, store), spot),
        kept=kept,
        attention=shared_attention,
        reflection=settings.reflection,
        train=settings.train,
        seed=seed,
        store=store,
        order=order,
        further=again == "further",
    )
    with lesson.until_end:
        plan = method.begin(lesson)
        curve = train(
            model,
            plan.rows,
            model.collator(tokenizer.pad_token_id),
            settings.train,
            seed=seed,
            objective=plan.objective,
            checkpoints=place.checkpoints,
            score_dev=lambda: _score_dev(
                model,
                tokenizer,
                task,
                joined=place.ref.joined,
                max_new_tokens=learnt.max_target_tokens,
                evaluation=settings.evaluation,
                precision=settings.train.precision,
            ),
            on_step=place.on_step,
        )
        saved = {name: store.put(data) for name, data in method.end(lesson).items()}
        pool.cpu()
        target = method.mixture(lesson)
        if not all(map(math.isfinite, target)):
            raise DivergenceError(
                f"After {task.name} the attention over the blocks is no number any more: {target}. Nothing of it is "
                "recorded: lower train.learning_rate or attention.learning_rate_ratio, and run again."
            )
        if order is not None and shared_attention is not None:
            target = tuple(target[each] for each in order)
        block = store_block(pool, store)
        tasks, blocks, targets = (parent.tasks, parent.blocks, parent.targets) if parent else ((), (), ())
        if spot is None:
            tasks, targets = (*tasks, learnt), (*targets, target)
            blocks = (*blocks, block) if grows else (block,)
        else:
            blocks = _with(blocks, spot, block) if grows else (block,)
            targets = _with(targets, spot, target) if shared_attention is not None else targets
        plain = not grows or all(len(weights) == count for count, weights in enumerate(targets, start=1))
        manifest = Manifest(
            schema_version=TRAINED if spot is None and plain else SCHEMA_VERSION,
            method=method,
            backbone=place.ref,
            pet=pet,
            attention=shared_attention,
            tasks=tasks,
            blocks=blocks,
            router=store_router(pool, store, order),
            targets=targets,
            state={**(parent.state if parent else {}), **saved},
            parent=parent.as_parent if parent else None,
            answering=place.sharing.answering,
            again=None if spot is None else learnt.name,
        )
        store.put(manifest.to_bytes())
    return manifest, curve


def again_faults(manifest: Manifest, task: str, *, anew: bool) -> list[str]:
    """Why a version cannot learn a task again; empty if it can.

    Args:
        manifest: the version.
        task: its name.
        anew: whether with a new block.
    """
    method = manifest.method
    if task not in manifest.names:
        return [f"the version has not learnt {task}; it knows: {', '.join(manifest.names)}"]
    if not method.again and method.pool == "block per task":
        return [
            f"with method {method.name} other tasks are answered with the block of {task} too, and nothing would hold "
            "their answers where they are: give its new rows a task name of their own, or learn all tasks anew"
        ]
    if not method.again:
        return [
            f"what method {method.name} keeps of a task is of one learning of it: give the new rows a task name of "
            "their own, or learn all tasks anew"
        ]
    if anew and method.pool != "block per task":
        return [
            f"method {method.name} has one block for all tasks, which cannot begin anew for {task}: learn it further"
        ]
    return []


def _spot(parent: Manifest | None, learnt: LearntTask, *, anew: bool) -> int:
    """The place of a task that is learnt again."""
    if parent is None:
        raise SnapshotError(f"No version knows {learnt.name}, so it cannot be learnt again")
    faults = again_faults(parent, learnt.name, anew=anew)
    if faults:
        raise SnapshotError(f"{learnt.name} cannot be learnt again: {'; '.join(faults)}")
    spot = parent.names.index(learnt.name)
    if parent.tasks[spot] != learnt:
        raise SnapshotError(
            f"{learnt.name} can be learnt again only with the definition, metric and lengths that it has"
        )
    return spot


def _last(spot: int, blocks: int) -> tuple[int, ...]:
    """For each block its place once the one at ``spot`` is put behind the others."""
    return (*range(spot), blocks - 1, *range(spot, blocks - 1))


def _but(items: Sequence[Item], spot: int | None) -> Sequence[Item]:
    return items if spot is None else (*items[:spot], *items[spot + 1 :])


def _with(items: tuple[Item, ...], spot: int, item: Item) -> tuple[Item, ...]:
    return (*items[:spot], item, *items[spot + 1 :])


def _routers(version: Manifest | None, store: BlobStore) -> list[RecordedAttention]:
    """The shared attention right after each task that a version has learnt, the last time, oldest task first."""
    recorded: dict[int, RecordedAttention] = {}
    while version is not None:
        if version.taught not in recorded:
            recorded[version.taught] = RecordedAttention(*load_router(version, store))
        version = None if version.parent is None else Manifest.from_bytes(store.get(version.parent))
    return [recorded[task] for task in sorted(recorded)]


def require_same_kind(parent: Manifest, method: Method, pet: PETConfig, attention: AttentionConfig | None) -> None:
    """Refuse to go on from a pool that these settings would read as another one.

    Raises:
        SnapshotError: naming every setting that says what a pool's tensors mean and differs.
    """
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


def _start(
    place: Workplace, settings: LearningSettings, parent: Manifest | None, spot: int | None, *, further: bool
) -> PETPool:
    """The pool with the block that is to be learnt, and the finished ones that take part.

    Args:
        place, settings, parent: as of ``learn_task``.
        spot: place of the task that is learnt again.
        further: whether its block goes on from where it stands.
    """
    method = settings.method
    if parent is not None and method.pool == "block per task":
        index = len(parent.tasks) if spot is None else spot
        taking_part = range(len(parent.blocks)) if method.shared_attention else method.active(index)
        pool = load_blocks(parent, place.store, place.backbone, [i for i in taking_part if i != index])
    else:
        attention = settings.attention if method.shared_attention else None
        pool = empty_pool(place.backbone, method, settings.pet, attention)
    pool.add()
    if parent is not None and method.pool == "one block":
        pool.blocks.load_current(load_blob(parent.blocks[-1], place.store))
    elif parent is not None and spot is not None:
        if further:
            pool.blocks.load_current(load_blob(parent.blocks[spot], place.store))
        if pool.key is not None:
            if further:
                with torch.no_grad():
                    pool.key.copy_(pool.frozen_keys[spot])
            pool.frozen_keys = torch.cat([pool.frozen_keys[:spot], pool.frozen_keys[spot + 1 :]])
    return pool


def _score_dev(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    *,
    joined: bool,
    max_new_tokens: int,
    evaluation: EvaluationConfig,
    precision: Precision,
) -> float:
    """Dev score, each worker answering its share of the rows."""
    rank, world = place()
    rows: list[dict[str, Any]] = list(task.dev)[rank::world]
    texts: list[str] = []
    if rows:
        texts, _ = answer_task(
            model,
            tokenizer,
            task,
            rows,
            evaluation,
            joined=joined,
            max_target_tokens=max_new_tokens,
            precision=precision,
        )
    scored = [(text, row["references"], row["input"]) for text, row in zip(texts, rows, strict=True)]
    predictions, references, inputs = zip(*(each for part in gathered(scored) for each in part), strict=True)
    return metrics.score(task.metric, predictions, references, inputs)
