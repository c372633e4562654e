"""Frozen backbones by content: which one exactly, and what its configuration says."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from sapt_core.blobs import BlobStore
from sapt_core.errors import BackboneError
from sapt_core.hashing import Digest, canonical_hash
from sapt_core.settings import HUB_REVISION, BackboneConfig

# What transformers may read of a model folder; pickled weights are not among it.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

# One of them holds a vocabulary; without any, transformers makes up an empty tokenizer.
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
_SEPARATOR = re.compile(r"[/\\\0]")


class BackboneRef(BaseModel):
    """A backbone by content.

    Attributes:
        path: hub id, or the folder's own name; where the folder lies is not part of what it is.
        revision: hub commit, None for a folder.
        files: sha256 of every file of a folder, None for a hub model.
        dtype: number format of the frozen weights; auto is the checkpoint's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    # Part of an address and of a path in the hub's cache.
    revision: str | None = Field(None, pattern=HUB_REVISION)
    files: dict[str, Digest] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """Names become paths on every machine that reads somebody else's version."""
        for name in files or {}:
            if _SEPARATOR.search(name) or not any(fnmatchcase(name, pattern) for pattern in FILES):
                raise ValueError(f"{name!r} is no plain name of a model's file ({', '.join(FILES)})")
        return files

    @model_validator(mode="after")
    def _hub_address(self) -> BackboneRef:
        # Of a folder, path is what messages call it and nothing else.
        if self.files is None and not _HUB_ID.fullmatch(self.path):
            raise ValueError(f"{self.path!r} is no hub id (owner/name), and there are no files")
        return self

    @property
    def digest(self) -> str:
        """sha256 that names the weights and tokenizer, wherever they lie."""
        content: Any = self.files if self.files is not None else [self.path, self.revision]
        return canonical_hash([content, self.dtype])


def identify(config: BackboneConfig) -> BackboneRef:
    """Name the configured backbone by content and refuse what is not a language model.

    Raises:
        BackboneError: neither a model folder nor a hub model that can be reached, pickled weights
            only, no tokenizer, or a class that is neither encoder-decoder nor causal.
    """
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise BackboneError(
                f"backbone.path {config.path}: no *.safetensors there; "
                "give a folder saved by save_pretrained (pickled weights are not loaded)"
            )
        if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            raise BackboneError(
                f"backbone.path {config.path}: no tokenizer there; save the model's own beside it by save_pretrained"
            )
        files = {
            path.name: file_digest(path)
            for pattern in FILES
            for path in sorted(folder.glob(pattern))
            if path.is_file() and not _SEPARATOR.search(path.name)
        }
        ref = BackboneRef(path=folder.resolve().name, files=files, dtype=config.dtype)
    elif folder.exists() or (os.sep in config.path.removeprefix("~") and not _looks_like_hub_id(config.path)):
        raise BackboneError(f"backbone.path {config.path}: not a folder; give a model folder or a hub id (owner/name)")
    else:
        ref = BackboneRef(path=config.path, revision=config.revision, dtype=config.dtype)
    model_config = load_model_config(location(config), config.revision)
    if ref.files is None:
        ref = ref.model_copy(update={"revision": getattr(model_config, "_commit_hash", None) or config.revision})
    model_class(model_config)
    return ref


def load_model_config(path: str, revision: str | None) -> PretrainedConfig:
    """The model's configuration alone, without weights.

    Raises:
        BackboneError: it cannot be found or read.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"backbone.path {path}: not a model that can be loaded ({first_line(error)}); "
            "give a folder with config.json, or a hub id while the hub can be reached"
        ) from error
    return config


def stored_model_config(ref: BackboneRef, store: BlobStore) -> PretrainedConfig:
    """The configuration of a backbone that a version names, without its weights.

    Raises:
        BackboneError: it cannot be found or read.
        StoreError: the folder's config.json is not in the store, or is damaged.
    """
    if ref.files is None:
        return load_model_config(ref.path, ref.revision)
    with tempfile.TemporaryDirectory() as folder:
        store.fetch_to(ref.files["config.json"], Path(folder, "config.json"))
        return load_model_config(folder, None)


def model_class(config: PretrainedConfig) -> type[AutoModelForSeq2SeqLM] | type[AutoModelForCausalLM]:
    """The auto class that loads a model of this configuration with a language-modelling head.

    Raises:
        BackboneError: the architecture is neither encoder-decoder nor causal.
    """
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    # BERT and its kind have a causal head too, but their configuration decides whether they look ahead.
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not config.is_encoder_decoder and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not looks_ahead:
        return AutoModelForCausalLM
    raise BackboneError(
        f"backbone of type {config.model_type!r} is neither an encoder-decoder nor a causal language model; "
        "use a T5-, Llama- or Qwen-class model"
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights (meta device), to look at its modules before anything is loaded."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config).from_config(config)  # type: ignore[no-untyped-call]
    return model


def location(config: BackboneConfig) -> str:
    """What transformers loads from: the folder, with a home folder's ~ written out, or the hub id."""
    folder = Path(config.path).expanduser()
    return str(folder) if folder.is_dir() else config.path


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
