"""The local store: what goes in comes out or is refused, and one writer wins."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.store import LocalStore, open_store, resolved
from sapt_core.errors import StoreError
from sapt_core.settings import StoreConfig

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
    with pytest.raises(StoreError, match=f"{digest} is not in .*Run the pipeline again"):
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


def test_checkpoints_newest_complete_wins_and_two_are_kept(store: LocalStore) -> None:
    checkpoints = store.checkpoints(KEY)
    assert checkpoints.load() is None
    for step in range(4):
        checkpoints.save({"state.bin": bytes([step]), "position.json": b"%d" % step})
        assert store.checkpoints(KEY).load() == {"state.bin": bytes([step]), "position.json": b"%d" % step}
    folder = store.folder / "checkpoints" / KEY
    assert sorted(path.name for path in folder.iterdir()) == ["00000002", "00000003"]
    (folder / "00000003" / "state.bin").write_bytes(b"\xff")  # damaged
    assert checkpoints.load() == {"state.bin": b"\x02", "position.json": b"2"}
    (folder / "00000002" / "manifest.json").unlink()  # never completed
    assert checkpoints.load() is None
    checkpoints.save({"state.bin": b"new"})
    assert checkpoints.load() == {"state.bin": b"new"}
    store.drop_checkpoints(KEY)
    assert checkpoints.load() is None
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../escape", "manifest.json", "a/b", "", ".hidden"])
def test_checkpoint_file_names_stay_in_their_folder(store: LocalStore, name: str) -> None:
    with pytest.raises(ValueError, match="checkpoint file"):
        store.checkpoints(KEY).save({name: b""})


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
