"""What can be said against a backbone and tasks before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from sapt_core.backbones.checkpoint import check_weights, own_dtype, read_headers
from sapt_core.backbones.device import Precision, resolved_precision
from sapt_core.backbones.reference import BackboneRef, load_model_config, location, skeleton
from sapt_core.backbones.tokens import check_tokens, load_tokenizer
from sapt_core.config import ExperimentConfig
from sapt_core.data.prepare import check_fits, check_writable
from sapt_core.data.task import Task
from sapt_core.errors import BackboneError
from sapt_core.pool.blocks.lora import find_sites
from sapt_core.settings import LoRAConfig, PromptConfig


def check_backbone(config: ExperimentConfig, tasks: Sequence[Task]) -> None:
    """Refuse, without loading weights, a backbone that cannot carry the configured blocks and prompts.

    Raises:
        BackboneError: weight files that are not of the configured model, target modules that match nothing, prompts
            (soft ones too) and answers longer than the model's positions, ids that the model has no row for, or a
            tokenizer that cannot be loaded or cannot write a marker.
        DataError: tasks whose template leaves no room for an input.
    """
    folder, path = location(config.backbone), config.backbone.path
    model_config = load_model_config(folder, path)
    model = skeleton(model_config)
    check_weights(model, read_headers(folder, model_config, path), path)
    for pet in (config.pet, config.generator.pet):
        if isinstance(pet, LoRAConfig):
            find_sites(model, pet.target_modules)
    config.method.check_backbone(model_config)
    _check_positions(config, path, model_config, len(tasks))
    tokenizer = load_tokenizer(folder, path)
    check_tokens(model, tokenizer, path)
    if config.method.shared_attention and config.reflection.source == "generated":
        check_writable(tokenizer, config.generator.content)
    check_fits(
        tasks,
        tokenizer,
        max_source_tokens=config.benchmark.max_source_tokens,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )


def settle_precision(config: ExperimentConfig, ref: BackboneRef) -> ExperimentConfig:
    """The experiment with a number format in the place of ``train.precision`` auto, for nodes of all kinds.

    Raises:
        BackboneError: float32 is asked for, and the weights are of a half format.
    """
    folder, path = location(config.backbone), config.backbone.path
    own = ref.dtype == "auto"
    weights = own_dtype(folder, load_model_config(folder, path), path) if own else getattr(torch, ref.dtype)
    precision = resolved_precision(config.train.precision, weights, config.cluster.gpus_per_worker)
    return with_precision(config, precision)


def with_precision(config: ExperimentConfig, precision: Precision) -> ExperimentConfig:
    """The experiment with ``train.precision`` set."""
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


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
