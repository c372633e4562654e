"""How a worker gets its backbone.

A backbone travels through the store by content, so that any worker on any node loads the very bytes the run was
started with. What this machine has already is not copied.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.checkpoint import check_loaded
from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.backbones.files import cache_folder, copy_of, file_digest, remember
from sapt_core.backbones.hub import fetched
from sapt_core.backbones.reference import FILES, BackboneRef, load_model_config, location, model_class
from sapt_core.backbones.tokens import answer_settings, load_tokenizer
from sapt_core.blobs import BlobStore
from sapt_core.errors import BackboneError, ServiceError
from sapt_core.settings import BackboneConfig


def store_backbone(config: BackboneConfig, ref: BackboneRef, store: BlobStore) -> None:
    """Put the backbone's files into the store, for workers on other nodes.

    Raises:
        BackboneError: a file has changed since it was looked at.
    """
    for name, digest in (ref.files or {}).items():
        if store.put_file(location(config) / name, digest) != digest:
            raise BackboneError(f"backbone.path {config.path}: {name} has changed meanwhile; run again")


@lru_cache(maxsize=1)
def _load_cached(ref: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reference = BackboneRef.model_validate_json(ref)
    config = load_model_config(folder, reference.path)
    try:
        found: Any = model_class(config).from_pretrained(
            folder,
            dtype=reference.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            # Shapes that differ are told with all other faults.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise BackboneError(f"backbone {reference.path} cannot be loaded: {reason(error)}") from error
    model, loaded = found
    check_loaded(loaded, reference.path)
    model.requires_grad_(False).train(False)
    tokenizer = load_tokenizer(folder, reference.path)
    model.generation_config = answer_settings(model, tokenizer)
    return model, tokenizer


def load_backbone(ref: BackboneRef, store: BlobStore) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; one backbone stays loaded in a process, for the stages that follow.

    Raises:
        BackboneError: it cannot be loaded, weights are missing, or the tokenizer has no padding and no end token.
        StoreError: a file is not in the store, or is damaged.
    """
    folder = fetched(ref.path, ref.revision, FILES) if ref.files is None else _materialise(ref, store)
    # Sorted: a manifest names the same files in another order.
    return _load_cached(json.dumps(ref.model_dump(mode="json"), sort_keys=True), folder)


def _materialise(ref: BackboneRef, store: BlobStore) -> Path:
    """A folder of the files on this machine, complete or not at all; those that lie here already are linked to."""
    cache = cache_folder() / "backbones"
    folder = cache / ref.digest
    files = ref.files or {}
    try:
        if folder.is_dir():
            if all((folder / name).is_file() and file_digest(folder / name) == files[name] for name in files):
                return folder
            shutil.rmtree(folder)  # damaged since it was fetched
        partial = cache / f".partial-{uuid4().hex}"
        partial.mkdir(parents=True)
    except OSError as error:
        raise ServiceError(
            f"{cache} cannot be used ({error.strerror}): set XDG_CACHE_HOME to a folder with free space that this user "
            "can write to"
        ) from error
    try:
        for name, digest in files.items():
            here = copy_of(digest)
            if here is not None and here.parent != folder:
                (partial / name).symlink_to(here)
            else:
                store.fetch_to(digest, partial / name)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another worker was first otherwise
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name, digest in files.items():
        if not (folder / name).is_symlink():
            remember(folder / name, digest)
    return folder
