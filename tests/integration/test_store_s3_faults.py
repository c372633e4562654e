"""The S3 store against servers that differ from AWS, and against bad lines."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest

from cluster.store import base, open_store
from cluster.store.cleaning import remove, unreachable
from cluster.store.s3 import S3Store
from sapt_core.errors import StoreError, StoreUnavailableError
from sapt_core.settings import StoreConfig
from tests.s3_faults import DENIED, Cut, Fault, FaultyS3, Refusal, Request, faulty_s3
from tests.states import load, save

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("aws_environment")]

KEY = sha256(b"key").hexdigest()
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture
def server(running: FaultyS3) -> Iterator[FaultyS3]:
    yield running
    running.fault = lambda _: None


@pytest.fixture
def store(server: FaultyS3) -> S3Store:
    store = open_store(StoreConfig(uri=f"s3://bucket-{uuid.uuid4().hex}/prefix", endpoint_url=server.endpoint))
    assert isinstance(store, S3Store)
    store.client.create_bucket(Bucket=store.bucket)
    server.asked.clear()
    return store


def names(store: S3Store) -> set[str]:
    listed = store.client.list_objects_v2(Bucket=store.bucket).get("Contents", [])
    return {item["Key"].removeprefix("prefix/") for item in listed}


def blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


# --- what is large ------------------------------------------------------------------------------------


def too_large(request: Request) -> Refusal | None:
    """A server whose single PUT takes 8 MiB, where AWS takes 5 GiB."""
    large = request.method == "PUT" and request.size > 8.5 * MEGABYTE
    return Refusal("400 Bad Request", "EntityTooLarge") if large else None


def test_nothing_is_too_large_for_one_put(server: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    server.fault = too_large
    data = os.urandom(18 * MEGABYTE)
    (tmp_path / "file").write_bytes(data)
    digest = store.put_file(tmp_path / "file")
    store.client.delete_object(Bucket=store.bucket, Key=f"prefix/{blob(digest)}")
    assert store.put(data) == digest
    store.fetch_to(digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    save(store.checkpoints(KEY), {"state.bin": data})
    assert load(store.checkpoints(KEY)) == {"state.bin": data}


def part(number: int) -> Callable[[Request], bool]:
    return lambda request: request.query.get("partNumber") == [str(number)]


@pytest.mark.parametrize("how", ["file", "bytes", "checkpoint"])
def test_a_part_that_fails_leaves_nothing(server: FaultyS3, store: S3Store, tmp_path: Path, how: str) -> None:
    second = part(2)
    server.fault = lambda request: DENIED if second(request) else None
    data = os.urandom(18 * MEGABYTE)
    (tmp_path / "file").write_bytes(data)
    put: dict[str, Callable[[], object]] = {
        "file": lambda: store.put_file(tmp_path / "file"),
        "bytes": lambda: store.put(data),
        "checkpoint": lambda: save(store.checkpoints(KEY), {"state.bin": data}),
    }
    with pytest.raises(StoreError, match=r"permission denied.*s3:AbortMultipartUpload"):
        put[how]()
    assert names(store) == set()
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket)
    assert load(store.checkpoints(KEY)) is None


def test_a_part_that_fails_once_is_sent_again(server: FaultyS3, store: S3Store) -> None:
    second, failed = part(2), []

    def once(request: Request) -> Refusal | None:
        if not second(request) or failed:
            return None
        failed.append(request)
        return Refusal("503 Service Unavailable", "SlowDown")

    server.fault = once
    data = os.urandom(18 * MEGABYTE)
    assert store.get(store.put(data)) == data
    assert failed


# --- bodies that break off ----------------------------------------------------------------------------


def cut(times: int) -> Fault:
    left = [Cut()] * times
    return lambda request: left.pop() if left and request.method == "GET" and not request.query else None


@pytest.mark.parametrize("times", [1, 3])
def test_a_body_that_breaks_off_is_read_again(server: FaultyS3, store: S3Store, tmp_path: Path, times: int) -> None:
    data = os.urandom(5 * MEGABYTE)
    digest = store.put(data)
    server.fault = cut(times)
    assert store.get(digest) == data
    server.fault = cut(times)
    server.asked.clear()
    store.fetch_to(digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    # It goes on from where it broke off.
    assert [request.has("Range") for request in server.asked] == [False, *[True] * times]
    server.fault = cut(times)
    store.commit_record(KEY, {"a": 1})
    assert store.read_record(KEY) == {"a": 1}


def test_a_line_that_never_holds_is_told_of(server: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    digest = store.put(os.urandom(5 * MEGABYTE))
    server.fault = cut(99)
    with pytest.raises(StoreUnavailableError, match="Cannot read in the store"):
        store.get(digest)
    with pytest.raises(StoreUnavailableError, match="Cannot read in the store"):
        store.fetch_to(digest, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_in_pieces_is_verified_as_a_whole(server: FaultyS3, store: S3Store, tmp_path: Path) -> None:
    data = os.urandom(5 * MEGABYTE)
    digest = store.put(data)

    def changed_in_between(request: Request) -> Cut | None:
        if request.method == "GET" and request.has("Range"):
            store._write(blob(digest), bytes(len(data)))
        return Cut() if request.method == "GET" and not request.has("Range") else None

    server.fault = changed_in_between
    with pytest.raises(StoreError, match="damaged"):
        store.fetch_to(digest, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_for_long_is_told_from_one_that_forbids(server: FaultyS3, store: S3Store) -> None:
    server.fault = lambda _: Refusal("503 Service Unavailable", "SlowDown")
    with pytest.raises(StoreUnavailableError, match="503"):
        store.put(b"x")
    server.fault = lambda _: DENIED
    with pytest.raises(StoreError, match="permission denied") as caught:
        store.put(b"x")
    assert not isinstance(caught.value, StoreUnavailableError)


# --- what a server may not do -------------------------------------------------------------------------


def wants_md5(request: Request) -> Refusal | None:
    lists = "delete" in request.query and not request.has("Content-MD5")
    return Refusal("400 Bad Request", "MissingContentMD5") if lists else None


def test_a_server_that_deletes_lists_only_with_md5_will_do(server: FaultyS3, store: S3Store) -> None:
    server.fault = wants_md5
    store.check()
    for step in range(4):
        save(store.checkpoints(KEY), {"state.bin": bytes([step])})
    assert load(store.checkpoints(KEY)) == {"state.bin": b"\x03"}
    store.drop_checkpoints(KEY)
    assert names(store) == set()


REFUSED: dict[str, Callable[[Request], bool]] = {
    "a plain put": lambda r: r.method == "PUT" and not r.has("If-None-Match") and not r.has("x-amz-copy-source"),
    "a conditional put": lambda r: r.method == "PUT" and r.has("If-None-Match"),
    "a get": lambda r: r.method == "GET" and "list-type" not in r.query,
    "a head": lambda r: r.method == "HEAD",
    "a list": lambda r: "list-type" in r.query,
    "a copy": lambda r: r.has("x-amz-copy-source"),
    "a delete": lambda r: r.method == "DELETE" and not r.query,
    "an upload in parts": lambda r: "uploads" in r.query,
    "a part": lambda r: "partNumber" in r.query,
}


@pytest.mark.parametrize("what", REFUSED)
def test_check_finds_out_what_is_forbidden(server: FaultyS3, store: S3Store, what: str) -> None:
    refused = REFUSED[what]
    server.fault = lambda request: DENIED if refused(request) else None
    with pytest.raises(StoreError, match="permission denied"):
        store.check()


def test_a_server_that_ignores_if_none_match_is_refused(server: FaultyS3, store: S3Store) -> None:
    def ignore(request: Request) -> None:
        request.environ.pop("HTTP_IF_NONE_MATCH", None)

    server.fault = ignore
    with pytest.raises(StoreError, match="If-None-Match"):
        store.check()
    assert names(store) == set()


# --- cleaning -----------------------------------------------------------------------------------------


def test_cleaning(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lost, again = (store.put(text) for text in (b"kept", b"lost", b"again"))
    store.commit_record(KEY, {"outputs": {"text": kept}})
    save(store.checkpoints(KEY), {"state.bin": b"1"})
    assert unreachable(store) == []  # all of it is young
    listed = unreachable(store, grace=timedelta(days=-1))
    assert {each.entry.name for each in listed} >= {blob(lost), blob(again)}
    assert {each.entry.name.split("/")[0] for each in listed} == {"blobs", "checkpoints"}
    old = [each._replace(entry=each.entry._replace(age=each.entry.age + 5)) for each in listed]
    assert remove(store, old) == 0  # younger than when they were listed: put since
    remove(store, listed)
    assert {name for name in names(store) if not name.endswith("/")} == {blob(kept), f"records/{KEY}.json"}


def test_what_is_put_again_is_as_new(
    server: FaultyS3, store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def changes() -> list[str]:
        return [request.method for request in server.asked if request.method not in {"HEAD", "GET"}]

    digest = store.put(b"text")
    server.asked.clear()
    store.put(b"text")
    assert changes() == []  # so young that it need not be told
    monkeypatch.setattr(base, "REFRESH_SECONDS", -1)
    store.put(b"text")
    assert [request.has("x-amz-copy-source") for request in server.asked if request.method == "PUT"] == [True]
    assert store.get(digest) == b"text"
    assert not store._touch(blob("0" * 64))
