"""Frozen backbones by content: which one exactly, and what its configuration says."""

from __future__ import annotations

import logging
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

from sapt_core.backbones.checkpoint import check_fetched, own_dtype, read_headers
from sapt_core.backbones.dense import dense_folder, dense_place
from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.backbones.files import file_digest
from sapt_core.backbones.hub import fetched
from sapt_core.errors import BackboneError
from sapt_core.io.blobs import BlobStore
from sapt_core.io.hashing import Digest, canonical_hash
from sapt_core.io.shipped import located
from sapt_core.settings import BackboneConfig
from sapt_core.task_settings import HUB_ID, HUB_REVISION

log = logging.getLogger(__name__)

# What transformers may read of a model folder; pickled weights are not among it.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

# One of them holds a vocabulary; without any, transformers makes up an empty tokenizer.
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*")

# A whole model in one file, which is taken where a config names it.
GGUF = "*.gguf"

_HUB_ID = re.compile(HUB_ID)
_SEPARATOR = re.compile(r"[/\\\0]")


class BackboneRef(BaseModel):
    """A backbone by content.

    Attributes:
        path: hub id, or the folder's own name; where the folder lies is not part of what it is.
        revision: hub commit, None for a folder.
        files: sha256 of every file; None for a hub model of an earlier release, which named it by its commit alone.
        dtype: number format of the frozen weights; auto is the checkpoint's own.
        gguf_file: the only one of ``files``, which holds model and tokenizer and is made dense wherever it is loaded;
            None for a folder that transformers loads as it is.
        joined: prompts and their answers are tokenised as one text, as for a decoder-only model they are. Versions
            that were learnt with the two tokenised apart do not say so, and answer as they were taught.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    # Part of an address and of a path in the hub's cache.
    revision: str | None = Field(None, pattern=HUB_REVISION)
    files: dict[str, Digest] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gguf_file: str | None = Field(None, exclude_if=lambda file: file is None)
    # Left out where it is not so: encoder-decoders, to which it means nothing, keep their names.
    joined: bool = Field(False, exclude_if=lambda joined: not joined)

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """Names become paths on every machine that reads somebody else's version."""
        for name in files or {}:
            if _SEPARATOR.search(name) or not any(fnmatchcase(name, pattern) for pattern in (*FILES, GGUF)):
                raise ValueError(f"{name!r} is no plain name of a model's file ({', '.join(FILES)})")
        return files

    @model_validator(mode="after")
    def _hub_address(self) -> BackboneRef:
        # Of a folder, path is what messages call it and nothing else.
        if self.files is None and not _HUB_ID.fullmatch(self.path):
            raise ValueError(f"{self.path!r} is no hub id (owner/name), and there are no files")
        return self

    @model_validator(mode="after")
    def _gguf_alone(self) -> BackboneRef:
        ggufs = [name for name in self.files or {} if fnmatchcase(name, GGUF)]
        if ggufs != [self.gguf_file] * (self.gguf_file is not None) or (ggufs and len(self.files or {}) > 1):
            raise ValueError("a GGUF file is a whole backbone: gguf_file names it, and there is no other file")
        return self

    @property
    def digest(self) -> str:
        """sha256 that names the weights and tokenizer, wherever they lie."""
        content: Any = self.files if self.files is not None else [self.path, self.revision]
        return canonical_hash([content, self.dtype])

    def is_of(self, other: BackboneRef) -> bool:
        """Whether it is what ``other`` names, perhaps without files, as an earlier release named hub models."""
        if other.files is None:
            return (self.path, self.revision, self.dtype) == (other.path, other.revision, other.dtype)
        return self.digest == other.digest


