"""The stage graph in one process: what runs, what does not, and what survives a failure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import (
    InlineExecutor,
    Stage,
    StageContext,
    StageEvent,
    StageRecord,
    StageResult,
    done,
    plan,
    run_graph,
    stage_key,
)
from cluster.store import LocalStore, patience
from cluster.store.cleaning import all_records
from cluster.store.erasing import erase
from cluster.store.lookups import Lookups
from sapt_core.errors import DataError, DivergenceError, StoreError, StoreUnavailableError
from tests.states import load, save


class Graph:
    """left and right -> both -> top; every body counts its runs and writes its ``text``."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self.ran: list[str] = []
        self.runs = 0
        self.texts = {"left": "l", "right": "r", "both": "b", "top": "t"}
        self.values: dict[str, int] = {}
        self.errors: dict[str, BaseException] = {}
        self.events: list[StageEvent] = []

    def body(self, name: str) -> Callable[[StageContext], StageResult]:
        def work(context: StageContext) -> StageResult:
            self.ran.append(name)
            self.runs += 1
            if name in self.errors:
                raise self.errors[name]
            assert context.is_main
            below = [context.store.get(record.outputs["text"]).decode() for record in context.inputs.values()]
            text = "".join([*below, self.texts[name]])
            return StageResult(
                {"text": context.store.put(text.encode())},
                {"size": self.values.get(name, 0)},
                {"runs": self.runs},
            )

        return work

    def stages(self, **reads: int) -> list[Stage]:
        left = Stage("left", "leaf", self.body("left"), {"side": 0, "x": reads.get("left", 0)})
        right = Stage("right", "leaf", self.body("right"), {"side": 1})
        both = Stage("both", "join", self.body("both"), {}, {"a": left, "b": right})
        return [left, right, both, Stage("top", "top", self.body("top"), {}, {"below": both})]

    def run(self, **reads: int) -> dict[str, StageRecord]:
        self.ran.clear()
        self.events.clear()
        records = run_graph(self.stages(**reads), Lookups(self.store), InlineExecutor(self.store), self.events.append)
        return {stage.name: record for stage, record in records.items()}


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return Graph(LocalStore(tmp_path))


def test_second_run_runs_nothing(graph: Graph) -> None:
    first = graph.run()
    assert graph.ran == ["left", "right", "both", "top"]
    assert graph.store.get(first["top"].outputs["text"]) == b"lrbt"
    assert first["both"].inputs == {"a": first["left"].key, "b": first["right"].key}
    assert graph.run() == first
    assert graph.ran == []
    assert [event.kind for event in graph.events] == ["planned"] * 4 + ["cached"] * 4


def test_deleted_record_reruns_that_stage_alone_when_its_outputs_stay(graph: Graph) -> None:
    first = graph.run()
    graph.store.delete_record(first["left"].key)
    again = graph.run()
    assert graph.ran == ["left"]  # metrics differ, outputs do not: early cut-off
    assert again["left"].metrics != first["left"].metrics
    assert again["top"] == first["top"]


@pytest.mark.parametrize("what", ["outputs", "values"])
def test_changed_results_rerun_dependants(graph: Graph, what: str) -> None:
    first = graph.run()
    graph.store.delete_record(first["left"].key)
    if what == "outputs":
        graph.texts["left"] = "L"
    else:
        graph.values["left"] = 1
    again = graph.run()
    assert graph.ran == (["left", "both", "top"] if what == "outputs" else ["left", "both"])
    assert again["both"].key != first["both"].key
    assert again["right"] == first["right"]


def test_changed_reads_rerun_the_stage(graph: Graph) -> None:
    graph.run()
    graph.run(left=1)
    assert graph.ran == ["left"]
    graph.run(left=0)
    assert graph.ran == []  # the first results are still there


def test_key_is_of_content_not_of_names(graph: Graph) -> None:
    stage = graph.stages()[0]
    key = stage_key(stage, {})
    assert stage_key(replace(stage, name="other", cpus=8, workers=4), {}) == key
    assert stage_key(replace(stage, reads={"x": 0, "side": 0}), {}) == key
    assert len({key, *(stage_key(replace(stage, **change), {}) for change in ({"kind": "k"}, {"version": 2}))}) == 3


