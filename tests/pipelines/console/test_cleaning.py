"""A finished sequence after its store was cleaned: all that it was made for still works."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.store import LocalStore
from cluster.store.cleaning import NO_RECORD, unreachable
from pipelines import continual, evaluate, predict, report
from pipelines import store as store_command
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, records

Call = Callable[[Callable[[], None], list[str]], Outcome]


def test_reports_versions_and_runs_outlive_it(
    copied: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the backbone comes out of the store
    store = LocalStore(copied.store)
    lost = store.put(b"of a record that was deleted")
    for path in copied.store.rglob("*"):
        os.utime(path, (1, 1))
    before = records(copied.store)
    place = f"store.uri={copied.store}"
    told = call(store_command.main, ["gc", place])
    assert told.code == 0, told.err
    assert f"{len(b'of a record that was deleted'):>14}  blobs/" in told.out
    assert lost in told.out
    assert told.out.endswith("Nothing was removed: --remove does.\n")
    listed = unreachable(store)
    # A report needs the tasks' text, when their folders are gone.
    assert {each.entry.name.split("/")[-1] for each in listed} == {lost}
    assert {each.why for each in listed} == {NO_RECORD}
    freed = sum(each.entry.size for each in listed)
    assert f"{freed:>14,}  bytes in {len(listed)} objects of " in told.out
    removed = call(store_command.main, ["gc", "--remove", place])
    assert removed.code == 0, removed.err
    assert removed.out.endswith(f"{freed:>14,}  bytes removed\n")
    assert unreachable(store, grace=timedelta(0)) == []

    places = [*TINY, f"store.uri={copied.store}"]
    for digest in (copied.snapshot, Manifest.from_bytes(store.get(copied.snapshot)).parent):
        assert digest is not None
        asked = ["--snapshot", digest, "--task", "animal", "--input", "a text", f"store.uri={copied.store}"]
        assert call(predict.main, asked).code == 0
    scored = call(evaluate.main, ["--config", QUICKSTART, *places, "--snapshot", copied.snapshot])
    assert scored.code == 0, scored.err
    drawn = call(report.main, ["--config", QUICKSTART, *places, "--inline"])
    assert drawn.code == 0, drawn.err
    again = call(continual.main, ["--config", QUICKSTART, "--inline", *places])
    assert again.code == 0, again.err
    assert records(copied.store) == before  # nothing ran
    further = call(continual.main, ["--config", QUICKSTART, "--inline", *places, "benchmark.tasks=animal,basket,loan"])
    assert further.code == 0, further.err
    assert records(copied.store).items() >= before.items()


def test_what_may_still_be_needed_is_not_listed(finished: Finished, call: Call) -> None:
    young = call(store_command.main, ["gc", f"store.uri={finished.store}"])
    assert (young.code, young.out.split()[:5]) == (0, ["0", "bytes", "in", "0", "objects"])
    kept = call(store_command.main, ["gc", "--keep", "0" * 64, f"store.uri={finished.store}"])
    assert kept.code == 3
    assert "that is to be kept is not in" in kept.err
    for given, said in ((["gc", "--keep", "abc"], "64 hex digits"), (["empty"], "choose from"), ([], "action")):
        refused = call(store_command.main, given)
        assert refused.code == 2
        assert said in refused.err
