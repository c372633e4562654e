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
from sapt_core.data.prepare import check_fits, check_templates, check_writable
from sapt_core.data.task import Task
from sapt_core.errors import BackboneError, ConfigError, DataError
from sapt_core.judging.choices import choices_of, label_encoder
from sapt_core.judging.scoring.base import Metric, Row, RowMean
from sapt_core.judging.scoring.named import METRICS, find_metric, metric_faults
from sapt_core.metric_settings import is_own
from sapt_core.pool.blocks.lora import find_sites, fused_experts, last_names
from sapt_core.pool.probe.unloaded import check_embeddings, check_sites
from sapt_core.settings import LoRAConfig, PETConfig, PromptConfig

log = logging.getLogger(__name__)

_WHOLE = 100 - 1e-6


def check_backbone(config: ExperimentConfig, tasks: Sequence[Task]) -> None:
    """Refuse, without loading weights, a backbone that cannot carry the configured blocks and prompts.

    Raises:
        BackboneError: weight files that are not of the configured model or quantised, target modules that match nothing
            or what no block can learn at, soft prompts that the model cannot read, prompts and answers longer than its
            positions, ids that it has no row for, or a tokenizer that cannot be loaded or cannot write a marker.
        DataError: tasks whose template cannot be filled in with all rows or leaves no room for an input, whose labels
            cannot be told apart, or whose right answers would all score 0.
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
    check_templates(tasks, tokenizer, is_encoder_decoder=bool(model_config.is_encoder_decoder))
    check_fits(
        tasks,
        tokenizer,
        max_source_tokens=config.benchmark.max_source_tokens,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )
    check_labels(
        tasks,
        tokenizer,
        max_target_tokens=config.benchmark.max_target_tokens,
        is_encoder_decoder=bool(model_config.is_encoder_decoder),
    )
    check_answers(tasks, tokenizer, config.evaluation.split)


def check_answers(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, split: Literal["test", "dev"] = "test"
) -> None:
    """Refuse tasks of which every right answer would score 0, and warn of those of which some cannot score 100.

    An answer may hold nothing that one of the task's metrics compares, or be nothing that the tokenizer can write:
    what it reads back of the answer's tokens is then another text.

    Args:
        tasks: as text.
        tokenizer: of the backbone.
        split: rows that scores are of.

    Raises:
        DataError: naming every such task.
    """
    faults = []
    for task in tasks:
        # The user's own metric need not say 100 of what is right, and whether it can be had is told elsewhere.
        for name in (name for name in task.metrics if not is_own(name)):
            fault, warning = _unreachable(task, name, split, tokenizer)
            if warning:
                log.warning("%s: %s", task.name, warning)
            if fault:
                faults.append(f"{task.name}: {fault}")
    if faults:
        raise DataError("Right answers would score 0:", faults)


def _unreachable(task: Task, name: str, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What is to be refused, and what to be warned of, where right answers do not score 100; empty where they do."""
    metric, found = find_metric(name), Counter[_Reach]()
    rows = Counter(row.references for row in getattr(task, split))
    for references, count in rows.items():
        found[_reach(metric, references, task.labels, tokenizer)] += count
    right = [Row(references[0], references) for references in rows.elements()]
    if found["whole"] and not isinstance(metric, RowMean) and metric.score(right) == 0:
        return f"metric {name} is 0 of the right answers themselves: they are too short; give chrf or rouge_l", ""
    if not (lost := found["unseen"] + found["unwritten"] + found["cut"]):
        return "", ""
    told = f"of {found.total()} {split} answers {found['unseen']} hold nothing that metric {name} sees, and "
    told += f"{lost - found['unseen']} "
    told += "are none of its labels" if task.labels else "cannot be written whole by the backbone's tokenizer"
    if not found["unseen"]:
        cure = "choose a backbone whose tokenizer knows their script"
        if task.labels:
            cure = "labels are what train rows answer; give benchmark.answers=free, or train rows of every label"
    elif f"{name}_unicode" in METRICS:
        cure = f"benchmark.metric={name}_unicode sees words of any script"
    else:
        cure = "choose another benchmark.metric"
    if found["whole"] or found["cut"]:
        return "", f"{told}: they cannot score 100 ({cure})"
    return f"{told}: {cure}", ""


_Reach: TypeAlias = Literal["unseen", "unwritten", "cut", "whole"]


def _reach(
    metric: Metric, references: tuple[str, ...], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> _Reach:
    """What the best that can be written for a row scores: nothing to see, nothing, less than 100, or 100."""
    seen = [reference for reference in references if metric.sees(reference)]
    if not seen:
        return "unseen"
    written: Sequence[str] = labels
    if not labels:
        ids = tokenizer(seen, add_special_tokens=False, verbose=False)["input_ids"]
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        if any(text.split() == reference.split() for text, reference in zip(written, seen, strict=True)):
            return "whole"
    best = max(metric.of_row(Row(text, references)) for text in written)
    return "unwritten" if best == 0 else "cut" if best < _WHOLE else "whole"


def check_metrics(tasks: Sequence[Task]) -> None:
    """Refuse metrics that cannot be had, before anything is trained.

    Raises:
        ConfigError: with every fault of every metric.
    """
    if faults := metric_faults(name for task in tasks for name in task.metrics):
        raise ConfigError("Metrics cannot be used:", faults)


def check_labels(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, *, max_target_tokens: int, is_encoder_decoder: bool
) -> None:
    """Refuse tasks of which only labels may be answered, and whose labels no answer could tell apart.

    Raises:
        DataError: naming every such task.
    """
    faults = []
    for task in tasks:
        if task.answers != "labels":
            continue
        encoder = label_encoder(tokenizer, is_encoder_decoder=is_encoder_decoder, joined=None)
        inputs = [row.input for split in (task.train, task.dev, task.test) for row in split]
        every = choices_of(encoder, task, inputs, max_target_tokens)
        found = dict.fromkeys(
            fault for each in {id(each): each for each in every}.values() for fault in each.faults(max_target_tokens)
        )
        faults += [f"{task.name}: {fault}" for fault in found]
        if len(task.labels) > len(task.train) / 2:
            log.warning(
                "%s: %d train rows have %d different answers, which are taken for labels (benchmark.answers=labels)",
                task.name,
                len(task.train),
                len(task.labels),
            )
    if faults:
        raise DataError("Labels cannot be told apart (benchmark.answers=labels):", faults)


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
