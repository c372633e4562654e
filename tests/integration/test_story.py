"""The life of a pool on real servers: two nodes of Ray, MLflow on PostgreSQL, S3 over HTTP, a browser."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest

from cluster.store import open_store
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.service import client_of
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.mlflow_pages import opened
from tests.pipelines.commands import QUICKSTART, write_task
from tests.sequences import Cluster, Outcome, command, read_summary, run

pytest_plugins = ["tests.mlflow_servers", "tests.ray_cluster"]
pytestmark = [pytest.mark.integration, pytest.mark.browser]

LEARNT, LATER = ("animal", "basket", "ticket"), "place"
ROWS = ("benchmark.train_rows=32", "benchmark.test_rows=16")
FOLDERS = ("benchmark.suite=folder", "benchmark.template=superni", "benchmark.metric=rouge_l")
FOLDERS += (
    "benchmark.train_rows=null",
    "benchmark.test_rows=null",
    "evaluation.single_task=false",
    "cluster.train_workers=2",
)


def rows_of(folder: Path) -> None:
    """Three tasks as folders, a fourth as a CSV file."""
    names = ",".join((*LEARNT, LATER))
    *learnt, later = load_sequence(load_config(QUICKSTART, [*ROWS, f"benchmark.tasks={names}"]).benchmark)
    for task in learnt:
        write_task(folder, task)
    with (folder / f"{LATER}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "output"])
        writer.writerows([row.input, row.references[0]] for row in (*later.train, *later.dev, *later.test))
    (folder / "definition").write_text(later.definition)


def table(out: str) -> dict[str, list[str]]:
    """Cells of the gate's table by task."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.count("│") == 7]
    return {name: rest for name, *rest in cells}


