"""What a command looks up, how often, and what it believes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from cluster.stages import InlineExecutor, Stage, StageContext, StageEvent, StageRecord, StageResult, plan, run_graph
from cluster.store import LocalStore
from cluster.store.cleaning import UNPACKED, unreachable
from cluster.store.lookups import Lookups, read_pack
from sapt_core.errors import StoreError
from tests.bucket import Bucket

NAME = hashlib.sha256(b"sequence").hexdigest()
WIDTH = 20


class Sequence:
    """Leaves, and a chain above them; ``ran`` are the stages that did."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.ran: list[str] = []

    def body(self, context: StageContext) -> StageResult:
        self.ran.append(context.name)
        text = f"{context.name} {sorted(record.outputs['text'] for record in context.inputs.values())}"
        return StageResult({"text": context.store.put(text.encode())}, metrics={"run": len(self.ran)})

    @property
    def stages(self) -> list[Stage]:
        leaves = [Stage(f"leaf {number}", "leaf", self.body, {"n": number}) for number in range(WIDTH)]
        chain: list[Stage] = []
        for leaf in leaves:
            below = {"leaf": leaf, **({"before": chain[-1]} if chain else {})}
            chain.append(Stage(f"on {leaf.name}", "link", self.body, {}, below))
        return [*leaves, *chain]

    def run(self, known: Lookups | None = None) -> dict[str, StageRecord]:
        """What a command does, with a pack at its end."""
        known = known or Lookups(self.store, [NAME])
        self.ran.clear()
        plan(self.stages, known)
        records = run_graph(self.stages, known, InlineExecutor(self.store))
        known.pack(NAME, [record.key for record in records.values()])
        return {stage.name: record for stage, record in records.items()}


@pytest.fixture
def sequence() -> Sequence:
    return Sequence(Bucket())


@pytest.fixture
def first(sequence: Sequence) -> dict[str, StageRecord]:
    """The records of a sequence that has ended."""
    return sequence.run()


def again(sequence: Sequence) -> dict[str, StageRecord]:
    sequence.store.asked.clear()
    sequence.store.read.clear()
    return sequence.run()


def place(record: StageRecord) -> str:
    return f"records/{record.key}.json"


def blob(record: StageRecord) -> str:
    digest = record.outputs["text"]
    return f"blobs/{digest[:2]}/{digest}"


def replaced(store: Bucket, record: StageRecord) -> StageRecord:
    """The record that another run has put in the place of this one."""
    other = record.model_copy(update={"metrics": {"run": 99}})
    store._write(place(record), json.dumps(other.model_dump(mode="json")).encode())
    return other


def test_a_finished_sequence_is_known_from_two_listings_and_a_pack(
    sequence: Sequence, first: dict[str, StageRecord]
) -> None:
    assert again(sequence) == first
    assert sequence.ran == []
    assert sequence.store.asked == {"list": 2, "read": 1}  # and its pack is as good as it was


def test_without_a_pack_each_record_is_read_once(sequence: Sequence, first: dict[str, StageRecord]) -> None:
    sequence.store._delete(f"packs/{NAME}")
    assert again(sequence) == first
    assert {sequence.store.read[place(record)] for record in first.values()} == {1}
    assert sequence.store.asked == {"list": 3, "read": 2 * WIDTH + 1, "write": 1}
    assert again(sequence) == first
    assert sequence.store.asked == {"list": 2, "read": 1}


