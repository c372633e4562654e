"""Predict and evaluate on the snapshot of the tiny sequence, and through the registry."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.store import open_store
from pipelines import evaluate, predict
from pipelines.console import versions
from sapt_core.config.experiment import load_places
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, publish

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]


def scoring(finished: Finished, *arguments: str) -> list[str]:
    return ["--config", QUICKSTART, *TINY, f"store.uri={finished.store}", *arguments]


def refused(outcome: Outcome, *parts: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.err


@pytest.fixture
def asked(finished: Finished, call: Call) -> Callable[..., Outcome]:
    def ask(*arguments: str) -> Outcome:
        return call(predict.main, ["--snapshot", finished.snapshot, f"store.uri={finished.store}", *arguments])

    return ask


def test_evaluate_gives_the_scores_of_the_run(finished: Finished, call: Call, tmp_path: Path) -> None:
    summary = tmp_path / "new" / "scores.json"
    arguments = scoring(
        finished, "--snapshot", finished.snapshot, "--summary", str(summary), "benchmark.tasks=animal,basket,loan"
    )
    outcome = call(evaluate.main, arguments)
    assert outcome.code == 0, outcome.err
    figures = json.loads(summary.read_text())
    assert figures["snapshot"] == finished.snapshot
    assert figures["method"] == "sapt"
    assert figures["learnt"] == ["animal", "basket"]
    assert [row["score"] for row in figures["tasks"][:2]] == finished.summary["scores"][-1]
    assert [row["learnt"] for row in figures["tasks"]] == [True, True, False]
    for row in figures["tasks"]:
        assert (row["rows"], row["metric"]) == (12, "rouge_l")
        assert list(row["weights"]) == ["animal", "basket"]
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)
    for part in ("unseen", f"{figures['tasks'][2]['score']:.1f}", "animal 1", finished.snapshot[:12]):
        assert part in outcome.out


def test_evaluate_scores_an_older_version_too(finished: Finished, call: Call, tmp_path: Path) -> None:
    store = open_store(StoreConfig(uri=str(finished.store)))
    parent = Manifest.from_bytes(store.get(finished.snapshot)).parent
    assert parent is not None
    arguments = ["--snapshot", parent, "--summary", str(tmp_path / "s.json"), "benchmark.tasks=animal"]
    assert call(evaluate.main, scoring(finished, *arguments)).code == 0
    (row,) = json.loads((tmp_path / "s.json").read_text())["tasks"]
    assert row["score"] == finished.summary["scores"][0][0]
    assert row["weights"] == {"animal": pytest.approx(1)}


def test_evaluate_refuses_another_backbone_before_it_scores(finished: Finished, call: Call, tmp_path: Path) -> None:
    summary = tmp_path / "s.json"
    arguments = ["--snapshot", finished.snapshot, "backbone.dtype=bfloat16", "--summary", str(summary)]
    refused(call(evaluate.main, scoring(finished, *arguments)), "backbone", "give the backbone it was learnt on")
    assert not summary.exists()


def test_a_newer_schema_is_refused(copied: Finished, call: Call) -> None:
    store = open_store(StoreConfig(uri=str(copied.store)))
    content = json.loads(store.get(copied.snapshot))
    newer = store.put(json.dumps({**content, "schema_version": 99, "unheard_of": 1}).encode())
    parts = ("schema version 99", "Update SAPT on Ray")
    refused(call(evaluate.main, scoring(copied, "--snapshot", newer)), *parts)
    refused(call(predict.main, ["--snapshot", newer, "--input", "x", f"store.uri={copied.store}"]), *parts)


def test_what_is_no_manifest_is_refused(copied: Finished, call: Call) -> None:
    digest = open_store(StoreConfig(uri=str(copied.store))).put(b'{"schema_version": 1}')
    outcome = call(predict.main, ["--snapshot", digest, "--input", "x", f"store.uri={copied.store}"])
    refused(outcome, "manifest is not valid", "backbone: Field required")


@pytest.mark.parametrize("which", ["manifest", "blocks", "router"])
def test_a_damaged_blob_is_named(copied: Finished, call: Call, which: str) -> None:
    manifest = Manifest.from_bytes(open_store(StoreConfig(uri=str(copied.store))).get(copied.snapshot))
    digest = {"manifest": copied.snapshot, "blocks": manifest.blocks[0], "router": manifest.router}[which]
    assert digest is not None
    path = copied.store / "blobs" / digest[:2] / digest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcome = call(predict.main, ["--snapshot", copied.snapshot, "--input", "x", f"store.uri={copied.store}"])
    refused(outcome, digest, "damaged", code=3)


def test_a_snapshot_that_is_not_there(finished: Finished, call: Call) -> None:
    at = f"store.uri={finished.store}"
    refused(call(predict.main, ["--snapshot", "0" * 64, "--input", "x", at]), "is not in", code=3)
    refused(call(predict.main, ["--snapshot", "v3", "--input", "x", at]), "snapshot v3", "64 hex digits")


def test_one_text(asked: Callable[..., Outcome]) -> None:
    outcome = asked("--task", "animal", "--input", "a short text")
    assert outcome.code == 0, outcome.err
    (_, weights) = outcome.out.splitlines()
    shown = [float(part.split(": ")[1]) for part in weights.split(", ")]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == pytest.approx(1, abs=0.03)


def test_lines_of_a_pipe_are_answered_one_by_one(
    asked: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [asked("--task", "basket", "--input", text).out for text in ("one text", "another")]
    monkeypatch.setattr("sys.stdin", io.StringIO("one text\n\nanother"))
    outcome = asked("--task", "basket")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "".join(alone)


def test_a_file_of_rows(asked: Callable[..., Outcome], finished: Finished, tmp_path: Path) -> None:
    prompt = "Definition: Do it.\n\nNow complete the following example -\nInput: x\nOutput: "
    rows = [
        {"input": "a text\u2028of two lines", "task": "animal", "id": 7},
        {"prompt": prompt},
        {"input": "the task of the command line"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    outcome = asked("--file", str(source), "--output", str(target), "--task", "basket")
    assert (outcome.code, outcome.out) == (0, ""), outcome.err
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        assert answer.items() >= row.items()
        assert answer.keys() - row.keys() == {"prediction", "weights"}
        assert list(answer["weights"]) == ["animal", "basket"]
        assert sum(answer["weights"].values()) == pytest.approx(1, abs=1e-5)
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]
    printed = asked("--file", str(source), "--task", "basket")
    assert [json.loads(line) for line in printed.out.splitlines()] == answers


def test_all_bad_rows_are_named_and_nothing_is_written(asked: Callable[..., Outcome], tmp_path: Path) -> None:
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": "cut',
        "[1]",
        '{"text": "x"}',
        '{"prompt": "x", "input": "y"}',
        '{"prompt": 3}',
        '{"input": "  "}',
        '{"input": "x", "task": "nosuch"}',
        '{"input": "x", "task": 4}',
        '{"prompt": "x", "task": "animal"}',
        '{"prompt": "\\ud800"}',
        '{"input": "x"}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    outcome = asked("--file", str(source), "--output", str(target))
    refused(outcome, "nosuch", "animal, basket", "column", "an input needs its task")
    faults = outcome.err.splitlines()[1:]
    assert [fault.split(":")[0].strip(" -") for fault in faults] == [f"line {n}" for n in range(2, 13)]
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task", "nosuch", "--input", "x"], ["nosuch", "animal, basket"]),
        (["--input", " "], ["--input: prompt is blank"]),
        (["--input", "x " * 2000], ["--input: prompt takes", "reads up to"]),
        (["--input", "a\udcff"], ["no characters"]),
        (["--file", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        (["--file", "."], ["Is a directory"]),
        (["--file", "empty.jsonl"], ["no rows"]),
        (["--file", "latin.jsonl"], ["latin.jsonl", "utf-8"]),
        (["--input", "x", "--output", "out.jsonl"], ["--output goes with --file"]),
        (["--file", "empty.jsonl", "--output", "."], ["cannot be written"]),
        (["--input", "x", "trakking.uri=x", "store.url=y"], ["trakking", "did you mean tracking", "store.url"]),
        (["--input", "x", "store.uri"], ["form key=value"]),
        (["--config", "missing.yaml", "--input", "x"], ["missing.yaml", "no such file"]),
    ],
)
def test_what_cannot_be_answered(
    asked: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n \n")
    Path("latin.jsonl").write_bytes(b'{"prompt": "\xe4"}')
    refused(asked(*arguments), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "latin.jsonl"]


def test_a_version_or_a_snapshot_must_be_named(call: Call) -> None:
    outcome = call(predict.main, ["--input", "x"])
    assert outcome.code == 2
    assert "--version --snapshot is required" in outcome.err


def test_versions_of_the_registry(
    finished: Finished, call: Call, sqlite_tracking: TrackingConfig, asked: Callable[..., Outcome], tmp_path: Path
) -> None:
    store = open_store(StoreConfig(uri=str(finished.store)))
    newest = Manifest.from_bytes(store.get(finished.snapshot))
    for index, digest in enumerate([newest.parent, newest.digest], start=1):
        assert digest is not None
        publish(finished, sqlite_tracking, digest, index)
    where = [f"tracking.uri={sqlite_tracking.uri}", f"tracking.model={sqlite_tracking.model}"]

    text = ["--task", "animal", "--input", "a short text"]
    latest = call(predict.main, ["--version", "latest", *text, *where])
    assert latest.code == 0, latest.err
    assert latest.out == asked(*text).out
    first = call(predict.main, ["--version", "1", *text, *where])
    assert first.out.splitlines()[1] == "  animal: 1.00"

    summary = tmp_path / "s.json"
    scored = call(evaluate.main, ["--config", QUICKSTART, *TINY, "--version", "2", "--summary", str(summary), *where])
    assert scored.code == 0, scored.err
    assert [row["score"] for row in json.loads(summary.read_text())["tasks"]] == finished.summary["scores"][-1]

    refused(call(predict.main, ["--version", "9", *text, *where]), "versions 1, 2", code=3)


def test_a_version_whose_store_has_moved(
    copied: Finished, call: Call, sqlite_tracking: TrackingConfig, tmp_path: Path
) -> None:
    publish(copied, sqlite_tracking)
    moved = copied.store.rename(tmp_path / "moved")
    asked = ["--version", "1", "--task", "animal", "--input", "a text", f"tracking.uri={sqlite_tracking.uri}"]
    refused(call(predict.main, asked), f"is not in {copied.store}", "store.uri", code=3)
    found = call(predict.main, [*asked, f"store.uri={moved}"])
    assert found.code == 0, found.err
    # A config may be of another machine than the version: what it says of a store is no word on this one.
    config = tmp_path / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text() + f"\nstore:\n  uri: {moved}\n")
    where = [f"tracking.uri={sqlite_tracking.uri}", f"tracking.model={sqlite_tracking.model}"]
    scoring_it = ["--config", str(config), *TINY, "--version", "1", *where]
    refused(call(evaluate.main, scoring_it), f"is not in {copied.store}", code=3)
    assert call(evaluate.main, [*scoring_it, f"store.uri={moved}", "benchmark.tasks=animal"]).code == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("s3://there/x", "http://old:9")),
        (["store.uri=s3://here/y"], ("s3://here/y", "http://old:9")),
        (["store.endpoint_url=http://new:9"], ("s3://there/x", "http://new:9")),
        (["store={uri: s3://here/y, endpoint_url: null}", "tracking.model=x"], ("s3://here/y", None)),
        (["store.uri=s3://here/y", "benchmark.tasks=a,b"], ("s3://here/y", "http://old:9")),
    ],
)
def test_the_command_line_counts_field_by_field(overrides: list[str], expected: tuple[str, str | None]) -> None:
    kept = StoreConfig(uri="s3://there/x", endpoint_url="http://old:9")
    asked = load_places([each for each in overrides if not each.startswith("benchmark")]).store
    found = versions._moved(kept, asked, overrides)
    assert (found.uri, found.endpoint_url) == expected


def test_a_tracking_file_that_is_not_there_is_not_made(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(predict.main, ["--version", "latest", "--input", "x", "tracking.uri=sqlite:///runs/mlflow.db"])
    refused(outcome, "no such file", code=3)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_told_of_in_seconds(call: Call, unused_port: int) -> None:
    start = time.monotonic()
    uri = f"http://user:secret@127.0.0.1:{unused_port}"
    outcome = call(predict.main, ["--version", "latest", "--input", "x", f"tracking.uri={uri}"])
    refused(outcome, "cannot be reached", code=3)
    assert "secret" not in outcome.err
    assert time.monotonic() - start < 30
