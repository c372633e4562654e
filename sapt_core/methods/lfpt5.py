"""LFPT5 (arXiv 2110.07298): one prompt that also learns to write samples of its tasks, which later tasks replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sapt_core.backbones.device import default_device
from sapt_core.data.collate import Batch, Collator
from sapt_core.data.task import LearntTask
from sapt_core.data.templates import ANSWER_MARKER, INPUT_MARKER, PromptPieces
from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.pool.model import SaptModel
from sapt_core.settings import GeneratorConfig
from sapt_core.training.generator import SOURCE, sample
from sapt_core.training.objective import Objective, Row
from sapt_core.training.trainer import step_seed
from sapt_core.training.workers import shared


class LFPT5(Method):
    """``L = L_task + λ_lm L_lm + λ_kl L_kl`` on the task's rows and on pseudo-samples of every earlier task.

    Before a task is learnt, the block as it is writes pseudo-samples of every earlier one. They are learnt beside
    the new rows, with the answers it wrote; their answers' distribution is held to what it was (L_kl); and of all
    rows it goes on learning to write them (L_lm).
    """

    name: Literal["lfpt5"] = "lfpt5"

    version: ClassVar[int] = 2
    summary: ClassVar[str] = "one block that writes the samples it replays (LFPT5, arXiv 2110.07298)"

    share: float = Field(
        0.02, gt=0, le=1, description="Pseudo-samples of an earlier task as a share of the task's rows."
    )
    writing: float = Field(0.25, ge=0, description="λ_lm, weight of learning to write samples.")
    consistency: float = Field(0.03, ge=0, description="λ_kl, weight of the earlier answers' distribution.")
    max_tokens: int = Field(192, ge=16, description="Longest sample it learns and writes.")
    max_attempts: int = Field(4, ge=1, description="Samples tried for each one to keep.")
    top_k: int = Field(20, ge=1, description="Likeliest tokens that a sample's next one is drawn from.")

    def begin(self, lesson: Lesson) -> Plan:
        """Write samples of the earlier tasks, and train on them beside the task's rows."""
        lesson.model.to(default_device()).eval()
        writer = _Writer(lesson, self)
        earlier = lesson.earlier
        texts = shared(len(earlier), lambda index: writer.texts(earlier[index], index))
        pseudo = [each for task, found in zip(earlier, texts, strict=True) for each in writer.samples(task, found)]
        terms: list[WritingTerm | ConsistencyTerm] = []
        collator = lesson.model.collator(lesson.tokenizer.pad_token_id)
        size = lesson.train.batch_size
        if self.writing:
            written = [*writer.own_rows(), *(each.written for each in pseudo)]
            terms.append(WritingTerm(self.writing, tuple(written), collator, size))
        if self.consistency and pseudo:
            rows = tuple(each.row for each in pseudo)
            before = tuple(lesson.answer_logits(row) for row in rows)
            terms.append(ConsistencyTerm(self.consistency, rows, collator, size, before))
        return Plan([*lesson.rows, *(each.row for each in pseudo)], Objective(tuple(terms)))


@dataclass(frozen=True)
class _Sample:
    """A pseudo-sample: as a row to answer, and as a row that teaches to write it."""

    row: Row
    written: Row


