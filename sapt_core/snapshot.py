"""Versions of a pool on disk: one JSON manifest and safetensors blobs by sha256.

Version t+1 adds one block and one router to what version t has; blocks that are finished are carried
by digest and never written again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.backbone import BackboneRef
from sapt_core.blobs import BlobStore
from sapt_core.blocks.lora import LoRABlocks
from sapt_core.config import AttentionConfig, LoRAConfig
from sapt_core.errors import SnapshotError
from sapt_core.pool import PETPool

SCHEMA_VERSION = 1


class LearntTask(BaseModel):
    """What inference and later reports need to know of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    definition: str
    template: str
    metric: str
    max_source_tokens: int
    max_target_tokens: int


class Manifest(BaseModel):
    """A version of a pool.

    Attributes:
        schema_version: of this format.
        method: name of the method that learnt it.
        backbone: the backbone it belongs to.
        pet: settings of its blocks.
        attention: settings of its shared attention; None for a single block without one.
        tasks: tasks learnt so far, oldest first.
        blocks: sha256 of every block, oldest first; each is a PEFT ``adapter_model.safetensors``.
        router: sha256 of keys (T, D) and query projection; None without attention.
        targets: mean attention of every task after it was learnt, over the blocks there were.
        parent: sha256 of the manifest of the version before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    method: str
    backbone: BackboneRef
    pet: LoRAConfig
    attention: AttentionConfig | None
    tasks: tuple[LearntTask, ...]
    blocks: tuple[str, ...]
    router: str | None
    targets: tuple[tuple[float, ...], ...]
    parent: str | None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        blocks = list(range(1, len(self.tasks) + 1)) if self.attention else [1] * len(self.tasks)
        if not self.tasks or len(self.blocks) != blocks[-1] or [len(row) for row in self.targets] != blocks:
            raise ValueError(
                f"{len(self.tasks)} tasks, {len(self.blocks)} blocks and targets over "
                f"{[len(row) for row in self.targets]} blocks do not belong together"
            )
        if (self.attention is None) != (self.router is None):
            raise ValueError("attention and router are there together or not at all")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the name of this version's content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def block_names(self) -> tuple[str, ...]:
        """The task that made each block, oldest first; a block that all tasks share is named so."""
        return tuple(task.name for task in self.tasks) if self.attention else ("all tasks",)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            SnapshotError: not a manifest, or written by a newer release.
        """
        try:
            value: Any = json.loads(data)
        except ValueError as error:
            raise SnapshotError(f"The snapshot's manifest is not JSON: {error}") from error
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SnapshotError(
                f"The snapshot has schema version {version}; this release reads up to {SCHEMA_VERSION}. "
                "Update sapt-on-ray to load it"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise SnapshotError(f"The snapshot's manifest is not valid: {where}") from error


def load_pool(manifest: Manifest, store: BlobStore, backbone: PreTrainedModel) -> PETPool:
    """The pool of a version, every block frozen.

    Args:
        manifest: the version.
        store: holds its blobs; each is verified.
        backbone: the loaded ``manifest.backbone``.

    Raises:
        SnapshotError: a blob is no safetensors file or does not fit the backbone.
        StoreError: a blob is missing or damaged.
    """
    pool = new_pool(backbone, manifest.pet, manifest.attention)
    for digest in manifest.blocks:
        pool.blocks.append_frozen(load_blob(digest, store))
    if pool.attention is not None and manifest.router is not None:
        tensors = load_blob(manifest.router, store)
        expected = {name: tuple(value.shape) for name, value in pool.attention.state_dict().items()}
        expected["keys"] = (len(manifest.blocks), pool.frozen_keys.shape[1])
        given = {name: tuple(value.shape) for name, value in tensors.items()}
        if given != expected:
            differing = sorted(name for name, _ in set(given.items()) ^ set(expected.items()))
            raise SnapshotError(
                "The snapshot's router does not fit this backbone's embedding width or its own blocks: "
                f"{', '.join(dict.fromkeys(differing))}"
            )
        pool.frozen_keys = tensors.pop("keys")
        pool.attention.load_state_dict(tensors)
    return pool


def load_blob(digest: str, store: BlobStore) -> dict[str, Tensor]:
    """The tensors of a stored blob.

    Raises:
        SnapshotError: it is no safetensors file.
        StoreError: it is missing or damaged.
    """
    try:
        return load_tensors(store.get(digest))
    except SafetensorError as error:
        raise SnapshotError(f"Blob {digest}, which the snapshot names, is no safetensors file: {error}") from error


def new_pool(backbone: PreTrainedModel, pet: LoRAConfig, attention: AttentionConfig | None) -> PETPool:
    """An empty pool for ``backbone``."""
    return PETPool(LoRABlocks.for_backbone(backbone, pet), embedding_matrix(backbone).shape[1], attention)


def embedding_matrix(backbone: PreTrainedModel) -> Tensor:
    """The frozen token embeddings (V, D)."""
    matrix = backbone.get_input_embeddings().weight
    assert isinstance(matrix, Tensor)  # noqa: S101 - of a language model they are a matrix
    return matrix


def store_block(pool: PETPool, store: BlobStore) -> str:
    """Put the block being learnt into the store and return its sha256."""
    return store.put(save_tensors(_on_cpu(pool.blocks.current_state())))


def store_router(pool: PETPool, store: BlobStore) -> str | None:
    """Put all keys and the query projection into the store; None without attention."""
    if pool.attention is None:
        return None
    return store.put(save_tensors(_on_cpu({"keys": pool.keys.detach(), **pool.attention.state_dict()})))


def export_block(manifest: Manifest, index: int, store: BlobStore, folder: Path) -> None:
    """Write one block as a plain PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``.

    PEFT applies it with weight 1, as the pool does an input that attends to nothing else.

    Args:
        manifest: the version.
        index: of the block, oldest first from 0.
        store: holds its blobs.
        folder: is made; must be empty or not there yet.

    Raises:
        SnapshotError: no such block, or the folder holds something.
        StoreError: the block's blob is missing or damaged.
    """
    from peft import LoraConfig  # noqa: PLC0415  seconds, and for exports alone

    if not 0 <= index < len(manifest.blocks):
        raise SnapshotError(f"There is no block {index}; the version has blocks 0 to {len(manifest.blocks) - 1}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotError(f"{folder} is not an empty folder; give one that is empty or not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    store.fetch_to(manifest.blocks[index], folder / "adapter_model.safetensors")
    pet = manifest.pet
    LoraConfig(
        r=pet.r,
        lora_alpha=pet.lora_alpha,  # type: ignore[arg-type]  # a fraction does as well
        lora_dropout=pet.lora_dropout,
        target_modules=list(pet.target_modules),
        base_model_name_or_path=manifest.backbone.path,
        revision=manifest.backbone.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))


def require_backbone(manifest: Manifest, ref: BackboneRef) -> None:
    """Refuse a snapshot that belongs to another backbone.

    Raises:
        SnapshotError: the digests differ.
    """
    if manifest.backbone.digest != ref.digest:
        raise SnapshotError(
            f"The snapshot was learnt on backbone {manifest.backbone.path} ({manifest.backbone.digest[:12]}), "
            f"not on {ref.path} ({ref.digest[:12]}); give the backbone it was learnt on"
        )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}
