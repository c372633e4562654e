"""Versions that a person looks at, compares, promotes and takes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.store import open_store
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.service import client_of
from pipelines import pool
from pipelines.sequence.gate import Row
from sapt_core.backbones.reference import BackboneRef
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Finished, Outcome, change_metrics, level_scores, publish

pytest_plugins = ["tests.mlflow_servers"]


@dataclass(frozen=True)
class Pool:
    """A registered model with versions of one and of two tasks, in a store of the test's own."""

    store: Path
    registry: PoolRegistry
    digests: tuple[str, str]
    call: Callable[[Callable[[], None], list[str]], Outcome]

    def __call__(self, *words: str) -> Outcome:
        if words[0] == "promote":  # as it was scored when it was learnt
            words = (*words, "evaluation.batch_size=50")
        return self.call(pool.main, [*words, f"tracking.uri={self.registry.config.uri}"])

    def refused(self, *words: str) -> Outcome:
        """What is said where nothing may be changed."""
        before = self.aliases()
        ended = self(*words)
        assert ended.code == 2, ended.out + ended.err
        assert ended.err.count("error: ") == 1
        assert self.aliases() == before
        return ended

    def aliases(self) -> list[tuple[str, ...]]:
        return [version.aliases for version in self.registry.versions()]

    def manifest(self, index: int) -> Manifest:
        return Manifest.from_bytes(open_store(StoreConfig(uri=str(self.store))).get(self.digests[index]))

    def blob(self, digest: str) -> Path:
        return self.store / "blobs" / digest[:2] / digest


@pytest.fixture
def two(copied: Finished, sqlite_tracking: TrackingConfig, call: Callable[..., Outcome]) -> Pool:
    level_scores(copied.store)
    for path in (copied.store / "records").glob("*.json"):
        record = json.loads(path.read_text())
        if record["name"] == "complete[00 animal]":
            first = record["outputs"]["manifest"]
    told = ({"ap": 40.0, "f_ra": 0.0, "score/animal": 40.0}, {"ap": 45.5, "f_ra": 1.0, "score/animal": 39.0})
    tasks = ("animal", "animal, basket")
    digests = (first, copied.snapshot)
    for index, (digest, metrics, names) in enumerate(zip(digests, told, tasks, strict=True), 1):
        tags = {"tasks": names, "method": "sapt"}
        publish(copied, sqlite_tracking, digest, index, tags=tags, metrics={**metrics, "score/basket": 52.0})
    return Pool(copied.store, PoolRegistry(sqlite_tracking), digests, call)


def test_what_there_is(two: Pool) -> None:
    two.registry.crown(two.registry.versions()[1])
    listed = two("list")
    assert listed.code == 0, listed.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in listed.out.splitlines() if "main" in line]
    assert rows == [
        ["main", "1", "", "40.00", "0.00", "animal"],
        ["main", "2", "champion", "45.50", "1.00", "animal, basket"],
    ]
    shown = two("show", "champion")
    assert shown.code == 0, shown.err
    for part in ("version 2 (champion), line main", "12 test rows, samples", "AP 45.50  F.Ra 1.00  method sapt"):
        assert part in shown.out
    compared = two("compare", "1", "2")
    assert compared.code == 0, compared.err
    cells = {line.split("│")[1].strip(): line for line in compared.out.splitlines() if "│" in line}
    assert "-1.00" in cells["animal"]
    assert "+5.50" in cells["AP"]
    assert two("list", "tracking.model=nothing").out.startswith("nothing has no versions yet")
    assert "'7' does not exist in MLflow: 'sapt' has the versions 1, 2" in two("show", "7").err


def test_a_version_is_whole_or_all_that_is_not_is_told(two: Pool) -> None:
    whole = two("verify", "2")
    assert whole.code == 0, whole.err
    assert "sapt version 2 is whole: " in whole.out
    manifest = two.manifest(1)
    assert manifest.carried is not None
    tokens = manifest.carried[0].tokens["test.arrow"]
    two.blob(tokens).unlink()
    two.blob(manifest.blocks[1]).write_bytes(b"something else")
    said = two.refused("verify", "2").err
    assert f"block of basket ({manifest.blocks[1]}) is damaged" in said
    assert f"test.arrow of animal ({tokens}) is gone" in said
    assert said.count("\n  - ") == 2


