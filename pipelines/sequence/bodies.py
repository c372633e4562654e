"""Stage bodies: what each stage of a sequence computes, from records and blobs to records and blobs.

Plain functions of ``sapt_core``; they run the same inline, as a Ray task and on Ray Train workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cluster.stages import StageContext, StageRecord, StageResult
from pipelines.sequence.base import training_outputs
from pipelines.sequence.progress import progress
from sapt_core.backbones.device import default_device
from sapt_core.backbones.loading import load_backbone, load_embeddings, load_encoding
from sapt_core.backbones.reference import BackboneRef
from sapt_core.data.collate import Sharing
from sapt_core.data.encoding import PromptEncoder
from sapt_core.data.prepare import PreparedTask, prepare_task, read_split
from sapt_core.data.task import LearntTask, Task
from sapt_core.errors import StoreError
from sapt_core.io.blobs import BlobStore
from sapt_core.judging import metrics
from sapt_core.judging.analysis import MIN_ROWS, draw, sample_quality
from sapt_core.judging.decoding import answer_task, pooled_embeddings, require_beams
from sapt_core.judging.scoring.intervals import Estimate
from sapt_core.judging.scoring.named import require_sources
from sapt_core.methods.base import find_method
from sapt_core.pool.cost import bare_model, forward_cost
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.pool.probe.loaded import probe as probe_backbone
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.settings import (
    PET_TYPES,
    AttentionConfig,
    EvaluationConfig,
    GeneratorConfig,
    PromptConfig,
    ReflectionConfig,
    RetentionConfig,
    TrainConfig,
)
from sapt_core.training.generator import generate_pseudo_samples
from sapt_core.training.reflection import GaussianQueries
from sapt_core.versions.learning import LearningSettings, Workplace, learn_task
from sapt_core.versions.loading import load_blocks, load_pool, load_version
from sapt_core.versions.manifest import CarriedTask, LearntAgain, Manifest, Recipe
from sapt_core.versions.size import trained_parameters

Input = TypeVar("Input")

SEALED = frozenset({"dev.arrow", "test.arrow"})  # of a task's tokens: rows that nothing is learnt from
CARRIED = SEALED | {"meta.json"}  # scores and attention need no more

LABELS = "labels.json"  # how often each answer is given, where answers are labels: text of rows

WEIGHT_DIGITS = 4  # of a row's weights, one a block: enough to look at

COST_ROWS = 16  # a batch that the cost of a forward is counted on

disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading weights: a stage has its own


def probe(context: StageContext) -> StageResult:
    """See what the backbone does with blocks on it, and refuse what cannot be learnt or answered with.

    Reads ``backbone``, ``blocks`` (kinds of them), ``gradient_checkpointing`` and, if several, ``num_beams``; is told
    the ``fields`` of the config that the blocks are of. Metrics: the fields of ``Verdict``. Values: what is to be done
    otherwise than the backbone's class says of itself; none where there is nothing, so that what is learnt has the key
    that it has without a probe.
    """
    reads = context.reads
    model, tokenizer = load_backbone(_backbone(context), context.store)
    model.to(default_device())  # type: ignore[arg-type]  # transformers types it as a method of another class
    verdict = reduce(
        Verdict.joined,
        [
            probe_backbone(
                model,
                tokenizer,
                PET_TYPES[kind["type"]](**kind),
                # Of the generator, which trains without.
                checkpointing=reads["gradient_checkpointing"] and field == "pet",
                field=field,
            )
            for field, kind in zip(context.told["fields"], reads["blocks"], strict=True)
        ],
    )
    require_beams(EvaluationConfig(num_beams=reads.get("num_beams", 1)), verdict.answering)
    return StageResult(values=verdict.otherwise, metrics=asdict(verdict))


def prepare(context: StageContext) -> StageResult:
    """Tokenise a task.

    Reads ``task`` (blob of its text), ``backbone``, ``max_source_tokens``, ``max_target_tokens``. Told what was ``cut``
    off the train rows. Metrics: ``rows``, ``cut`` and the ``facts`` of ``TaskFacts`` that are figures; the counts of
    labels, which are text of rows, are an output of their own, where there are any.
    """
    reads = context.reads
    task = Task.from_json(context.store.get(reads["task"]))
    config, tokenizer = load_encoding(_backbone(context), context.store)
    prepared = prepare_task(
        task,
        tokenizer,
        max_source_tokens=reads["max_source_tokens"],
        max_target_tokens=reads["max_target_tokens"],
        is_encoder_decoder=bool(config.is_encoder_decoder),
    )
    outputs = {name: context.store.put(data) for name, data in prepared.to_blobs().items()}
    rows = {split: len(getattr(prepared, split)) for split in ("train", "dev", "test")}
    assert prepared.facts is not None  # noqa: S101 - it was just prepared
    facts, labels = prepared.facts.parted()
    if labels:
        outputs[LABELS] = context.store.put(json.dumps(labels).encode())
    return StageResult(outputs=outputs, metrics={"rows": rows, "facts": facts, "cut": context.told.get("cut")})


def pseudo_samples(context: StageContext) -> StageResult:
    """Generate a task's pseudo-samples: what reflection source ``generated`` keeps of it.

    Reads ``generator``, ``precision``, ``seed``, ``backbone``; inputs ``task``, ``probe``.
    """
    reads = context.reads
    task = prepared_task(context.store, context.inputs["task"])
    model, tokenizer = load_backbone(_backbone(context), context.store)
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
            sharing=_probed(context),
        )
    if not context.is_main:
        return StageResult()
    if len(samples.inputs) < samples.wanted:
        print(
            f"{context.name}: {len(samples.inputs)} of {samples.wanted} pseudo-samples, from {samples.generated} "
            f"generated texts ({samples.malformed} malformed, {samples.empty} empty, {samples.duplicate} duplicates)"
            + ("" if samples.inputs else ": the task is NOT reflected on; raise generator.epochs or generator.steps"),
            flush=True,
        )
    counts = {
        name: getattr(samples, name) for name in ("wanted", "generated", "malformed", "empty", "duplicate", "copied")
    }
    kept = _keep_texts(context, samples.inputs)
    metrics = {**kept.metrics, **counts, "curve": _store_curve(context, curve)}
    if reads["generator"]["content"] == "pairs":
        metrics["known_answers"] = samples.known_answers  # also of none: the report shows all tasks alike
    if not samples.answers:
        return replace(kept, metrics=metrics)
    answers = json.dumps(samples.answers).encode()
    return StageResult(
        outputs={**kept.outputs, "answers": context.store.put(answers)},
        metrics={**metrics, "bytes": metrics["bytes"] + len(answers)},
    )


def given_samples(context: StageContext) -> StageResult:
    """Take a task's samples as they were given. Reads ``inputs``, a blob of texts."""
    return _keep_texts(context, json.loads(context.store.get(context.reads["inputs"])))


