"""The local store: what goes in comes out or is refused, and one writer wins."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.store import LocalStore, open_store, resolved
from sapt_core.errors import StoreError
from sapt_core.settings import StoreConfig
from tests.states import load, save

KEY = hashlib.sha256(b"key").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def blob_path(store: LocalStore, digest: str) -> Path:
    return store.folder / "blobs" / digest[:2] / digest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.binary(max_size=5000))
def test_bytes_come_back_under_their_sha256(store: LocalStore, data: bytes) -> None:
    digest = store.put(data)
    assert digest == hashlib.sha256(data).hexdigest()
    assert store.has(digest)
    assert store.get(digest) == data
    assert store.size(digest) == len(data)


def test_files_go_in_and_out_in_pieces(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(range(256)) * 12_000)  # three chunks
    digest = store.put_file(source)
    assert digest == store.put(source.read_bytes())
    target = tmp_path / "deep" / "copy"
    store.fetch_to(digest, target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_missing_blob_says_what_to_do(store: LocalStore, tmp_path: Path) -> None:
    digest = "0" * 64
    assert not store.has(digest)
    with pytest.raises(StoreError, match=f"{digest} is not in .*moved.*store.uri.*run the pipeline again"):
        store.get(digest)
    with pytest.raises(StoreError, match=digest):
        store.size(digest)
    with pytest.raises(StoreError, match=digest):
        store.fetch_to(digest, tmp_path / "out")


@pytest.mark.parametrize("content", [b"hellO", b"hell", b"hello!", b""])
def test_damage_is_found_on_every_read(store: LocalStore, tmp_path: Path, content: bytes) -> None:
    digest = store.put(b"hello")
    blob_path(store, digest).write_bytes(content)
    with pytest.raises(StoreError, match=f"{digest}.*damaged"):
        store.get(digest)
    with pytest.raises(StoreError, match="damaged"):
        store.fetch_to(digest, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [store.folder]  # nothing half-written


def test_putting_again_mends_a_truncated_blob(store: LocalStore) -> None:
    digest = store.put(b"hello")
    blob_path(store, digest).write_bytes(b"he")
    store.put(b"hello")
    assert store.get(digest) == b"hello"


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "0" * 63])
def test_a_digest_cannot_leave_its_folder(store: LocalStore, digest: str) -> None:
    with pytest.raises(StoreError, match="not a sha256"):
        store.get(digest)
    with pytest.raises(StoreError, match="not a sha256"):
        store.read_record(digest)


def test_record_first_writer_wins(store: LocalStore) -> None:
    assert store.read_record(KEY) is None
    assert store.commit_record(KEY, {"by": 1}) == {"by": 1}
    assert store.commit_record(KEY, {"by": 2}) == {"by": 1}
    store.delete_record(KEY)
    assert store.read_record(KEY) is None
    assert store.commit_record(KEY, {"by": 3}) == {"by": 3}


def test_broken_record_is_named(store: LocalStore) -> None:
    store.commit_record(KEY, {})
    (store.folder / "records" / f"{KEY}.json").write_text('{"by"')
    with pytest.raises(StoreError, match=f"records/{KEY}.json"):
        store.read_record(KEY)


def test_racing_threads_have_one_winner(store: LocalStore) -> None:
    barrier = threading.Barrier(8)
    seen: list[int] = []

    def write(number: int) -> None:
        barrier.wait()
        seen.append(store.commit_record(KEY, {"by": number})["by"])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


def commit_in_process(folder: str, number: int) -> int:
    winner: int = LocalStore(folder).commit_record(KEY, {"by": number})["by"]
    return winner


def test_racing_processes_have_one_winner(store: LocalStore) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        seen = pool.starmap(commit_in_process, [(str(store.folder), number) for number in range(12)])
    assert set(seen) == {store.read_record(KEY)["by"]}  # type: ignore[index]
    assert list((store.folder / "tmp").iterdir()) == []


def numbered(store: LocalStore) -> dict[int, Path]:
    """The folders of the stage's checkpoints."""
    return {int(path.name.partition("-")[0]): path for path in (store.folder / "checkpoints" / KEY).iterdir()}


