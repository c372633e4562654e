"""Versions of a pool on disk: one JSON manifest and safetensors blobs by sha256.

Version t+1 adds one block and one router to what version t has; blocks that are finished are carried
by digest and never written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.attention import SharedAttention
from sapt_core.backbone import BackboneRef, stored_model_config
from sapt_core.blobs import BlobStore
from sapt_core.blocks.base import embedding_matrix
from sapt_core.errors import SnapshotError
from sapt_core.methods.base import AnyMethod, Method
from sapt_core.pool import PETPool
from sapt_core.settings import AttentionConfig, FullConfig, LoRAConfig, PETConfig, PromptConfig

SCHEMA_VERSION = 3


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
        method: the method that learnt it, with its options.
        backbone: the backbone it belongs to.
        pet: settings of its blocks.
        attention: settings of its shared attention; None for a method without it.
        tasks: tasks learnt so far, oldest first.
        blocks: sha256 of every block, oldest first; each is a PEFT ``adapter_model.safetensors``.
        router: sha256 of keys (T, D) and query projection; None without attention.
        targets: mean weights of the blocks there were, on every task after it was learnt.
        state: sha256 of what the method keeps beside the blocks, by name.
        parent: sha256 of the manifest of the version before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    method: AnyMethod
    backbone: BackboneRef
    pet: PETConfig
    attention: AttentionConfig | None
    tasks: tuple[LearntTask, ...]
    blocks: tuple[str, ...]
    router: str | None
    targets: tuple[tuple[float, ...], ...]
    state: dict[str, str] = {}
    parent: str | None

    # Of an earlier schema, as it was read: what this one adds must not rename what was written then.
    _written: bytes | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        grows = self.method.pool == "block per task"
        blocks = list(range(1, len(self.tasks) + 1)) if grows else [1] * len(self.tasks)
        if not self.tasks or len(self.blocks) != blocks[-1] or [len(row) for row in self.targets] != blocks:
            raise ValueError(
                f"{len(self.tasks)} tasks, {len(self.blocks)} blocks and targets over "
                f"{[len(row) for row in self.targets]} blocks do not belong together"
            )
        if (self.attention is None) != (self.router is None):
            raise ValueError("attention and router are there together or not at all")
        if self.method.shared_attention != (self.attention is not None):
            has = "has no" if self.attention is None else "has an"
            raise ValueError(f"method {self.method.name} does not go with a version that {has} attention")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Manifest:
        """A changed copy is another manifest than the one that was read."""
        copy = super().model_copy(update=update, deep=deep)
        copy._written = None
        return copy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON; of a manifest that an earlier release wrote, the very bytes."""
        return self._written or json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the name of this version's content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def block_names(self) -> tuple[str, ...]:
        """The task that made each block, oldest first; a block that all tasks share is named so."""
        grows = self.method.pool == "block per task"
        return tuple(task.name for task in self.tasks) if grows else ("all tasks",)

    def chosen(self, task: str | None) -> Sequence[int]:
        """Indices of the blocks that answer; a ``task`` is looked at where the method needs one.

        Raises:
            SnapshotError: the method needs a task that the version has learnt, and this is none.
        """
        return self.method.active(self.index_of(task)) if self.method.needs_task else range(len(self.blocks))

    def blocks_for(self, task: str | None) -> tuple[str, ...]:
        """The names of the blocks that answer, as ``chosen``."""
        return tuple(self.block_names[index] for index in self.chosen(task))

    def index_of(self, task: str | None) -> int:
        """The place of a task that the version has learnt.

        Raises:
            SnapshotError: it has not, or none is named.
        """
        names = [learnt.name for learnt in self.tasks]
        if task in names:
            return names.index(task)
        given = "none is named" if task is None else f"it has not learnt {task}"
        raise SnapshotError(
            f"Method {self.method.name} answers only where the task is told, and {given}; it knows: {', '.join(names)}"
        )

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
        if isinstance(version, int) and version < 3 and isinstance(value.get("method"), str):
            value["method"] = {"name": value["method"]}  # methods had no options yet
        if version == 1 and isinstance(value.get("attention"), dict):
            # Schema 1 kept the router's rate, a setting of training alone, under another name.
            value["attention"].pop("learning_rate", None)
        try:
            manifest = cls.model_validate(value)
        except ValidationError as error:
            where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise SnapshotError(f"The snapshot's manifest is not valid: {where}") from error
        if version != SCHEMA_VERSION:
            manifest._written = data
        return manifest


