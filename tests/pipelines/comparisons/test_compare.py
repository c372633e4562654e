"""A tiny comparison of two rows and two seeds, in one process: what it shares, where it goes on, what it says."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import stages
from cluster.stages import InlineExecutor, StageContext, StageResult
from cluster.tracking.runs import PARENT
from cluster.tracking.service import client_of
from pipelines import compare
from pipelines.comparisons.cells import Comparison, ComparisonConfig, Row, load_comparison
from pipelines.comparisons.records import read_records
from pipelines.console import cli
from pipelines.reports import page
from pipelines.running import sequence
from pipelines.sequence import bodies
from sapt_core.errors import ConfigError, SaptError
from sapt_core.methods.base import known_methods
from sapt_core.settings import TrackingConfig
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome, records

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
CONFIGS = sorted((ROOT / "pipelines/configs/comparisons").glob("*.yaml"))
MARKED = "# Results\n<!-- compare:tiny begin -->\nold\n<!-- compare:tiny end -->\nThe end.\n"


def write(folder: Path, **changes: Any) -> Path:
    """The tiny comparison's file, with some of it changed."""
    values: dict[str, Any] = {
        "base": QUICKSTART,
        "overrides": [*TINY, "evaluation.single_task=false", f"store.uri={folder}/store"],
        "seeds": [0, 1],
        "rows": [
            {"name": "SAPT", "note": "as it is"},
            {"name": "no reflection", "overrides": ["reflection.weight=0"]},
        ],
        "results": str(folder / "results"),
        **changes,
    }
    path = folder / "compare_tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True)
class Compared:
    """The folder of a comparison that was interrupted once and then ran to its end."""

    folder: Path
    interrupted: Outcome
    results_then: tuple[str, ...]
    stages_then: tuple[str, ...]
    outcome: Outcome


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    path = write(folder)
    left = 16  # all of the first cell and some of the second

    class Interrupted(InlineExecutor):
        def wait(self, handles: Any) -> Any:
            nonlocal left
            left -= 1
            patch.setenv("GIT_COMMIT", "moved on")
            if left < 0:
                raise KeyboardInterrupt
            return super().wait(handles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "InlineExecutor", Interrupted)
        patch.setenv("GIT_COMMIT", "begun")
        interrupted = in_process(["--config", str(path), "--inline"])
    then = tuple(sorted(file.name for file in (folder / "results").glob("*.json")))
    names = tuple(name for name, _ in records(folder / "store").values())
    (folder / "results.md").write_text(MARKED)
    outcome = in_process(["--config", str(path), "--inline", "--markdown", str(folder / "results.md")])
    assert outcome.code == 0, outcome.err
    return Compared(folder, interrupted, then, names, outcome)


def in_process(arguments: list[str]) -> Outcome:
    """Call the entry point outside of a test."""
    import contextlib
    import io

    from pipelines.console import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["compare.py", *arguments])
        try:
            cli.run(compare.main)
        except SystemExit as ended:
            code = int(str(ended.code or 0))
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def again(compared: Compared, tmp_path: Path) -> Path:
    """A copy of the finished comparison, to change."""
    shutil.copytree(compared.folder, tmp_path, dirs_exist_ok=True)
    return write(tmp_path)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "results").glob("*.json")}


def test_what_cells_share_runs_once(compared: Compared) -> None:
    names = [name.partition(": ")[2].partition("[")[0] for name, _ in records(compared.folder / "store").values()]
    # For each seed both rows share the first task and its score; all share what is prepared.
    assert Counter(names) == {"probe": 1, "prepare": 2, "train": 2 * 3, "pseudo_samples": 2, "evaluate": 2 * 5} | {
        "attend": 2 * 3,
        "quality": 2,
        "cost": 2 * 2,
    }


def test_a_record_is_written_as_soon_as_its_cell_is_complete(compared: Compared) -> None:
    assert compared.interrupted.code == 130
    assert compared.results_then == ("sapt_seed0.json",)
    assert len(compared.stages_then) == 16


