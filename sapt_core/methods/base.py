"""What a continual-learning method is to the pipeline, and how one is found by its name.

The trainer, the stages, snapshots, the registry and reports know this contract and no method's name. A
method is a subclass in a file of its own: its fields are its options (section ``method`` of a config),
its class variables say what it needs, and its hooks run when a task begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, SerializeAsAny
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.device import autocast
from sapt_core.data.collate import Batch
from sapt_core.data.encoding import PromptEncoder
from sapt_core.data.prepare import PreparedTask
from sapt_core.data.task import LearntTask
from sapt_core.errors import DivergenceError
from sapt_core.io.blobs import BlobStore
from sapt_core.judging.decoding import pooled_embeddings
from sapt_core.pool.blocks.base import PETBlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_blocks
from sapt_core.settings import AttentionConfig, PETConfig, ReflectionConfig, TrainConfig
from sapt_core.task_settings import Section
from sapt_core.training.objective import Objective, Row
from sapt_core.training.reflection import GaussianQueries, RecordedAttention

Kept: TypeAlias = Sequence[str] | GaussianQueries
"""What reflection has of an earlier task: inputs as text, or the statistics of their pooled embeddings."""


@dataclass(frozen=True)
class Lesson:
    """One task that is to be learnt, and what there is to learn it with.

    Attributes:
        model: the backbone with the pool whose last block is learnt. It may be on the CPU when ``begin`` is called,
            which may move it, and is where it trained when ``end`` is.
        tokenizer: of the backbone.
        task: tokenised rows.
        learnt: what the next version keeps of the task.
        earlier: tasks that the version before has learnt, oldest first, but for the one that is learnt again; empty
            where there is no other.
        targets: mean weights of the blocks there were, on each of them after it was learnt.
        saved: sha256 of what the method saved at the end of earlier tasks, by name.
        routers: reads the shared attention as it was right after each earlier task, oldest first.
        kept: what there is to reflect on of every earlier task, oldest first; empty without reflection.
        attention: settings of shared attention; None for a method without it.
        reflection, train: settings.
        seed: of this task in this sequence.
        order: for each of the version's blocks, oldest first, its place in the pool, where the one that is learnt
            stands last; None where it is the newest.
        further: whether the task is learnt further: block and key stand where it left them.
        store: holds the version's blobs.
        notes: what a method's ``begin`` leaves for its ``end``.
        until_end: puts back what the method changes of the backbone, which others share, however the lesson ends.
    """

    model: SaptModel
    tokenizer: PreTrainedTokenizerBase
    task: PreparedTask
    learnt: LearntTask
    earlier: Sequence[LearntTask]
    targets: Sequence[Sequence[float]]
    saved: Mapping[str, str]
    routers: Callable[[], Sequence[RecordedAttention]]
    kept: Sequence[Kept]
    attention: AttentionConfig | None
    reflection: ReflectionConfig
    train: TrainConfig
    seed: int
    store: BlobStore
    order: Sequence[int] | None = None
    further: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    until_end: ExitStack = field(default_factory=ExitStack)

    @property
    def index(self) -> int:
        """The task's place in the sequence, from 0; of one that is learnt again, how many others there are."""
        return len(self.earlier)

    @cached_property
    def rows(self) -> list[Row]:
        """The task's train rows, with ``prompt_ids`` and ``answer_ids``."""
        return list(self.task.train)

    @cached_property
    def pooled(self) -> Tensor:
        """Pooled embeddings (N, D) of the train rows."""
        return pooled_embeddings(self.model, self.tokenizer, self.rows)

    def encoder(self, task: LearntTask) -> PromptEncoder:
        """Tokenises texts of a task as its rows are."""
        return PromptEncoder(
            self.tokenizer,
            max_source_tokens=task.max_source_tokens,
            is_encoder_decoder=self.model.is_encoder_decoder,
        )

    def batch(self, row: Row) -> Batch:
        """One train row as a batch, where the backbone is."""
        collator = self.model.collator(self.tokenizer.pad_token_id)
        return collator([row]).to(next(self.model.backbone.parameters()).device)

    @torch.no_grad()
    def answer_logits(self, row: Row) -> Tensor:
        """What the model says now of a row's answer tokens (L, V), in float32 on the CPU."""
        batch = self.batch(row)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        with autocast(batch.input_ids.device, self.train.precision):
            logits = self.model(batch)
        return self.model.answer_logits(logits[0], batch.labels[0]).cpu()

    def state(self, name: str) -> bytes | None:
        """What the method saved under a name at the end of an earlier task; None if it did not."""
        digest = self.saved.get(name)
        return None if digest is None else self.store.get(digest)


