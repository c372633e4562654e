"""A job of ``ray job submit`` runs in a copy of its working directory: what would be written there is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import compare, continual, evaluate, predict, report, sweep
from pipelines.console.places import is_passing
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
STORE = "store.uri=runs/store: give s3://BUCKET/PREFIX"
TRACKING = "tracking.uri=sqlite:///runs/mlflow.db: give the http(s) address of an MLflow server"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As Ray lays a job's copy out."""
    folder = tmp_path / "session_x/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "pipelines/configs", folder / "configs")
    monkeypatch.chdir(folder)
    return folder


RESULTS = {"comparisons": "runs/comparisons/", "sweeps": "runs/sweeps/"}


@pytest.mark.parametrize(
    ("main", "arguments", "faults"),
    [
        (continual.main, ["--summary", "s.json"], [STORE, TRACKING, "--summary s.json: give an absolute path"]),
        (continual.main, ["--dry-run"], [STORE, TRACKING]),
        (continual.main, ["--inline"], [STORE]),
        (continual.main, ["store.uri=s3://bucket/x"], [TRACKING]),
        (continual.main, ["store.uri=file://runs/store"], ["store.uri=file://runs/store: give", TRACKING]),
        (report.main, [], [STORE, TRACKING, "--out runs/report/"]),
        (evaluate.main, ["--version", "1", "--summary", "s.json"], ["--summary s.json"]),
    ],
)
def test_places_in_the_copy_are_refused_together(
    main: Callable[[], None], arguments: list[str], faults: list[str], job: Path, call: Call
) -> None:
    refused = call(main, ["--config", QUICKSTART, *TINY, *arguments])
    assert refused.code == 2, refused.err
    told = [line.removeprefix("  - ") for line in refused.err.splitlines() if line.startswith("  - ")]
    assert len(told) == len(faults)
    assert all(line.startswith(fault) for line, fault in zip(told, faults, strict=True)), told
    assert "Plan" not in refused.out
    assert {path.name for path in job.iterdir()} == {"configs"}


@pytest.mark.parametrize(("main", "config"), [(compare.main, "comparisons"), (sweep.main, "sweeps")])
def test_records_in_the_copy_are_refused(main: Callable[[], None], config: str, job: Path, call: Call) -> None:
    refused = call(
        main, ["--config", f"configs/{config}/quickstart.yaml", f"backbone.path={ROOT}/pipelines/backbones/tiny"]
    )
    assert refused.code == 2
    for fault in (STORE, TRACKING, f"results {RESULTS[config]}"):
        assert f"  - {fault}" in refused.err


def test_answers_in_the_copy_are_refused(job: Path, call: Call) -> None:
    refused = call(predict.main, ["--version", "1", "--file", "in.jsonl", "--output", "out.jsonl"])
    assert refused.code == 2
    assert "  - --output out.jsonl: give an absolute path" in refused.err


def test_what_lasts(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_passing(Path("runs/store"))
    assert is_passing(job / "runs")
    assert not is_passing(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert not is_passing(Path("runs/store"))