def test_a_record_names_the_commit_at_which_its_run_began(compared: Compared) -> None:
    assert "begun" in {record.commit for record in read_records(compared.folder / "results")}


def test_an_interrupted_comparison_goes_on_where_it_stopped(compared: Compared) -> None:
    assert "3 cells to learn, 1 have their record" in compared.outcome.out
    lines = compared.outcome.out.splitlines()
    started = {line[9:].removesuffix(" started") for line in lines if line.endswith(" started")}
    told = {
        name for name, _ in records(compared.folder / "store").values() if "train[" in name or "pseudo_samples[" in name
    }
    done = told & set(compared.stages_then)
    assert done > {"SAPT seed 0: train[00 animal]", "SAPT seed 0: train[01 basket]"}
    assert started == told - done != set()


def test_records_say_what_was_run(compared: Compared) -> None:
    found = {record.place.name: record for record in read_records(compared.folder / "results")}
    assert set(found) == {f"{row} seed {seed}" for row in ("SAPT", "no reflection") for seed in (0, 1)}
    record = found["no reflection seed 1"]
    assert record.overrides == ("reflection.weight=0",)
    assert record.method == "sapt"
    assert record.settings == found["no reflection seed 0"].settings != found["SAPT seed 0"].settings
    assert record.key != found["no reflection seed 0"].key
    assert record.tasks == ("animal", "basket")
    (first,), last = record.scores
    assert record.figures.ap == pytest.approx(sum(last) / 2, abs=1e-4)
    assert record.figures.f_ra == pytest.approx(first - last[0], abs=1e-4)
    assert record.figures.fwt is None
    assert [len(row) for row in record.attention] == [1, 2]
    assert sum(record.attention[1][0]) == pytest.approx(1, abs=1e-3)
    assert record.sizes == {"tasks": 2, "train_rows": 44, "dev_rows": 4, "test_rows": 24}
    assert set(record.seconds) == {"probe", "prepare", "train", "evaluate", "attend", "cost"}
    assert found["SAPT seed 0"].source_seconds > 0 == record.source_seconds
    assert record.machine.cores > 0


def test_the_table_is_printed_and_put_between_its_markers(compared: Compared) -> None:
    text = (compared.folder / "results.md").read_text()
    assert text.startswith("# Results\n<!-- compare:tiny begin -->\n| row | cells | AP |")
    assert text.endswith("\n<!-- compare:tiny end -->\nThe end.\n")
    assert "old" not in text
    for name in ("SAPT", "no reflection"):
        assert f"\n| {name} | 2 | " in text
        assert f"│ {name} " in compared.outcome.out


def test_what_has_its_record_is_not_run_again(again: Path, call: Call) -> None:
    before = contents(again.parent)
    shutil.rmtree(again.parent / "store")
    ended = call(compare.main, ["--config", str(again), "--inline"])
    assert ended.code == 0, ended.err
    assert contents(again.parent) == before
    assert "0 cells to learn, 4 have their record" in ended.out


def test_a_record_is_taken_over_from_a_comparison_of_the_same_experiment(again: Path, call: Call) -> None:
    there = read_records(again.parent / "results")
    shutil.rmtree(again.parent / "store")
    (again.parent / "results").rename(again.parent / "others")
    rows = [{"name": "ours"}, {"name": "without", "overrides": ["reflection.weight=0"]}]
    path = write(again.parent, rows=rows)
    shown = call(compare.main, ["--config", str(path), "--inline", "--dry-run"])
    assert "ours seed 1: its record is taken over from another comparison" in shown.out
    assert not (again.parent / "results").exists()
    ended = call(compare.main, ["--config", str(path), "--inline"])
    assert ended.code == 0, ended.err
    assert " started" not in ended.out
    taken = {record.place.name: record for record in read_records(again.parent / "results")}
    assert set(taken) == {"ours seed 0", "ours seed 1", "without seed 0", "without seed 1"}
    (ours,) = [record for record in there if record.place.name == "SAPT seed 1"]
    assert taken["ours seed 1"] == ours.model_copy(update={"row": "ours"})
    assert "No record yet" not in ended.out


