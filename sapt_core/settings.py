"""The sections of an experiment's config, each field declared once.

Stages read single sections, so a section's content, not the whole file, decides what is computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from sapt_core.metric_settings import METRIC_NAMES, MetricList, metric_names
from sapt_core.task_settings import (
    HUB_REVISION,
    NameList,
    Section,
    TaskDefaults,
    TaskList,
    told_in_full,
)
from sapt_core.template_settings import TEMPLATE_NAMES, TemplateText

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class BenchmarkConfig(Section):
    """Which tasks, in which order, and how a row becomes text and tokens."""

    suite: Literal["superni", "long_sequence", "synthetic", "folder"] = Field(
        "folder",
        description="superni and long_sequence know their orders, prompts and metrics; folder takes any data sets; "
        "synthetic generates its tasks.",
    )
    data_dir: Path | None = Field(None, description="Folder that holds one folder a task. Not for synthetic.")
    order: int | None = Field(None, ge=1, description="Numbered task order of the suite.")
    tasks: TaskList | None = Field(
        None,
        description="Tasks in the order to learn, each a folder in data_dir, a task of tasks_file or a mapping; wins "
        "over order.",
    )
    unseen: TaskList = Field((), description="Tasks, likewise, that every version is scored on and none ever learns.")
    tasks_file: Path | None = Field(
        None,
        exclude=True,
        description="YAML file with a list of tasks, or with tasks and defaults. All are learnt, in its order, unless "
        "tasks names some.",
    )
    defaults: TaskDefaults | None = Field(
        None, exclude=True, description="What tasks have that do not say otherwise; over those of tasks_file."
    )
    template: TemplateText | None = Field(
        None,
        description=f"Prompt; default: the suite's. There are {', '.join(TEMPLATE_NAMES)}, chat: SYSTEM TEXT, and "
        "Jinja text of your own (docs/data.md). none: inputs are whole prompts, as TRACE's are; chat: the tokenizer's "
        "own chat template; apart: prompt and answer are tokenised each by itself, as the published code does it for "
        "decoder-only models.",
    )
    metric: MetricList | None = Field(
        None,
        description="Score, or several with the leading one first; default: the suite's. There are "
        f"{', '.join(METRIC_NAMES)} and package.module:function of your own (docs/metrics.md). rouge_l sees a-z and "
        "0-9 alone, as published, and exact_match leaves out ASCII punctuation; the unicode ones take words and "
        "punctuation of any script.",
    )
    answers: Literal["free", "labels"] = Field(
        "free",
        description="What may be answered: anything, or one of the task's labels: its label_names or, where it has "
        "none, the answers of its train rows.",
    )
    max_source_tokens: int = Field(
        512, ge=8, description="Longest prompt; a longer one loses tokens from the middle of its input."
    )
    max_target_tokens: int = Field(50, ge=1, description="Longest answer, learnt and generated.")
    train_rows: int | None = Field(None, ge=2, description="First so many train rows; default: all.")
    test_rows: int | None = Field(None, ge=1, description="First so many test rows; default: all.")
    dev_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the train rows that is split off as dev.")
    split_seed: int = Field(0, ge=0, description="Seed of the dev split; apart from `seed`, so that seeds share it.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, the leading one first; none where the suite says which."""
        return metric_names(self.metric)

    @model_validator(mode="before")
    @classmethod
    def _told_in_full(cls, values: Any) -> Any:
        """Tasks with what ``tasks_file`` and ``defaults`` say of them, which are then said."""
        return told_in_full(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _consistent(self) -> BenchmarkConfig:
        every = (*(self.tasks or ()), *self.unseen)
        placed = [task.name for task in every if task.path is not None]
        if self.suite == "synthetic":
            if self.data_dir is not None:
                raise ValueError("synthetic tasks are generated: leave data_dir out")
            if told := [task.name for task in every if task.model_fields_set != {"name"}]:
                raise ValueError(f"synthetic tasks are generated: of {', '.join(told)} give the name alone")
        elif self.data_dir is None and (self.tasks is None or len(placed) < len(every)):
            raise ValueError(
                f"suite {self.suite} needs data_dir, the folder that holds one folder a task, or a path of every task"
            )
        if self.suite == "folder" and not self.tasks:
            raise ValueError("suite folder has no numbered orders: name its tasks in tasks, or give tasks_file")
        if self.suite == "folder" and not all(
            (self.template or task.template) and (self.metric or task.metric) for task in every
        ):
            raise ValueError(
                "suite folder needs template (superni, chat, Jinja text: docs/data.md) and metric (rouge_l or "
                "exact_match, or "
                "for other scripts than the Latin one rouge_l_unicode or exact_match_unicode)"
            )
        if self.tasks is not None:
            names = [task.name for task in self.tasks]
            twice = sorted({name for name in names if names.count(name) > 1})
            if not names:
                raise ValueError("tasks is empty: name at least one task")
            if twice:
                raise ValueError(f"tasks named twice: {', '.join(twice)}")
        return self


class BackboneConfig(Section):
    """The frozen model: a folder or a hub id, of which one GGUF file may be all that is read."""

    path: str = Field(min_length=1, description="Folder with a Hugging Face model and tokenizer, or a hub id.")
    revision: str | None = Field(
        None, pattern=HUB_REVISION, description="Hub revision (commit); pin it, so that records stay valid."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: the checkpoint's own, float32 for float16 and for quantised GGUF files."
    )
    gguf_file: str | None = Field(
        None,
        pattern=r"^[^/\\]+\.gguf$",
        description="Name of a GGUF file there with model and tokenizer; its weights are made dense, once a machine.",
    )


class LoRAConfig(Section):
    """One LoRA block; words as in PEFT."""

    type: Literal["lora"] = Field("lora", description="Kind of block.")
    r: int = Field(8, ge=1, description="Rank.")
    lora_alpha: float = Field(16, gt=0, description="The block counts lora_alpha / r times.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of its input while it is learnt.")
    target_modules: NameList = Field(
        ("q", "v"),
        min_length=1,
        description="Last name parts of the linears to adapt; the generator's are the block's unless given.",
    )
    detach_frozen: bool = Field(
        False,
        description="Let no gradient through finished blocks to the layers below, as the published code does; "
        "it is not the gradient of the model that is used.",
    )


class PromptConfig(Section):
    """One block of soft prompts (SAPT-Prompt): ``length`` embeddings in front of the input's."""

    type: Literal["prompt"] = Field("prompt", description="Kind of block.")
    length: int = Field(10, ge=1, description="Soft tokens a block; each starts as a random row of the vocabulary.")


class FullConfig(Section):
    """Full fine-tuning: the one block is a whole set of the model's weights."""

    type: Literal["full"] = Field("full", description="Kind of block.")


def _pet_type(value: Any) -> Any:
    return value.get("type", "lora") if isinstance(value, dict) else getattr(value, "type", None)


PET_TYPES = {"lora": LoRAConfig, "prompt": PromptConfig, "full": FullConfig}
PETConfig: TypeAlias = Annotated[
    Annotated[LoRAConfig, Tag("lora")] | Annotated[PromptConfig, Tag("prompt")] | Annotated[FullConfig, Tag("full")],
    Discriminator(
        _pet_type,
        custom_error_type="pet_type",
        custom_error_message="type must be lora, prompt or full",
    ),
]


class AttentionConfig(Section):
    """Shared attention (SAPT section 3.2): which blocks, how much, for every input.

    The defaults are the paper's; ``method.name`` sapt has its own for some of them (``TUNED``).
    """

    bottleneck: int = Field(100, ge=1, description="Width d_p of the query projection.")
    temperature: float = Field(1.0, gt=0, description="τ in units of √D; 1 is the paper's √D.")
    silu: Literal["between", "after"] = Field("between", description="Paper: between the two linears; code: after.")
    query: Literal["prompt", "input"] = Field(
        "prompt",
        description="What the query is made of: the whole prompt, or the prompt less its definition, "
        "which all inputs of a task share and which is close to a task's name.",
    )
    pool_padding: bool = Field(
        False, description="Let padding take part in the query, as the published code does: it depends on the batch."
    )
    key_init: Literal["uniform", "task_mean"] = Field(
        "uniform",
        description="Paper: U(-1, 1); task_mean: mean query of the task's own train inputs, scaled to length √D.",
    )
    centre: Literal["none", "vocabulary"] = Field(
        "none",
        description="What is taken off a pooled embedding: nothing (paper), or what random tokens pool to, "
        "which all inputs share and which hides how they differ.",
    )
    scale: Literal["none", "vocabulary"] = Field(
        "none",
        description="What a pooled embedding's dimensions are divided by: nothing (paper), or their standard "
        "deviation over what random tokens pool to.",
    )
    residual: bool = Field(
        False, description="Add the projection to the pooled embedding, starting from it alone (W_up zero)."
    )
    hold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a task's steps over which the new block's weight is let go from 1; meanwhile the "
        "task's loss does not move the router.",
    )
    learning_rate_ratio: float = Field(1.0, gt=0, description="Router's rate as a multiple of train.learning_rate.")
    selection: Literal["attention", "uniform"] = Field(
        "attention",
        description="Weights that answers are made with: those of learning, or, to see what alignment is worth, "
        "the same for every block.",
    )