@pytest.mark.timeout(1800)
def test_a_pool_lives(
    ray_cluster: Cluster, mlflow_on_postgres: str, s3_endpoint: str, aws_environment: None, tmp_path: Path
) -> None:
    s3 = boto3.client("s3", endpoint_url=s3_endpoint)
    s3.create_bucket(Bucket="story")
    config = StoreConfig(uri="s3://story/sapt", endpoint_url=s3_endpoint)
    store = open_store(config)
    places = [f"store.uri={config.uri}", f"store.endpoint_url={s3_endpoint}", f"tracking.uri={mlflow_on_postgres}"]
    places.append("tracking.model=story")
    registry = PoolRegistry(TrackingConfig(uri=mlflow_on_postgres, experiment="quickstart", model="story"))
    cache, data, summary = tmp_path / "cache", tmp_path / "data", tmp_path / "summary.json"
    told = {**ray_cluster.environment, "XDG_CACHE_HOME": str(cache)}

    def typed(*words: str, code: int = 0) -> Outcome:
        ended = run(list(words), told)
        assert ended.code == code, ended.out + ended.err
        assert "not-a-secret-of-anyone" not in ended.out + ended.err
        return ended

    def pool(*words: str, code: int = 0) -> Outcome:
        scored = ["evaluation.batch_size=50"] if words[0] in {"promote", "forget"} else []  # as it was learnt
        return typed("pipelines/pool.py", *words, *places, *scored, code=code)

    def aliases() -> dict[str, int]:
        return {alias: version.version for version in registry.versions() for alias in version.aliases}

    def manifest_of(version: int) -> Manifest:
        return Manifest.from_bytes(store.get(registry.resolve(str(version)).tags["sapt.snapshot"]))

    # Three tasks are learnt on both nodes.
    rows_of(data)
    given = [*FOLDERS, f"benchmark.data_dir={data}", f"benchmark.tasks={','.join(LEARNT)}", "tracking.model=story"]
    where = (config.uri, mlflow_on_postgres, f"store.endpoint_url={s3_endpoint}")
    typed(*command(*where, *given, "--summary", str(summary)))
    kinds = {each["Key"].split("/")[1] for each in s3.list_objects_v2(Bucket="story")["Contents"]}
    assert kinds == {"blobs", "records", "packs"}  # no checkpoint stays behind
    client = client_of(mlflow_on_postgres)
    experiment = client.get_experiment_by_name("quickstart").experiment_id
    (trained,) = [each for each in client.search_runs([experiment]) if each.info.run_name == "train[02 ticket]"]
    assert trained.data.tags["world_size"] == "2"  # of one CPU each, so one on each node
    _, kept, version = registry.load_manifest("latest", s3_endpoint)
    learnt = read_summary(summary)
    assert (kept.uri, kept.endpoint_url, version.version) == (config.uri, s3_endpoint, 3)
    assert version.tags["sapt.snapshot"] == learnt["snapshot"]
    assert min(learnt["scores"][-1]) > 20
    assert max(learnt["scores"][-1]) > 80

    # A person makes the newest the champion; scores are those of learning.
    promoted = table(pool("promote", "latest").out)
    assert {task: float(cells[1]) for task, cells in promoted.items() if task in LEARNT} == pytest.approx(
        dict(zip(LEARNT, learnt["scores"][-1], strict=True)), abs=0.005
    )
    assert aliases() == {"champion": 3}

    # Data and caches are gone, and a month later a fourth task comes, as a file.
    for name in LEARNT:
        shutil.rmtree(data / name)
    shutil.rmtree(cache, ignore_errors=True)
    more = ["--task", LATER, "--data", str(data / f"{LATER}.csv"), "--definition", (data / "definition").read_text()]
    extension = ["pipelines/extend.py", "--from", "models:/story@champion", *more, *places]
    typed(*extension, "cluster.train_workers=2", "evaluation.batch_size=50", "--summary", str(summary))
    extended = read_summary(summary)
    assert [version.tasks for version in registry.versions()][2:] == [
        "animal, basket, ticket",
        "animal, basket, ticket, place",
    ]
    assert extended["scores"][:3] == learnt["scores"]
    for before, after in zip(learnt["scores"][-1], extended["scores"][-1], strict=False):
        assert after >= before - 13  # two of 16 rows

    # The gate: held against the champion, and its sealed rows know when it would lose.
    gate = pool("promote", "latest", "registry.max_drop=13")
    rows = table(gate.out)
    assert [float(rows[name][1]) for name in (*LEARNT, LATER)] == pytest.approx(extended["scores"][-1], abs=0.005)
    assert [float(rows[name][0]) for name in LEARNT] == pytest.approx(learnt["scores"][-1], abs=0.005)
    assert aliases() == {"champion": 4, "previous": 3}
    assert "no better than the bare backbone" not in gate.out
    refused = pool("promote", "1", code=2)
    assert "basket: the champion has learnt it and this version has not" in refused.err
    assert aliases() == {"champion": 4, "previous": 3}

    # A person reads MLflow's pages, and moves the alias there; what asks for the champion follows.
    with opened(mlflow_on_postgres, screenshots := tmp_path / "screenshots") as pages:
        print("screenshots:", screenshots)
        assert all(f"Version {number}" in pages.find("story") for number in (1, 2, 3, 4))
        for number, made in ((3, learnt), (4, extended)):
            assert f"AP {made['ap']:.2f}, F.Ra {made['f_ra']:.2f}" in pages.version("story", number)
        figures = pages.compare("story", 4, 3)
        for name in ("ap", "f_ra"):
            assert list(map(float, figures[name])) == pytest.approx([learnt[name], extended[name]], abs=0.01)
        assert extended["snapshot"] in pages.artifact("story", 4, "report", "index.html")
        answers = pages.artifact("story", 4, "predictions.json")
        assert [name for name in (*LEARNT, LATER) if f"\n{name}\n" in answers] != []
        pages.name("story", 3, "champion")
        assert aliases() == {"champion": 3, "previous": 3}
        asked = ["pipelines/predict.py", "--version", "champion", "--input", "ada met a grey fox.", "--task"]
        assert f"{LATER!r}" in typed(*asked, LATER, *places, code=2).err
        pages.name("story", 4, "champion")
    assert aliases() == {"champion": 4, "previous": 3}
    assert LATER in typed(*asked, LATER, *places).out

    # The first task is forgotten; all others answer as before.
    forgot = table(pool("forget", LEARNT[0], "--version", "latest").out)
    others = [*LEARNT[1:], LATER]
    assert [name for name in forgot if name in (*LEARNT, LATER)] == [*others, LEARNT[0]]
    assert all(abs(float(forgot[name][2])) <= 0.5 for name in others)
    assert forgot[LEARNT[0]][-1] == "forgotten"
    assert [task.name for task in manifest_of(5).tasks] == others
    pool("promote", "latest")
    assert aliases() == {"champion": 5, "previous": 4}

    # Nothing of it goes while versions that know it are there.
    block, before = manifest_of(4).blocks[0], usage(s3)
    assert "0  bytes removed" in typed("pipelines/store.py", "gc", "--remove", *places).out
    assert usage(s3) == before
    assert store.has(block)
    pool("rollback")
    assert aliases() == {"champion": 4, "previous": 5}
    assert LEARNT[0] in typed(*asked, LEARNT[0], *places).out
    pool("rollback")

    # Once they are deleted it goes, and the champion answers on.
    for number in (1, 2, 3, 4):
        client.delete_registered_model_alias("story", "previous") if number == 4 else None
        client.delete_model_version("story", str(number))
    listed = typed("pipelines/store.py", "gc", *places).out.splitlines()
    freed = typed("pipelines/store.py", "gc", "--remove", *places).out.splitlines()
    assert freed[:-1] == listed[:-1]
    size = int(freed[-1].split()[0].replace(",", ""))
    assert sum(usage(s3).values()) == sum(before.values()) - size
    assert size > 10_000
    assert not store.has(block)
    assert "is whole" in pool("verify", "champion").out
    answered = typed(*asked, LATER, *places).out
    assert LATER in answered
    assert LEARNT[0] not in answered


def usage(s3: Any) -> Mapping[str, int]:
    """Sizes of all objects by name."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="story")
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
