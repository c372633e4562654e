"""Durable stages: a graph of named work whose results outlive every process.

A stage's key is a hash of its kind, its version, exactly what it reads and the content of its
inputs' results. Its result is one record, committed to the store after all its blobs. A stage whose
record exists is not run again, so a run that was broken off goes on where it stopped, and a stage
that ran again with equal results leaves everything after it valid.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from graphlib import TopologicalSorter
from importlib.metadata import version
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as PydanticField

from cluster.store import ArtifactStore
from cluster.store.lease import leased
from cluster.store.lookups import Lookups
from cluster.store.patience import patiently
from sapt_core.errors import DivergenceError, StoreError
from sapt_core.io.blobs import Checkpoints
from sapt_core.io.hashing import canonical_hash

Json: TypeAlias = Any

RECORD_SCHEMA: Literal[1] = 1  # part of every key: records of another schema are never looked up

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")  # that a stage's figures may depend on

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Stage:
    """A piece of durable work.

    Attributes:
        name: unique in a graph, for people; not in the key.
        kind: what it does, for example ``train``; in the key.
        body: the work. With ``workers`` every worker runs it, and rank 0's result counts.
        reads: the config fields and other JSON facts the body uses; nothing else may change its result.
        inputs: stages whose results it uses.
        uses: for an input, the outputs that can change the result, where that is not all of them.
        version: raised when the body changes what it computes.
        workers: 0 is a plain task; 1 or more are that many training workers in one process group.
        cpus, gpus: what a plain task takes, or each worker.
        told: what the body is told beside what it reads: names and habits that change no result; in no key.
        memory: bytes of main memory that it takes too, as far as known: the weights of a backbone that is loaded.
        quiet: names of inputs that it waits for and that count in its key only where they give values. A record that
            was made without such an input is as good as one made with one that gave none.
    """

    name: str
    kind: str
    body: Callable[[StageContext], StageResult]
    reads: Mapping[str, Json] = field(default_factory=dict)
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    uses: Mapping[str, frozenset[str]] = field(default_factory=dict)
    version: int = 1
    workers: int = 0
    cpus: float = 1
    gpus: float = 0
    told: Mapping[str, Json] = field(default_factory=dict)
    memory: int = 0
    quiet: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StageContext:
    """What a body gets: what it reads, its inputs' records, the store, and its place among the workers."""

    name: str
    key: str
    reads: Mapping[str, Json]
    told: Mapping[str, Json]
    inputs: Mapping[str, StageRecord]
    store: ArtifactStore
    checkpoints: Checkpoints
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this worker's result counts."""
        return self.rank == 0


@dataclass(frozen=True)
class StageResult:
    """What a body gives.

    Attributes:
        outputs: blob digests by name, all of them in the store already.
        values: deterministic facts that later stages read; part of their keys, like the outputs.
        metrics: scores, curves, seconds; in no key.
    """

    outputs: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Json] = field(default_factory=dict)
    metrics: Mapping[str, Json] = field(default_factory=dict)


def _is_empty(value: Sequence[object]) -> bool:
    return not value


class StageRecord(BaseModel):
    """A finished stage as the store keeps it.

    ``inputs`` are the keys of the input stages' records, ``libraries`` the versions that computed it; neither is in a
    key that later stages have of it. ``erased`` names outputs that were taken out of the store on purpose: the stage is
    done, and runs again only for a stage that is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = RECORD_SCHEMA
    kind: str
    name: str
    key: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    values: dict[str, Json]
    metrics: dict[str, Json]
    seconds: float
    finished_at: datetime
    world_size: int
    libraries: dict[str, str] = {}
    erased: tuple[str, ...] = PydanticField((), exclude_if=_is_empty)

    def content(self, used: frozenset[str] | None) -> dict[str, Json]:
        """What a later stage depends on that uses these outputs; None is all of them."""
        outputs = {name: digest for name, digest in self.outputs.items() if used is None or name in used}
        return {"outputs": outputs, "values": self.values}


@dataclass(frozen=True)
class StageEvent:
    """News of one stage: ``key`` from ``started`` on, ``record`` when done, ``error`` when failed."""

    kind: Literal["planned", "cached", "started", "finished", "failed"]
    stage: Stage
    key: str | None = None
    record: StageRecord | None = None
    error: BaseException | None = None


Handle = TypeVar("Handle", bound=Hashable)
Outcome: TypeAlias = StageRecord | Exception


class Executor(Protocol[Handle]):
    """Runs stages somewhere."""

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        """Whether the stage would start at once, and leave to those ahead of it what they wait for.

        Always true while nothing runs.
        """
        ...

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> Handle:
        """Start a stage."""
        ...

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Outcome]]:
        """Block until at least one has ended, and return those that have, each with its record or error."""
        ...


def stage_key(stage: Stage, inputs: Mapping[str, StageRecord]) -> str:
    """sha256 (hex) of everything the stage's result depends on."""
    contents = {
        name: canonical_hash(record.content(stage.uses.get(name)))
        for name, record in inputs.items()
        if record.values or name not in stage.quiet
    }
    return canonical_hash([RECORD_SCHEMA, stage.kind, stage.version, dict(stage.reads), contents])