@dataclass(frozen=True)
class _Writer:
    """Asks the block for samples of a task, by the task's definition, and shows it how they are written."""

    lesson: Lesson
    method: LFPT5

    def source(self, task: LearntTask) -> list[int]:
        """Ids of the text that asks for a sample of a task."""
        return self.lesson.encoder(task).prompts("none", task.definition, [SOURCE])[0].prompt_ids

    def written(self, task: LearntTask, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Rows that teach to write inputs with their answers."""
        pieces = [PromptPieces("", INPUT_MARKER, text, ANSWER_MARKER + answer) for text, answer in pairs]
        source = self.source(task)
        targets = self.lesson.encoder(task).targets(task.definition + SOURCE, pieces, self.method.max_tokens)
        return [{"prompt_ids": source, "answer_ids": target, "query_start": 0} for target in targets]

    def own_rows(self) -> list[Row]:
        """Of the task that is to be learnt."""
        train = self.lesson.task.train
        answers = self.lesson.tokenizer.batch_decode(list(train["answer_ids"]), skip_special_tokens=True)
        return self.written(self.lesson.learnt, list(zip(map(str, train["input"]), answers, strict=True)))

    def texts(self, task: LearntTask, index: int) -> dict[str, str]:
        """Clean inputs of an earlier task with their answers, as many as its share of the new task's rows or fewer."""
        method, model = self.method, self.lesson.model
        config = GeneratorConfig(
            content="pairs",
            batch_size=16,
            max_attempts=method.max_attempts,
            top_k=method.top_k,
            repetition_penalty=1.0,
            max_tokens=method.max_tokens,
        )
        wanted = max(1, round(method.share * len(self.lesson.rows)))
        torch.manual_seed(step_seed(self.lesson.seed, "sample", index))
        encoder = self.lesson.encoder(task)
        found, _ = sample(
            model,
            self.lesson.tokenizer,
            self.source(task),
            wanted=wanted,
            config=config,
            precision=self.lesson.train.precision,
            takes=lambda text: encoder.takes(task.template, task.definition, text),
        )
        return found

    def samples(self, task: LearntTask, found: Mapping[str, str]) -> list[_Sample]:
        """What was written of a task, as rows."""
        if not found:
            return []
        pairs = list(found.items())
        rows = self.lesson.encoder(task).rows(task.template, task.definition, pairs, task.max_target_tokens)
        return [_Sample(row.row, written) for row, written in zip(rows, self.written(task, pairs), strict=True)]


@dataclass(frozen=True)
class _OfRows:
    """A ``sapt_core.training.objective.Term`` on at most ``batch_size`` random rows a step."""

    weight: float
    rows: tuple[Row, ...]
    collator: Collator
    batch_size: int
    per_micro_batch = False
    runs_rows = True

    def draw(self, generator: torch.Generator) -> list[_Chosen]:
        rows = torch.randperm(len(self.rows), generator=generator)[: self.batch_size].tolist()
        tokens = sum(len(self.rows[row]["answer_ids"]) for row in rows)
        return [_Chosen(row, tokens) for row in rows]

    def seen(self, model: SaptModel, drawn: Sequence[_Chosen]) -> tuple[Tensor, Batch]:
        """Logits (B, P, V) of the drawn rows, and the batch that they are, on the CPU."""
        batch = self.collator([self.rows[each.row] for each in drawn])
        return model(batch.to(next(model.backbone.parameters()).device)), batch

    def to(self, device: torch.device) -> Self:
        """Itself: only what is drawn is moved."""
        return self


class _Chosen(NamedTuple):
    """A row of a term's by its index, drawn for a step in which the answers of all drawn rows have so many tokens."""

    row: int
    tokens: int


@dataclass(frozen=True)
class WritingTerm(_OfRows):
    """Mean cross-entropy a token of written samples."""

    name = "writing"

    def value(self, model: SaptModel, drawn: Sequence[_Chosen]) -> Tensor:
        logits, batch = self.seen(model, drawn)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        return model.token_loss(logits, batch.labels.to(logits.device)) / drawn[0].tokens


@dataclass(frozen=True)
class ConsistencyTerm(_OfRows):
    """``KL(p_before ‖ p_now)``, mean over the answer tokens of pseudo-samples.

    Attributes:
        before: logits (L, V) of every row's answer, in float32 on the CPU: all of them would fill a GPU.
    """

    before: tuple[Tensor, ...]
    name = "consistency"

    def value(self, model: SaptModel, drawn: Sequence[_Chosen]) -> Tensor:
        logits, batch = self.seen(model, drawn)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        parts = []
        for place, each in enumerate(drawn):
            # Labels on the CPU say where the answer is without waiting for the device.
            now = model.answer_logits(logits[place], batch.labels[place])
            before = self.before[each.row].to(now.device)
            parts.append(F.kl_div(now.log_softmax(-1), before.softmax(-1), reduction="sum"))
        return torch.stack(parts).sum() / drawn[0].tokens