def memory(context: StageContext) -> StageResult:
    """Keep a random share of a task's real train inputs. Reads ``share``, ``seed``; input ``task``."""
    texts = [str(text) for text in prepared_task(context.store, context.inputs["task"], "train").train["input"]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(context.reads["seed"])).tolist()
    wanted = max(1, round(context.reads["share"] * len(texts)))
    return _keep_texts(context, [texts[index] for index in sorted(order[:wanted])])


def statistics(context: StageContext) -> StageResult:
    """Keep mean and covariance of the pooled embeddings of a task's train rows, and no text.

    Reads ``rank``, ``attention`` (what a query is made of), ``backbone``; input ``task``.
    """
    reads = context.reads
    task = prepared_task(context.store, context.inputs["task"])
    model, tokenizer = load_embeddings(_backbone(context), context.store)
    pooled = pooled_embeddings(pooling_model(model, AttentionConfig(**reads["attention"])), tokenizer, list(task.train))
    return _keep_statistics(context, GaussianQueries.of(pooled, reads["rank"]))


def joined(context: StageContext) -> StageResult:
    """What is kept of a task that was learnt again: of the rows of before, as far as it is there, and of the new ones.

    Reads ``rows``, how many each is of, and ``rank``. Inputs: ``before``, ``kept``, both texts or both statistics.
    """
    reads = context.reads
    parts = [kept_inputs(context.store, context.inputs[name]) for name in ("before", "kept")]
    known = [part for part in parts if isinstance(part, GaussianQueries)]
    texts = [text for part in parts if not isinstance(part, GaussianQueries) for text in part]
    if known:
        return _keep_statistics(
            context, GaussianQueries.joined(list(zip(known, reads["rows"], strict=True)), reads["rank"])
        )
    return _keep_texts(context, list(dict.fromkeys(texts)))