def find_record(store: ArtifactStore, key: str) -> StageRecord | None:
    """The record of a key, None if the stage is not done.

    Raises:
        StoreError: the record is there but is not one of ours.
    """
    stored = store.read_record(key)
    return None if stored is None else _parsed(stored, key, store)


def _parsed(stored: Mapping[str, Json], key: str, store: ArtifactStore) -> StageRecord:
    try:
        return StageRecord.model_validate(stored)
    except ValidationError as error:
        raise StoreError(
            f"Record {key} in {store.uri} is not a stage record. Delete records/{key}.json there and run again: "
            "its stage is repeated."
        ) from error


def commit(
    stage: Stage,
    key: str,
    inputs: Mapping[str, StageRecord],
    result: StageResult,
    store: ArtifactStore,
    *,
    seconds: float,
    world_size: int,
) -> StageRecord:
    """Make a stage's result durable and return the record that counts, which is another's if that was first.

    Raises:
        DivergenceError: a figure is no finite number. JSON has none for it, and what is made of it is none either.
    """
    faults = [name for name, value in {**result.values, **result.metrics}.items() if not _is_finite(value)]
    if faults:
        raise DivergenceError(
            f"{stage.name} gave figures that are no finite numbers: {', '.join(faults)}. Nothing of it is recorded: "
            "what it looked at has diverged in training, so lower the learning rate (train.learning_rate, "
            "generator.learning_rate) and run again."
        )
    record = StageRecord(
        kind=stage.kind,
        name=stage.name,
        key=key,
        inputs={name: record.key for name, record in inputs.items()},
        outputs=dict(result.outputs),
        values=dict(result.values),
        metrics=dict(result.metrics),
        seconds=round(seconds, 3),
        finished_at=datetime.now(UTC),
        world_size=world_size,
        libraries=_libraries(),
    )
    return StageRecord.model_validate(store.commit_record(key, record.model_dump(mode="json")))


@cache
def _libraries() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _is_finite(value: Json) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def run_alone(
    stage: Stage, key: str, inputs: Mapping[str, StageRecord], store: ArtifactStore, *, world_size: int = 1
) -> StageRecord:
    """Run a stage's body here, resumable through the store, as the only run at it, and commit its record.

    A run that is at the same stage is waited for, and so is a store that does not answer for some minutes.

    Args:
        stage: its body is called.
        key: of the stage.
        inputs: records of its inputs.
        store: of the records.
        world_size: of the workers whom the body has do it, where it does not do it itself.
    """

    def attempt() -> StageRecord:
        with leased(store, key, stage.name):
            done = find_record(store, key)  # another run may have finished it since the graph looked
            if done is not None:
                return done
            start = time.monotonic()
            context = StageContext(
                name=stage.name,
                key=key,
                reads=stage.reads,
                told=stage.told,
                inputs=inputs,
                store=store,
                checkpoints=store.checkpoints(key),
            )
            result = stage.body(context)
            seconds = time.monotonic() - start
            record = commit(stage, key, inputs, result, store, seconds=seconds, world_size=world_size)
            store.drop_checkpoints(key)
            return record

    return patiently(attempt)


