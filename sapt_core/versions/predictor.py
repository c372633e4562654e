"""Answers from a published pool version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerBase

from sapt_core.backbones.device import default_device
from sapt_core.backbones.loading import load_backbone
from sapt_core.data.collate import Sharing
from sapt_core.data.encoding import EncodedPrompt, PromptEncoder
from sapt_core.data.rendering import ends_of
from sapt_core.errors import FaultsError, RequestError
from sapt_core.io.blobs import BlobStore
from sapt_core.judging.choices import Choices, choices_of
from sapt_core.judging.decoding import answer
from sapt_core.pool.model import SaptModel
from sapt_core.settings import EvaluationConfig
from sapt_core.template_settings import template_fault
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.requests import Request, Row, read_rows, refuse, rows_of


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
        self._encoders = {
            room: PromptEncoder(
                tokenizer,
                max_source_tokens=room,
                is_encoder_decoder=is_encoder_decoder,
                joined=manifest.backbone.joined,
            )
            for room in {task.max_source_tokens for task in manifest.tasks}
        }
        ends: dict[str | None, tuple[int, ...]] = {
            task.name: ends_of(task.template, tokenizer)
            for task in manifest.tasks
            if template_fault(task.template) is None  # one of a newer release is refused where it is asked for
        }
        every = tuple(dict.fromkeys(end for of_task in ends.values() for end in of_task))
        self._taught_ends = {**ends, None: every}

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
            pool = load_pool(parsed, store, backbone, task)
            return SaptModel(backbone, pool, Sharing(answering=parsed.answering)).to(default_device())

        # Everything that can be wrong with a version shows before anything is asked.
        attach(parsed.tasks[0].name if parsed.method.needs_task else None)
        return cls(parsed, attach, tokenizer, is_encoder_decoder=bool(backbone.config.is_encoder_decoder))

    def predict(
        self, texts: Sequence[str], tasks: Sequence[str | None] | None = None, batch_size: int = 32
    ) -> list[Prediction]:
        """Answer texts: ``answer`` of full prompts and of inputs.

        Args:
            texts: full prompts, or inputs of tasks.
            tasks: one a text: the name of whose definition and template to put around it; None for a full prompt.
            batch_size: texts in one forward.

        Returns:
            A prediction a text, in the same order.

        Raises:
            RequestError: as ``answer``, or there are more or fewer tasks than texts.
        """
        return self.answer(rows_of(texts, tasks), batch_size=batch_size)

    def answer(
        self,
        rows: Sequence[Row],
        *,
        names: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """Answer rows; the method chooses the mix by itself, whether a task is named or not, unless it needs the task.

        An input that makes its prompt longer than what the task was trained on loses tokens from its middle, as it
        did in training. Of a full prompt nobody knows what may be lost, so one that is too long is refused.

        Args:
            rows: what is asked.
            names: of the rows, for messages; default: row 0, row 1 and so on.
            max_new_tokens: longest answer, but for a task of which only labels may be answered; default: what the
                task with the longest was trained on.
            num_beams: beams of the search; 1, the default, is greedy.
            batch_size: rows in one forward.

        Returns:
            A prediction a row, in the same order.

        Raises:
            RequestError: with every fault of every row; none is answered.
        """
        requests, faults = read_rows(self.manifest, rows)
        encoded: dict[int, EncodedPrompt] = {}
        for place, request in requests.items():
            try:
                encoded[place] = self._encode(request)
            except FaultsError as error:
                faults[place] = "; ".join(error.faults)
        options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        refuse(
            faults,
            names,
            [
                f"{name}={value}: give a whole number from 1 on"
                for name, value in options.items()
                if value is not None and value < 1
            ],
        )
        asked: dict[tuple[str | None, bool, tuple[int, ...]], list[int]] = {}
        for place, request in requests.items():
            told = request.task if self.manifest.method.needs_task else None
            labels = request.task is not None and bool(request.task.labels)
            key = (None if told is None else told.name, labels, self._ends(request))
            asked.setdefault(key, []).append(place)
        found: dict[int, Prediction] = {}
        for (name, labels, ends), places in asked.items():
            answers, weights = answer(
                self._attach(name),
                self._tokenizer,
                [encoded[place].row for place in places],
                EvaluationConfig(batch_size=batch_size, num_beams=num_beams or 1),
                max_new_tokens=max_new_tokens or max(task.max_target_tokens for task in self.manifest.tasks),
                precision="auto",
                choices=[self._choices(requests[place]) for place in places] if labels else (),
                ends=ends,
            )
            blocks = self.manifest.blocks_for(name)
            for place, text, row in zip(places, answers, weights, strict=True):
                found[place] = Prediction(text, dict(zip(blocks, row.tolist(), strict=True)))
        return [found[place] for place in range(len(rows))]

    def _ends(self, request: Request) -> tuple[int, ...]:
        """Ids that end an answer as the task was taught; to a full prompt those of any task."""
        return self._taught_ends[None if request.task is None else request.task.name]

    def _choices(self, request: Request) -> Choices:
        """The only answers to an input of a task with labels."""
        text, task = request
        assert task is not None  # noqa: S101 - whose labels they are
        encoder = self._encoders[task.max_source_tokens]
        return choices_of(encoder, task, [text], task.max_target_tokens)[0]

    def _encode(self, request: Request) -> EncodedPrompt:
        text, task = request
        longest = max(learnt.max_source_tokens for learnt in self.manifest.tasks)
        encoder = self._encoders[longest if task is None else task.max_source_tokens]
        if task is not None:
            return encoder.prompts(task.template, task.definition, [text])[0]
        (prompt,) = encoder.prompts("none", "", [text])
        if prompt.truncated:
            raise RequestError(
                "The prompt cannot be answered:",
                [
                    f"prompt takes {len(encoder.text(text))} tokens, and the version reads up to {longest}: shorten "
                    "it, or give input and task, which lose the middle of the input"
                ],
            )
        return prompt