def _keep_statistics(context: StageContext, kept: GaussianQueries) -> StageResult:
    data = save_tensors({name: value.contiguous() for name, value in vars(kept).items()})
    return StageResult(outputs={"statistics": context.store.put(data)}, metrics={"bytes": len(data)})


def _keep_texts(context: StageContext, texts: Sequence[str]) -> StageResult:
    data = json.dumps(texts).encode()
    return StageResult(
        outputs={"samples": context.store.put(data)}, metrics={"kept": len(texts), "bytes": len(data) if texts else 0}
    )


def train(context: StageContext) -> StageResult:
    """Learn one task: the next version of the pool.

    Reads ``method``, ``pet``, ``attention``, ``reflection``, ``train``, ``evaluation``, ``seed``,
    ``backbone``, ``learnt`` and, of a task that is known, ``again``: further or anew. Inputs: ``task``; ``probe``;
    ``parent``, the train stage before; ``kept 00`` and on, what there is to reflect on of the other tasks that the
    parent knows. Reads ``metrics`` too, where weights are chosen by the user's own.
    """
    reads, inputs = context.reads, context.inputs
    require_sources(reads.get("metrics", {}))
    model, tokenizer = load_backbone(_backbone(context), context.store)
    parent = inputs.get("parent")
    kept = [kept_inputs(context.store, record) for record in numbered(inputs, "kept")]
    with progress(context.name, context.is_main) as on_step:
        place = Workplace(
            model, tokenizer, _backbone(context), context.store, context.checkpoints, on_step, _probed(context)
        )
        manifest, curve = learn_task(
            place,
            LearningSettings(
                method=find_method(reads["method"]["name"])(**reads["method"]),
                pet=PET_TYPES[reads["pet"]["type"]](**reads["pet"]),
                attention=AttentionConfig(**reads["attention"]),
                reflection=ReflectionConfig(**reads["reflection"]),
                train=TrainConfig(**reads["train"], checkpoint_every_steps=context.told["checkpoint_every_steps"]),
                evaluation=EvaluationConfig(**reads["evaluation"]),
                seed=reads["seed"],
            ),
            prepared_task(context.store, inputs["task"], "train", "dev"),
            LearntTask(**reads["learnt"]),
            parent=None if parent is None else Manifest.from_bytes(context.store.get(parent.outputs["manifest"])),
            kept=kept,
            again=reads.get("again"),
        )
    return StageResult(
        outputs=training_outputs(manifest),
        metrics={"curve": _store_curve(context, curve), "last": curve[-1]},
    )