def identify(config: BackboneConfig) -> BackboneRef:
    """Name the configured backbone by content and refuse what is not a language model.

    A float16 checkpoint is named as what it is loaded as, float32: steps in float16 vanish without loss scaling, which
    nothing here does.

    Raises:
        BackboneError: neither a model folder nor a hub model that can be reached, pickled weights only, no tokenizer,
            files that git did not fetch or that are damaged, or a class that is neither encoder-decoder nor causal.
    """
    if config.gguf_file is not None:
        return _identify_gguf(config, config.gguf_file)
    folder, name = location(config), config.path
    names = [
        path.name
        for pattern in FILES
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not _SEPARATOR.search(path.name)
    ]
    ggufs = ", ".join(sorted(path.name for path in folder.glob(GGUF)))
    if not any(name.endswith(".safetensors") for name in names) and ggufs:
        raise BackboneError(
            f"backbone.path {name}: GGUF files lie there and no *.safetensors: name one as backbone.gguf_file ({ggufs})"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise BackboneError(
            f"backbone.path {name}: no *.safetensors there; "
            "give a folder saved by save_pretrained (pickled weights are not loaded)"
        )
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise BackboneError(
            f"backbone.path {name}: no tokenizer there; save the model's own beside it by save_pretrained"
        )
    if "adapter_config.json" in names:
        raise BackboneError(
            f"backbone.path {name}: an adapter lies there (adapter_config.json), which would be loaded with the model; "
            "give the model alone, or merge the adapter into it and save that"
        )
    check_fetched(folder, names, name)
    model_config = load_model_config(folder, name)
    model_class(model_config)
    dtype = config.dtype
    if dtype == "auto" and own_dtype(folder, model_config, name) == torch.float16:
        dtype = "float32"
        log.warning(
            "backbone %s is stored in float16, in which training fails without loss scaling: it is loaded as float32; "
            "backbone.dtype=bfloat16 takes half of the memory",
            name,
        )
    read_headers(folder, model_config, name)
    given: dict[str, Any] = {
        "files": {file: file_digest(folder / file) for file in names},
        "dtype": dtype,
        "joined": not model_config.is_encoder_decoder,
    }
    return _named(config, folder, given)


def _identify_gguf(config: BackboneConfig, file: str) -> BackboneRef:
    model_config = load_model_config(location(config), config.path)
    model_class(model_config)
    folder = source(config)
    given: dict[str, Any] = {
        "files": {file: file_digest(folder / file)},
        "dtype": config.dtype,
        "gguf_file": file,
        "joined": not model_config.is_encoder_decoder,
    }
    return _named(config, folder, given)


def _named(config: BackboneConfig, folder: Path, given: Mapping[str, Any]) -> BackboneRef:
    if located(config.path).is_dir():
        return BackboneRef(path=folder.resolve().name, **given)
    return BackboneRef(path=config.path, revision=folder.name, **given)


def weight_bytes(config: BackboneConfig) -> int:
    """Size of a folder's weights, which is about what a process takes that has loaded them; 0 of what is not here."""
    folder = located(config.path)
    if config.gguf_file is not None and (file := folder / config.gguf_file).is_file():
        folder = dense_place(file_digest(file), config.dtype)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


def load_model_config(folder: Path, name: str, gguf_file: str | None = None) -> PretrainedConfig:
    """The model's configuration alone, without weights.

    Args:
        folder: the model's.
        name: what messages call it.
        gguf_file: of the folder, to be read in the place of its config.json.

    Raises:
        BackboneError: it cannot be found or read.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
    except UNREADABLE as error:
        raise BackboneError(
            f"backbone.path {name}: not a model that can be loaded ({reason(error)}); "
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
        return load_model_config(fetched(ref.path, ref.revision, FILES), ref.path)
    file = ref.gguf_file or "config.json"
    if file not in ref.files:
        raise BackboneError(f"backbone {ref.path}: the version names no config.json among its files")
    with tempfile.TemporaryDirectory() as folder:
        store.fetch_to(ref.files[file], Path(folder, file))
        return load_model_config(Path(folder), ref.path, ref.gguf_file)


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
    """The model without weights (meta device), to look at its modules before anything is loaded.

    Raises:
        BackboneError: no model can be made of the configuration.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(config)  # type: ignore[no-untyped-call]
    except UNREADABLE as error:
        raise BackboneError(
            f"config.json describes no {config.model_type} model that can be made: {reason(error)}"
        ) from error
    return model


def location(config: BackboneConfig) -> Path:
    """The folder of the configured backbone that transformers loads as it is; of a GGUF file the one made of it.

    Raises:
        BackboneError: as for ``source``, or a GGUF file that cannot be read.
        ServiceError: no folder can be made of a GGUF file, for want of room or rights.
    """
    folder = source(config)
    if config.gguf_file is None:
        return folder
    file = folder / config.gguf_file
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in folder.glob(GGUF))) or "none"
        raise BackboneError(f"backbone.path {config.path}: no file {file.name} there; GGUF files there: {there}")
    return dense_folder(file, file_digest(file), config.dtype, config.path)


def source(config: BackboneConfig) -> Path:
    """The folder of the backbone's own files on this machine; a hub model is fetched first, if it is not there yet.

    Raises:
        BackboneError: neither a folder nor a hub model that can be reached.
    """
    folder = located(config.path)
    if folder.is_dir():
        return folder
    if folder.is_file() and fnmatchcase(folder.name, GGUF):
        raise BackboneError(
            f"backbone.path {config.path}: give the folder, and the file as backbone.gguf_file "
            f"(backbone.path={Path(config.path).parent} backbone.gguf_file={folder.name})"
        )
    if folder.exists() or not _HUB_ID.fullmatch(config.path):
        raise BackboneError(f"backbone.path {config.path}: not a folder; give a model folder or a hub id (owner/name)")
    return fetched(config.path, config.revision, FILES if config.gguf_file is None else (config.gguf_file,))