class ReflectionConfig(Section):
    """Attentive reflection (ARM, SAPT section 3.3): KL between stored and present attention on inputs of old tasks."""

    source: Literal["generated", "given", "memory", "statistics", "none"] = Field(
        "generated",
        description="Where an old task's inputs come from: its generator (paper), a folder of samples made "
        "elsewhere, a share of its real train inputs, draws from the mean and covariance of its pooled "
        "embeddings (no generator, no text kept), or nowhere.",
    )
    weight: float = Field(0.5, ge=0, description="λ, the weight of the KL term.")
    batch_size: int = Field(16, ge=1, description="Inputs of every old task in a step.")
    target: Literal["task_mean", "instance"] = Field(
        "task_mean", description="Attention to hold: the task's mean (paper), or each input's own, when learnt."
    )
    target_split: Literal["train", "dev"] = Field("train", description="Rows whose mean attention is the target.")
    data_dir: Path | None = Field(None, description="source given: one folder a task with samples as train.json.")
    share: float = Field(0.02, gt=0, le=1, description="source memory: kept share of the train inputs, at least one.")
    rank: int = Field(16, ge=0, description="source statistics: directions of the covariance that are kept.")
    per_micro_batch: bool = Field(
        False,
        description="Add the term in every micro-batch, undivided, as published: accumulation then multiplies λ.",
    )

    @model_validator(mode="after")
    def _has_its_data(self) -> ReflectionConfig:
        if (self.source == "given") != (self.data_dir is not None):
            raise ValueError("source given and data_dir, the folder that holds its samples, belong together")
        return self


