"""From text to token ids: one task's splits as Arrow tables, and new inputs the very same way."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sapt_core.data.task import Example, Task
from sapt_core.data.templates import ANSWER_MARKER, INPUT_MARKER, TEMPLATES, PromptPieces
from sapt_core.errors import BackboneError, DataError

log = logging.getLogger(__name__)

NO_ROOM = "Prompts do not fit the model's input:"
SPLITS = ("train", "dev", "test")
SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "answer_ids": pa.list_(pa.int32()),
        "query_start": pa.int32(),
        "input": pa.string(),
        "references": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt.

    Attributes:
        prompt_ids: at most ``max_source_tokens`` ids. For an encoder-decoder with every special token that the
            tokenizer adds; for a decoder-only model with those in front (BOS) and none behind, as the answer follows.
        query_start: index of the first token after the definition, so ``prompt_ids[query_start:]`` holds the rest.
        truncated: tokens were taken out of the middle of the input.
    """

    prompt_ids: list[int]
    query_start: int
    truncated: bool

    @property
    def row(self) -> dict[str, Any]:
        """What a collator asks of a prompt to generate from."""
        return {"prompt_ids": self.prompt_ids, "query_start": self.query_start}


class PromptEncoder:
    """Tokenises prompts and answers for one backbone.

    A prompt that fits has exactly the ids of ``tokenizer(text)`` (less a final EOS for a decoder-only model). One
    that does not loses tokens from the middle of its input, down to a quarter of the room, and then from the
    middle of its definition; the words of the template always stay.

    Raises:
        BackboneError: the tokenizer has no EOS token, so no answer could end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_source_tokens: int, is_encoder_decoder: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise BackboneError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no EOS token, so a model cannot "
                "learn where an answer ends: set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.max_source_tokens = max_source_tokens
        self.is_encoder_decoder = is_encoder_decoder
        self.eos_token_id = int(tokenizer.eos_token_id)
        # What the tokenizer puts around any text: learnt from it, as classes do not say.
        bare, whole = self._ids(["a"])[0], list(tokenizer(["a"])["input_ids"][0])
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
        self._prefix = whole[:start]
        self._suffix = whole[start + len(bare) :] if is_encoder_decoder else []
        self._loses_end = False

    def prompts(self, template: str, definition: str, inputs: Sequence[str]) -> list[EncodedPrompt]:
        """Encode the prompts of ``inputs``.

        Raises:
            DataError: the words of the template alone leave no room in ``max_source_tokens``.
        """
        return self._encode([TEMPLATES[template].pieces(definition, text) for text in inputs])

    def _encode(self, rows: Sequence[PromptPieces]) -> list[EncodedPrompt]:
        if not rows:
            return []
        if not self.tokenizer.is_fast:
            return [self._encode_pieces(row) for row in rows]
        batch = self.tokenizer(
            ["".join(row) for row in rows], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        encoded = []
        for row, ids, offsets in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True):
            first = len(row.definition) + len(row.before_input)
            last = first + len(row.input)
            size = len(ids)
            query_start = next((i for i, (_, end) in enumerate(offsets) if end > len(row.definition)), size)
            # A token that straddles the border belongs to the template and stays.
            input_start = next((i for i, (start, _) in enumerate(offsets) if start >= first), size)
            input_end = next((i for i, (_, end) in enumerate(offsets) if end > last), size)
            encoded.append(self._fit(ids, query_start, input_start, max(input_start, input_end)))
        return encoded

    def text(self, text: str) -> list[int]:
        """Ids of a text that is no prompt of a task, with the special tokens that a prompt has."""
        return [*self._prefix, *self._ids([text])[0], *self._suffix]

    def targets(self, rows: Sequence[PromptPieces], max_tokens: int) -> list[list[int]]:
        """Texts to write: they end with EOS; over-long ones are cut as prompts are, and then at their end.

        What stands after the input is an answer, which a model may have written itself at any length.
        """
        writer = copy(self)
        writer._loses_end = True
        writer.max_source_tokens = max_tokens
        writer._prefix = self._prefix if self.is_encoder_decoder else []
        writer._suffix = [self.eos_token_id]
        return [prompt.prompt_ids for prompt in writer._encode(rows)]

    def answers(self, texts: Sequence[str], max_target_tokens: int) -> list[tuple[list[int], bool]]:
        """For each answer its ids, at most ``max_target_tokens`` with the final EOS, and whether it was cut."""
        before = self._prefix if self.is_encoder_decoder else []
        room = max_target_tokens - 1
        whole = [before + ids for ids in self._ids(texts)] if texts else []
        return [([*ids[:room], self.eos_token_id], len(ids) > room) for ids in whole]

    def template_tokens(self, template: str, definition: str) -> int:
        """Length of a prompt whose input is empty."""
        text = "".join(TEMPLATES[template].pieces(definition, ""))
        return len(self._prefix) + len(self._ids([text])[0]) + len(self._suffix)

    def _encode_pieces(self, row: PromptPieces) -> EncodedPrompt:
        """Without character offsets (slow tokenizers): whole if it fits, else its pieces tokenised apart."""
        definition, before, text, after = self._ids(list(row))
        whole = self._ids(["".join(row)])[0]
        if len(self._prefix) + len(whole) + len(self._suffix) <= self.max_source_tokens:
            return self._fit(whole, min(len(definition), len(whole)), 0, 0)
        start = len(definition) + len(before)
        return self._fit([*definition, *before, *text, *after], len(definition), start, start + len(text))

    def _fit(self, ids: list[int], query_start: int, input_start: int, input_end: int) -> EncodedPrompt:
        """Add the special tokens and, where needed, take out the middle of ``ids[input_start:input_end]``.

        An input is cut down to a quarter of the room at most; what is then still too much comes out of the
        middle of the definition, ``ids[:query_start]``, and of a text to write at last from its end.
        """
        excess = len(self._prefix) + len(ids) + len(self._suffix) - self.max_source_tokens
        if excess > 0:
            spare = max(0, input_end - input_start - self.max_source_tokens // 4)
            from_input = min(excess, spare)
            from_definition = min(excess - from_input, query_start)
            from_end = excess - from_input - from_definition
            if from_end and not self._loses_end:
                raise DataError(NO_ROOM, [_no_room(self.max_source_tokens + from_end, self.max_source_tokens)])
            ids = ids[: len(ids) - from_end]
            ids = _without_middle(ids, input_start, input_end, from_input)
            ids = _without_middle(ids, 0, query_start, from_definition)
            query_start -= from_definition
        return EncodedPrompt([*self._prefix, *ids, *self._suffix], len(self._prefix) + query_start, excess > 0)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in batch["input_ids"]]


def check_writable(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    """Refuse a tokenizer that loses a marker of ``generator.content``: what was written could not be read back.

    Raises:
        BackboneError: naming the marker.
    """
    for marker in (INPUT_MARKER, ANSWER_MARKER) if content == "pairs" else (INPUT_MARKER,):
        if marker not in tokenizer.decode(tokenizer(f"a {marker} b")["input_ids"], skip_special_tokens=True):
            simpler = "generator.content=inputs or " if marker == ANSWER_MARKER else ""
            raise BackboneError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} cannot write {marker}, which "
                f"generator.content={content} needs: use {simpler}another reflection.source, such as statistics."
            )


@dataclass(frozen=True)
class PreparedTask:
    """One task as token ids.

    Attributes:
        name, definition, template, metric: as in ``Task``.
        train, dev, test: columns ``prompt_ids``, ``answer_ids`` (of the first reference; ends with EOS),
            ``query_start`` (see ``EncodedPrompt``), ``input`` and ``references``.
        truncated: for each split how many ``prompts`` and ``answers`` were too long and cut.
    """

    name: str
    definition: str
    template: str
    metric: str
    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset
    truncated: dict[str, dict[str, int]]

    def to_blobs(self) -> dict[str, bytes]:
        """``train.arrow``, ``dev.arrow``, ``test.arrow`` (Arrow IPC streams) and ``meta.json``.

        Equal tasks give equal bytes.
        """
        meta = {
            "name": self.name,
            "definition": self.definition,
            "template": self.template,
            "metric": self.metric,
            "rows": {split: len(getattr(self, split)) for split in SPLITS},
            "truncated": self.truncated,
        }
        blobs = {f"{split}.arrow": _stream(getattr(self, split)) for split in SPLITS}
        return {**blobs, "meta.json": json.dumps(meta, indent=1, sort_keys=True).encode()}

    @classmethod
    def from_blobs(cls, blobs: Mapping[str, bytes]) -> PreparedTask:
        """Read what ``to_blobs`` wrote; the tables are used in place, not copied."""
        meta = json.loads(blobs["meta.json"])
        splits = {split: read_split(blobs[f"{split}.arrow"]) for split in SPLITS}
        own = {key: meta[key] for key in ("name", "definition", "template", "metric", "truncated")}
        return cls(**own, **splits)


def read_split(data: bytes) -> datasets.Dataset:
    """One split that ``to_blobs`` wrote, used in place."""
    return datasets.Dataset.from_buffer(pa.py_buffer(data))


def prepare_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_tokens: int,
    max_target_tokens: int,
    is_encoder_decoder: bool,
) -> PreparedTask:
    """Tokenise every split of ``task``. Lengths count special tokens.

    Raises:
        BackboneError: the tokenizer has no EOS token.
        DataError: the words of the template leave no room for an input.
    """
    encoder = PromptEncoder(tokenizer, max_source_tokens=max_source_tokens, is_encoder_decoder=is_encoder_decoder)
    tables, truncated = {}, {}
    for split in SPLITS:
        rows: tuple[Example, ...] = getattr(task, split)
        try:
            prompts = encoder.prompts(task.template, task.definition, [row.input for row in rows])
        except DataError as error:
            raise DataError(NO_ROOM, [f"{task.name}: {fault}" for fault in error.faults]) from error
        answers = encoder.answers([row.references[0] for row in rows], max_target_tokens)
        columns: dict[str, list[Any]] = {
            "prompt_ids": [prompt.prompt_ids for prompt in prompts],
            "answer_ids": [ids for ids, _ in answers],
            "query_start": [prompt.query_start for prompt in prompts],
            "input": [row.input for row in rows],
            "references": [list(row.references) for row in rows],
        }
        tables[split] = datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns, schema=SCHEMA)))
        truncated[split] = {
            "prompts": sum(prompt.truncated for prompt in prompts),
            "answers": sum(cut for _, cut in answers),
        }
    return PreparedTask(task.name, task.definition, task.template, task.metric, **tables, truncated=truncated)


def check_fits(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, *, max_source_tokens: int, is_encoder_decoder: bool
) -> None:
    """Refuse, before anything is trained, tasks whose template leaves no room; warn of definitions that are cut.

    Raises:
        BackboneError: the tokenizer has no EOS token.
        DataError: naming every such task.
    """
    encoder = PromptEncoder(tokenizer, max_source_tokens=max_source_tokens, is_encoder_decoder=is_encoder_decoder)
    faults = []
    for task in tasks:
        fixed = encoder.template_tokens(task.template, "") + max_source_tokens // 4
        if fixed > max_source_tokens:
            faults.append(f"{task.name}: {_no_room(fixed, max_source_tokens)}")
        elif (whole := encoder.template_tokens(task.template, task.definition)) > max_source_tokens * 3 // 4:
            log.warning(
                "%s: definition and template take %d of benchmark.max_source_tokens=%d; "
                "rows that do not fit lose the middle of the definition too",
                task.name,
                whole,
                max_source_tokens,
            )
    if faults:
        raise DataError(NO_ROOM, faults)


def _without_middle(ids: list[int], start: int, end: int, excess: int) -> list[int]:
    """``ids`` less ``excess`` tokens from the middle of ``ids[start:end]``."""
    head_end = start + (end - start - excess + 1) // 2
    return [*ids[:head_end], *ids[head_end + excess :]]


def _no_room(needed: int, allowed: int) -> str:
    return (
        f"the template and a quarter of the room for the input take {needed} tokens, benchmark.max_source_tokens is "
        f"{allowed}: raise it"
    )


def _stream(split: datasets.Dataset) -> bytes:
    table = split.with_format("arrow")[:].cast(SCHEMA).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