def test_a_champion_is_made_and_taken_back(two: Pool, tmp_path: Path) -> None:
    assert "sapt has no champion" in two.refused("rollback").err
    assert two("promote", "1", "--inline").code == 0
    assert "no version that was champion before version 1" in two.refused("rollback").err
    ended = two("promote", "2", "--inline", "--reason", "knows baskets")
    assert ended.code == 0, ended.out + ended.err
    assert two.aliases() == [("previous",), ("champion",)]
    first, second = two.registry.versions()
    assert (second.tags["promoted.why"], second.tags["promoted.over"]) == ("knows baskets", "1")
    assert second.tags["promoted.by"]
    assert first.run_id is not None
    client = client_of(two.registry.config.uri)
    kept = [each.path for each in client.list_artifacts(first.run_id, "promotions")]
    assert [path.split("-")[1] for path in kept] == ["1", "2"]
    told = json.loads(Path(client.download_artifacts(first.run_id, kept[1], str(tmp_path))).read_text())
    scores = {row["task"]: row for row in told["scores"]}
    assert (scores["animal"]["candidate"], scores["animal"]["champion"]) == (50.0, 50.0)
    assert two("rollback").code == 0
    assert two.aliases() == [("champion",), ("previous",)]
    assert two.registry.versions()[0].tags["promoted.why"] == "rolled back from version 2"
    assert "version 1 is the champion already" in two("promote", "1", "--inline").out


def test_a_version_that_is_worse_is_not_promoted(two: Pool) -> None:
    assert two("promote", "1", "--inline").code == 0
    change_metrics(two.store, "evaluate[v01 on 00 animal]", score=48.5)
    refused = two.refused("promote", "2", "--inline")
    assert "animal: falls by 1.50 points, from 50.00 to 48.50; registry.max_drop is 1" in refused.err
    assert "basket" not in refused.err
    assert "-1.50" in refused.out
    change_metrics(two.store, "zero_shot[basket]", score=50.0)
    refused = two.refused("promote", "2", "--inline", "registry.max_drop=2")
    assert "basket: 50.00 is no better than the bare backbone, 50.00" in refused.err
    assert "animal" not in refused.err
    assert two("promote", "2", "--inline", "--force", "a trial").code == 0
    tags = two.registry.versions()[1].tags
    assert tags["promoted.why"] == "a trial"
    assert tags["promoted.against"].count("\n") == 1


def test_what_is_not_promoted_whatever_its_scores(two: Pool) -> None:
    one, last = two.registry.versions()
    two.registry.tag(last, {"line": "branch-of-1"})
    two.registry.crown(one)
    assert "give --line branch-of-1" in two.refused("promote", "2", "--inline").err
    assert "version 2 is of line branch-of-1" in two.refused("promote", "2", "--inline", "--line", "main").err
    wrong = two.refused("promote", "2", "--inline", "train.precision=bf16", "pet.r=2").err
    assert "train.precision: versions are scored as they were learnt" in wrong
    assert "pet.r" in wrong
    assert two("promote", "2", "--inline", "--line", "branch-of-1").code == 0


def test_a_champion_in_another_store_or_on_another_backbone(
    two: Pool, copied: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.registry.crown(two.registry.versions()[0])
    client = client_of(two.registry.config.uri)
    client.delete_model_version("sapt", "2")
    shutil.copytree(two.store, tmp_path / "elsewhere")
    publish(replace(copied, store=tmp_path / "elsewhere"), two.registry.config, two.digests[1])
    assert "copy one store into the other" in two.refused("promote", "latest", "--inline").err
    there = f"store.uri={tmp_path / 'elsewhere'}"
    monkeypatch.setattr(BackboneRef, "is_of", lambda own, other: False)
    assert "neither can be scored on the other's rows" in two.refused("promote", "latest", "--inline", there).err
    monkeypatch.undo()
    ended = two("promote", "latest", "--inline", there)
    assert ended.code == 0, ended.err


def test_a_version_without_sealed_rows_is_not_promoted(two: Pool, copied: Finished) -> None:
    trained = two.manifest(1).trained
    two.registry.crown(two.registry.versions()[0])
    client = client_of(two.registry.config.uri)
    client.delete_model_version("sapt", "2")
    publish(copied, two.registry.config, trained)
    assert "an earlier release published it" in two.refused("promote", "latest", "--inline").err
    forced = two("promote", "latest", "--inline", "--force", "nothing else answers")
    assert forced.code == 0, forced.err
    last = two.registry.versions()[-1]
    assert last.aliases == ("champion",)
    assert last.tags["promoted.against"].startswith("not scored: ")


@pytest.mark.parametrize(
    ("row", "faults"),
    [
        (Row("a", 50.0, 51.0, 3.0), 0),
        (Row("a", 50.0, 51.1, 3.0), 1),
        (Row("a", 50.0, 40.0, 50.0), 1),
        (Row("a", 10.0, 40.0, 50.0), 2),
        (Row("a", 50.0, None, 3.0), 0),
        (Row("a", None, None, None), 0),
        (Row("a", None, None, None, learnt=False), 1),
    ],
)
def test_what_is_against_a_version(row: Row, faults: int) -> None:
    assert len(row.faults(1.0)) == faults