class GeneratorConfig(Section):
    """Pseudo-sample generator: a LoRA on the raw backbone, one a task (SAPT section 3.3)."""

    pet: LoRAConfig = Field(
        LoRAConfig(r=8, lora_alpha=32, lora_dropout=0.1),
        description="Its own LoRA, on `pet.target_modules` unless given.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's rate.")
    batch_size: int = Field(16, ge=1, description="Rows in an optimizer step, over all workers.")
    micro_batch_size: int | None = Field(None, ge=1, description="Rows in one forward of one worker; default: all.")
    epochs: float | None = Field(None, gt=0, description="Passes over the train rows; give this or steps.")
    steps: int | None = Field(5000, ge=1, description="Optimizer steps; give this or epochs.")
    content: Literal["inputs", "pairs"] = Field(
        "inputs",
        description="What it learns to write: inputs (paper; reflection reads no more), or inputs and answers.",
    )
    share: float = Field(0.02, gt=0, le=1, description="Kept pseudo-samples as a share of the train rows.")
    min_samples: int = Field(1, ge=1, description="Kept pseudo-samples at least, however few the train rows.")
    max_attempts: int = Field(4, ge=1, description="Generations tried for each sample to keep.")
    top_k: int = Field(20, ge=1, description="Likeliest tokens that the next one is drawn from.")
    repetition_penalty: float = Field(2.5, ge=1, description="Divides the scores of tokens that are there already.")
    max_tokens: int = Field(
        512, ge=16, description="Longest text it learns and generates; over-long ones are cut as prompts are."
    )

    @model_validator(mode="after")
    def _one_length(self) -> GeneratorConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (null for the other)")
        return self


class TrainConfig(Section):
    """One task's training loop. Batches are counted over all workers."""

    learning_rate: float = Field(3e-4, gt=0, description="AdamW's rate.")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="Paper: the rate stays; linear: it falls from the first step to zero after the last."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    epochs: float = Field(10, gt=0, description="Passes over the train rows; may be a fraction.")
    batch_size: int = Field(32, ge=1, description="Rows in an optimizer step, over all workers.")
    micro_batch_size: int | None = Field(None, ge=1, description="Rows in one forward of one worker; default: all.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Longer gradients are cut to this norm; null: none are.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 autocast where the device computes in it natively or the backbone's weights are in "
        "it; settled once, on the machine that a run is started from, for all nodes.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward: less memory, more time."
    )
    eval_every_epochs: int | None = Field(
        None, ge=1, description="Score dev so often and keep the best weights; default: keep the last."
    )
    checkpoint_every_steps: int = Field(200, ge=1, description="Steps that an interruption costs at most.")