def complete(context: StageContext) -> StageResult:
    """A version with all that later tasks need: its manifest, in the store.

    Reads ``lineage``, ``recipe``, ``tasks`` (of each its text's ``data``, its ``rows``, the ``origin`` of what there is
    to reflect on and, where not all may stay, its ``retention``; of one that was learnt again, each time under
    ``again``, the last without a curve if that is the version's own). Inputs: ``version``, the train stage; for each
    task ``task 00``, its ``prepare``, ``learnt 00``, its first train stage, and where there is something to reflect on
    ``kept 00``.
    """
    reads, inputs = context.reads, context.inputs
    manifest = Manifest.from_bytes(context.store.get(inputs["version"].outputs["manifest"]))
    carried = [
        CarriedTask(
            data=task["data"],
            rows=task["rows"],
            tokens={
                name: digest
                for name, digest in inputs[f"task {index:02d}"].outputs.items()
                if name in CARRIED and (name not in SEALED or RetentionConfig(**task.get("retention", {})).sealed_rows)
            },
            reflection=inputs[f"kept {index:02d}"].outputs if f"kept {index:02d}" in inputs else {},
            origin=task["origin"],
            curve=inputs[f"learnt {index:02d}"].metrics.get("curve"),
            retention=task.get("retention"),
            again=tuple(
                LearntAgain(**{"curve": inputs["version"].metrics["curve"], **each}) for each in task.get("again", ())
            ),
        )
        for index, task in enumerate(reads["tasks"])
    ]
    version = manifest.complete(lineage=reads["lineage"], recipe=Recipe(**reads["recipe"]), carried=carried)
    return StageResult(outputs={"manifest": context.store.put(version.to_bytes())})


def carried(context: StageContext) -> StageResult:
    """What a stage gave that ran before, elsewhere: as the version that is gone on from carries it.

    Reads ``outputs``; ``metrics``, where its record had some that are asked for.

    Raises:
        StoreError: something of it is not in the store any more.
    """
    outputs: dict[str, str] = context.reads["outputs"]
    gone = [name for name, digest in outputs.items() if not context.store.has(digest)]
    if gone:
        raise StoreError(
            f"{context.name}: {', '.join(gone)} of the version that is gone on from is not in {context.store.uri} any "
            "more. Give the store.uri that the version was published with, or go on from another version."
        )
    metrics: dict[str, Any] = dict(context.reads["metrics"])
    if "samples" in outputs:
        data = context.store.get(outputs["samples"])
        metrics |= {"kept": len(json.loads(data)), "bytes": len(data)}
    elif "statistics" in outputs:
        metrics["bytes"] = context.store.size(outputs["statistics"])
    return StageResult(outputs=outputs, metrics=metrics)


def cost(context: StageContext) -> StageResult:
    """What a version costs, counted on some train rows of the task that it learnt.

    A stage of its own: what it needs memory for must not stand between a training and its record.
    Inputs: ``version``, the train stage; ``task``. Metrics: ``trained_parameters`` of the newest task and
    ``forward_cost``, a forward's operations as a multiple of the bare backbone's.
    """
    manifest = Manifest.from_bytes(context.store.get(context.inputs["version"].outputs["manifest"]))
    rows = list(read_split(context.store.get(context.inputs["task"].outputs["train.arrow"])))[:COST_ROWS]
    model, tokenizer = load_backbone(manifest.backbone, context.store)
    pool = load_pool(manifest, context.store, model, manifest.tasks[manifest.taught].name)
    versioned = SaptModel(model, pool).to(default_device())
    batch = versioned.collator(tokenizer.pad_token_id)(rows).to(default_device())
    return StageResult(
        metrics={
            "trained_parameters": trained_parameters(manifest, context.store),
            "forward_cost": forward_cost(versioned, batch),
        }
    )