def test_checkpoints_newest_complete_wins_and_two_are_kept(store: LocalStore) -> None:
    checkpoints = store.checkpoints(KEY)
    assert load(checkpoints) is None
    for step in range(4):
        save(checkpoints, {"state.bin": bytes([step]), "position.json": b"%d" % step})
        assert load(store.checkpoints(KEY)) == {"state.bin": bytes([step]), "position.json": b"%d" % step}
    folders = numbered(store)
    assert sorted(folders) == [2, 3]
    (folders[3] / "state.bin").write_bytes(b"\xff")  # damaged
    assert load(checkpoints) == {"state.bin": b"\x02", "position.json": b"2"}
    (folders[2] / "manifest.json").unlink()  # never completed
    assert load(checkpoints) is None
    save(checkpoints, {"state.bin": b"new"})
    assert load(checkpoints) == {"state.bin": b"new"}
    store.drop_checkpoints(KEY)
    assert load(checkpoints) is None
    assert not (store.folder / "checkpoints" / KEY).exists()
    assert list((store.folder / "tmp").iterdir()) == []


def test_checkpoints_of_an_earlier_release_are_gone_on_from(store: LocalStore) -> None:
    folder = store.folder / "checkpoints" / KEY / "00000007"
    folder.mkdir(parents=True)
    (folder / "state.bin").write_bytes(b"old")
    (folder / "manifest.json").write_text(json.dumps({"state.bin": hashlib.sha256(b"old").hexdigest()}))
    assert load(store.checkpoints(KEY)) == {"state.bin": b"old"}
    save(store.checkpoints(KEY), {"state.bin": b"new"})
    assert sorted(numbered(store)) == [7, 8]


