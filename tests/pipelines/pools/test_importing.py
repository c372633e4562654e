"""``sapt pool import``: an adapter becomes a version, in the store and in the registry."""

from __future__ import annotations

import json
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
from tests.pipelines.commands import QUICKSTART, TINY, Finished, publish
from tests.pipelines.extensions import Call, Learnt, go_on, manifest

pytest_plugins = ["tests.mlflow_servers"]


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
    """Whose place is after all that was learnt, a task that was learnt again twice over."""
    assert publish(copied, sqlite_tracking, index=3) == 1
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
        "index": "4",
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
    [("[]", "holds no rows"), ("{", "rows.json"), ('["a", 3]', "row 1: input is a number"), ("3", "holds a number")],
)
def test_rows_that_are_none(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=told):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "nosuch.txt")


def test_with_its_data_it_is_a_task_like_any_other(
    later: Learnt, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored, reflected on and learnt again; without it the other tasks are carried all the same."""
    monkeypatch.chdir(tmp_path)
    where = f"store.uri={later.store}"
    exported = ["export", "--snapshot", later.version, "--task", "animal", "--out", "adapter", where]
    assert call(pool.main, exported).code == 0
    bring = ["import", "adapter", "--onto", later.version, "--task", "ticket", where, "--inline"]
    brought = call(pool.main, [*bring, "--data", str(later.ticket)])
    assert brought.code == 0, brought.out + brought.err
    before, after = (manifest(later.store, each) for each in (later.version, brought.out.split()[-1]))
    assert before.carried is not None
    assert after.carried is not None
    assert after.carried[:2] == before.carried
    assert after.parent == before.trained
    ticket = after.carried[2]
    assert (ticket.tokens.keys(), ticket.curve) == ({"dev.arrow", "test.arrow", "meta.json"}, None)
    assert ticket.reflection.keys() == {"statistics"}
    assert after.tasks[2].definition
    assert call(pool.main, [*bring, "--data", str(later.ticket)]).out == brought.out
    (tmp_path / "more.csv").write_text("input,output\n" + "".join(f"the ticket {i},late\n" for i in range(12)))
    again = go_on(call, later.store, after.digest, "--task", "ticket", "--again", "--data", "more.csv")
    assert again.code == 0, again.out + again.err
    told = json.loads((later.store / "summary.json").read_text())
    assert told["lessons"] == ["animal", "basket", "ticket", "ticket again"]
    assert [len(row) for row in told["scores"]] == [1, 2, 3, 3]
    # Of inputs alone it lacks what refit gives it, and nothing of the others is lost.
    (tmp_path / "rows.txt").write_text("the first ticket\nthe second ticket\n")
    bare = call(pool.main, [*bring, "--rows", "rows.txt"])
    assert bare.code == 0, bare.err
    version = manifest(later.store, bare.out.split()[-1])
    assert version.carried is not None
    assert version.carried[:2] == before.carried
    refused = go_on(call, later.store, version.digest, "--task", "colour", "--data", "more.csv")
    assert "sapt pool refit VERSION --task ticket --data PATH" in refused.err
    refitted = call(
        pool.main, ["refit", version.digest, "--task", "ticket", "--data", str(later.ticket), where, "--inline"]
    )
    assert refitted.code == 0, refitted.err
    extended = go_on(call, later.store, refitted.out.split()[-1], "--task", "colour", "--data", "more.csv", "--dry-run")
    assert extended.code == 0, extended.err


def test_data_that_is_none_changes_nothing(later: Learnt, call: Call, tmp_path: Path) -> None:
    where = f"store.uri={later.store}"
    folder = str(tmp_path / "adapter")
    assert (
        call(pool.main, ["export", "--snapshot", later.version, "--task", "animal", "--out", folder, where]).code == 0
    )
    objects = sorted(later.store.rglob("*"))
    bring = ["import", folder, "--onto", later.version, "--inline", where]
    missing = call(pool.main, [*bring, "--task", "ticket", "--data", "none.csv"])
    assert (missing.code, "none.csv" in missing.err) == (2, True)
    named = call(pool.main, [*bring, "--task", "Basket", "--data", str(later.ticket)])
    assert (named.code, "which differs in case alone" in named.err) == (2, True)
    kind = call(pool.main, [*bring, "--task", "ticket", "--data", str(later.ticket), "pet.r=4"])
    assert (kind.code, "pet.r 4 (was 8)" in kind.err) == (2, True)
    trained = manifest(later.store, later.version).trained
    poor = call(
        pool.main, ["import", folder, "--onto", str(trained), "--task", "ticket", "--data", str(later.ticket), where]
    )
    assert (poor.code, "sapt pool refit VERSION --task animal" in poor.err) == (2, True)
    assert sorted(later.store.rglob("*")) == objects


def test_a_metric_that_is_none_is_refused_where_a_pool_begins(call: Call, tmp_path: Path) -> None:
    (tmp_path / "colour.csv").write_text("input,output\na fox,red\na crow,black\na swan,white\n")
    named = ["--task", "colour", "--data", str(tmp_path / "colour.csv"), "--metric", "meteor"]
    ended = call(pool.main, ["import", str(tmp_path), "--config", "quickstart", *named, f"store.uri={tmp_path}/store"])
    assert ended.code == 2
    assert "metric: there is no metric 'meteor'" in ended.err
