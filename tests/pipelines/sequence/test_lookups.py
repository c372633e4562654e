"""What a sequence that has ended asks its store before it knows that nothing is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.stages import InlineExecutor, Stage, StageRecord, StageResult, closure, commit, plan, run_graph, stage_key
from cluster.store.lookups import Lookups
from pipelines.reports import page
from pipelines.running.monitor import Monitor
from pipelines.running.sequence import run
from pipelines.sequence.experiment import Experiment, load_experiment
from pipelines.sequence.graph import build_graph
from sapt_core.errors import SaptError
from tests.bucket import Bucket
from tests.pipelines.commands import QUICKSTART, TINY

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("train.arrow", "dev.arrow", "test.arrow", "meta.json"),
    "pseudo_samples": ("samples",),
    "train": ("manifest", "block", "router"),
    "complete": ("manifest",),
    "evaluate": ("predictions",),
}


def sequence(count: int) -> Experiment:
    """A sequence of so many tasks, each learnt alone as well."""
    made = load_experiment(Path(QUICKSTART), [*TINY, "benchmark.tasks=animal", "evaluation.single_task=true"])
    tasks = tuple(replace(made.tasks[0], name=f"task {number}", definition=str(number)) for number in range(count))
    return replace(made, tasks=tasks, graph=build_graph(made.config, tasks, (), made.backbone))


def finish(experiment: Experiment, store: Bucket) -> dict[Stage, StageRecord]:
    """Give every stage a record, with blobs of its own, as if it had run."""
    records: dict[Stage, StageRecord] = {}

    def record_of(stage: Stage) -> StageRecord:
        if stage not in records:
            inputs = {name: record_of(source) for name, source in stage.inputs.items()}
            key = stage_key(stage, inputs)
            outputs = {name: store.put(f"{name} {key}".encode()) for name in OUTPUTS.get(stage.kind, ())}
            result = StageResult(outputs, metrics={"score": 50.0})
            records[stage] = commit(stage, key, inputs, result, store, seconds=1.0, world_size=1)
        return records[stage]

    experiment.upload(Lookups(store))
    for stage in closure(experiment.graph.published):
        record_of(stage)
    Lookups(store).pack(experiment.key, [record.key for record in records.values()])
    return records


@pytest.mark.parametrize(("count", "stages", "most"), [(15, 241, 60), (100, 5851, 300)])
def test_a_finished_sequence_asks_little_however_long_it_is(count: int, stages: int, most: int) -> None:
    experiment, store = sequence(count), Bucket()
    records = finish(experiment, store)
    assert len(records) == stages
    store.old()  # so that what is put again would be touched
    store.asked.clear()
    store.check()
    known = Lookups(store, [experiment.key])
    assert set(plan(experiment.graph.published, known).values()) == {"done"}
    experiment.upload(known)
    assert run_graph(experiment.graph.published, known, InlineExecutor(store)) == records
    known.pack(experiment.key, [record.key for record in records.values()])
    assert store.requests <= most


def test_a_report_reads_what_a_run_has_packed() -> None:
    experiment, store = sequence(3), Bucket()
    finish(experiment, store)
    store.asked.clear()
    with pytest.raises((SaptError, ValueError)):  # what the stages gave is no version
        page.find(experiment, store, None)
    assert store.asked == {"list": 2, "read": 2}  # the pack, and the manifest


def test_a_run_leaves_a_pack_of_its_records() -> None:
    experiment, store = sequence(3), Bucket()
    records = finish(experiment, store)
    store._delete(f"packs/{experiment.key}")
    monitor = Monitor(experiment, store, None)
    run(experiment, Lookups(store, [experiment.key]), InlineExecutor(store), monitor)
    assert monitor.records == records
    assert f"packs/{experiment.key}" in store.objects


def test_texts_are_put_until_a_record_names_them_and_when_they_are_lost() -> None:
    experiment, store = sequence(3), Bucket()
    experiment.upload(Lookups(store))
    texts = {f"blobs/{task.digest[:2]}/{task.digest}" for task in experiment.tasks}
    assert texts <= store.objects.keys()
    store.old()
    experiment.upload(Lookups(store))
    assert {store._entry(name).age > 24 * 3600 for name in texts} == {True}  # as old as before: a record keeps them
    lost = min(texts)
    store._delete(lost)
    experiment.upload(Lookups(store))
    assert lost in store.objects
    (described,) = [name for name in store.objects if name.startswith("records/")]
    store._delete(described)
    experiment.upload(Lookups(store))
    assert {store._entry(name).age > 24 * 3600 for name in texts} == {False}
    assert described in store.objects
