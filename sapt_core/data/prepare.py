"""From text to token ids: one task's splits as Arrow tables, and new inputs the very same way."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sapt_core.data.task import Example, Task
from sapt_core.data.templates import ANSWER_MARKER, INPUT_MARKER, TEMPLATES, PromptPieces
from sapt_core.errors import BackboneError, DataError

log = logging.getLogger(__name__)

NO_ROOM = "Prompts do not fit the model's input:"
SPLITS = ("train", "dev", "test")
TOLD = ("name", "definition", "template", "metric")  # of a task, in a blob beside its splits
TOLD_OF_SOME = ("other_metrics", "labels")  # there only where a task has any
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


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a prompt and of its answer.

    Attributes:
        prompt: the very one that ``PromptEncoder.prompts`` gives for the input.
        answer_ids: at most ``max_target_tokens`` ids, the last one EOS.
        answer_cut: the answer was too long.
    """

    prompt: EncodedPrompt
    answer_ids: list[int]
    answer_cut: bool

    @property
    def row(self) -> dict[str, Any]:
        """What a collator asks of a row to train on."""
        return {**self.prompt.row, "answer_ids": self.answer_ids}


class _Located(NamedTuple):
    """Ids of a text in pieces, without special tokens: where its definition ends, and where its input lies."""

    ids: list[int]
    query_start: int
    input_start: int
    input_end: int