def test_stages_that_are_ready_together_are_looked_up_together(
    sequence: Sequence, first: dict[str, StageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence.store._delete(f"packs/{NAME}")
    together, read = Barrier(WIDTH // 2, timeout=30), sequence.store._read
    leaves = {place(first[f"leaf {number}"]) for number in range(WIDTH // 2)}

    def wait_for_the_others(name: str) -> bytes | None:
        if name in leaves:
            together.wait()
        return read(name)

    monkeypatch.setattr(sequence.store, "_read", wait_for_the_others)
    assert plan(sequence.stages, Lookups(sequence.store)).keys()
    assert not together.broken


def test_in_a_store_of_very_many_each_is_asked_for(sequence: Sequence) -> None:
    sequence.store.pages = 0
    first = sequence.run()
    assert again(sequence) == first
    assert sequence.ran == []
    assert {sequence.store.read[place(record)] for record in first.values()} == {1}
    assert sequence.store.asked["look"] == 2 * WIDTH
    assert not any(name.startswith("packs/") for name in sequence.store.objects)


def test_on_disk_each_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    read: list[str] = []
    original = store.read_record
    monkeypatch.setattr(store, "read_record", lambda key: read.append(key) or original(key))  # type: ignore[func-returns-value]
    sequence = Sequence(store)
    first = sequence.run()
    read.clear()
    assert sequence.run() == first
    assert sorted(read) == sorted(record.key for record in first.values())
    assert not (tmp_path / "packs").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "another form", "empty"])
def test_a_damaged_pack_costs_time_alone(sequence: Sequence, first: dict[str, StageRecord], damage: str) -> None:
    name = f"packs/{NAME}"
    data, when = sequence.store.objects[name]
    changed = data.replace(b'"run": 1}', b'"run": 7}')
    assert changed != data
    bad = {"cut": data[:-9], "changed": changed, "another form": b"sapt pack 2\n{}", "empty": b""}[damage]
    sequence.store.objects[name] = bad, when
    assert again(sequence) == first
    assert sequence.ran == []
    assert sequence.store.objects[name][0] == data


def test_a_record_that_was_replaced_since_it_was_packed_counts(
    sequence: Sequence, first: dict[str, StageRecord]
) -> None:
    other = replaced(sequence.store, first["leaf 3"])
    assert again(sequence) == {**first, "leaf 3": other}
    assert sequence.ran == []
    assert sequence.store.asked["read"] == 2
    assert again(sequence)["leaf 3"] == other
    assert sequence.store.asked == {"list": 2, "read": 1}  # packed anew


def test_a_record_that_was_deleted_since_it_was_packed_is_gone(
    sequence: Sequence, first: dict[str, StageRecord]
) -> None:
    sequence.store._delete(place(first["on leaf 4"]))
    assert again(sequence)["on leaf 4"].metrics == {"run": 1}
    assert sequence.ran == ["on leaf 4"]
    assert again(sequence)["on leaf 4"].metrics == {"run": 1}
    assert sequence.store.asked == {"list": 2, "read": 1}


def test_a_packed_record_that_has_lost_a_blob_is_deleted_and_its_stage_runs(
    sequence: Sequence, first: dict[str, StageRecord], caplog: pytest.LogCaptureFixture
) -> None:
    sequence.store._delete(blob(first["on leaf 4"]))
    known = Lookups(sequence.store, [NAME])
    states = {stage.name: state for stage, state in plan(sequence.stages, known).items()}
    assert (states["on leaf 3"], states["on leaf 4"], states["on leaf 5"]) == ("done", "to run", "unknown")
    assert place(first["on leaf 4"]) in sequence.store.objects  # a plan changes nothing
    sequence.run(known)
    assert sequence.ran == ["on leaf 4"]
    assert "on leaf 4 runs again: its text is no longer in bucket" in caplog.text
    assert again(sequence)["on leaf 4"].metrics == {"run": 1}
    assert sequence.ran == []


def test_a_blob_that_no_listing_has_is_asked_for_before_anything_is_deleted(
    sequence: Sequence, first: dict[str, StageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sequence.store._tags

    def late(folder: str) -> dict[str, str] | None:
        return {name: tag for name, tag in (names(folder) or {}).items() if name != blob(first["leaf 0"])}

    monkeypatch.setattr(sequence.store, "_tags", late)
    assert again(sequence) == first
    assert sequence.ran == []
    assert sequence.store.asked["look"] == 1


def test_what_another_run_has_done_since_is_not_done_again(sequence: Sequence) -> None:
    """It listed what is there before the other began; with the first stage that it waits for it sees the rest."""
    known = Lookups(sequence.store, [NAME])
    assert "done" not in plan(sequence.stages, known).values()
    other = Sequence(sequence.store)
    records = other.run()
    events: list[StageEvent] = []
    mine = run_graph(sequence.stages, known, InlineExecutor(sequence.store), events.append)
    assert sequence.ran == []
    assert {stage.name: record for stage, record in mine.items()} == records
    started = [event.stage.name for event in events if event.kind == "started"]
    assert started == [f"leaf {number}" for number in range(WIDTH)]  # and their leases tell that they are done
    known.pack(NAME, [record.key for record in mine.values()])
    assert again(sequence) == records
    assert sequence.store.asked == {"list": 2, "read": 1}


def test_two_runs_at_once_leave_one_result_and_a_good_pack(sequence: Sequence) -> None:
    both = [sequence, Sequence(sequence.store)]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(Sequence.run, both)
    assert one == other
    assert sorted(both[0].ran + both[1].ran) == sorted(stage.name for stage in sequence.stages)
    assert again(sequence) == one
    assert sequence.store.asked == {"list": 2, "read": 1}


def test_a_record_that_is_replaced_while_it_is_packed_is_not_taken_for_the_new_one(
    sequence: Sequence, first: dict[str, StageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence.store._delete(f"packs/{NAME}")
    sequence.run()
    # The other's comes when this run has read its own, and before it writes the pack.
    write = sequence.store._write
    others: list[StageRecord] = []

    def replaced_before(name: str, data: bytes) -> None:
        if name.startswith("packs/") and not others:
            others.append(first["leaf 3"])
            others[0] = replaced(sequence.store, first["leaf 3"])
        write(name, data)

    sequence.store._delete(f"packs/{NAME}")
    monkeypatch.setattr(sequence.store, "_write", replaced_before)
    sequence.run()
    assert again(sequence)["leaf 3"] == others[0]


def test_a_pack_that_cannot_be_written_fails_nothing(
    sequence: Sequence, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, data: bytes) -> None:
        if name.startswith("packs/"):
            raise StoreError("permission denied")
        Bucket._write(sequence.store, name, data)

    monkeypatch.setattr(sequence.store, "_write", refuse)
    assert len(sequence.run()) == 2 * WIDTH
    assert "look up its stages one by one: permission denied" in caplog.text


def test_cleaning_removes_a_pack_when_the_last_of_its_records_is_gone(
    sequence: Sequence, first: dict[str, StageRecord]
) -> None:
    store = sequence.store
    store.old()
    assert unreachable(store) == []
    *others, last = first.values()
    for record in others:
        store.delete_record(record.key)
    assert [each for each in unreachable(store) if each.why == UNPACKED] == []
    store.delete_record(last.key)
    assert [each.entry.name for each in unreachable(store) if each.why == UNPACKED] == [f"packs/{NAME}"]
    store._write(f"packs/{NAME}", b"damaged")
    assert read_pack(store, NAME) == {}
    assert [each for each in unreachable(store) if each.why == UNPACKED] == []  # young