def evaluate(context: StageContext) -> StageResult:
    """Score one version on one task's test rows.

    Reads ``evaluation``, ``precision``, ``max_target_tokens``; inputs ``version``, ``task``.
    Reads ``metrics`` too, where some are the user's own. Metrics: ``score`` (0 to 100) of the leading metric with its
    confidence ``interval``, ``others``, where there are any, by metric its score and the ends of its interval, and
    ``weights``, the mean mixture over the version's blocks (T).
    """
    reads = context.reads
    require_sources(reads.get("metrics", {}))
    task = prepared_task(context.store, context.inputs["task"], reads["evaluation"]["split"])
    manifest = Manifest.from_bytes(context.store.get(context.inputs["version"].outputs["manifest"]))
    found, weights, predictions = score_version(
        manifest,
        task,
        context.store,
        EvaluationConfig(**reads["evaluation"]),
        precision=reads["precision"],
        max_target_tokens=reads["max_target_tokens"],
    )
    rows = [
        {**row, "weights": [round(weight, WEIGHT_DIGITS) for weight in mixture]}
        for row, mixture in zip(predictions, weights.tolist(), strict=True)
    ]
    return StageResult(
        outputs={"predictions": _store_predictions(context, rows)},
        metrics={**_scores(task, found), "weights": weights.mean(dim=0).tolist(), "rows": len(rows)},
    )


def attend(context: StageContext) -> StageResult:
    """Mean attention of one version on the dev rows of every task it has learnt; no pass of the backbone.

    Inputs: ``version``, the train stage; ``task 00`` and on. Test rows are not looked at, so that what
    is set because of these figures was not chosen by what scores are measured on.
    Metrics: ``weights``, a list a task of the mean weight of every block, oldest first.
    """
    manifest = Manifest.from_bytes(context.store.get(context.inputs["version"].outputs["manifest"]))
    model, tokenizer = load_embeddings(manifest.backbone, context.store)
    pool = load_blocks(manifest, context.store, model, ())  # attention looks at keys and not at blocks
    bare = SaptModel(model, pool)
    weights = []
    for record in numbered(context.inputs, "task"):
        rows = list(read_split(context.store.get(record.outputs["dev.arrow"])))
        with torch.no_grad():
            weights.append(pool.attend(pooled_embeddings(bare, tokenizer, rows)).mean(dim=0).tolist())
    return StageResult(metrics={"weights": weights})


