"""Stage bodies: what each stage of a sequence computes, from records and blobs to records and blobs.

Plain functions of ``sapt_core``; they run the same inline, as a Ray task and on Ray Train workers.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cluster.stages import StageContext, StageRecord, StageResult
from pipelines.progress import progress
from sapt_core import metrics
from sapt_core.backbone import BackboneRef, load_backbone
from sapt_core.benchmarks.prepare import PreparedTask, PromptEncoder, prepare_task
from sapt_core.benchmarks.task import Task
from sapt_core.blobs import BlobStore
from sapt_core.blocks.lora import LoRABlocks
from sapt_core.config import (
    AttentionConfig,
    EvaluationConfig,
    GeneratorConfig,
    LoRAConfig,
    MethodConfig,
    ReflectionConfig,
    TrainConfig,
)
from sapt_core.device import default_device
from sapt_core.evaluation import answer, pooled_embeddings
from sapt_core.generator import encode_pseudo_samples, generate_pseudo_samples
from sapt_core.learning import learn_task
from sapt_core.model import SaptModel
from sapt_core.pool import PETPool
from sapt_core.snapshot import LearntTask, Manifest, embedding_matrix, load_pool, new_pool

disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights: a stage has its own


def prepare(context: StageContext) -> StageResult:
    """Tokenise a task.

    Reads ``task`` (blob of its text), ``backbone``, ``max_source_tokens``, ``max_target_tokens``.
    """
    reads = context.reads
    task = Task.from_json(context.store.get(reads["task"]))
    model, tokenizer = load_backbone(BackboneRef(**reads["backbone"]), context.store)
    prepared = prepare_task(
        task,
        tokenizer,
        max_source_tokens=reads["max_source_tokens"],
        max_target_tokens=reads["max_target_tokens"],
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    outputs = {name: context.store.put(data) for name, data in prepared.to_blobs().items()}
    rows = {split: len(getattr(prepared, split)) for split in ("train", "dev", "test")}
    return StageResult(outputs=outputs, metrics={"rows": rows, "truncated": prepared.truncated})


def pseudo_samples(context: StageContext) -> StageResult:
    """Generate a task's pseudo-samples and pool their embeddings.

    Reads ``generator``, ``precision``, ``seed``, ``backbone``, ``max_source_tokens``; input ``task``.
    """
    reads = context.reads
    task = _prepared(context.store, context.inputs["task"])
    model, tokenizer = load_backbone(BackboneRef(**reads["backbone"]), context.store)
    with progress(context.name, context.is_main) as on_step:
        samples, curve = generate_pseudo_samples(
            model,
            tokenizer,
            task,
            GeneratorConfig(**reads["generator"]),
            precision=reads["precision"],
            seed=reads["seed"],
            checkpoints=context.checkpoints,
            on_step=on_step,
        )
    if context.is_main and len(samples.inputs) < samples.wanted:
        print(
            f"{context.name}: {len(samples.inputs)} of {samples.wanted} pseudo-samples, from {samples.generated} "
            f"generated texts ({samples.malformed} malformed, {samples.empty} empty, {samples.duplicate} duplicates)"
            + ("" if samples.inputs else ": the task is NOT reflected on; raise generator.epochs or generator.steps"),
            flush=True,
        )
    encoder = PromptEncoder(
        tokenizer,
        max_source_tokens=reads["max_source_tokens"],
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    rows = encode_pseudo_samples(samples, task, encoder)
    pooled = torch.empty(0, embedding_matrix(model).shape[1])
    if rows:
        bare = SaptModel(model, new_pool(model, GeneratorConfig(**reads["generator"]).pet, None))
        try:
            pooled = pooled_embeddings(bare, tokenizer, rows)
        finally:
            bare.detach()
    counts = {
        name: getattr(samples, name) for name in ("wanted", "generated", "malformed", "empty", "duplicate", "copied")
    }
    return StageResult(
        outputs={
            "samples": context.store.put(json.dumps(samples.inputs).encode()),
            "pooled": context.store.put(save_tensors({"pooled": pooled})),
        },
        metrics={**counts, "kept": len(samples.inputs), "curve": _store_curve(context, curve)},
    )


def train(context: StageContext, *, checkpoint_every_steps: int) -> StageResult:
    """Learn one task: the next version of the pool.

    Reads ``method``, ``pet``, ``attention``, ``reflection``, ``train``, ``evaluation``, ``seed``,
    ``backbone``, ``learnt``. Inputs: ``task``; ``parent``, the train stage before; ``pseudo 00`` and
    on, the pseudo-samples of the earlier tasks.
    """
    reads, inputs = context.reads, context.inputs
    model, tokenizer = load_backbone(BackboneRef(**reads["backbone"]), context.store)
    parent = inputs.get("parent")
    pseudo = [
        load_tensors(context.store.get(record.outputs["pooled"]))["pooled"]
        for name, record in sorted(inputs.items())
        if name.startswith("pseudo")
    ]
    with progress(context.name, context.is_main) as on_step:
        manifest, curve = learn_task(
            model,
            tokenizer,
            _prepared(context.store, inputs["task"]),
            LearntTask(**reads["learnt"]),
            None if parent is None else Manifest.from_bytes(context.store.get(parent.outputs["manifest"])),
            pseudo,
            ref=BackboneRef(**reads["backbone"]),
            method=MethodConfig(**reads["method"]),
            pet=LoRAConfig(**reads["pet"]),
            attention=AttentionConfig(**reads["attention"]),
            reflection=ReflectionConfig(**reads["reflection"]),
            config=TrainConfig(**reads["train"], checkpoint_every_steps=checkpoint_every_steps),
            evaluation=EvaluationConfig(**reads["evaluation"]),
            seed=reads["seed"],
            store=context.store,
            checkpoints=context.checkpoints,
            on_step=on_step,
        )
    outputs = {"manifest": manifest.digest, "block": manifest.blocks[-1]}
    if manifest.router is not None:
        outputs["router"] = manifest.router
    return StageResult(outputs=outputs, metrics={"curve": _store_curve(context, curve), "last": curve[-1]})


def evaluate(context: StageContext) -> StageResult:
    """Score one version on one task's test rows.

    Reads ``evaluation``, ``precision``, ``max_target_tokens``; inputs ``version``, ``task``.
    Metrics: ``score`` (0 to 100) and ``weights``, the mean mixture over the version's blocks (T).
    """
    reads = context.reads
    task = _prepared(context.store, context.inputs["task"])
    manifest = Manifest.from_bytes(context.store.get(context.inputs["version"].outputs["manifest"]))
    score, weights, predictions = score_version(
        manifest,
        task,
        context.store,
        EvaluationConfig(**reads["evaluation"]),
        precision=reads["precision"],
        max_target_tokens=reads["max_target_tokens"],
    )
    return StageResult(
        outputs={"predictions": _store_predictions(context, predictions)},
        metrics={"score": score, "weights": weights.mean(dim=0).tolist(), "rows": len(predictions)},
    )


def zero_shot(context: StageContext) -> StageResult:
    """Score the bare backbone on one task's test rows.

    Reads ``backbone``, ``evaluation``, ``precision``, ``max_target_tokens``; input ``task``.
    """
    reads = context.reads
    model, tokenizer = load_backbone(BackboneRef(**reads["backbone"]), context.store)
    nothing = PETPool(LoRABlocks({}, LoRAConfig()), embedding_matrix(model).shape[1], None)
    score, _, predictions = _score(
        SaptModel(model, nothing).to(default_device()),
        tokenizer,
        _prepared(context.store, context.inputs["task"]),
        EvaluationConfig(**reads["evaluation"]),
        precision=reads["precision"],
        max_target_tokens=reads["max_target_tokens"],
    )
    return StageResult(
        outputs={"predictions": _store_predictions(context, predictions)},
        metrics={"score": score, "rows": len(predictions)},
    )


def score_version(
    manifest: Manifest,
    task: PreparedTask,
    store: BlobStore,
    config: EvaluationConfig,
    *,
    precision: Any,
    max_target_tokens: int,
) -> tuple[float, Tensor, list[dict[str, Any]]]:
    """Score, mixture weights (N, T) and predictions of a version on a task's test rows."""
    model, tokenizer = load_backbone(manifest.backbone, store)
    attached = SaptModel(model, load_pool(manifest, store, model)).to(default_device())
    return _score(attached, tokenizer, task, config, precision=precision, max_target_tokens=max_target_tokens)


def _score(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    config: EvaluationConfig,
    *,
    precision: Any,
    max_target_tokens: int,
) -> tuple[float, Tensor, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = list(task.test)
    try:
        texts, weights = answer(model, tokenizer, rows, config, max_new_tokens=max_target_tokens, precision=precision)
    finally:
        model.detach()
    references = [list(row["references"]) for row in rows]
    predictions = [
        {"input": row["input"], "prediction": text, "references": accepted}
        for row, text, accepted in zip(rows, texts, references, strict=True)
    ]
    return metrics.score(task.metric, texts, references), weights, predictions


def _prepared(store: BlobStore, record: StageRecord) -> PreparedTask:
    return PreparedTask.from_blobs({name: store.get(digest) for name, digest in record.outputs.items()})


def _store_predictions(context: StageContext, predictions: list[dict[str, Any]]) -> str:
    return context.store.put("\n".join(json.dumps(prediction) for prediction in predictions).encode())


def _store_curve(context: StageContext, curve: list[dict[str, float]]) -> str:
    return context.store.put(json.dumps(curve).encode())
