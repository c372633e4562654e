"""From blobs by sha256 to a pool or a whole version, and back: blocks and router as safetensors files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.device import default_device
from sapt_core.backbones.loading import beside_backbone, load_backbone
from sapt_core.data.collate import Sharing
from sapt_core.errors import SnapshotError
from sapt_core.io.blobs import BlobStore
from sapt_core.methods.base import Method
from sapt_core.pool.attention import SharedAttention
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool
from sapt_core.settings import AttentionConfig, PETConfig
from sapt_core.versions.manifest import Manifest


@dataclass(frozen=True)
class _Wanted:
    """Blocks of a version: the same from whatever store they are read."""

    manifest: Manifest
    blocks: tuple[int, ...]
    store: BlobStore = field(compare=False)


@beside_backbone
def _attached(wanted: _Wanted) -> tuple[SaptModel, PreTrainedTokenizerBase]:
    manifest, store = wanted.manifest, wanted.store
    backbone, tokenizer = load_backbone(manifest.backbone, store)
    pool = load_blocks(manifest, store, backbone, wanted.blocks)
    return SaptModel(backbone, pool, Sharing(answering=manifest.answering)).to(default_device()), tokenizer


def load_version(manifest: Manifest, store: BlobStore, task: str) -> tuple[SaptModel, PreTrainedTokenizerBase]:
    """A version on its backbone where it computes, and the tokenizer, to ask and not to change.

    The last one stays ready in a process, for the tasks that it is scored on one after another. It is let go of as
    soon as anything else loads a version or a backbone.

    Args:
        manifest: the version.
        store: holds its blobs and those of its backbone.
        task: as of ``load_pool``.

    Raises:
        SnapshotError: as ``load_pool``.
        StoreError: a blob is missing or damaged.
        BackboneError: the backbone cannot be loaded.
    """
    return _attached(_Wanted(manifest, tuple(manifest.chosen(task)), store))


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
    if chosen:
        pool.blocks.append_frozen(*(load_blob(manifest.blocks[index], store) for index in chosen))
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
    with tempfile.TemporaryDirectory() as folder:  # a whole set of weights would lie in memory three times
        path = Path(folder, "block.safetensors")
        save_file(_on_cpu(pool.blocks.current_state()), path)
        return store.put_file(path)


def store_router(pool: PETPool, store: BlobStore, order: Sequence[int] | None = None) -> str | None:
    """Put all keys and the query projection into the store; None without attention.

    Args:
        pool: has them.
        store: gets them.
        order: for each of the version's blocks its place in the pool; None where both have one order.
    """
    if pool.attention is None:
        return None
    keys = pool.keys.detach()
    tensors = {"keys": keys if order is None else keys[list(order)], **pool.attention.state_dict()}
    return store.put(save_tensors(_on_cpu(tensors)))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}