class EvaluationConfig(Section):
    """Decoding of the rows that are scored, without sampling."""

    split: Literal["test", "dev"] = Field(
        "test", description="Rows that scores are of: the test rows, or dev, to choose settings by."
    )
    batch_size: int = Field(32, ge=1, description="Rows that are answered at once.")
    num_beams: int = Field(1, ge=1, description="Beams of the search; 1 is greedy.")
    single_task: bool = Field(
        True, description="Learn every task alone too: the baseline of FWT, about as much training again."
    )


class DiagnosticsConfig(Section):
    """From when on the end of a run warns. Nothing that is computed depends on it."""

    forgetting: float = Field(5.0, ge=0, description="Points of score an earlier task may fall by from its best.")
    transfer: float = Field(5.0, ge=0, description="Points a task may be learnt worse than alone.")
    misalignment: float = Field(
        0.5, gt=0, description="Nats (KL) a task's attention may be away from where it was when it was learnt."
    )
    falling: float = Field(
        0.1, ge=0, description="Nats the mean loss may fall from the third to the last quarter of a task's steps."
    )


class RetentionConfig(Section):
    """What may stay of a task's data in store, versions and reports once the sequence is learnt.

    Until then all of it is there, so no result depends on it. A task's name and instruction, scores, counts and digests
    always stay.
    """

    train_rows: Literal["all", "share", "samples", "statistics"] = Field(
        "all",
        description="The most that may stay of its train rows: all, so that they can be learnt again without their "
        "files; a share, for a memory of real rows; samples, which a generator wrote in their place, and no row; or "
        "statistics, figures alone and no text.",
    )
    share: float = Field(
        0.02, gt=0, le=1, description="train_rows share: the highest share of real rows; one row may always stay."
    )
    sealed_rows: bool = Field(
        True,
        description="Whether the rows stay that scores are of, with what was answered to them: test rows, and dev "
        "rows, which are split off the train rows. Without them a version answers, but is neither promoted by its "
        "scores nor extended, and reports show no rows.",
    )

    @property
    def keeps_all(self) -> bool:
        """Whether all of the data may stay."""
        return self.train_rows == "all" and self.sealed_rows


class ClusterConfig(Section):
    """What Ray gives each stage."""

    address: str | None = Field(None, description="Ray address; default: RAY_ADDRESS, else a local Ray.")
    train_workers: int = Field(
        1,
        ge=0,
        description="Ray Train workers of a training stage. They start once (some ten seconds) and stay for the next "
        "stage while nothing else needs their place; 0 trains in the stage's own Ray task.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a worker, and of every other stage.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of a worker, and of a stage that scores.")
    max_failures: int = Field(2, ge=0, description="Restarts of a training stage whose worker died.")


class StoreConfig(Section):
    """Where blobs and records live."""

    uri: str = Field("runs/store", description="Folder, file:///folder or s3://bucket/prefix.")
    endpoint_url: str | None = Field(None, description="S3 endpoint; default: the AWS environment's.")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        scheme, separator, rest = uri.partition("://")
        if separator and (scheme not in {"s3", "file"} or not rest):
            raise ValueError("give a folder, file:///folder or s3://bucket/prefix")
        return uri


class TrackingConfig(Section):
    """MLflow."""

    uri: str = Field("sqlite:///runs/mlflow.db", description="Any MLflow tracking URI.")
    experiment: str = Field("sapt", min_length=1, description="MLflow experiment that gets the runs.")
    model: str = Field("sapt", pattern=MODEL_NAME, description="Registered model that gets a version a task.")
    line: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="Line of versions that this sequence goes on or begins; default: that of the version it goes on "
        "from, else the registered model's first. In a line no version has lost tasks of the one before.",
    )


class RegistryConfig(Section):
    """When a version may become the champion."""

    max_drop: float = Field(
        1.0,
        ge=0,
        description="Points that a task may score lower than with the champion; more is refused. One point is a row of "
        "a hundred: less than that is within what other test rows would say.",
    )


class PlacesConfig(Section):
    """Where versions of the pool are kept: all that reading one needs."""

    store: StoreConfig = Field(StoreConfig(), description="Where blobs and records live.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where runs and versions are told of.")
    registry: RegistryConfig = Field(RegistryConfig(), description="When a version may become the champion.")
