"""The tiny sequence end to end in one process: what it gives, what it does not do twice, and what a kill costs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.stages import StageContext, StageResult
from pipelines import continual, predict
from pipelines.console.checkout import git_commit
from pipelines.sequence import bodies
from sapt_core.errors import SaptError
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import (
    QUICKSTART,
    ROOT,
    SETTLED,
    TINY,
    Finished,
    Outcome,
    change_metrics,
    command,
    level_scores,
    records,
)

KINDS = {"probe", "complete", "prepare", "pseudo_samples", "train", "evaluate", "single", "attend", "quality", "cost"}


def test_inline_runs_where_ray_mlflow_and_boto3_are_not_installed(finished: Finished) -> None:
    assert finished.outcome.code == 0
    assert finished.outcome.err == ""


@pytest.mark.parametrize("module", ["ray", "mlflow", "boto3"])
def test_the_proof_above_could_fail(module: str, finished: Finished) -> None:
    blocker = finished.store.parent / "blocker"
    ended = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**os.environ, "PYTHONPATH": str(blocker)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"No module named '{module}'" in ended.stderr


def test_summary_has_the_figures_of_the_end(finished: Finished) -> None:
    summary = finished.summary
    promised = {"tasks", "scores", "single", "ap", "f_ra", "fwt", "bwt", "model", "version", "seconds"}
    promised |= {"bwt_over_t", "snapshot", "method", "seed", "key", "verdict", "warnings"}
    assert set(summary) == promised | {"intervals", "other_scores"}
    assert summary["tasks"] == ["animal", "basket"]
    (first,), (forgot, second) = summary["scores"]
    alone = summary["single"]
    assert max(first, second, forgot) > 0
    assert summary["ap"] == pytest.approx((forgot + second) / 2)
    assert summary["f_ra"] == pytest.approx(first - forgot)
    assert summary["bwt"] == pytest.approx(forgot - first)
    assert summary["bwt_over_t"] == pytest.approx((forgot - first) / 2)
    assert summary["fwt"] == pytest.approx((first - alone[0] + second - alone[1]) / 2)
    assert summary["model"] is None
    assert summary["version"] is None
    assert (summary["method"], summary["seed"]) == ("sapt", 0)
    assert set(summary["seconds"]) == KINDS


def test_plain_lines_where_there_is_no_terminal(finished: Finished) -> None:
    out = finished.outcome.out
    assert "\r" not in out + finished.outcome.err
    assert "\x1b" not in out
    assert "train[00 animal] started" in out
    assert "after basket: AP" in out
    assert f"--snapshot {finished.snapshot}" in out
    assert f"store.uri={finished.store}" in out


def contents(store: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_a_second_run_does_no_work(
    copied: Finished, tmp_path: Path, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    before = contents(copied.store)
    summary = tmp_path / "again.json"
    again = call(continual.main, [*command(copied.store)[2:], "--summary", str(summary)])
    assert again.code == 0, again.err
    assert " started" not in again.out
    assert contents(copied.store) == before
    told, earlier = json.loads(summary.read_text()), dict(copied.summary)
    *verdict, following = told.pop("verdict")
    assert verdict == earlier.pop("verdict")[:-1]
    assert following.endswith(f"store.uri={copied.store}")  # what to type next says where the version is
    assert told == earlier


def test_a_record_that_is_gone_is_made_again_and_no_other(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    before = records(copied.store)
    (gone,) = [file for file, (name, _) in before.items() if name == "train[00 animal]"]
    (copied.store / "records" / gone).unlink()
    again = call(continual.main, command(copied.store)[2:])
    assert again.code == 0, again.err
    after = records(copied.store)
    # Its result is equal, so that what depends on it stays valid.
    assert after.keys() == before.keys()
    assert [file for file in after if after[file] != before[file]] == [gone]
    assert [line.split()[1] for line in again.out.splitlines() if line.endswith(" started")] == ["train[00"]
    assert copied.snapshot in again.out


def test_a_blob_that_is_gone_is_made_again(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    folder = copied.store / "blobs"
    trained = Manifest.from_bytes((folder / copied.snapshot[:2] / copied.snapshot).read_bytes()).trained
    assert trained is not None
    blob = folder / trained[:2] / trained
    blob.unlink()
    again = call(continual.main, command(copied.store)[2:])
    assert again.code == 0, again.err
    assert [line.split()[1:3] for line in again.out.splitlines() if line.endswith(" started")] == [
        ["train[01", "basket]"]
    ]
    assert blob.is_file()


def test_a_rate_that_diverges_is_told_and_leaves_no_version(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    """The same command with a lower rate then goes on, and what does not hang on the rate is not done again."""
    known = records(copied.store)
    given = [*command(copied.store)[2:], "evaluation.single_task=false"]
    ended = call(continual.main, [*given, "train.learning_rate=1e30"])
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: Training has diverged at step 2 of 24: loss is nan, gradient norm is nan.")
    assert "at a learning rate of 1e+30" in ended.err
    assert "lower train.learning_rate" in ended.err
    assert "train[00 animal] failed" in ended.out
    assert records(copied.store) == known
    assert all(b"NaN" not in path.read_bytes() for path in copied.store.rglob("*.json"))
    lower = call(continual.main, [*given, "train.learning_rate=0.004"])
    assert lower.code == 0, lower.err
    added = {name for name, _ in (records(copied.store)[key] for key in records(copied.store).keys() - known.keys())}
    assert {"train[00 animal]", "train[01 basket]"} <= added
    assert not [name for name in added if name.startswith(("prepare", "pseudo_samples"))]


def test_a_generator_that_diverges_is_told_with_its_own_rate(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    ended = call(continual.main, [*command(copied.store)[2:], "generator.learning_rate=1e30", "generator.steps=3"])
    assert ended.code == 2, ended.err
    assert "Training has diverged at step 2 of 3" in ended.err
    assert "lower generator.learning_rate" in ended.err


def test_another_weight_of_reflection_shares_what_it_does_not_reach(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    before = set(records(copied.store))
    again = call(continual.main, [*command(copied.store)[2:], "reflection.weight=2"])
    assert again.code == 0, again.err
    new = {name for file, (name, _) in records(copied.store).items() if file not in before}
    assert "train[01 basket]" in new
    scored = {"evaluate[v01 on 00 animal]", "evaluate[v01 on 01 basket]"}
    # Both versions say how they were learnt: the next task would be learnt so.
    assert new <= {"train[01 basket]", "attend[v01]", "cost", "complete[00 animal]", "complete[01 basket]", *scored}


def test_a_cost_that_cannot_be_counted_loses_no_version(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(context: StageContext) -> StageResult:
        raise SaptError("no memory to count with")

    monkeypatch.setattr(bodies, "cost", fails)
    before = set(records(copied.store))
    ended = call(continual.main, [*command(copied.store)[2:], "reflection.weight=3"])
    assert ended.code == 2
    assert "no memory to count with" in ended.err
    assert "train[01 basket]" in {name for file, (name, _) in records(copied.store).items() if file not in before}


def test_other_test_rows_retrain_nothing(
    copied: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    before = set(records(copied.store))
    again = call(continual.main, [*command(copied.store)[2:], "benchmark.test_rows=6"])
    assert again.code == 0, again.err
    new = {name.partition("[")[0] for file, (name, _) in records(copied.store).items() if file not in before}
    assert new == {"prepare", "evaluate", "complete"}  # versions carry the rows that they are scored on


def test_warnings_are_told_and_kept(
    copied: Finished, tmp_path: Path, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    level_scores(copied.store)
    change_metrics(copied.store, "attend[v01]", weights=[[0.5, 0.5], [0.0, 1.0]])
    before = contents(copied.store)
    summary = tmp_path / "again.json"
    again = call(
        continual.main, [*command(copied.store)[2:], "--summary", str(summary), "diagnostics.misalignment=0.6", SETTLED]
    )
    assert again.code == 0, again.err
    assert contents(copied.store) == before  # another limit computes nothing
    (warning,) = json.loads(summary.read_text())["warnings"]
    assert set(warning) == {"kind", "task", "figure", "limit", "cure", "evidence", "text"}
    assert (warning["kind"], warning["task"], warning["limit"]) == ("misalignment", "animal", 0.6)
    assert warning["figure"] == pytest.approx(math.log(2))
    assert f"warning: {warning['text']}" in again.out.splitlines()


def test_stages_of_several_processes_end_in_the_same_version(finished: Finished, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(tmp_path / "store", "--processes", "2", "--summary", str(tmp_path / "summary.json")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["snapshot"] == finished.snapshot
    assert summary["scores"] == finished.summary["scores"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--inline", "--processes", "0"], "'0' is not a whole number from 1 on"),
        (["--inline", "--processes", "two"], "'two' is not a whole number from 1 on"),
        (["--processes", "2"], "--processes goes with --inline"),
    ],
)
def test_a_wrong_number_of_processes(
    arguments: list[str], told: str, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    refused = call(continual.main, ["--config", QUICKSTART, *arguments])
    assert refused.code == 2
    assert told in refused.err


def test_dry_run_writes_nothing(
    tmp_path: Path, call: Callable[[Callable[[], None], list[str]], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--inline"]):
        arguments = ["--config", QUICKSTART, "--dry-run", *extra, *TINY, "--summary", "new/summary.json"]
        shown = call(continual.main, arguments)
        assert shown.code == 0, shown.err
        assert "20 stages" in shown.out
        assert "4 of the 20 stages to run learn every task alone" in shown.out
        assert "evaluation.single_task=false" in shown.out
        assert list(tmp_path.iterdir()) == []
    assert "alone" not in call(continual.main, [*arguments, "evaluation.single_task=false"]).out


def test_dry_run_shows_what_is_done(
    finished: Finished, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> None:
    before = contents(finished.store)
    shown = call(continual.main, [*command(finished.store)[2:], "--dry-run", "evaluation.batch_size=3"])
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in shown.out.splitlines() if "│" in line}
    counts = {kind: [int(cell) for cell in cells] for kind, cells in rows.items()}
    assert "2 of the 5 stages to run learn every task alone" in shown.out
    assert counts == {
        "probe": [1, 0, 0],
        "prepare": [2, 0, 0],
        "train": [2, 0, 0],
        "pseudo_samples": [2, 0, 0],
        "complete": [2, 0, 0],
        "single": [2, 0, 0],
        "evaluate": [0, 5, 0],
        "attend": [2, 0, 0],
        "quality": [1, 0, 0],
        "cost": [1, 0, 0],
    }
    assert contents(finished.store) == before


def test_the_next_command_can_be_pasted(
    finished: Finished,
    tmp_path: Path,
    call: Callable[[Callable[[], None], list[str]], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "Tom & Ann's [1] #2"
    shutil.copytree(finished.store, store)
    monkeypatch.setenv("COLUMNS", "40")
    again = call(continual.main, command(store)[2:])
    assert again.code == 0, again.err
    (line,) = [line for line in again.out.splitlines() if line.startswith("next: ")]
    name, asked, *arguments = shlex.split(line.removeprefix("next: "))
    assert (name, asked) == ("sapt", "predict")
    answered = call(predict.main, arguments)
    assert answered.code == 0, answered.err
    assert "animal: " in answered.out


def test_the_commit_is_that_of_the_code_and_not_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = git_commit()
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "another"], check=True)
    assert git_commit() == here


def test_a_changed_checkout_is_no_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "copy")], check=True)

    def commit() -> str:
        code = "from pipelines.console.checkout import git_commit; print(git_commit())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
        environment.pop("GIT_COMMIT", None)
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return ended.stdout.strip()

    clean = commit()
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "copy/README.md").write_text("changed, and no code")
    assert commit() == clean
    with (tmp_path / "copy/pipelines/sequence/experiment.py").open("a") as file:
        file.write("# changed\n")
    assert commit() == f"{clean}-dirty"


@pytest.mark.chaos
def test_a_run_that_was_killed_while_it_trained_ends_in_the_same_snapshot(tmp_path: Path) -> None:
    # 22 steps a task. How often a run keeps its state is in no key, so only the victim needs to do it often.
    longer = ["train.epochs=2", "train.batch_size=2", "evaluation.single_task=false"]
    often = "train.checkpoint_every_steps=1"

    def run(store: Path) -> str:
        summary = store.with_suffix(".json")
        started = [*command(store, *longer), "--summary", str(summary)]
        ended = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return str(json.loads(summary.read_text())["snapshot"])

    store = tmp_path / "killed"
    victim = subprocess.Popen(
        command(store, *longer, often), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        # The fourth checkpoint of the first train stage.
        while not list(store.glob("checkpoints/*/00000003-*/manifest.json")):
            assert victim.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert not any(name.startswith("train") for name, _ in records(store).values())
    assert run(store) == run(tmp_path / "whole")
    assert not list(store.glob("checkpoints/*/*/*")), "checkpoints are dropped once the stage is done"