class InlineExecutor:
    """Runs stages in this process, one after another, whatever number of workers they ask for."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._waiting: dict[str, tuple[Stage, Mapping[str, StageRecord]]] = {}

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        return not self._waiting

    def submit(self, stage: Stage, key: str, inputs: Mapping[str, StageRecord]) -> str:
        self._waiting[key] = (stage, inputs)
        return key

    def wait(self, handles: Sequence[str]) -> list[tuple[str, Outcome]]:
        key = handles[0]
        stage, inputs = self._waiting.pop(key)
        try:
            return [(key, run_alone(stage, key, inputs, self._store))]
        except Exception as error:
            return [(key, error)]


def run_graph(
    stages: Sequence[Stage],
    known: Lookups,
    executor: Executor[Any],
    on_event: Callable[[StageEvent], None] = lambda _: None,
) -> dict[Stage, StageRecord]:
    """Run all stages and the stages they depend on, as wide as the executor allows, and skip what is done.

    Of the stages that are ready, the first in the order of ``stages`` starts first. While it has no room, a later one
    may start that takes nothing of what it needs, so that a chain put first never waits behind work that could wait
    itself, and waiting for a GPU holds up no work that needs none. When one fails
    nothing new starts; what is in flight finishes and keeps its records. An interrupt waits for nothing:
    what is in flight ends with the process or, on Ray, when the driver disconnects.

    Raises:
        ValueError: two stages of one name, or a cycle.
        Exception: the first failure of a stage, a ``SaptError`` unchanged.
    """
    graph, order = _graph(stages)
    graph.prepare()
    for again in _made_again(order, patiently(partial(_recorded, stages, known))).values():
        known.delete(again.key)
    for stage in order:
        on_event(StageEvent("planned", stage))
    records: dict[Stage, StageRecord] = {}
    ready: list[tuple[int, str]] = []
    to_do: dict[str, list[Stage]] = {}  # by key, until the work has ended: the stages it is done for
    in_flight: dict[Any, str] = {}
    failure: Exception | None = None

    def inputs_of(stage: Stage) -> dict[str, StageRecord]:
        return {name: records[source] for name, source in stage.inputs.items()}

    def finish(stage: Stage, kind: Literal["cached", "finished"], record: StageRecord) -> None:
        records[stage] = record
        graph.done(stage)
        on_event(StageEvent(kind, stage, record.key, record))

    def admit(new: Sequence[Stage]) -> None:
        keys = {stage: stage_key(stage, inputs_of(stage)) for stage in new}
        unknown = {key: stage for stage, key in keys.items() if key not in to_do}
        found = patiently(partial(_valid_records, unknown, known))
        for stage, key in keys.items():
            if key in found:
                finish(stage, "cached", found[key])
            elif key in to_do:  # the same work under another name: one run serves both
                to_do[key].append(stage)
            else:
                to_do[key] = [stage]
                ready.append((order[stage], key))

    while (graph.is_active() and failure is None) or in_flight:
        new = graph.get_ready() if failure is None else ()
        if new:
            admit(sorted(new, key=order.__getitem__))
            continue  # a stage that was done already makes others ready
        chosen = _first_with_room(ready, to_do, executor) if failure is None else None
        if chosen is not None:
            ready.remove(chosen)
            key = chosen[1]
            stage = to_do[key][0]
            on_event(StageEvent("started", stage, key))
            in_flight[executor.submit(stage, key, inputs_of(stage))] = key
            continue
        for handle, outcome in executor.wait(list(in_flight)):
            key = in_flight.pop(handle)
            first, *twins = to_do.pop(key)
            if isinstance(outcome, StageRecord):
                known.add(key, outcome.model_dump(mode="json"))
            for stage in (first, *twins):
                if isinstance(outcome, StageRecord):
                    finish(stage, "finished" if stage is first else "cached", outcome)
                else:
                    failure = failure or outcome
                    on_event(StageEvent("failed", stage, key, error=outcome))
    if failure is not None:
        raise failure
    return records


def done(stages: Sequence[Stage], known: Lookups) -> dict[Stage, StageRecord]:
    """Records of the stages, and of those they depend on, that a run would not repeat. Nothing is run."""
    records = _recorded(stages, known)
    again = _made_again(closure(stages), records)
    return {stage: record for stage, record in records.items() if stage not in again}


def _recorded(stages: Sequence[Stage], known: Lookups) -> dict[Stage, StageRecord]:
    """The same with those whose outputs were erased, needed or not."""
    graph, _ = _graph(stages)
    graph.prepare()
    records: dict[Stage, StageRecord] = {}
    while graph.is_active():
        new = graph.get_ready()
        keys = {
            stage: stage_key(
                stage, {name: records[source] for name, source in stage.inputs.items() if source in records}
            )
            for stage in new
            if all(source in records or name in stage.quiet for name, source in stage.inputs.items())
        }
        found = _looked_up(keys.values(), known)
        records |= {stage: found[key][0] for stage, key in keys.items() if key in found and not found[key][1]}
        graph.done(*new)
    return records


def _made_again(order: Iterable[Stage], records: Mapping[Stage, StageRecord]) -> dict[Stage, StageRecord]:
    """Those of the records that are void because something of them was erased that a stage without a record needs.

    Args:
        order: all stages of a graph.
        records: of those that have one.
    """
    again: dict[Stage, StageRecord] = {}
    needed = [source for stage in order if stage not in records for source in stage.inputs.values()]
    while needed:
        stage = needed.pop()
        if stage in records and stage not in again and records[stage].erased:
            again[stage] = records[stage]
            needed.extend(stage.inputs.values())
    return again


def plan(stages: Sequence[Stage], known: Lookups) -> dict[Stage, Literal["done", "to run", "unknown"]]:
    """What a run would do with each stage: ``unknown`` where the key depends on results not there yet."""
    graph, _ = _graph(stages)
    records = done(stages, known)
    states: dict[Stage, Literal["done", "to run", "unknown"]] = {}
    for stage in graph.static_order():
        if stage in records:
            states[stage] = "done"
        else:
            states[stage] = "to run" if all(source in records for source in stage.inputs.values()) else "unknown"
    return states


def closure(stages: Sequence[Stage]) -> list[Stage]:
    """The stages and all that they depend on, each once, in the order given, what a stage needs behind it."""
    found: dict[Stage, None] = {}
    waiting = list(reversed(stages))
    while waiting:
        stage = waiting.pop()
        if stage not in found:
            found[stage] = None
            waiting.extend(stage.inputs.values())
    return list(found)


def _first_with_room(
    ready: Sequence[tuple[int, str]], to_do: Mapping[str, Sequence[Stage]], executor: Executor[Any]
) -> tuple[int, str] | None:
    """The first of the ready stages, by place and key, that has room; of those that ask alike one is asked about."""
    ahead: dict[tuple[float, ...], Stage] = {}
    for place, key in sorted(ready):
        stage = to_do[key][0]
        asks = (stage.workers, stage.cpus, stage.gpus, stage.memory)
        if asks not in ahead:
            if executor.has_room(stage, list(ahead.values())):
                return place, key
            ahead[asks] = stage
    return None


def _graph(stages: Sequence[Stage]) -> tuple[TopologicalSorter[Stage], dict[Stage, int]]:
    """The graph of the stages and all they depend on, and each stage's place in the order it was given."""
    order = {stage: place for place, stage in enumerate(closure(stages))}
    graph = TopologicalSorter({stage: stage.inputs.values() for stage in order})
    twice = [name for name, count in Counter(stage.name for stage in order).items() if count > 1]
    if twice:
        raise ValueError(f"stages of the same name: {', '.join(twice)}")
    return graph, order


def _valid_records(stages: Mapping[str, Stage], known: Lookups) -> dict[str, StageRecord]:
    """Records of these stages, given by key, whose blobs are all there; a record that has lost one is deleted."""
    found = _looked_up(stages, known)
    for key, (_, lost) in found.items():
        if lost:
            where = known.store.uri
            log.warning("%s runs again: its %s is no longer in %s", stages[key].name, ", ".join(lost), where)
            known.delete(key)
    return {key: record for key, (record, lost) in found.items() if not lost}


def _looked_up(keys: Iterable[str], known: Lookups) -> dict[str, tuple[StageRecord, list[str]]]:
    """The records that there are of these keys, each with the names of those of its outputs that are gone."""
    records = {key: _parsed(stored, key, known.store) for key, stored in known.records(keys).items()}
    kept = {
        key: {name: digest for name, digest in record.outputs.items() if name not in record.erased}
        for key, record in records.items()
    }
    gone = known.missing(digest for outputs in kept.values() for digest in outputs.values())
    return {
        key: (record, [name for name, digest in kept[key].items() if digest in gone]) for key, record in records.items()
    }