def load_pool(manifest: Manifest, store: BlobStore, backbone: PreTrainedModel, task: str | None = None) -> PETPool:
    """The pool of a version, every block frozen.

    Args:
        manifest: the version.
        store: holds its blobs; each is verified.
        backbone: the loaded ``manifest.backbone``.
        task: what the inputs are known to be of; needed, and looked at, where the method ``needs_task``.

    Raises:
        SnapshotError: a blob is no safetensors file or does not fit the backbone; no task was named to a
            method that needs one, or one that the version has not learnt.
        StoreError: a blob is missing or damaged.
    """
    return load_blocks(manifest, store, backbone, manifest.chosen(task))


def load_blocks(manifest: Manifest, store: BlobStore, backbone: PreTrainedModel, chosen: Sequence[int]) -> PETPool:
    """A pool of the ``chosen`` blocks of a version, every one frozen; all of them where they are mixed by attention.

    Raises:
        SnapshotError: a blob is no safetensors file or does not fit the backbone.
        StoreError: a blob is missing or damaged.
    """
    pool = empty_pool(backbone, manifest.method, manifest.pet, manifest.attention)
    for index in chosen:
        pool.blocks.append_frozen(load_blob(manifest.blocks[index], store))
    if pool.attention is not None:
        pool.attention, pool.frozen_keys = load_router(manifest, store)
        if pool.frozen_keys.shape[1] != embedding_matrix(backbone).shape[1]:
            raise SnapshotError(
                f"The snapshot's router is {pool.frozen_keys.shape[1]} wide, this backbone's embeddings "
                f"{embedding_matrix(backbone).shape[1]}; give the backbone it was learnt on"
            )
    return pool


def empty_pool(backbone: PreTrainedModel, method: Method, pet: PETConfig, attention: AttentionConfig | None) -> PETPool:
    """A pool for ``backbone`` that takes blocks of the method's kind."""
    return PETPool(method.blocks(backbone, pet), embedding_matrix(backbone).shape[1], attention)


def load_router(manifest: Manifest, store: BlobStore) -> tuple[SharedAttention, Tensor]:
    """Query projection and keys (T, D) of a version that has shared attention.

    Args:
        manifest: the version.
        store: holds its blobs.

    Raises:
        SnapshotError: the blob is no safetensors file, or its tensors do not fit.
        StoreError: it is missing or damaged.
    """
    if manifest.attention is None or manifest.router is None:
        raise ValueError("the version has no shared attention")
    tensors = load_blob(manifest.router, store)
    width = tensors["centre"].shape[-1] if "centre" in tensors else 0
    attention = SharedAttention(width, manifest.attention)
    expected = {name: tuple(value.shape) for name, value in attention.state_dict().items()}
    expected["keys"] = (len(manifest.blocks), width)
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if given != expected:
        differing = sorted(name for name, _ in set(given.items()) ^ set(expected.items()))
        raise SnapshotError(
            f"The snapshot's router does not fit its own width or blocks: {', '.join(dict.fromkeys(differing))}"
        )
    keys = tensors.pop("keys")
    attention.load_state_dict(tensors)
    return attention, keys


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
        SnapshotError: no such block or no block that PEFT has a kind for, or the folder holds something.
        StoreError: the block's blob is missing or damaged.
    """
    if isinstance(manifest.pet, FullConfig):
        raise SnapshotError("The version is a whole set of weights (pet.type=full), which is no PEFT adapter")
    if type(manifest.method).blocks is not Method.blocks:
        raise SnapshotError(f"The blocks of method {manifest.method.name} are of its own kind, which PEFT has not")
    if not 0 <= index < len(manifest.blocks):
        raise SnapshotError(f"There is no block {index}; the version has blocks 0 to {len(manifest.blocks) - 1}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotError(f"{folder} is not an empty folder; give one that is empty or not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    store.fetch_to(manifest.blocks[index], folder / "adapter_model.safetensors")
    _peft_config(manifest, store).save_pretrained(str(folder))


def _peft_config(manifest: Manifest, store: BlobStore) -> Any:
    from peft import LoraConfig, PromptTuningConfig, TaskType  # noqa: PLC0415  seconds, and for exports alone

    pet = manifest.pet
    common: dict[str, Any] = {
        "base_model_name_or_path": manifest.backbone.path,
        "revision": manifest.backbone.revision,
        "inference_mode": True,
    }
    if isinstance(pet, LoRAConfig):
        return LoraConfig(
            r=pet.r,
            lora_alpha=pet.lora_alpha,  # type: ignore[arg-type]  # a fraction does as well
            lora_dropout=pet.lora_dropout,
            target_modules=list(pet.target_modules),
            **common,
        )
    assert isinstance(pet, PromptConfig)  # noqa: S101 - export_block takes no other kind
    encoder_decoder = stored_model_config(manifest.backbone, store).is_encoder_decoder
    return PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM,
        num_virtual_tokens=pet.length,
        # PEFT's default for an encoder-decoder puts a second prompt in front of the decoder.
        num_transformer_submodules=1,
        **common,
    )


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
