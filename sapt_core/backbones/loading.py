"""How a worker gets its backbone.

A backbone travels through the store by content, so that any worker on any node loads the very bytes the run was
started with. What this machine has already is not copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.checkpoint import check_loaded, own_dtype, weight_files
from sapt_core.backbones.dense import dense_folder
from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.backbones.files import cache_folder, copy_of, file_digest, remember
from sapt_core.backbones.hub import fetched
from sapt_core.backbones.last import Given, Last, Loaded
from sapt_core.backbones.reference import FILES, BackboneRef, load_model_config, model_class, skeleton, source
from sapt_core.backbones.tokens import answer_settings, load_tokenizer
from sapt_core.errors import BackboneError, ServiceError
from sapt_core.io.blobs import BlobStore
from sapt_core.settings import BackboneConfig


def store_backbone(config: BackboneConfig, ref: BackboneRef, store: BlobStore) -> None:
    """Put the backbone's files into the store, for workers on other nodes.

    Raises:
        BackboneError: a file has changed since it was looked at.
    """
    for name, digest in (ref.files or {}).items():
        if store.put_file(source(config) / name, digest) != digest:
            raise BackboneError(f"backbone.path {config.path}: {name} has changed meanwhile; run again")


@Last
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
    # Sorted: a manifest names the same files in another order.
    return _load_cached(json.dumps(ref.model_dump(mode="json"), sort_keys=True), folder_of(ref, store))


def beside_backbone(load: Callable[Given, Loaded]) -> Last[Given, Loaded]:
    """A function that keeps what it made last of a backbone, until this or another one is loaded by somebody else."""
    return Last(load, on=_load_cached)


def load_encoding(ref: BackboneRef, store: BlobStore) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer, for what reads text and asks no model.

    Raises:
        BackboneError: one cannot be loaded, or the tokenizer has no padding and no end token.
        StoreError: a file is not in the store, or is damaged.
    """
    folder = folder_of(ref, store)
    return load_model_config(folder, ref.path), load_tokenizer(folder, ref.path)


def load_embeddings(ref: BackboneRef, store: BlobStore) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its token embeddings alone, every other weight without content (meta device), and the tokenizer.

    Where the embeddings are more than a matrix, or the weight files call it something else than the model does, the
    whole model is loaded.

    Raises:
        BackboneError: it cannot be loaded, or the tokenizer has no padding and no end token.
        StoreError: a file is not in the store, or is damaged.
    """
    folder = folder_of(ref, store)
    config = load_model_config(folder, ref.path)
    model = skeleton(config).requires_grad_(False).train(False)
    layer = model.get_input_embeddings()
    matrix = _read_matrix(folder, model, layer, ref.path) if type(layer) is nn.Embedding else None
    if matrix is None:
        return load_backbone(ref, store)
    dtype = own_dtype(folder, config, ref.path) if ref.dtype == "auto" else getattr(torch, ref.dtype)
    layer.weight = nn.Parameter(matrix.to(dtype), requires_grad=False)
    return model, load_tokenizer(folder, ref.path)


def _read_matrix(folder: Path, model: PreTrainedModel, layer: nn.Embedding, name: str) -> Tensor | None:
    """The layer's matrix from the weight files, None if no tensor there has one of its names and its shape.

    Its own name counts before those of layers that share it, and a checkpoint of the model without its head leaves
    out the prefix.
    """
    own = [f"{module}.weight" for module, found in model.named_modules() if found is layer]
    shared = [key for key, value in model.named_parameters(remove_duplicate=False) if value is layer.weight]
    names = [each for key in (*own, *shared) for each in (key, key.removeprefix(f"{model.base_model_prefix}."))]
    files: dict[str, Path] = {}
    try:
        for path in weight_files(folder, model.config, name):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        key = next((key for key in names if key in files), None)
        if key is None:
            return None
        with safe_open(files[key], framework="pt") as file:
            matrix: Tensor = file.get_tensor(key)
    except UNREADABLE as error:
        raise BackboneError(f"backbone {name} cannot be loaded: {reason(error)}") from error
    return matrix if matrix.shape == layer.weight.shape else None


def folder_of(ref: BackboneRef, store: BlobStore) -> Path:
    """A folder on this machine that transformers loads the backbone from; what is not here is fetched.

    Raises:
        BackboneError: a hub model that cannot be reached, or a GGUF file that cannot be read.
        StoreError: a file is not in the store, or is damaged.
    """
    if ref.files is None:
        return fetched(ref.path, ref.revision, FILES)
    folder = _materialise(ref, store)
    if ref.gguf_file is None:
        return folder
    return dense_folder(folder / ref.gguf_file, ref.files[ref.gguf_file], ref.dtype, ref.path)


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
