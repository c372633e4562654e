"""From a PEFT LoRA folder to the next version of a pool, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.loading import load_embeddings
from sapt_core.backbones.reference import BackboneRef, skeleton
from sapt_core.data.encoding import PromptEncoder
from sapt_core.data.task import LearntTask, name_faults
from sapt_core.errors import FaultsError
from sapt_core.io.blobs import BlobStore
from sapt_core.judging.decoding import pooled_embeddings
from sapt_core.judging.scoring.named import metric_faults
from sapt_core.methods.base import Kept, Method
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool
from sapt_core.settings import AttentionConfig, LoRAConfig, PETConfig
from sapt_core.template_settings import template_fault
from sapt_core.training.reflection import GaussianQueries
from sapt_core.versions.adapters import TITLE, read_adapter
from sapt_core.versions.loading import empty_pool, load_router, store_router
from sapt_core.versions.manifest import Manifest

_DRAWN = 1024  # of statistics: a key is the mean over so many inputs


@dataclass(frozen=True)
class PoolKind:
    """What a pool is of, whether it has blocks yet or not; fields as in ``Manifest``."""

    method: Method
    backbone: BackboneRef
    pet: PETConfig
    attention: AttentionConfig | None

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The kind of a version."""
        return cls(manifest.method, manifest.backbone, manifest.pet, manifest.attention)


def import_adapter(
    folder: Path, task: LearntTask, known: Kept, store: BlobStore, *, onto: Manifest | PoolKind
) -> Manifest:
    """Make a PEFT LoRA adapter the newest block of a pool, and store the version.

    With shared attention the block's key points to the mean query of its task, as the key of a block that is to be
    learnt does with ``attention.key_init`` task_mean. Nothing is trained, so nothing holds the attention of earlier
    tasks: what the new key draws away from them, ``evaluate`` tells.

    Args:
        folder: as PEFT's ``save_pretrained`` writes it; see ``sapt_core.versions.adapters.read_adapter``.
        task: what the adapter was trained on.
        known: inputs of the task, or the statistics of their pooled embeddings; looked at with shared attention.
        store: holds the version and its backbone, and receives the next.
        onto: the version before, or the kind of a pool that is begun.

    Returns:
        The next version; its last target is the mean attention of the task's inputs.

    Raises:
        FaultsError: with all that is against the adapter, the task and the pool; nothing is stored.
        StoreError: a blob is missing or damaged.
        BackboneError: the backbone cannot be loaded.
    """
    parent, kind = (onto, PoolKind.of(onto)) if isinstance(onto, Manifest) else (None, onto)
    faults = [*kind_faults(kind), *task_faults(task, parent)]
    if kind.attention is not None and not isinstance(known, GaussianQueries):
        faults += _row_faults(known)
    if not isinstance(kind.pet, LoRAConfig) or kind_faults(kind):
        raise FaultsError(TITLE, faults)
    backbone, tokenizer = load_embeddings(kind.backbone, store)
    try:
        block = read_adapter(folder, backbone, skeleton(backbone.config), kind.pet)
    except FaultsError as error:
        faults += error.faults
    if faults:
        raise FaultsError(TITLE, faults)
    pool = _pool(kind, parent, backbone, store)
    target = (1.0,) * (1 if parent is None else len(parent.blocks) + 1)
    if pool.attention is not None:
        pooled = _pooled(SaptModel(backbone, pool), tokenizer, task, known, joined=kind.backbone.joined)
        with torch.no_grad():
            pool.frozen_keys = torch.cat([pool.frozen_keys, pool.attention.task_key(pooled).unsqueeze(0)])
            target = tuple(pool.attend(pooled).mean(dim=0).tolist())
    manifest = Manifest(
        method=kind.method,
        backbone=kind.backbone,
        pet=kind.pet,
        attention=kind.attention,
        tasks=(*(parent.tasks if parent else ()), task),
        blocks=(*(parent.blocks if parent else ()), store.put(save_tensors(block))),
        router=store_router(pool, store),
        targets=(*(parent.targets if parent else ()), target),
        state=parent.state if parent else {},
        parent=parent.as_parent if parent else None,
        answering=parent.answering if parent else "any",
    )
    store.put(manifest.to_bytes())
    return manifest


def kind_faults(kind: PoolKind) -> list[str]:
    """Why no adapter can become a block of such a pool."""
    method = kind.method
    if method.pool != "block per task":
        return [f"method {method.name} has one block for all tasks: give a pool with a block a task, as sapt's are"]
    if type(method).blocks is not Method.blocks:
        return [f"the blocks of method {method.name} are of its own kind, which PEFT has not"]
    if not isinstance(kind.pet, LoRAConfig):
        return [f"the pool's blocks are of pet.type {kind.pet.type}: give a pool of pet.type lora"]
    return []


def task_faults(task: LearntTask, parent: Manifest | None) -> list[str]:
    """What is against a task's name and settings."""
    faults = [f"--task {task.name}: {fault}" for fault in name_faults(task.name, parent.names if parent else ())]
    if (fault := template_fault(task.template)) is not None:
        faults.append(fault)
    faults += metric_faults([task.metric])
    if task.template == "none" and task.definition:
        faults.append("with template none inputs are whole prompts: leave the definition empty")
    return faults


def _row_faults(rows: Sequence[str]) -> list[str]:
    if not rows:
        return ["there are no rows: the block's key is made of inputs of its task"]
    blank = [place for place, row in enumerate(rows) if not row.strip()]
    return [f"row {place} is blank; rows count from 0" for place in blank[:3]]


def _pool(kind: PoolKind, parent: Manifest | None, backbone: PreTrainedModel, store: BlobStore) -> PETPool:
    """The pool as its attention sees it: keys, and no blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a query projection that is begun is random, and the same import the same version
        pool = empty_pool(backbone, kind.method, kind.pet, kind.attention)
    if pool.attention is not None and parent is not None:
        pool.attention, pool.frozen_keys = load_router(parent, store)
    elif pool.attention is not None:
        with torch.no_grad():
            pool.attention.start(embedding_matrix(backbone))
    return pool


def _pooled(
    model: SaptModel, tokenizer: PreTrainedTokenizerBase, task: LearntTask, known: Kept, *, joined: bool
) -> Tensor:
    """Pooled embeddings (N, D) of the task's inputs."""
    if isinstance(known, GaussianQueries):
        return known.draw(_DRAWN, torch.Generator().manual_seed(0))
    encoder = PromptEncoder(
        tokenizer,
        max_source_tokens=task.max_source_tokens,
        is_encoder_decoder=model.is_encoder_decoder,
        joined=joined,
    )
    prompts = encoder.prompts(task.template, task.definition, known)
    return pooled_embeddings(model, tokenizer, [prompt.row for prompt in prompts])