def test_a_lost_record_is_put_together_from_its_stages(again: Path, call: Call) -> None:
    lost = again.parent / "results/sapt_seed1.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    ended = call(compare.main, ["--config", str(again), "--inline"])
    assert ended.code == 0, ended.err
    assert " started" not in ended.out
    del before["written_at"]
    assert json.loads(lost.read_text()).items() >= before.items()


def test_a_record_of_other_settings_is_replaced_with_a_notice(again: Path, call: Call) -> None:
    before = contents(again.parent)
    arguments = ["--config", str(again), "--inline", "--rows", "SAPT", "--seeds", "0", "evaluation.batch_size=5"]
    shown = call(compare.main, [*arguments, "--dry-run"])
    assert shown.code == 0, shown.err
    assert "SAPT seed 0: its record is of other settings, data or backbone; it is replaced" in shown.out
    assert contents(again.parent) == before
    ended = call(compare.main, arguments)
    assert ended.code == 0, ended.err
    assert "it is replaced" in ended.out
    after = contents(again.parent)
    assert [name for name in after if after[name] != before[name]] == ["sapt_seed0.json"]
    # Its row has no mean of two settings.
    assert "Left out, of other settings than the newest of its row: SAPT seed 1." in ended.out
    assert "1 of 2" in ended.out


def test_a_row_has_no_mean_over_two_backbones(again: Path, call: Call) -> None:
    other = again.parent / "other"
    shutil.copytree(ROOT / "pipelines/backbones/tiny", other)
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "_from_model_config": False}))
    arguments = ["--config", str(again), "--inline", "--rows", "SAPT", "--seeds", "0", f"backbone.path={other}"]
    ended = call(compare.main, arguments)
    assert ended.code == 0, ended.err
    assert "Left out, of other settings than the newest of its row: SAPT seed 1." in ended.out
    record = {each.place.name: each for each in read_records(again.parent / "results")}["SAPT seed 0"]
    assert record.config is not None
    assert record.config["backbone"]["path"] == "other"
    assert str(again.parent) not in record.to_text()


def test_a_record_that_told_its_settings_otherwise_is_told_anew(again: Path, call: Call) -> None:
    path = again.parent / "results/sapt_seed0.json"
    now = json.loads(path.read_text())
    path.write_text(json.dumps({**now, "settings": "as an earlier release had it", "config": None}))
    ended = call(compare.main, ["--config", str(again), "--inline"])
    assert ended.code == 0, ended.err
    assert "Left out" not in ended.out
    assert json.loads(path.read_text()) == now


def test_the_table_alone_needs_no_data_and_runs_nothing(again: Path, call: Call) -> None:
    shutil.rmtree(again.parent / "store")
    (again.parent / "results/sapt_seed1.json").unlink()
    write(again.parent, overrides=["backbone.path=nowhere"])
    ended = call(compare.main, ["--config", str(again), "--table-only"])
    assert ended.code == 0, ended.err
    assert "No record yet: SAPT seed 1." in ended.out
    assert not (again.parent / "store").exists()


