"""Tasks that are scored and never learnt: what they change, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import InlineExecutor, StageEvent, StageRecord, run_graph, stage_key
from cluster.store import LocalStore, open_store
from cluster.store.lookups import Lookups
from cluster.tracking.outbox import Outbox
from cluster.tracking.service import client_of
from pipelines import continual
from pipelines.running.monitor import Monitor
from pipelines.running.publishing import MLflowPublisher
from pipelines.sequence.experiment import Experiment, load_experiment
from sapt_core.settings import StoreConfig, TrackingConfig
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, command, records
from tests.pipelines.sequence.test_graph import identities, identity

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
UNSEEN = "benchmark.unseen=stock,loan"


def experiment(*overrides: str) -> Experiment:
    return load_experiment(Path(QUICKSTART), [*TINY, *overrides])


def test_stages_of_the_sequence_stay_as_they_are() -> None:
    plain, with_unseen = experiment(), experiment(UNSEEN)
    assert identities(with_unseen.graph) == identities(plain.graph)
    assert [task.name for task in with_unseen.tasks] == ["animal", "basket"]
    assert [task.name for task in with_unseen.unseen] == ["stock", "loan"]
    assert plain.graph.transfer == ((), ())
    assert plain.graph.zero_shot == ()
    assert plain.key != with_unseen.key != experiment("benchmark.unseen=stock").key


def test_every_version_and_the_backbone_meet_every_unseen_task() -> None:
    graph = experiment(UNSEEN).graph
    assert [[stage.name for stage in row] for row in graph.transfer] == [
        ["evaluate[v00 on unseen stock]", "evaluate[v00 on unseen loan]"],
        ["evaluate[v01 on unseen stock]", "evaluate[v01 on unseen loan]"],
    ]
    for version, row in zip(graph.train, graph.transfer, strict=True):
        assert [stage.inputs["version"] for stage in row] == [version, version]
    assert [stage.name for stage in graph.zero_shot] == ["zero_shot[stock]", "zero_shot[loan]"]
    assert [list(stage.inputs) for stage in graph.zero_shot] == [["task", "probe"], ["task", "probe"]]


def test_rows_that_are_not_scored_repeat_no_scoring(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def key(*overrides: str) -> str:
        made = experiment(UNSEEN, *overrides)
        made.upload(Lookups(store))
        scored = made.graph.zero_shot[0]
        prepared = scored.inputs["task"]
        return stage_key(scored, {"task": run_graph([prepared], Lookups(store), InlineExecutor(store))[prepared]})

    tested, on_dev = key(), key("evaluation.split=dev")
    assert key("benchmark.train_rows=20") == tested
    assert key("benchmark.test_rows=8") != tested
    assert key("evaluation.split=dev", "benchmark.test_rows=8") == on_dev
    assert key("evaluation.split=dev", "benchmark.train_rows=20") == on_dev  # dev rows are drawn apart


def test_the_bare_backbone_is_scored_once_for_all_methods() -> None:
    sapt, sequential = (
        experiment(UNSEEN, f"method.name={name}", "pet.r=3" if name == "sapt" else "pet.r=8")
        for name in ("sapt", "sequential")
    )
    assert [identity(stage) for stage in sapt.graph.zero_shot] == [
        identity(stage) for stage in sequential.graph.zero_shot
    ]


def test_a_tiny_sequence_scores_what_it_never_learns(copied: Finished, call: Call, tmp_path: Path) -> None:
    before = set(records(copied.store))
    summary = tmp_path / "summary.json"
    arguments = [*command(copied.store)[2:], "benchmark.unseen=stock", "--summary", str(summary)]
    ended = call(continual.main, arguments)
    assert ended.code == 0, ended.err
    new = {name for file, (name, _) in records(copied.store).items() if file not in before}
    assert new == {
        "prepare[unseen stock]",
        "evaluate[v00 on unseen stock]",
        "evaluate[v01 on unseen stock]",
        "zero_shot[stock]",
    }
    figures = json.loads(summary.read_text())
    assert figures["scores"] == copied.summary["scores"]
    assert set(figures) == {*copied.summary, "unseen", "zero_shot"}
    assert [len(scores) for scores in figures["unseen"].values()] == [2]
    table = ended.out.partition("never learnt")[2]
    for label, score in zip(
        ("backbone", "0 animal", "1 basket"), [figures["zero_shot"]["stock"], *figures["unseen"]["stock"]], strict=True
    ):
        (line,) = [line for line in table.splitlines() if line.startswith(f"│ {label}")]
        assert [cell.strip() for cell in line.split("│")[2:4]] == [f"{score:.1f}"] * 2


SCORES = {
    "evaluate[v00 on 00 animal]": 50.0,
    "evaluate[v01 on 00 animal]": 40.0,
    "evaluate[v01 on 01 basket]": 60.0,
    "evaluate[v00 on unseen stock]": 11.0,
    "evaluate[v00 on unseen loan]": 12.0,
    "evaluate[v01 on unseen stock]": 21.0,
    "evaluate[v01 on unseen loan]": 22.0,
    "zero_shot[stock]": 1.0,
    "zero_shot[loan]": 2.0,
}


def finish(monitor: Monitor, finished: Finished) -> None:
    """Tell the monitor of every stage, with the scores above and manifests of the finished sequence."""
    store = open_store(StoreConfig(uri=str(finished.store)))
    done = {record["name"]: record for record in map(store.read_record, map(record_key, records(finished.store)))}
    example: dict[str, Any] = next(iter(done.values()))
    for stage in monitor.experiment.graph.stages:
        stored = done.get(stage.name, {**example, "outputs": {}, "metrics": {}, "kind": stage.kind})
        scored = {"score": SCORES.get(stage.name, 0.0)} if stage.kind in {"evaluate", "zero_shot"} else {}
        record = StageRecord.model_validate({**stored, "name": stage.name, "metrics": {**stored["metrics"], **scored}})
        monitor.on_event(StageEvent("cached", stage, record.key, record))


def record_key(file: str) -> str:
    return file.removesuffix(".json")


def test_summary_by_hand(finished: Finished) -> None:
    monitor = Monitor(experiment(UNSEEN), open_store(StoreConfig(uri=str(finished.store))), None)
    finish(monitor, finished)
    summary = monitor.summary()
    assert summary["unseen"] == {"stock": [11.0, 21.0], "loan": [12.0, 22.0]}
    assert summary["zero_shot"] == {"stock": 1.0, "loan": 2.0}
    assert (summary["ap"], summary["f_ra"]) == (50.0, 10.0)


def test_scores_are_metrics_of_every_version(finished: Finished, sqlite_tracking: TrackingConfig) -> None:
    given = experiment(UNSEEN, f"store.uri={finished.store}")
    with Outbox() as outbox:
        publisher = MLflowPublisher(given, sqlite_tracking, outbox)
        monitor = Monitor(given, open_store(given.config.store), publisher)
        finish(monitor, finished)
        publisher.finish(monitor, dict)
    client = client_of(sqlite_tracking.uri)
    points = client.get_metric_history(publisher.run_id, "unseen/stock")
    assert [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)] == [
        (0, 1.0),
        (1, 11.0),
        (2, 21.0),
    ]


@pytest.mark.parametrize(
    ("unseen", "part"),
    [
        ("stok", "benchmark.unseen: no synthetic task 'stok'; did you mean stock?"),
        ("stock,animal", "benchmark.unseen: animal, which is learnt in the sequence"),
        ("stock,stock", "named in unseen already"),
    ],
)
def test_what_is_refused(call: Call, unseen: str, part: str, tmp_path: Path) -> None:
    refused = call(continual.main, [*command(tmp_path / "store")[2:], f"benchmark.unseen={unseen}"])
    assert refused.code == 2
    assert part in refused.err
    assert "Traceback" not in refused.err
    assert list(tmp_path.iterdir()) == []


def test_folders_are_refused_together(call: Call, tmp_path: Path) -> None:
    for name in ("task1_a", "task2_b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"input": f"text {number}", "output": ["answer"]} for number in range(6)]
        for split in ("train", "test"):
            content = json.dumps({"Definition": ["Do."], "Instances": rows})
            (tmp_path / "data" / name / f"{split}.json").write_text(content)
    (tmp_path / "data/task2_b/test.json").write_text("{")
    overrides = [
        "benchmark.suite=folder",
        "benchmark.template=superni",
        f"benchmark.data_dir={tmp_path}/data",
        "benchmark.tasks=task1",
        "benchmark.unseen=task1_a,task2,task3",
    ]
    refused = call(continual.main, [*command(tmp_path / "store")[2:], *overrides])
    assert refused.code == 2
    found = [line for line in refused.err.splitlines() if line.startswith("  - ")]
    assert [fault.split(":")[0] for fault in found] == ["  - benchmark.unseen", "  - task3", "  - task2_b/test.json"]
