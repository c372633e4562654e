"""LFPT5 (arXiv 2110.07298): one prompt that also learns to write samples of its tasks, which later tasks replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sapt_core.benchmarks.prepare import PromptEncoder
from sapt_core.benchmarks.templates import ANSWER_MARKER, INPUT_MARKER, PromptPieces
from sapt_core.collate import Collator
from sapt_core.device import autocast, default_device
from sapt_core.generator import SOURCE, sample
from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.model import SaptModel
from sapt_core.settings import GeneratorConfig
from sapt_core.snapshot import LearntTask
from sapt_core.trainer import Objective, Row, step_seed


class LFPT5(Method):
    """``L = L_task + λ_lm L_lm + λ_kl L_kl`` on the task's rows and on pseudo-samples of every earlier task.

    Before a task is learnt, the block as it is writes pseudo-samples of every earlier one. They are learnt beside
    the new rows, with the answers it wrote; their answers' distribution is held to what it was (L_kl); and of all
    rows it goes on learning to write them (L_lm).
    """

    name: Literal["lfpt5"] = "lfpt5"

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
        writer = _Writer(lesson, self)
        earlier = lesson.parent.tasks if lesson.parent is not None else ()
        pseudo = [sample for index, task in enumerate(earlier) for sample in writer.samples(task, index)]
        terms: list[WritingTerm | ConsistencyTerm] = []
        collator = lesson.model.collator(lesson.tokenizer.pad_token_id)
        size = lesson.train.batch_size
        if self.writing:
            written = [*writer.own_rows(), *(each.written for each in pseudo)]
            terms.append(WritingTerm(self.writing, tuple(written), collator, size))
        if self.consistency and pseudo:
            rows = tuple(each.row for each in pseudo)
            logits = tuple(writer.logits(row) for row in rows)
            terms.append(ConsistencyTerm(self.consistency, rows, logits, collator, size))
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

    def _encoder(self, task: LearntTask) -> PromptEncoder:
        model = self.lesson.model
        return PromptEncoder(
            self.lesson.tokenizer,
            max_source_tokens=task.max_source_tokens,
            is_encoder_decoder=model.is_encoder_decoder,
        )

    def source(self, task: LearntTask) -> list[int]:
        """Ids of the text that asks for a sample of a task."""
        ids: list[int] = self._encoder(task).prompts("none", task.definition, [SOURCE])[0].row["prompt_ids"]
        return ids

    def written(self, task: LearntTask, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Rows that teach to write inputs with their answers."""
        pieces = [PromptPieces("", INPUT_MARKER, text, ANSWER_MARKER + answer) for text, answer in pairs]
        source = self.source(task)
        targets = self._encoder(task).targets(pieces, self.method.max_tokens)
        return [{"prompt_ids": source, "answer_ids": target, "query_start": 0} for target in targets]

    def own_rows(self) -> list[Row]:
        """Of the task that is to be learnt."""
        train = self.lesson.task.train
        answers = self.lesson.tokenizer.batch_decode(list(train["answer_ids"]), skip_special_tokens=True)
        return self.written(self.lesson.learnt, list(zip(map(str, train["input"]), answers, strict=True)))

    def samples(self, task: LearntTask, index: int) -> list[_Sample]:
        """Clean samples of an earlier task, as many as its share of the new task's rows or fewer."""
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
        model.to(default_device()).eval()
        try:
            found, _ = sample(
                model,
                self.lesson.tokenizer,
                self.source(task),
                wanted=wanted,
                config=config,
                precision=self.lesson.train.precision,
            )
        finally:
            model.pool.cpu()
        if not found:
            return []
        encoder = self._encoder(task)
        prompts = encoder.prompts(task.template, task.definition, list(found))
        answers = encoder.answers(list(found.values()), task.max_target_tokens)
        rows = [{**prompt.row, "answer_ids": ids} for prompt, (ids, _) in zip(prompts, answers, strict=True)]
        return [_Sample(*pair) for pair in zip(rows, self.written(task, list(found.items())), strict=True)]

    @torch.no_grad()
    def logits(self, row: Row) -> Tensor:
        """What the block says now of a row's answer tokens (L, V), on the CPU."""
        model = self.lesson.model.to(default_device()).eval()
        device = next(model.backbone.parameters()).device
        batch = model.collator(self.lesson.tokenizer.pad_token_id)([row]).to(device)
        with autocast(device, self.lesson.train.precision):
            logits = model(batch)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        found = model.answer_logits(logits[0], batch.labels[0]).cpu()
        model.pool.cpu()
        return found


@dataclass(frozen=True)
class WritingTerm:
    """Mean cross-entropy a token of written samples; a ``sapt_core.trainer.Term``."""

    weight: float
    rows: tuple[Row, ...]
    collator: Collator
    batch_size: int
    name = "writing"
    per_micro_batch = False

    def draw(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.rows), generator=generator)[: self.batch_size].tolist()

    def value(self, model: SaptModel, drawn: Sequence[int]) -> Tensor:
        batch = self.collator([self.rows[index] for index in drawn]).to(next(model.backbone.parameters()).device)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        return model.token_loss(model(batch), batch.labels) / sum(len(self.rows[i]["answer_ids"]) for i in drawn)

    def to(self, device: torch.device) -> WritingTerm:
        return self


@dataclass(frozen=True)
class ConsistencyTerm:
    """``KL(p_before ‖ p_now)``, mean over the answer tokens of pseudo-samples; a ``sapt_core.trainer.Term``."""

    weight: float
    rows: tuple[Row, ...]
    before: tuple[Tensor, ...]
    collator: Collator
    batch_size: int
    name = "consistency"
    per_micro_batch = False

    def draw(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(len(self.rows), generator=generator)[: self.batch_size].tolist()

    def value(self, model: SaptModel, drawn: Sequence[int]) -> Tensor:
        batch = self.collator([self.rows[index] for index in drawn]).to(next(model.backbone.parameters()).device)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        logits = model(batch)
        parts, tokens = [], 0
        for place, index in enumerate(drawn):
            now = model.answer_logits(logits[place], batch.labels[place])
            parts.append(F.kl_div(now.log_softmax(-1), self.before[index].softmax(-1), reduction="sum"))
            tokens += len(now)
        return torch.stack(parts).sum() / tokens

    def to(self, device: torch.device) -> ConsistencyTerm:
        return replace(self, before=tuple(each.to(device) for each in self.before))