class PromptEncoder:
    """Tokenises prompts and answers for one backbone.

    A prompt that fits has exactly the ids of ``tokenizer(text)`` (less a final EOS for a decoder-only model). One
    that does not loses tokens from the middle of its input, down to a quarter of the room, and then from the
    middle of its definition; the words of the template always stay.

    For a decoder-only model prompt and answer are one text, and the blank between them goes with the answer: most
    vocabularies have a blank and the word behind it as one token. So a prompt is tokenised without the blanks at its
    end, and an answer has the ids that it has in the joined text. Where a vocabulary has a token across the border,
    the prompt keeps its ids, and the answer with its blank is tokenised apart.

    Args:
        tokenizer: of the backbone.
        max_source_tokens: longest prompt, special tokens included.
        is_encoder_decoder: kind of the backbone.
        joined: whether prompt and answer are one text, as ``BackboneRef`` has it; default: as what is learnt now.

    Raises:
        BackboneError: the tokenizer has no EOS token, so no answer could end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_source_tokens: int,
        is_encoder_decoder: bool,
        joined: bool | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise BackboneError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no EOS token, so a model cannot "
                "learn where an answer ends: set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.max_source_tokens = max_source_tokens
        self.is_encoder_decoder = is_encoder_decoder
        self.joined = not is_encoder_decoder if joined is None else joined
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
        return [self._fit(located) for located in self._locate(self._prompts(template, definition, inputs)[0])]

    def rows(
        self, template: str, definition: str, pairs: Sequence[tuple[str, str]], max_target_tokens: int
    ) -> list[EncodedRow]:
        """Encode inputs with their answers.

        Raises:
            DataError: the words of the template alone leave no room in ``max_source_tokens``.
        """
        prompts, blanks = self._prompts(template, definition, [text for text, _ in pairs])
        located = self._locate(prompts)
        answers = [blank + answer for blank, (_, answer) in zip(blanks, pairs, strict=True)]
        whole = self._ids(answers)
        if self.is_encoder_decoder:
            whole = [self._prefix + ids for ids in whole]
        elif self.joined:
            joined = self._ids(["".join(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)])
            whole = [
                ids[len(prompt.ids) :] if _begins(ids, prompt.ids) else apart
                for prompt, ids, apart in zip(located, joined, whole, strict=True)
            ]
        room = max_target_tokens - 1
        return [
            EncodedRow(self._fit(prompt), [*ids[:room], self.eos_token_id], len(ids) > room)
            for prompt, ids in zip(located, whole, strict=True)
        ]

    def uncut(self) -> PromptEncoder:
        """One that encodes the same and takes prompts of any length."""
        encoder = copy(self)
        encoder.max_source_tokens = sys.maxsize
        return encoder

    def ends(self, template: str, definition: str, inputs: Sequence[str]) -> list[str]:
        """What prompts end in, all that the ids of answers behind them can depend on: the last letter, and blanks."""
        prompts, blanks = self._prompts(template, definition, inputs)
        return ["".join(prompt)[-1:] + blank for prompt, blank in zip(prompts, blanks, strict=True)]

    def text(self, text: str) -> list[int]:
        """Ids of a text that is no prompt of a task, with the special tokens that a prompt has."""
        return [*self._prefix, *self._ids([text])[0], *self._suffix]

    def targets(self, source: str, rows: Sequence[PromptPieces], max_tokens: int) -> list[list[int]]:
        """Texts to write: they end with EOS; over-long ones are cut as prompts are, and then at their end.

        What stands after the input is an answer, which a model may have written itself at any length.

        Args:
            source: the text that asks for them. Decoder-only, theirs goes on behind it after a blank, as an answer's.
            rows: the texts in pieces.
            max_tokens: longest text, with its EOS.
        """
        writer = copy(self)
        writer._loses_end = True
        writer.max_source_tokens = max_tokens
        writer._prefix = self._prefix if self.is_encoder_decoder else []
        writer._suffix = [self.eos_token_id]
        return [writer._fit(located).prompt_ids for located in self._located_behind(source, rows)]

    def _located_behind(self, source: str, rows: Sequence[PromptPieces]) -> list[_Located]:
        if not self.joined:
            return self._locate(rows)
        rows = [row._replace(definition=f" {row.definition}") for row in rows]
        joined = self._locate([row._replace(definition=source + row.definition) for row in rows])
        before = self._ids([source])[0]
        return [
            _Located(ids[len(before) :], *(max(0, place - len(before)) for place in places))
            if _begins(ids, before)
            else apart
            for (ids, *places), apart in zip(joined, self._locate(rows), strict=True)
        ]

    def _prompts(self, template: str, definition: str, inputs: Sequence[str]) -> tuple[list[PromptPieces], list[str]]:
        """Prompts in pieces, and what their answers begin with."""
        whole = [TEMPLATES[template].pieces(definition, text) for text in inputs]
        parted = [_without_last_blanks(row) if self.joined else (row, "") for row in whole]
        return [row for row, _ in parted], [blanks for _, blanks in parted]

    def _locate(self, rows: Sequence[PromptPieces]) -> list[_Located]:
        if not rows:
            return []
        if not self.tokenizer.is_fast:
            return [self._locate_without_offsets(row) for row in rows]
        batch = self.tokenizer(
            ["".join(row) for row in rows], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        located = []
        for row, ids, offsets in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True):
            first = len(row.definition) + len(row.before_input)
            last = first + len(row.input)
            size = len(ids)
            query_start = next((i for i, (_, end) in enumerate(offsets) if end > len(row.definition)), size)
            # A token that straddles the border belongs to the template and stays.
            input_start = next((i for i, (start, _) in enumerate(offsets) if start >= first), size)
            input_end = next((i for i, (_, end) in enumerate(offsets) if end > last), size)
            located.append(_Located(ids, query_start, input_start, max(input_start, input_end)))
        return located

    def _locate_without_offsets(self, row: PromptPieces) -> _Located:
        """For slow tokenizers: a piece reaches as far as the whole text's ids are those of the text up to there."""
        whole, definition, before, after = self._ids(
            ["".join(row), row.definition, row.definition + row.before_input, row.after_input]
        )
        input_start, input_end = _common(whole, before), len(whole) - _common(whole[::-1], after[::-1])
        return _Located(whole, _common(whole, definition), input_start, max(input_start, input_end))

    def template_tokens(self, template: str, definition: str) -> int:
        """Length of a prompt whose input is empty."""
        (pieces,), _ = self._prompts(template, definition, [""])
        return len(self.text("".join(pieces)))

    def _fit(self, located: _Located) -> EncodedPrompt:
        """Add the special tokens and, where needed, take out the middle of the input.

        An input is cut down to a quarter of the room at most; what is then still too much comes out of the
        middle of the definition, and of a text to write at last from its end.
        """
        ids, query_start, input_start, input_end = located
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
        if not texts:  # which transformers 5.23 stumbles over
            return []
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
        name, definition, template, metric, other_metrics, labels: as in ``Task``.
        train, dev, test: columns ``prompt_ids``, ``answer_ids`` (of the first reference; ends with EOS),
            ``query_start`` (see ``EncodedPrompt``), ``input`` and ``references``.
        truncated: for each split how many ``prompts`` and ``answers`` were too long and cut; in no blob.
    """

    name: str
    definition: str
    template: str
    metric: str
    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset
    truncated: dict[str, dict[str, int]] = field(default_factory=dict)
    other_metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, the leading one first."""
        return (self.metric, *self.other_metrics)

    def to_blobs(self) -> dict[str, bytes]:
        """``train.arrow``, ``dev.arrow``, ``test.arrow`` (Arrow IPC streams) and ``meta.json``.

        Equal tasks give equal bytes, and what a split holds shows in its own blob alone, so that who reads one of
        them does not depend on the others. ``meta.json`` of earlier releases counted the rows of all.
        """
        meta = {name: getattr(self, name) for name in TOLD}
        meta |= {name: list(told) for name in TOLD_OF_SOME if (told := getattr(self, name))}
        blobs = {f"{split}.arrow": _stream(getattr(self, split)) for split in SPLITS}
        return {**blobs, "meta.json": json.dumps(meta, indent=1, sort_keys=True).encode()}

    @classmethod
    def from_blobs(cls, blobs: Mapping[str, bytes]) -> PreparedTask:
        """Read what ``to_blobs`` wrote, in place and not copied. A split that is not there has no rows."""
        meta = json.loads(blobs["meta.json"])
        names = {split: f"{split}.arrow" for split in SPLITS}
        splits = {split: read_split(blobs[name]) if name in blobs else _no_rows() for split, name in names.items()}
        some: dict[str, Any] = {name: tuple(meta.get(name, ())) for name in TOLD_OF_SOME}
        return cls(**{name: meta[name] for name in TOLD}, **some, **splits)


