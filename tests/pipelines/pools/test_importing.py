"""``sapt pool import``: an adapter becomes a version, in the store and in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.store import open_store
from cluster.store.cleaning import unreachable
from pipelines import pool, predict
from pipelines.pools.importing import read_rows
from sapt_core.errors import DataError
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.loading import load_blob
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, publish

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]


@pytest.fixture
def adapter(finished: Finished, call: Call, tmp_path: Path) -> Path:
    """The block of a task, as PEFT has it."""
    folder = tmp_path / "adapter"
    given = ["--snapshot", finished.snapshot, "--task", "animal", "--out", str(folder)]
    assert call(pool.main, ["export", *given, f"store.uri={finished.store}"]).code == 0
    (tmp_path / "rows.txt").write_text("the sky is blue.\n\nthe door is red.\n")
    return folder


def bringing(adapter: Path, *arguments: str, task: str = "colour") -> list[str]:
    rows = str(adapter.with_name("rows.txt"))
    return ["import", str(adapter), "--task", task, "--rows", rows, "--definition", "Name it.", *arguments]


def test_onto_a_snapshot_the_store_alone_has_the_next(copied: Finished, adapter: Path, call: Call) -> None:
    where = f"store.uri={copied.store}"
    brought = call(pool.main, bringing(adapter, "--onto", copied.snapshot, "--max-target-tokens", "4", where))
    assert brought.code == 0, brought.err
    assert "rows of colour give its block 1.00 of their weight" in brought.out
    digest = brought.out.split("snapshot ")[1].strip()
    store = open_store(StoreConfig(uri=str(copied.store)))
    before, after = (Manifest.from_bytes(store.get(each)) for each in (copied.snapshot, digest))
    assert after.parent == before.as_parent
    assert (after.tasks[2].definition, after.tasks[2].max_target_tokens) == ("Name it.", 4)
    assert (after.tasks[2].template, after.tasks[2].metric) == (before.tasks[1].template, before.tasks[1].metric)
    block, of_animal = (load_blob(each, store) for each in (after.blocks[2], before.blocks[0]))
    assert all(bool((value == of_animal[name]).all()) for name, value in block.items())
    # A record reaches it, so that it is not cleaned away.
    lost = {leftover.entry.name for leftover in unreachable(store, grace=timedelta(seconds=-1))}
    assert not {name for name in lost if name.rpartition("/")[2] in {digest, after.blocks[2], after.router}}
    asked = call(predict.main, ["--snapshot", digest, "--task", "colour", "--input", "the sea is blue.", where])
    assert asked.code == 0, asked.err


def test_a_registered_version_gets_the_next_number(
    copied: Finished, adapter: Path, call: Call, sqlite_tracking: TrackingConfig
) -> None:
    assert publish(copied, sqlite_tracking) == 1
    where = [f"tracking.uri={sqlite_tracking.uri}", f"tracking.experiment={sqlite_tracking.experiment}"]
    onto = f"models:/{sqlite_tracking.model}/1"
    brought = call(pool.main, bringing(adapter, "--onto", onto, *where))
    assert brought.code == 0, brought.err
    assert brought.out.endswith(f"{sqlite_tracking.model} version 2: models:/{sqlite_tracking.model}/2\n")
    client = MlflowClient(sqlite_tracking.uri)
    made = client.get_model_version(sqlite_tracking.model, "2")
    assert {name: made.tags[name] for name in ("task", "tasks", "method", "index")} == {
        "task": "colour",
        "tasks": "animal, basket, colour",
        "method": "sapt",
        "index": "3",
    }
    assert client.get_run(made.run_id).info.status == "FINISHED"
    # Once more is the same version, another one does not go on from the newest.
    assert call(pool.main, bringing(adapter, "--onto", onto, *where)).out == brought.out
    objects = sorted(copied.store.rglob("*"))
    other = call(pool.main, bringing(adapter, "--onto", onto, *where, task="other"))
    assert other.code == 2
    assert "version 2 (method sapt, tasks animal, basket, colour) is the newest of its line main" in other.err
    assert sorted(copied.store.rglob("*")) == objects
    further = call(
        pool.main, bringing(adapter, "--onto", f"models:/{sqlite_tracking.model}@latest", *where, task="other")
    )
    assert further.code == 0, further.err
    assert "version 3" in further.out


def test_a_pool_begins_with_an_adapter(
    finished: Finished, adapter: Path, call: Call, sqlite_tracking: TrackingConfig, tmp_path: Path
) -> None:
    places = [f"store.uri={tmp_path / 'new'}", f"tracking.uri={sqlite_tracking.uri}", "tracking.model=begun"]
    given = ["--config", QUICKSTART, *TINY, *places]
    assert "its rank is" in call(pool.main, bringing(adapter, *given, "pet.r=1")).err
    assert not (tmp_path / "new").exists()
    brought = call(pool.main, bringing(adapter, *given))
    assert brought.code == 0, brought.err
    assert "begun version 1: models:/begun/1" in brought.out
    asked = call(predict.main, ["--version", "latest", "--task", "colour", "--input", "the sea", *places[1:]])
    assert asked.code == 0, asked.err
    assert "colour: 1.00" in asked.out


def test_what_is_refused_changes_nothing(copied: Finished, adapter: Path, call: Call) -> None:
    where = f"store.uri={copied.store}"
    objects = sorted(copied.store.rglob("*"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    refused = call(pool.main, bringing(adapter, "--onto", copied.snapshot, where, task="Animal"))
    assert refused.code == 2
    assert "use_dora true: DoRA scales" in refused.err
    assert "--task Animal: the version has learnt animal, which differs in case alone" in refused.err
    assert "Traceback" not in refused.err
    assert call(pool.main, bringing(adapter)).code == 2
    assert sorted(copied.store.rglob("*")) == objects


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", '["a b", "c"]'),
        ("rows.json", '{"Definition": "Do.", "Instances": [{"input": "a b", "output": "x"}, {"input": "c"}]}'),
        ("rows.jsonl", '{"prompt": "a b", "answer": "x"}\n{"input": "c"}\n'),
        ("rows.csv", "input,output\na b,1\nc,2\n"),
        ("rows", "a b\nc\n"),
    ],
)
def test_rows_are_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path / name) == (["a b", "c"], "Do." if "Do." in text else "")


@pytest.mark.parametrize(
    ("text", "told"),
    [("[]", "holds no rows"), ("{", "rows.json"), ('["a", 3]', "row 1: input is a number"), ("3", "holds no rows")],
)
def test_rows_that_are_none(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=told):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "nosuch.txt")
