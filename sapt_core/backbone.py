"""Frozen backbones: which one exactly, and how a worker gets it.

A local folder travels through the store by content, so that any worker on any node loads the very
bytes the run was started with; a hub model is named by its commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sapt_core.benchmarks.prepare import check_fits, check_writable
from sapt_core.benchmarks.task import Task
from sapt_core.blobs import BlobStore
from sapt_core.blocks.lora import find_sites
from sapt_core.config import ExperimentConfig
from sapt_core.errors import BackboneError
from sapt_core.hashing import canonical_hash
from sapt_core.settings import BackboneConfig, LoRAConfig, PromptConfig

# What transformers may read of a model folder; pickled weights are not among it.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

# One of them holds a vocabulary; without any, transformers makes up an empty tokenizer.
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*")


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
    revision: str | None = None
    files: dict[str, str] | None = None
    dtype: str = "auto"

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
        files = {path.name: _sha256(path) for pattern in FILES for path in sorted(folder.glob(pattern))}
        ref = BackboneRef(path=folder.resolve().name, files=files, dtype=config.dtype)
    elif folder.exists() or (os.sep in config.path.removeprefix("~") and not _looks_like_hub_id(config.path)):
        raise BackboneError(f"backbone.path {config.path}: not a folder; give a model folder or a hub id (owner/name)")
    else:
        ref = BackboneRef(path=config.path, revision=config.revision, dtype=config.dtype)
    model_config = load_model_config(_location(config), config.revision)
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
            f"backbone.path {path}: not a model that can be loaded ({_first_line(error)}); "
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


def store_backbone(config: BackboneConfig, ref: BackboneRef, store: BlobStore) -> None:
    """Put a folder's files into the store, for workers on other nodes."""
    for name, digest in (ref.files or {}).items():
        if not store.has(digest):
            store.put_file(Path(config.path).expanduser() / name)


def check_backbone(config: ExperimentConfig, tasks: Sequence[Task]) -> None:
    """Refuse, without loading weights, a backbone that cannot carry the configured blocks and prompts.

    Raises:
        BackboneError: target modules that match nothing, prompts (soft ones too) and answers longer than
            the model's positions, or a tokenizer that cannot be loaded or cannot write a marker.
        DataError: tasks whose template leaves no room for an input.
    """
    path, revision = _location(config.backbone), config.backbone.revision
    model_config = load_model_config(path, revision)
    model = skeleton(model_config)
    for pet in (config.pet, config.generator.pet):
        if isinstance(pet, LoRAConfig):
            find_sites(model, pet.target_modules)
    config.method.check_backbone(model_config)
    _check_positions(config, path, model_config, len(tasks))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BackboneError(f"the tokenizer of {path} cannot be loaded: {_first_line(error)}") from error
    if config.method.shared_attention and config.reflection.source == "generated":
        check_writable(tokenizer, config.generator.content)
    check_fits(
        tasks,
        tokenizer,
        max_source_tokens=config.benchmark.max_source_tokens,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )


def _check_positions(config: ExperimentConfig, path: str, model_config: PretrainedConfig, tasks: int) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is None:  # relative positions, as T5's, have no end
        return
    prompt = config.method.soft_tokens(config.pet.length, tasks) if isinstance(config.pet, PromptConfig) else 0
    benchmark = config.benchmark
    source = prompt + benchmark.max_source_tokens
    if model_config.is_encoder_decoder:
        asked = {"pet.length and benchmark.max_source_tokens" if prompt else "benchmark.max_source_tokens": source}
        asked["benchmark.max_target_tokens"] = benchmark.max_target_tokens
    else:
        fields = "benchmark.max_source_tokens and max_target_tokens"
        asked = {f"pet.length, {fields}" if prompt else fields: source + benchmark.max_target_tokens}
    asked["generator.max_tokens"] = config.generator.max_tokens
    faults = [f"{fields} ask for {length}" for fields, length in asked.items() if length > positions]
    if faults:
        raise BackboneError(f"backbone {path} has {positions} positions, but {'; '.join(faults)}: lower them")


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
        raise BackboneError(f"backbone {ref.path} cannot be loaded: {_first_line(error)}") from error
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
        if all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in files.items()):
            _verified.add(folder)
            return folder
        shutil.rmtree(folder)  # damaged since it was fetched
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
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


def _location(config: BackboneConfig) -> str:
    """What transformers loads from: the folder, with a home folder's ~ written out, or the hub id."""
    folder = Path(config.path).expanduser()
    return str(folder) if folder.is_dir() else config.path


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