def test_only_the_outputs_that_are_used_count(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def two(context: StageContext) -> StageResult:
        return StageResult({name: store.put(text.encode()) for name, text in context.reads.items()})

    def reader(below: Stage, *used: str) -> Stage:
        return Stage("top", "top", lambda _: StageResult(), {}, {"below": below}, {"below": frozenset(used)})

    def keys(*used: str) -> set[str]:
        found = set()
        for read, unread in (("a", "x"), ("a", "y")):
            top = reader(Stage("below", "below", two, {"read": read, "unread": unread}), *used)
            found.add(run_graph([top], Lookups(store), InlineExecutor(store))[top].key)
        return found

    assert len(keys("read")) == 1
    assert len(keys("read", "unread")) == 2


def test_a_quiet_input_counts_where_it_gives_values(tmp_path: Path) -> None:
    store, told, ran = LocalStore(tmp_path), dict[str, int](), list[str]()

    def look(context: StageContext) -> StageResult:
        ran.append(context.name)
        return StageResult(values=told, metrics={"seconds": len(ran)})

    def work(context: StageContext) -> StageResult:
        ran.append(context.name)
        return StageResult(values={"seen": dict(context.inputs["look"].values)})

    def stages(reads: int) -> list[Stage]:
        first = Stage("look", "look", look, {"x": reads})
        top = Stage("work", "work", work, {}, {"look": first}, quiet=frozenset({"look"}))
        return [first, top]

    def run(reads: int) -> StageRecord:
        ran.clear()
        found = stages(reads)
        return run_graph(found, Lookups(store), InlineExecutor(store))[found[1]]

    before = run(0)
    assert ran == ["look", "work"]
    assert before.key == stage_key(replace(stages(0)[1], inputs={}), {})
    # Looked at anew, and nothing found: what was made stays. It stays where nobody has looked at all.
    assert set(done(stages(1), Lookups(store))) != set()
    assert [stage.name for stage in done(stages(1), Lookups(store))] == ["work"]
    assert list(plan(stages(1), Lookups(store)).values()) == ["to run", "done"]
    assert run(1) == before
    assert ran == ["look"]
    told["alone"] = 1
    after = run(2)
    assert ran == ["look", "work"]
    assert after.key != before.key
    assert after.values == {"seen": {"alone": 1}}


def test_missing_blob_makes_a_record_void(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    first = graph.run()
    digest = first["both"].outputs["text"]
    (graph.store.folder / "blobs" / digest[:2] / digest).unlink()
    assert list(plan(graph.stages(), Lookups(graph.store)).values()) == ["done", "done", "to run", "unknown"]
    assert graph.store.read_record(first["both"].key) is not None  # a plan changes nothing
    graph.run()
    assert graph.ran == ["both"]
    assert "both runs again: its text" in caplog.text


def test_done_are_the_records_that_a_run_would_keep(graph: Graph) -> None:
    assert done(graph.stages(), Lookups(graph.store)) == {}
    records = graph.run()
    assert {stage.name: record for stage, record in done(graph.stages(), Lookups(graph.store)).items()} == records
    graph.store.delete_record(records["both"].key)
    graph.ran.clear()
    assert [stage.name for stage in done(graph.stages(), Lookups(graph.store))] == ["left", "right"]
    assert graph.ran == []


def test_plan(graph: Graph) -> None:
    assert list(plan(graph.stages(), Lookups(graph.store)).values()) == ["to run", "to run", "unknown", "unknown"]
    graph.run()
    assert set(plan(graph.stages(), Lookups(graph.store)).values()) == {"done"}


def test_failure_keeps_finished_work_and_starts_nothing_new(graph: Graph) -> None:
    graph.errors["right"] = DataError("Broken:", ["row 1", "row 2"])
    with pytest.raises(DataError, match="row 2") as caught:
        graph.run()
    assert caught.value is graph.errors["right"]
    assert graph.ran == ["left", "right"]
    assert [(event.kind, event.stage.name) for event in graph.events[4:]] == [
        ("started", "left"),
        ("finished", "left"),
        ("started", "right"),
        ("failed", "right"),
    ]
    graph.errors.clear()
    graph.run()
    assert graph.ran == ["right", "both", "top"]


@pytest.mark.parametrize("value", [math.nan, math.inf, [[1.0], [math.nan]], {"kl": -math.inf}])
def test_a_figure_that_is_no_number_is_never_recorded(graph: Graph, value: object) -> None:
    """A record is JSON, which has no such number: a reader would meet null, and in another place."""
    stage = Stage("attend[v01]", "attend", lambda _: StageResult(metrics={"rows": 3, "weights": value}))
    with pytest.raises(
        DivergenceError, match=r"attend\[v01\] gave figures that are no finite numbers: weights\. Nothing"
    ):
        run_graph([stage], Lookups(graph.store), InlineExecutor(graph.store))
    assert graph.store.read_record(stage_key(stage, {})) is None
    with pytest.raises(ValueError, match="Out of range float"):
        graph.store.commit_record("f00d" * 16, {"weights": value})


def test_interrupt_travels(graph: Graph) -> None:
    graph.errors["right"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        graph.run()
    graph.errors.clear()
    graph.run()
    assert graph.ran == ["right", "both", "top"]


def test_equal_work_under_two_names_runs_once(graph: Graph) -> None:
    left = graph.stages()[0]
    twin = replace(left, name="twin")
    done = run_graph([left, twin], Lookups(graph.store), InlineExecutor(graph.store))
    assert graph.ran == ["left"]
    assert done[left] == done[twin]


class TwoPlaces(InlineExecutor):
    """Room for two stages at once, or for one that is wide."""

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        taken = [self._waiting[key][0] for key in self._waiting]
        return not taken or sum(max(each.workers, 1) for each in (*taken, *ahead, stage)) <= 2


class OneCard(InlineExecutor):
    """Two processors and a GPU."""

    def has_room(self, stage: Stage, ahead: Sequence[Stage] = ()) -> bool:
        running = [each for each, _ in self._waiting.values()]
        together = [*running, *ahead, stage]
        fits = sum(each.cpus for each in together) <= 2 and (not stage.gpus or sum(each.gpus for each in together) <= 1)
        return not running or fits


def test_waiting_for_a_gpu_holds_up_no_work_that_needs_none(tmp_path: Path) -> None:
    def nothing(context: StageContext) -> StageResult:
        return StageResult()

    cards = [Stage(f"card {number}", "card", nothing, {"n": number}, cpus=0.5, gpus=1) for number in range(2)]
    others = [Stage(f"other {number}", "other", nothing, {"n": number}) for number in range(3)]
    events: list[StageEvent] = []
    store = LocalStore(tmp_path)
    run_graph([*cards, *others], Lookups(store), OneCard(store), events.append)
    told = [event.stage.name for event in events if event.kind in {"started", "finished"}]
    # One other beside the first card, and none that would take the processor that the second card waits with.
    assert told[:4] == ["card 0", "other 0", "card 0", "card 1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_chain_put_first_never_waits_behind_work_that_can_wait(tmp_path: Path, workers: int) -> None:
    def nothing(context: StageContext) -> StageResult:
        return StageResult()

    first = Stage("first", "chain", nothing, {"n": 1}, workers=workers)
    second = Stage("second", "chain", nothing, {"n": 2}, {"parent": first}, workers=workers)
    others = [Stage(f"other {number}", "other", nothing, {"n": number}) for number in range(4)]
    events: list[StageEvent] = []
    store = LocalStore(tmp_path)
    run_graph([first, second, *others], Lookups(store), TwoPlaces(store), events.append)
    told = [event.stage.name for event in events if event.kind == "started"]
    if workers:
        assert told == ["first", "second", "other 0", "other 1", "other 2", "other 3"]
    else:
        assert told == ["first", "other 0", "second", "other 1", "other 2", "other 3"]


def test_what_is_done_needs_no_room(tmp_path: Path) -> None:
    """A resumed run tells of all earlier results before it waits for new ones."""
    store = LocalStore(tmp_path)
    stages = [Stage(f"s{number}", "s", lambda _: StageResult(), {"n": number}) for number in range(3)]
    run_graph(stages[1:], Lookups(store), InlineExecutor(store))
    events: list[StageEvent] = []
    run_graph(stages, Lookups(store), InlineExecutor(store), events.append)
    told = [(event.kind, event.stage.name) for event in events[3:]]
    assert told == [("cached", "s1"), ("cached", "s2"), ("started", "s0"), ("finished", "s0")]


def test_cycle_and_equal_names_are_refused(graph: Graph) -> None:
    left, right, *_ = graph.stages()
    left.inputs["loop"] = replace(right, inputs={"back": left})  # type: ignore[index]
    with pytest.raises(ValueError, match="cycle"):
        run_graph([left], Lookups(graph.store), InlineExecutor(graph.store))
    with pytest.raises(ValueError, match="same name: right"):
        run_graph([right, replace(right)], Lookups(graph.store), InlineExecutor(graph.store))
    assert graph.ran == []


def test_foreign_record_is_refused(graph: Graph) -> None:
    left = graph.stages()[0]
    graph.store.commit_record(stage_key(left, {}), {"schema_version": 9})
    with pytest.raises(StoreError, match="not a stage record"):
        run_graph([left], Lookups(graph.store), InlineExecutor(graph.store))


def test_a_broken_off_stage_resumes_from_its_checkpoint_and_leaves_none(graph: Graph) -> None:
    steps: list[int] = []

    def train(context: StageContext) -> StageResult:
        state = load(context.checkpoints)
        for step in range(int(state["step"]) if state else 0, 6):
            steps.append(step)
            if steps == [0, 1, 2]:
                raise RuntimeError("power cut")
            save(context.checkpoints, {"step": b"%d" % (step + 1)})
        return StageResult()

    stage = Stage("t", "train", train, workers=2)
    with pytest.raises(RuntimeError):
        run_graph([stage], Lookups(graph.store), InlineExecutor(graph.store))
    record = run_graph([stage], Lookups(graph.store), InlineExecutor(graph.store))[stage]
    assert steps == [0, 1, 2, 2, 3, 4, 5]
    assert record.world_size == 1
    assert not any((graph.store.folder / "checkpoints").iterdir())


# --- a store that does not answer ---------------------------------------------------------------------


def fail(times: int, error: Exception, then: Callable[..., Any]) -> Callable[..., Any]:
    """``then``, which only fails at first."""
    left = [error] * times

    def called(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return then(*arguments)

    return called


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(patience, "WAIT_SECONDS", (1.0, 2.0))
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    return slept


def test_a_stage_goes_on_from_its_checkpoint_when_the_store_answers_again(
    tmp_path: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    steps: list[int] = []

    def train(context: StageContext) -> StageResult:
        state = load(context.checkpoints)
        for step in range(int(state["step"]) if state else 0, 4):
            steps.append(step)
            if len(steps) in {2, 4}:
                raise StoreUnavailableError("The server does not answer.")
            save(context.checkpoints, {"step": b"%d" % (step + 1)})
        return StageResult()

    run_graph([Stage("t", "train", train)], Lookups(store), InlineExecutor(store))
    assert steps == [0, 1, 1, 2, 2, 3]
    assert waits == [1.0, 2.0]
    assert "The server does not answer. Trying again in 1 s." in caplog.text
    assert list((store.folder / "leases").iterdir() if (store.folder / "leases").exists() else []) == []


@pytest.mark.parametrize("method", ["read_record", "commit_record", "_create"])
def test_looking_up_and_committing_are_repeated_too(
    graph: Graph, waits: list[float], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    outage = fail(2, StoreUnavailableError("away"), getattr(graph.store, method))
    monkeypatch.setattr(graph.store, method, outage)
    assert set(graph.run()) == {"left", "right", "both", "top"}
    assert waits == [1.0, 2.0]


def test_a_store_that_stays_away_ends_the_run(graph: Graph, waits: list[float]) -> None:
    graph.errors["left"] = StoreUnavailableError("away")
    with pytest.raises(StoreUnavailableError, match="away"):
        graph.run()
    assert graph.ran == ["left"] * 3
    assert waits == [1.0, 2.0]


def test_other_errors_of_the_store_are_not_repeated(graph: Graph, waits: list[float]) -> None:
    graph.errors["left"] = StoreError("damaged")
    with pytest.raises(StoreError, match="damaged"):
        graph.run()
    assert (graph.ran, waits) == (["left"], [])


def test_what_was_erased_is_done_until_somebody_needs_it(graph: Graph) -> None:
    records = graph.run()
    known = Lookups(graph.store)
    wanted = {records[name].key: ["text"] for name in ("left", "both")}
    erased = erase(wanted, all_records(graph.store), known)
    assert (erased.marked, erased.blobs, erased.kept) == (2, 2, frozenset())
    assert not graph.store.has(records["left"].outputs["text"])
    assert set(plan(graph.stages(), known).values()) == {"done"}
    assert {name: record.outputs for name, record in graph.run().items()} == {
        name: record.outputs for name, record in records.items()
    }
    assert graph.ran == []
    # Once more is nothing more.
    assert erase(wanted, all_records(graph.store), known)[:3] == (0, 0, 0)
    # The top is to be made again, and for that what is erased below it, but not what is there.
    graph.store.delete_record(records["top"].key)
    states = {stage.name: state for stage, state in plan(graph.stages(), Lookups(graph.store)).items()}
    assert states == {"left": "to run", "right": "done", "both": "unknown", "top": "unknown"}
    again = graph.run()
    assert graph.ran == ["left", "both", "top"]
    assert {record.erased for record in again.values()} == {()}


def test_a_blob_that_another_record_names_outlives_its_erasure(graph: Graph) -> None:
    graph.texts["right"] = graph.texts["left"]
    records = graph.run()
    digest = records["left"].outputs["text"]
    assert digest == records["right"].outputs["text"]
    known = Lookups(graph.store)
    first = erase({records["left"].key: ["text"]}, all_records(graph.store), known)
    assert (first.blobs, first.kept) == (0, {digest})
    both = erase({records[side].key: ["text"] for side in ("left", "right")}, all_records(graph.store), known)
    assert (both.marked, both.blobs) == (1, 1)
    assert not graph.store.has(digest)


def test_a_deletion_that_breaks_off_is_made_good(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    records = graph.run()
    wanted = {records["left"].key: ["text"]}
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_delete", fail(1, StoreError("gone"), LocalStore._delete))
        with pytest.raises(StoreError, match="gone"):
            erase(wanted, all_records(graph.store), Lookups(graph.store))
    assert set(plan(graph.stages(), Lookups(graph.store)).values()) == {"done"}
    assert erase(wanted, all_records(graph.store), Lookups(graph.store)).blobs == 1