@dataclass(frozen=True)
class Plan:
    """What one task's training goes through: its rows, and the loss beside their cross-entropy."""

    rows: Sequence[Row]
    objective: Objective = field(default_factory=Objective)


class Method(Section):
    """How a sequence is learnt. The defaults train on the task's rows and save nothing.

    Attributes:
        name: in configs and snapshots; a subclass gives it as a Literal with itself as the default.
        version: raised when the method learns otherwise than before, so that what is stored is learnt anew.
        summary: one line for those who choose, with the paper it comes from.
        pool: a block for every task beside the finished ones, one block that goes on training from task to
            task, or one that every task starts afresh.
        shared_attention: whether SAPT's attention mixes the blocks (sections ``attention`` and
            ``reflection``); without it every block has weight 1.
        again: whether a task can be learnt again from more rows, as honestly as a new one is: nothing that is kept
            goes by the task's place, and no block was learnt on top of one that changes.
        pet_types: kinds of PET block it works with.
        attention_defaults: what it sets in ``attention`` unless the config does.
    """

    name: str

    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    pool: ClassVar[Literal["block per task", "one block", "fresh block"]] = "one block"
    shared_attention: ClassVar[bool] = False
    again: ClassVar[bool] = False
    pet_types: ClassVar[tuple[str, ...]] = ("lora", "prompt")
    attention_defaults: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.model_fields["name"].default
        if isinstance(name, str):  # the others are what methods share
            _known[name] = cls

    @property
    def needs_task(self) -> bool:
        """Whether answers are made only for inputs whose task is told."""
        return False

    @property
    def kept_share(self) -> float:
        """Share of a task's train rows that it keeps as they are, at least one row; 0 where it keeps none."""
        return 0.0

    def soft_tokens(self, length: int, tasks: int) -> int:
        """How many soft tokens stand in front of an input after so many tasks, with prompts of a ``length``."""
        return length

    def blocks(self, backbone: PreTrainedModel, pet: PETConfig) -> PETBlocks:
        """No blocks yet, of the method's own kind."""
        return new_blocks(backbone, pet)

    def active(self, task: int) -> Sequence[int]:
        """Indices of the blocks that take part where the input is known to be of the ``task``-th task.

        While it is learnt, and with ``needs_task`` when it is answered.
        """
        return range(task + 1)

    def begin(self, lesson: Lesson) -> Plan:
        """What to train on. Called with the new block in place; may change how it and its key start."""
        return Plan(lesson.rows)

    def check_backbone(self, config: PretrainedConfig) -> None:
        """Refuse a backbone that the options do not fit, before anything is loaded.

        Raises:
            BackboneError: with what was asked and what there is.
        """

    def mixture(self, lesson: Lesson) -> tuple[float, ...]:
        """Mean weights of the blocks on the task that was just learnt."""
        return (1.0,) * (lesson.index + 1 if self.pool == "block per task" else 1)

    def end(self, lesson: Lesson) -> Mapping[str, bytes]:
        """What to save beside the blocks, by name; what earlier tasks saved under other names stays."""
        return {}


def packed(what: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a method saves them.

    Raises:
        DivergenceError: a number among them is none, and every later version would inherit it.
    """
    faults = sorted(name for name, value in tensors.items() if not value.isfinite().all())
    if faults:
        raise DivergenceError(
            f"{what} holds numbers that are not finite, in {len(faults)} of {len(tensors)} tensors, first {faults[0]}. "
            "Nothing of it is recorded: lower train.learning_rate and run again."
        )
    return save_tensors({name: value.contiguous() for name, value in tensors.items()})


DEFAULT = "sapt"

_known: dict[str, type[Method]] = {}


@cache
def _import_all() -> None:
    """Make the classes of this package; a folder is listed, so once."""
    package = import_module("sapt_core.methods")
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


def known_methods() -> dict[str, type[Method]]:
    """Every method by its name: this package's, and all others whose classes exist."""
    _import_all()
    return dict(sorted(_known.items()))


def find_method(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        ValueError: there is none; names the nearest and all that are known.
    """
    known = known_methods()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"there is no method {name!r}; {hint}known: {', '.join(known)}")
    return known[name]


def default_method() -> Method:
    """What learns where a config names no method."""
    return find_method(DEFAULT).model_validate({})


def _as_method(value: Any) -> Any:
    """Options with a name, as YAML and JSON have them, are the options of the method of that name."""
    if not isinstance(value, Mapping):
        return value
    return find_method(str(value.get("name", DEFAULT))).model_validate(value)


AnyMethod: TypeAlias = Annotated[SerializeAsAny[Method], BeforeValidator(_as_method)]
"""A field that holds a method with its options."""
