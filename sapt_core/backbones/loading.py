"""How a worker gets its backbone.

A local folder travels through the store by content, so that any worker on any node loads the very
bytes the run was started with; a hub model is named by its commit.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sapt_core.backbones.reference import BackboneRef, file_digest, first_line, load_model_config, model_class
from sapt_core.blobs import BlobStore
from sapt_core.errors import BackboneError
from sapt_core.settings import BackboneConfig


def store_backbone(config: BackboneConfig, ref: BackboneRef, store: BlobStore) -> None:
    """Put a folder's files into the store, for workers on other nodes."""
    for name, digest in (ref.files or {}).items():
        store.put_file(Path(config.path).expanduser() / name, digest)


# Folders whose files this process has hashed.
_verified: set[Path] = set()


@lru_cache(maxsize=1)
def _load_cached(ref: str, folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reference = BackboneRef.model_validate_json(ref)
    source: dict[str, Any] = {"revision": reference.revision, "trust_remote_code": False}
    config = load_model_config(folder, reference.revision)
    model: PreTrainedModel = model_class(config).from_pretrained(
        folder, dtype=reference.dtype, use_safetensors=True, **source
    )
    model.requires_grad_(False).train(False)
    # A checkpoint's own taste in decoding (penalties, top_p) must not leak into scores: only its tokens stay.
    own = model.generation_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    return model, AutoTokenizer.from_pretrained(folder, **source)


def load_backbone(ref: BackboneRef, store: BlobStore) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; one backbone stays loaded in a process, for the stages that follow.

    Raises:
        BackboneError: it cannot be loaded, or the tokenizer has no padding and no end token.
        StoreError: a file is not in the store, or is damaged.
    """
    folder = ref.path if ref.files is None else str(_materialise(ref, store))
    try:
        # Sorted: a manifest names the same files in another order.
        model, tokenizer = _load_cached(json.dumps(ref.model_dump(mode="json"), sort_keys=True), folder)
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {ref.path} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BackboneError(f"the tokenizer of {ref.path} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _materialise(ref: BackboneRef, store: BlobStore) -> Path:
    """The folder's files on this machine, complete or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sapt" / "backbones"
    folder = cache / ref.digest
    files = ref.files or {}
    if folder in _verified:
        return folder
    if folder.is_dir():
        if all((folder / name).is_file() and file_digest(folder / name) == digest for name, digest in files.items()):
            _verified.add(folder)
            return folder
        shutil.rmtree(folder)  # damaged since it was fetched
    partial = cache / f".partial-{uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        for name, digest in files.items():
            store.fetch_to(digest, partial / name)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another worker was first otherwise
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _verified.add(folder)
    return folder