@pytest.mark.parametrize("name", ["manifest.json", ".hidden", "a b"])
def test_checkpoint_file_names_stay_in_their_folder(store: LocalStore, name: str) -> None:
    with pytest.raises(ValueError, match="checkpoint file"):
        save(store.checkpoints(KEY), {name: b""})
    assert list((store.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("manifest", ['{"../../escape": "x"}', '{"/escape": "x"}', "[1]", '"x"', "{"])
def test_a_checkpoint_of_somebody_elses_making_is_passed_over(store: LocalStore, manifest: str) -> None:
    save(store.checkpoints(KEY), {"state.bin": b"mine"})
    save(store.checkpoints(KEY), {"state.bin": b"theirs"})
    (numbered(store)[1] / "manifest.json").write_text(manifest)
    assert load(store.checkpoints(KEY)) == {"state.bin": b"mine"}


def test_check_leaves_nothing_behind(store: LocalStore) -> None:
    store.check()
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


def test_check_refuses_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Cannot write in the store .*file.*store\.uri"):
        LocalStore(tmp_path / "file" / "store").check()


def test_relative_folders_are_fixed_before_they_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolved(StoreConfig(uri="runs/store"))
    assert config.uri == str(tmp_path / "runs" / "store")
    assert resolved(config) == config
    assert resolved(StoreConfig(uri="s3://b/p")).uri == "s3://b/p"
    assert open_store(StoreConfig(uri=f"file://{tmp_path}/x")).uri == str(tmp_path / "x")
    assert pickle.loads(pickle.dumps(open_store(config))).uri == config.uri  # noqa: S301


# --- several runs, several users ----------------------------------------------------------------------


def test_saving_and_dropping_at_once_fail_nobody(store: LocalStore) -> None:
    """Two drivers at one stage: what one saves, the other drops, as often as it can."""
    rounds, faults = 40, []
    barrier = threading.Barrier(5)

    def repeat(what: Callable[[], object]) -> None:
        barrier.wait()
        try:
            for _ in range(rounds):
                what()
        except Exception as error:
            faults.append(error)

    def saving() -> None:
        save(store.checkpoints(KEY), {"state.bin": b"1", "position.json": b"2"})

    work = [saving, saving, lambda: store.drop_checkpoints(KEY), lambda: store.drop_checkpoints(KEY)]
    work.append(lambda: load(store.checkpoints(KEY)))
    threads = [threading.Thread(target=repeat, args=(what,)) for what in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    saving()
    assert load(store.checkpoints(KEY)) == {"state.bin": b"1", "position.json": b"2"}
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_save_outlives_a_drop_in_its_midst(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, dropped = Path.replace, []

    def drop_before(path: Path, target: Path) -> Path:
        if target.name not in dropped:
            dropped.append(target.name)
            LocalStore(store.folder).drop_checkpoints(KEY)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", drop_before)
    save(store.checkpoints(KEY), {"state.bin": b"1"})
    assert dropped == ["state.bin", "manifest.json"]
    assert load(store.checkpoints(KEY)) is None  # a checkpoint is lost, and no stage
    save(store.checkpoints(KEY), {"state.bin": b"2"})
    assert load(store.checkpoints(KEY)) == {"state.bin": b"2"}


def test_a_drop_outlives_a_save_in_its_midst(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rmdir, saved = os.rmdir, []

    def save_before(*args: Any, **options: Any) -> None:
        if not saved:
            saved.append(True)
            save(LocalStore(store.folder).checkpoints(KEY), {"state.bin": b"late"})
        rmdir(*args, **options)

    save(store.checkpoints(KEY), {"state.bin": b"1"})
    monkeypatch.setattr(os, "rmdir", save_before)
    store.delete_folder(f"checkpoints/{KEY}")
    assert saved
    assert load(store.checkpoints(KEY)) == {"state.bin": b"late"}


def test_what_cannot_be_dropped_fails_no_stage(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: str) -> None:
        raise StoreError("the disk is asleep")

    save(store.checkpoints(KEY), {"state.bin": b"1"})
    monkeypatch.setattr(store, "delete_folder", refuse)
    store.drop_checkpoints(KEY)
    assert f"checkpoints/{KEY} stays in {store.folder}" in caplog.text
    assert "the disk is asleep" in caplog.text


def test_a_folder_that_cannot_be_made_is_told_of(store: LocalStore) -> None:
    store.folder.mkdir()
    (store.folder / "records").write_text("")  # a file
    with pytest.raises(StoreError, match=r"Cannot write in the store .*records"):
        store.commit_record(KEY, {})


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_gives(store: LocalStore, umask: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    source.chmod(0o600)  # as libraries write them
    digest = store.put(b"bytes")
    store.put_file(source)
    store.commit_record(KEY, {})
    checkpoints = store.checkpoints(KEY)

    def write(folder: Path) -> None:
        (folder / "state.bin").touch(mode=0o600)

    checkpoints.save(write)
    store.fetch_to(digest, tmp_path / "out" / "fetched")
    paths = [*store.folder.rglob("*"), *(tmp_path / "out").rglob("*")]
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in paths}
    assert modes == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    assert len([path for path in paths if path.is_file()]) == 6


def test_what_killed_processes_left_is_cleared_after_a_day(store: LocalStore) -> None:
    store.check()
    old, new, folder = (store.folder / "tmp" / name for name in ("old", "new", "folder"))
    old.write_bytes(b"")
    new.write_bytes(b"")
    folder.mkdir()
    (folder / "state.bin").write_bytes(b"")
    for path in (old, folder):
        os.utime(path, (1, 1))
    store.check()
    assert list((store.folder / "tmp").iterdir()) == [new]


@pytest.mark.parametrize("how", ["bytes", "file", "file of a known digest"])
def test_what_is_put_again_is_as_new(store: LocalStore, tmp_path: Path, how: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"bytes")
    digest = store.put(b"bytes")
    os.utime(blob_path(store, digest), (1, 1))
    if how == "bytes":
        store.put(b"bytes")
    else:
        store.put_file(source, None if how == "file" else digest)
    assert blob_path(store, digest).stat().st_mtime > 1


def test_a_digest_that_is_known_spares_reading_a_file_that_is_there(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    digest = store.put_file(source)
    source.write_bytes(b"two")  # as long, so only reading it would tell
    assert store.put_file(source, digest) == digest
    assert store.put_file(source) == hashlib.sha256(b"two").hexdigest()
    source.write_bytes(b"three")
    assert store.put_file(source, digest) == hashlib.sha256(b"three").hexdigest()


def test_files_never_lie_in_memory_whole(store: LocalStore, tmp_path: Path) -> None:
    size = 48 << 20

    def write(folder: Path) -> None:
        with (folder / "state.bin").open("wb") as file:
            file.truncate(size)

    write(tmp_path)
    tracemalloc.start()
    try:
        store.fetch_to(store.put_file(tmp_path / "state.bin"), tmp_path / "copy")
        store.checkpoints(KEY).save(write)
        assert store.checkpoints(KEY).load(lambda folder: (folder / "state.bin").stat().st_size) == size
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()
