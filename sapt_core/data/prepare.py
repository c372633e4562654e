"""From text to token ids: one task's splits as Arrow tables, and what can be said against a task before."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sapt_core.data.encoding import NO_ROOM, PromptEncoder, no_room
from sapt_core.data.facts import TaskFacts, encoded, facts_of
from sapt_core.data.task import Example, Task
from sapt_core.data.templates import ANSWER_MARKER, INPUT_MARKER
from sapt_core.errors import BackboneError, DataError
from sapt_core.template_settings import VARIABLES, told

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
FAULTS_SHOWN = 5  # of a task's rows
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
        facts: what it comes to as tokens; in no blob.
    """

    name: str
    definition: str
    template: str
    metric: str
    train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset
    facts: TaskFacts | None = None
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
    tables, made = {}, {}
    for split in SPLITS:
        rows: tuple[Example, ...] = getattr(task, split)
        try:
            made[split] = encoded(task, rows, encoder, max_target_tokens)
        except DataError as error:
            raise DataError(error.title, [f"{task.name}: {fault}" for fault in error.faults]) from error
        columns: dict[str, list[Any]] = {
            "prompt_ids": [row.prompt.prompt_ids for row in made[split]],
            "answer_ids": [row.answer_ids for row in made[split]],
            "query_start": [row.prompt.query_start for row in made[split]],
            "input": [row.input for row in rows],
            "references": [list(row.references) for row in rows],
        }
        tables[split] = datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns, schema=SCHEMA)))
    return PreparedTask(
        task.name,
        task.definition,
        task.template,
        task.metric,
        **tables,
        facts=facts_of(task, made, tokenizer),
        other_metrics=task.other_metrics,
        labels=task.labels,
    )


def check_templates(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> None:
    """Refuse, before anything is trained, templates that cannot be filled in with every row.

    Raises:
        BackboneError: the tokenizer has no EOS token.
        DataError: naming tasks, rows and what templates may read.
    """
    encoder = PromptEncoder(tokenizer, max_source_tokens=1, is_encoder_decoder=is_encoder_decoder)
    faults = []
    for task in tasks:
        try:
            encoder.wording(task.template)
        except (BackboneError, DataError) as error:
            found = error.faults if isinstance(error, DataError) else [str(error)]
            faults += [f"{task.name}: {fault}" for fault in found]
        else:
            faults += [f"{task.name}: {fault}" for fault in _unfilled(task, encoder)]
    if faults:
        raise DataError("Templates cannot be used:", list(dict.fromkeys(faults)))


def _unfilled(task: Task, encoder: PromptEncoder) -> list[str]:
    """Rows that the task's template makes no prompt of, or one without the input."""
    wording = encoder.wording(task.template)
    if not wording.rendered:
        return []
    faults = []
    for split in SPLITS:
        for place, row in enumerate(getattr(task, split)):
            try:
                (marked,) = wording.prompts(task.definition, [row.input])
            except DataError as error:
                fault = error.faults[0]
            else:
                start, end = marked.input
                fault = "" if marked.text[start:end].strip() else "nothing of the input is left in the prompt"
            if fault:
                faults.append(f"{split} row {place}: {fault}")
    if not faults:
        return []
    more = [f"{len(faults) - FAULTS_SHOWN} more rows"] if len(faults) > FAULTS_SHOWN else []
    said = f"template {told(task.template)}, which may read {', '.join(VARIABLES)}"
    return [f"{fault} ({said})" for fault in faults[:FAULTS_SHOWN]] + more


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
        sample = task.train[0].input if encoder.wording(task.template).rendered else ""
        fixed = encoder.fixed_tokens(task.template, task.definition, sample) + max_source_tokens // 4
        if fixed > max_source_tokens:
            faults.append(f"{task.name}: {no_room(fixed, max_source_tokens)}")
        elif (whole := encoder.template_tokens(task.template, task.definition, sample)) > max_source_tokens * 3 // 4:
            log.warning(
                "%s: definition and template take %d of benchmark.max_source_tokens=%d; "
                "rows that do not fit lose the middle of the definition too",
                task.name,
                whole,
                max_source_tokens,
            )
    if faults:
        raise DataError(NO_ROOM, faults)


def _stream(split: datasets.Dataset) -> bytes:
    table = split.with_format("arrow")[:].cast(SCHEMA).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
