"""Answers from a published pool version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from sapt_core.backbones.device import default_device
from sapt_core.backbones.loading import load_backbone
from sapt_core.blobs import BlobStore
from sapt_core.data.prepare import EncodedPrompt, PromptEncoder
from sapt_core.data.task import LearntTask
from sapt_core.errors import SaptError
from sapt_core.judging.decoding import answer
from sapt_core.pool.model import SaptModel
from sapt_core.settings import EvaluationConfig
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import Manifest


@dataclass(frozen=True)
class Prediction:
    """An answer and the mixture it was made with: the weight of every block, by the task that made it."""

    text: str
    weights: Mapping[str, float]


class Predictor:
    """A pool version on its backbone, ready to answer."""

    def __init__(
        self,
        manifest: Manifest,
        attach: Callable[[str | None], SaptModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
    ) -> None:
        self.manifest = manifest
        self._attach = attach
        self._tokenizer = tokenizer
        self._is_encoder_decoder = is_encoder_decoder

    @classmethod
    def load(cls, manifest: bytes, store: BlobStore) -> Predictor:
        """Load backbone and pool; every blob is verified.

        Raises:
            SnapshotError: the manifest or a block is damaged, too new, or does not fit.
            StoreError: a blob is missing or damaged.
            BackboneError: the backbone cannot be loaded.
        """
        parsed = Manifest.from_bytes(manifest)
        backbone, tokenizer = load_backbone(parsed.backbone, store)

        @cache
        def attach(task: str | None) -> SaptModel:
            return SaptModel(backbone, load_pool(parsed, store, backbone, task)).to(default_device())

        # Everything that can be wrong with a version shows before anything is asked.
        attach(parsed.tasks[0].name if parsed.method.needs_task else None)
        return cls(parsed, attach, tokenizer, is_encoder_decoder=bool(backbone.config.is_encoder_decoder))

    def predict(
        self, texts: Sequence[str], tasks: Sequence[LearntTask | None] | None = None, batch_size: int = 32
    ) -> list[Prediction]:
        """Answer texts; the method chooses the mix by itself, whether a task is named or not, unless it needs the task.

        Prompts that are longer than what the version was trained on lose tokens from the middle of their input,
        as they did in training.

        Args:
            texts: full prompts, or inputs of tasks.
            tasks: one a text: whose definition and template to put around it; None for a full prompt.
            batch_size: texts in one forward.

        Returns:
            A prediction a text, in the same order.

        Raises:
            SnapshotError: the method needs the task, and a text has none.
        """
        groups: dict[LearntTask | None, list[int]] = {}
        for index, task in enumerate(tasks or [None] * len(texts)):
            groups.setdefault(task, []).append(index)
        told = self.manifest.method.needs_task
        asked: dict[str | None, dict[int, dict[str, Any]]] = {}
        for task, indices in groups.items():
            place = self.manifest.index_of(None if task is None else task.name) if told else None
            rows = asked.setdefault(None if place is None else self.manifest.tasks[place].name, {})
            for index, prompt in zip(indices, self._encode([texts[index] for index in indices], task), strict=True):
                rows[index] = prompt.row
        found: dict[int, Prediction] = {}
        for name, rows in asked.items():
            answers, weights = answer(
                self._attach(name),
                self._tokenizer,
                [rows[index] for index in sorted(rows)],
                EvaluationConfig(batch_size=batch_size),
                max_new_tokens=max(task.max_target_tokens for task in self.manifest.tasks),
                precision="auto",
            )
            blocks = self.manifest.blocks_for(name)
            for index, text, row in zip(sorted(rows), answers, weights, strict=True):
                found[index] = Prediction(text, dict(zip(blocks, row.tolist(), strict=True)))
        return [found[index] for index in range(len(texts))]

    def _encode(self, texts: Sequence[str], task: LearntTask | None) -> list[EncodedPrompt]:
        longest = max(learnt.max_source_tokens for learnt in self.manifest.tasks)
        encoder = PromptEncoder(
            self._tokenizer,
            max_source_tokens=longest if task is None else task.max_source_tokens,
            is_encoder_decoder=self._is_encoder_decoder,
            joined=self.manifest.backbone.joined,
        )
        if task is None:
            return encoder.prompts("none", "", texts)
        return encoder.prompts(task.template, task.definition, texts)


def find_task(manifest: Manifest, name: str) -> LearntTask:
    """A task that the version has learnt, by its name or by what comes before the name's first underscore.

    Raises:
        SaptError: it has learnt no such task, or several that begin so.
    """
    found = [task for task in manifest.tasks if task.name == name]
    found = found or [task for task in manifest.tasks if task.name.startswith(f"{name}_")]
    if len(found) == 1:
        return found[0]
    if found:
        raise SaptError(f"task {name!r} fits several, give one in full: {', '.join(task.name for task in found)}")
    known = ", ".join(task.name for task in manifest.tasks)
    raise SaptError(f"the version has not learnt task {name!r}; it knows: {known}")
