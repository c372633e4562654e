"""Versions of a pool on disk: one JSON manifest and safetensors blobs by sha256.

Version t+1 adds one block and one router to what version t has; blocks that are finished are carried
by digest and never written again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
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
        targets: mean attention of every task after it was learnt, row i of length i + 1.
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

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the name of this version's content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

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
        SnapshotError: a blob does not fit the backbone.
        StoreError: a blob is missing or damaged.
    """
    pool = new_pool(backbone, manifest.pet, manifest.attention)
    for digest in manifest.blocks:
        pool.blocks.append_frozen(load_tensors(store.get(digest)))
    if pool.attention is not None and manifest.router is not None:
        tensors = load_tensors(store.get(manifest.router))
        keys = tensors.pop("keys")
        expected = {name: value.shape for name, value in pool.attention.state_dict().items()}
        given = {name: value.shape for name, value in tensors.items()}
        if given != expected or keys.shape != (len(manifest.blocks), pool.frozen_keys.shape[1]):
            raise SnapshotError("The snapshot's router does not fit this backbone's embedding width or its blocks")
        pool.attention.load_state_dict(tensors)
        pool.frozen_keys = keys
    return pool


def new_pool(backbone: PreTrainedModel, pet: LoRAConfig, attention: AttentionConfig | None) -> PETPool:
    """An empty pool for ``backbone``."""
    width = backbone.get_input_embeddings().weight.shape[1]
    return PETPool(LoRABlocks.for_backbone(backbone, pet), width, attention)


def store_block(pool: PETPool, store: BlobStore) -> str:
    """Put the block being learnt into the store and return its sha256."""
    return store.put(save_tensors(_on_cpu(pool.blocks.current_state())))


def store_router(pool: PETPool, store: BlobStore) -> str | None:
    """Put all keys and the query projection into the store; None without attention."""
    if pool.attention is None:
        return None
    return store.put(save_tensors(_on_cpu({"keys": pool.keys.detach(), **pool.attention.state_dict()})))


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