def _no_rows() -> datasets.Dataset:
    return datasets.Dataset(datasets.table.InMemoryTable(SCHEMA.empty_table()))


def read_split(data: bytes) -> datasets.Dataset:
    """One split that ``to_blobs`` wrote, used in place."""
    return datasets.Dataset.from_buffer(pa.py_buffer(data))


def read_examples(data: bytes) -> list[Example]:
    """The rows of such a split as text, without a data set around them: a pool of many tasks has hundreds."""
    columns = pa.ipc.open_stream(pa.py_buffer(data)).read_all().select(["input", "references"]).to_pydict()
    return [Example(text, tuple(right)) for text, right in zip(*columns.values(), strict=True)]


def prepare_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_tokens: int,
    max_target_tokens: int,
    is_encoder_decoder: bool,
    joined: bool | None = None,
) -> PreparedTask:
    """Tokenise every split of ``task``. Lengths count special tokens; ``joined`` is as ``PromptEncoder`` takes it.

    Raises:
        BackboneError: the tokenizer has no EOS token.
        DataError: the words of the template leave no room for an input.
    """
    encoder = PromptEncoder(
        tokenizer, max_source_tokens=max_source_tokens, is_encoder_decoder=is_encoder_decoder, joined=joined
    )
    tables, truncated = {}, {}
    for split in SPLITS:
        rows: tuple[Example, ...] = getattr(task, split)
        pairs = [(row.input, row.references[0]) for row in rows]
        try:
            encoded = encoder.rows(task.template, task.definition, pairs, max_target_tokens)
        except DataError as error:
            raise DataError(NO_ROOM, [f"{task.name}: {fault}" for fault in error.faults]) from error
        columns: dict[str, list[Any]] = {
            "prompt_ids": [row.prompt.prompt_ids for row in encoded],
            "answer_ids": [row.answer_ids for row in encoded],
            "query_start": [row.prompt.query_start for row in encoded],
            "input": [row.input for row in rows],
            "references": [list(row.references) for row in rows],
        }
        tables[split] = datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns, schema=SCHEMA)))
        truncated[split] = {
            "prompts": sum(row.prompt.truncated for row in encoded),
            "answers": sum(row.answer_cut for row in encoded),
        }
    return PreparedTask(
        task.name,
        task.definition,
        task.template,
        task.metric,
        **tables,
        truncated=truncated,
        other_metrics=task.other_metrics,
        labels=task.labels,
    )


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


def _without_last_blanks(pieces: PromptPieces) -> tuple[PromptPieces, str]:
    """A prompt less the blanks at its end, and these; one of nothing but blanks stays as it is."""
    kept = list(pieces)
    for place in reversed(range(len(kept))):
        kept[place] = kept[place].rstrip(" ")
        if kept[place]:
            return PromptPieces(*kept), "".join(pieces)[len("".join(kept)) :]
    return pieces, ""


def _begins(ids: Sequence[int], before: Sequence[int]) -> bool:
    return ids[: len(before)] == before


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


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