def quality(context: StageContext) -> StageResult:
    """Compare a task's pseudo-samples with its train rows.

    Reads ``backbone``, ``max_source_tokens``, ``template``, ``definition``; inputs ``task``, ``kept``. Metrics: the
    fields of ``SampleQuality``.
    """
    reads = context.reads
    generated: list[str] = json.loads(context.store.get(context.inputs["kept"].outputs["samples"]))
    train = read_split(context.store.get(context.inputs["task"].outputs["train.arrow"]))
    model, tokenizer = load_embeddings(_backbone(context), context.store)
    bare = pooling_model(model, AttentionConfig())
    encoder = PromptEncoder(
        tokenizer,
        max_source_tokens=reads["max_source_tokens"],
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    drawn = [train[index] for index in draw(len(train), max(MIN_ROWS, len(generated)))]
    made = [prompt.row for prompt in encoder.prompts(reads["template"], reads["definition"], generated)]
    real, fake = (pooled_embeddings(bare, tokenizer, rows).numpy() for rows in (drawn, made))
    found = sample_quality([str(text) for text in train["input"]], generated, real, fake)
    return StageResult(metrics=asdict(found))


def zero_shot(context: StageContext) -> StageResult:
    """Score the bare backbone on one task's test rows.

    Reads ``backbone``, ``evaluation``, ``precision``, ``max_target_tokens``; inputs ``task``, ``probe``.
    """
    reads = context.reads
    require_sources(reads.get("metrics", {}))
    ref = _backbone(context)
    model, tokenizer = load_backbone(ref, context.store)
    task = prepared_task(context.store, context.inputs["task"], reads["evaluation"]["split"])
    found, _, predictions = _score(
        bare_model(model, _probed(context)).to(default_device()),
        tokenizer,
        task,
        EvaluationConfig(**reads["evaluation"]),
        joined=ref.joined,
        precision=reads["precision"],
        max_target_tokens=reads["max_target_tokens"],
    )
    return StageResult(
        outputs={"predictions": _store_predictions(context, predictions)},
        metrics={**_scores(task, found), "rows": len(predictions)},
    )


def score_version(
    manifest: Manifest,
    task: PreparedTask,
    store: BlobStore,
    config: EvaluationConfig,
    *,
    precision: Any,
    max_target_tokens: int,
) -> tuple[dict[str, Estimate], Tensor, list[dict[str, Any]]]:
    """Scores by metric, mixture weights (N, T) and predictions of a version on a task's test rows."""
    model, tokenizer = load_version(manifest, store, task.name)
    return _score(
        model,
        tokenizer,
        task,
        config,
        joined=manifest.backbone.joined,
        precision=precision,
        max_target_tokens=max_target_tokens,
    )


def _score(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    config: EvaluationConfig,
    *,
    joined: bool,
    precision: Any,
    max_target_tokens: int,
) -> tuple[dict[str, Estimate], Tensor, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = list(getattr(task, config.split))
    texts, weights = answer_task(
        model, tokenizer, task, rows, config, joined=joined, max_target_tokens=max_target_tokens, precision=precision
    )
    references = [list(row["references"]) for row in rows]
    predictions = [
        {"input": row["input"], "prediction": text, "references": accepted}
        for row, text, accepted in zip(rows, texts, references, strict=True)
    ]
    inputs = [row["input"] for row in rows]
    return metrics.estimates(task.metrics, texts, references, inputs), weights, predictions


def _scores(task: PreparedTask, found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Scores as a record has them."""
    leading = found[task.metric]
    others = {name: list(found[name]) for name in task.other_metrics}
    return {"score": leading.score, "interval": [leading.low, leading.high], **({"others": others} if others else {})}


def pooling_model(model: PreTrainedModel, attention: AttentionConfig) -> SaptModel:
    """A model to pool with: only the embeddings are asked, and what ``attention`` lets a query see."""
    return SaptModel(model, new_pool(model, PromptConfig(length=1), attention))


def kept_inputs(store: BlobStore, record: StageRecord) -> Sequence[str] | GaussianQueries:
    """What reflection has of a task, from the record of the stage that kept it."""
    if "statistics" in record.outputs:
        return GaussianQueries(**load_tensors(store.get(record.outputs["statistics"])))
    texts: list[str] = json.loads(store.get(record.outputs["samples"]))
    return texts


def _backbone(context: StageContext) -> BackboneRef:
    """The backbone that a stage reads by content, under the name it is told."""
    return BackboneRef(**{**context.reads["backbone"], "path": context.told["backbone"]})


def _probed(context: StageContext) -> Sharing:
    """Which rows may share a forward, as the backbone's probe found it."""
    return Sharing(**context.inputs["probe"].values)


def numbered(inputs: Mapping[str, Input], word: str) -> list[Input]:
    """The inputs named ``word NUMBER``, by number: as text, 100 stands before 11."""
    names = [name for name in inputs if name.partition(" ")[0] == word]
    return [inputs[name] for name in sorted(names, key=lambda name: int(name.partition(" ")[2]))]


def prepared_task(store: BlobStore, record: StageRecord, *splits: str) -> PreparedTask:
    """A task's tokenised rows, from the record of its ``prepare``: of all splits, or of those that are asked for."""
    names = {f"{split}.arrow" for split in splits} | {"meta.json"} if splits else record.outputs.keys()
    return PreparedTask.from_blobs({name: store.get(record.outputs[name]) for name in sorted(names)})


def _store_predictions(context: StageContext, predictions: list[dict[str, Any]]) -> str:
    return context.store.put("\n".join(json.dumps(prediction) for prediction in predictions).encode())


def _store_curve(context: StageContext, curve: list[dict[str, float]]) -> str:
    return context.store.put(json.dumps(curve, allow_nan=False).encode())
