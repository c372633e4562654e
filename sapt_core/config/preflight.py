"""What can be said against a backbone and tasks before anything is loaded or trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.checkpoint import check_weights, own_dtype, read_headers
from sapt_core.backbones.device import Precision, resolved_precision
from sapt_core.backbones.reference import BackboneRef, load_model_config, location, skeleton
from sapt_core.backbones.tokens import check_tokens, load_tokenizer
from sapt_core.backbones.traits import first_position
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.prepare import check_fits, check_writable
from sapt_core.data.task import Task
from sapt_core.errors import BackboneError, DataError
from sapt_core.judging.metrics import METRICS
from sapt_core.pool.blocks.lora import find_sites, fused_experts, last_names
from sapt_core.pool.probe import check_embeddings, check_sites
from sapt_core.settings import LoRAConfig, PETConfig, PromptConfig

log = logging.getLogger(__name__)

_WHOLE = 100 - 1e-6


def check_backbone(config: ExperimentConfig, tasks: Sequence[Task]) -> None:
    """Refuse, without loading weights, a backbone that cannot carry the configured blocks and prompts.

    Raises:
        BackboneError: weight files that are not of the configured model or quantised, target modules that match nothing
            or what no block can learn at, soft prompts that the model cannot read, prompts and answers longer than its
            positions, ids that it has no row for, or a tokenizer that cannot be loaded or cannot write a marker.
        DataError: tasks whose template leaves no room for an input, or whose right answers would all score 0.
    """
    folder, path = location(config.backbone), config.backbone.path
    model_config = load_model_config(folder, path)
    model = skeleton(model_config)
    check_weights(model, read_headers(folder, model_config, path), path)
    _check_blocks(model, config.pet, "pet")
    if config.generates:
        _check_blocks(model, config.generator.pet, "generator.pet")
    config.method.check_backbone(model_config)
    _check_positions(config, path, model, len(tasks))
    tokenizer = load_tokenizer(folder, path)
    check_tokens(model, tokenizer, path)
    if config.generates:
        check_writable(tokenizer, config.generator.content)
    check_fits(
        tasks,
        tokenizer,
        max_source_tokens=config.benchmark.max_source_tokens,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )
    check_answers(tasks, tokenizer, config.evaluation.split)


def check_answers(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, split: Literal["test", "dev"] = "test"
) -> None:
    """Refuse tasks of which every right answer would score 0, and warn of those of which some cannot score 100.

    An answer may hold nothing that the task's metric compares, or be nothing that the tokenizer can write: what it
    reads back of the answer's tokens is then another text.

    Args:
        tasks: as text.
        tokenizer: of the backbone.
        split: rows that scores are of.

    Raises:
        DataError: naming every such task.
    """
    faults = []
    for task in tasks:
        found: Counter[_Reach] = Counter()
        for references, count in Counter(row.references for row in getattr(task, split)).items():
            found[_reach(task.metric, references, tokenizer)] += count
        if not (lost := found["unseen"] + found["unwritten"] + found["cut"]):
            continue
        told = (
            f"of {found.total()} {split} answers {found['unseen']} hold nothing that metric {task.metric} sees, "
            f"and {lost - found['unseen']} cannot be written whole by the backbone's tokenizer"
        )
        if not found["unseen"]:
            cure = "choose a backbone whose tokenizer knows their script"
        elif task.metric.endswith("_unicode"):
            cure = "choose another benchmark.metric"
        else:
            cure = f"benchmark.metric={task.metric}_unicode sees words of any script"
        if found["whole"] or found["cut"]:
            log.warning("%s: %s: they cannot score 100 (%s)", task.name, told, cure)
        else:
            faults.append(f"{task.name}: {told}: {cure}")
    if faults:
        raise DataError("Right answers would score 0:", faults)


_Reach: TypeAlias = Literal["unseen", "unwritten", "cut", "whole"]


def _reach(name: str, references: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> _Reach:
    """What the best that can be written for a row scores: nothing to see, nothing, less than 100, or 100."""
    metric = METRICS[name]
    seen = [reference for reference in references if metric.sees(reference)]
    if not seen:
        return "unseen"
    ids = tokenizer(seen, add_special_tokens=False, verbose=False)["input_ids"]
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if any(text.split() == reference.split() for text, reference in zip(written, seen, strict=True)):
        return "whole"
    best = max(metric.score(text, references) for text in written)
    return "unwritten" if best == 0 else "cut" if best < _WHOLE else "whole"


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


def _check_blocks(model: PreTrainedModel, pet: PETConfig, field: str) -> None:
    if isinstance(pet, PromptConfig):
        check_embeddings(model)
    if isinstance(pet, LoRAConfig):
        check_sites(model, find_sites(model, pet.target_modules, field), field)
        if fused := last_names(fused_experts(model, pet.target_modules)):
            log.warning(
                "%s.target_modules: %s name experts of %s as well, which are one tensor a layer and stay as they are",
                field,
                ", ".join(fused),
                type(model).__name__,
            )


def _check_positions(config: ExperimentConfig, path: str, model: PreTrainedModel, tasks: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:  # relative positions, as T5's, have no end
        return
    positions -= first_position(model)
    prompt = config.method.soft_tokens(config.pet.length, tasks) if isinstance(config.pet, PromptConfig) else 0
    benchmark = config.benchmark
    source = prompt + benchmark.max_source_tokens
    if model.config.is_encoder_decoder:
        asked = {"pet.length and benchmark.max_source_tokens" if prompt else "benchmark.max_source_tokens": source}
        asked["benchmark.max_target_tokens"] = benchmark.max_target_tokens
    else:
        fields = "benchmark.max_source_tokens and max_target_tokens"
        asked = {f"pet.length, {fields}" if prompt else fields: source + benchmark.max_target_tokens}
    if config.generates:
        asked["generator.max_tokens"] = config.generator.max_tokens
    faults = [f"{fields} ask for {length}" for fields, length in asked.items() if length > positions]
    if faults:
        raise BackboneError(f"backbone {path} has {positions} positions, but {'; '.join(faults)}: lower them")