def test_a_failed_cell_is_told_of_and_the_others_go_on(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(context: StageContext) -> StageResult:
        raise SaptError("too few samples")

    monkeypatch.setattr(bodies, "pseudo_samples", fails)
    ended = call(compare.main, ["--config", str(write(tmp_path, seeds=[0])), "--inline"])
    assert ended.code == 2
    assert "SAPT seed 0: too few samples" in ended.err
    assert "Traceback" not in ended.err
    assert "│ SAPT          │ 0 of 1 │" in ended.out
    assert list(contents(tmp_path)) == ["no-reflection_seed0.json"]


def test_what_stops_everything_is_no_failure_of_a_cell(
    again: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise SaptError("the store is gone")

    (again.parent / "results/sapt_seed1.json").unlink()
    monkeypatch.setattr(stages, "_valid_records", broken)
    ended = call(compare.main, ["--config", str(again), "--inline"])
    assert (ended.code, ended.err) == (2, "error: the store is gone\n")


def test_sequences_are_children_of_the_comparisons_run(
    again: Path, call: Call, sqlite_tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(again.parent / "results")
    build, threads = page.build, []

    def built(*given: Any) -> dict[str, bytes]:
        threads.append(threading.current_thread())
        return build(*given)

    monkeypatch.setattr(page, "build", built)
    # All stages are done, so that no Ray is started.
    arguments = ["--config", str(again), f"tracking.uri={sqlite_tracking.uri}", "tracking.experiment=unit"]
    ended = call(compare.main, [*arguments, "--seeds", "0"])
    assert ended.code == 0, ended.err
    client = client_of(sqlite_tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("unit").experiment_id])
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    assert (parent.info.run_name, parent.info.status) == ("compare tiny", "FINISHED")
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["ap_after_each_task.png", "tiny.md"]
    sequences = {run.info.run_name: run for run in runs if run.data.tags.get(PARENT) == parent.info.run_id}
    assert set(sequences) == {"SAPT seed 0", "no reflection seed 0"}
    for run in sequences.values():
        assert run.info.status == "FINISHED"
        assert "ap" in run.data.metrics
        children = {each.info.run_name for each in runs if each.data.tags.get(PARENT) == run.info.run_id}
        assert {"train[00 animal]", "train[01 basket]"} <= children
    assert client.search_registered_models() == []
    # Drawing holds up no stage.
    assert len(threads) == 2
    assert threading.main_thread() not in threads


# What people get wrong


def faults(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_comparison(path, overrides)
    return caught.value.faults


def test_all_faults_at_once(tmp_path: Path) -> None:
    rows = [
        {"name": "one", "overrides": ["reflection.wait=0"]},
        {"name": "One", "overrides": ["seed=3", "store.uri=elsewhere"], "sedes": [1]},
        {"name": "three", "overrides": ["train.epochs"]},
        {"name": "one"},
    ]
    found = faults(write(tmp_path, base="nowhere.yaml", rows=rows, result="x"), "benchmark.order=2")
    for part in (
        "result: no such field; did you mean results?",
        "rows.1.sedes: no such field; did you mean seeds?",
        "nowhere.yaml: no such file",
        "rows.one: reflection.wait: no such field; did you mean weight?",
        "rows.three: 'train.epochs': give a dotted key, '=' and a value",
        "command line: benchmark.order: give orders",
    ):
        assert [fault for fault in found if part in fault], (part, found)
    assert len(found) == len(set(found))


def test_rows_of_one_name(tmp_path: Path) -> None:
    (fault,) = faults(write(tmp_path, rows=[{"name": "one"}, {"name": "One"}, {"name": "two"}]))
    assert fault == "config: rows of one name: one, One"


def test_rows_set_nothing_that_all_share(tmp_path: Path) -> None:
    row = {"name": "one", "overrides": ["seed=3", "store.uri=x", "tracking.model=x", "cluster.max_failures=0"]}
    found = faults(write(tmp_path, rows=[row]))
    assert [fault.split(": ")[1] for fault in found] == ["seed", "store.uri", "tracking.model", "cluster.max_failures"]


def test_orders_and_named_tasks(tmp_path: Path) -> None:
    found = faults(write(tmp_path, orders=[1, 2]))
    assert found[0].startswith("orders: row SAPT names benchmark.tasks")
    (fault,) = faults(write(tmp_path, rows=[{"name": "one"}, {"name": "two", "orders": [2]}]))
    assert fault.startswith("orders: row two names benchmark.tasks")


def test_a_row_may_have_orders_of_its_own() -> None:
    rows = (Row(name="a", orders=(1, 2)), Row(name="b"), Row(name="c", orders=(2,), seeds=(4,)))
    config = ComparisonConfig(base=Path("b.yaml"), rows=rows, results=Path("results"), orders=(1,), seeds=(0,))
    found = Comparison("x", Path("x.yaml"), config, ()).places()
    assert [(place.row, place.order, place.seed) for place in found] == [
        ("a", 1, 0),
        ("a", 2, 0),
        ("b", 1, 0),
        ("c", 2, 4),
    ]


def test_a_warning_that_every_row_gives_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(cli.first_time())
    log = logging.Logger("unit")
    log.addHandler(handler)
    for name in ("a", "b", "a"):
        log.warning("%s is long", name)
    assert capsys.readouterr().err == "a is long\nb is long\n"


def test_a_fault_of_the_base_is_told_once(tmp_path: Path) -> None:
    assert faults(write(tmp_path), "train.epochs=0") == ("train.epochs: Input should be greater than 0 (given: 0)",)


def test_faults_of_the_data_name_their_rows(tmp_path: Path, call: Call) -> None:
    rows = [{"name": "one"}, {"name": "two", "overrides": ["benchmark.tasks=animl"]}]
    path = write(tmp_path, rows=rows)
    ended = call(compare.main, ["--config", str(path), "--inline", "backbone.path=./nowhere"])
    assert ended.code == 2
    assert "did you mean animal?" in ended.err
    assert "two seed 0, two seed 1: " in ended.err
    assert "backbone.path ./nowhere" in ended.err
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rows", "SAPTT"], "no row 'SAPTT'; did you mean 'SAPT'?"),
        (["--seeds", "one"], "invalid"),
        (["--rows", ","], "one or more names"),
        (["--seeds", "-1"], "whole numbers from 0 on"),
        (["--markdown", "README.md"], "<!-- compare:tiny begin -->\n<!-- compare:tiny end -->"),
        (["--markdown", "missing.md"], "missing.md cannot be read"),
    ],
)
def test_what_is_refused_before_the_work(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no markers")
    ended = call(compare.main, ["--config", str(write(tmp_path)), "--inline", *arguments])
    assert ended.code == 2
    assert part in ended.err
    assert "Traceback" not in ended.err
    assert not Path("store").exists()


# What ships


@pytest.mark.parametrize(
    "shipped",
    [pytest.param(path, id=path.stem) for path in CONFIGS],
)
def test_what_ships_validates(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_comparison(shipped)
    assert caplog.messages == []  # nothing is set in vain
    # A demo's records are the machine's own: a fresh clone computes them.
    parent = "runs/comparisons" if found.name == "quickstart" else "docs/results"
    assert str(found.config.results) == f"{parent}/{found.name}"
    head = shipped.read_text().splitlines()[1]
    assert head.startswith(f"# python pipelines/compare.py --config pipelines/configs/comparisons/{shipped.name}")


def test_methods_are_listed_a_line_each(call: Call) -> None:
    listed = call(compare.main, ["--list-methods"])
    assert listed.code == 0
    lines = listed.out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(known_methods())
    assert "am_lora      attention over the LoRAs' own features in every layer (AM-LoRA, arXiv 2409.19611)" in lines


def test_a_base_counts_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("apart").mkdir()
    Path("base.yaml").write_text(Path(QUICKSTART).read_text())
    assert load_comparison(write(Path("apart"), base="base.yaml")).places()
    assert load_comparison(write(Path("apart"), base="quickstart")).places()
    Path("base.yaml").rename("apart/base.yaml")
    assert faults(write(Path("apart"), base="base.yaml")) == (
        "base: base.yaml: no such file; relative paths count from the working folder, also those in "
        "apart/compare_tiny.yaml: give apart/base.yaml",
    )


def test_a_row_is_told_what_it_sets_in_vain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"name": "SAPT"}, {"name": "plain", "overrides": ["method.name=sequential", "reflection.weight=0"]}]
    load_comparison(write(tmp_path, rows=rows))
    assert caplog.messages == ["rows.plain: reflection.weight has no effect: method sequential has no shared attention"]
