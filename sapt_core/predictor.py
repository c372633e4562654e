"""Answers from a published pool version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sapt_core.backbone import load_backbone
from sapt_core.benchmarks.prepare import PromptEncoder
from sapt_core.benchmarks.templates import TEMPLATES
from sapt_core.blobs import BlobStore
from sapt_core.config import EvaluationConfig
from sapt_core.device import default_device
from sapt_core.errors import SaptError
from sapt_core.evaluation import answer
from sapt_core.model import SaptModel
from sapt_core.snapshot import Manifest, load_pool


@dataclass(frozen=True)
class Prediction:
    """An answer and the mixture it was made with: the weight of every block, by the task that made it."""

    text: str
    weights: Mapping[str, float]


class Predictor:
    """A pool version on its backbone, ready to answer."""

    def __init__(self, manifest: Manifest, model: SaptModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.manifest = manifest
        self._model = model
        self._tokenizer = tokenizer
        tasks = [task.name for task in manifest.tasks]
        # A method that goes on training one block has no block of any one task.
        self._blocks = tasks if len(tasks) == len(manifest.blocks) else ["all tasks"]

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
        model = SaptModel(backbone, load_pool(parsed, store, backbone))
        return cls(parsed, model.to(default_device()), tokenizer)

    def prompt(self, task: str, text: str) -> str:
        """The full prompt of an input of a task that the version has learnt.

        Raises:
            SaptError: it has learnt no such task.
        """
        for learnt in self.manifest.tasks:
            if learnt.name == task or learnt.name.startswith(f"{task}_"):
                return "".join(TEMPLATES[learnt.template].pieces(learnt.definition, text))
        known = ", ".join(learnt.name for learnt in self.manifest.tasks)
        raise SaptError(f"The version has not learnt task {task!r}; it knows: {known}")

    def predict(self, prompts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """Answer full prompts; no task is named, the shared attention chooses the mix."""
        learnt = self.manifest.tasks
        encoder = PromptEncoder(
            self._tokenizer,
            max_source_tokens=max(task.max_source_tokens for task in learnt),
            is_encoder_decoder=self._model.is_encoder_decoder,
        )
        if not prompts:
            return []
        texts, weights = answer(
            self._model,
            self._tokenizer,
            [{"prompt_ids": encoder.text(prompt)} for prompt in prompts],
            EvaluationConfig(batch_size=batch_size),
            max_new_tokens=max(task.max_target_tokens for task in learnt),
            precision="auto",
        )
        return [
            Prediction(text, dict(zip(self._blocks, row.tolist(), strict=True)))
            for text, row in zip(texts, weights, strict=True)
        ]
