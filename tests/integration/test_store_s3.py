"""The S3 store against a server that speaks S3 over HTTP."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.stages import InlineExecutor, Stage, StageContext, StageResult, plan, run_graph
from cluster.store import open_store, s3
from cluster.store.lookups import Lookups
from cluster.store.s3 import S3Store
from sapt_core.errors import StoreError
from sapt_core.settings import StoreConfig
from tests.states import load, save

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("aws_environment")]

KEY = hashlib.sha256(b"key").hexdigest()
SECRET = "not-a-secret-of-anyone"  # noqa: S105


@pytest.fixture
def store(s3_endpoint: str) -> S3Store:
    store = open_store(StoreConfig(uri=f"s3://bucket-{uuid.uuid4().hex}/some/prefix", endpoint_url=s3_endpoint))
    assert isinstance(store, S3Store)
    store.client.create_bucket(Bucket=store.bucket)
    return store


def keys(store: S3Store) -> list[str]:
    return [item["Key"] for item in store.client.list_objects_v2(Bucket=store.bucket).get("Contents", [])]


def test_blobs(store: S3Store, tmp_path: Path) -> None:
    digest = store.put(b"hello")
    assert keys(store) == [f"some/prefix/blobs/{digest[:2]}/{digest}"]
    assert store.has(digest)
    assert store.size(digest) == len(store.get(digest))
    assert store.get(digest) == b"hello"
    source = tmp_path / "big"
    source.write_bytes(os.urandom(9 << 20))  # more than one part
    big = store.put_file(source)
    store.fetch_to(big, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert not store.has("0" * 64)
    with pytest.raises(StoreError, match="is not in s3://"):
        store.get("0" * 64)
    store.client.put_object(Bucket=store.bucket, Key=f"some/prefix/blobs/{digest[:2]}/{digest}", Body=b"hellO")
    with pytest.raises(StoreError, match="damaged"):
        store.get(digest)
    with pytest.raises(StoreError, match="damaged"):
        store.fetch_to(digest, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_record_has_one_winner_among_threads_and_processes(store: S3Store, s3_endpoint: str) -> None:
    script = (
        "import sys; from cluster.store.s3 import S3Store\n"
        "print(S3Store(sys.argv[1], 'some/prefix', sys.argv[2]).commit_record(sys.argv[3], {'by': sys.argv[4]})['by'])"
    )
    command = [sys.executable, "-c", script, store.bucket, s3_endpoint, KEY]
    processes = [subprocess.Popen([*command, f"p{number}"], stdout=subprocess.PIPE, text=True) for number in range(2)]
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda number: store.commit_record(KEY, {"by": f"t{number}"})["by"], range(8)))
    seen += [process.communicate(timeout=60)[0].strip() for process in processes]
    assert len(seen) == 10
    assert len(set(seen)) == 1
    store.delete_record(KEY)
    assert store.read_record(KEY) is None


def test_checkpoints(store: S3Store) -> None:
    checkpoints = store.checkpoints(KEY)
    assert load(checkpoints) is None
    for step in range(3):
        save(checkpoints, {"state.bin": bytes([step])})
    assert load(checkpoints) == {"state.bin": b"\x02"}
    assert {key.split("/")[-2].partition("-")[0] for key in keys(store)} == {"00000001", "00000002"}
    store.drop_checkpoints(KEY)
    assert keys(store) == []


def test_a_tag_is_another_once_the_content_is(store: S3Store) -> None:
    assert store._tags("records") == {}
    for number in range(3):
        store._write(f"records/{number}", b"%d" % number)
    store._write("probes/0", b"0")
    first = store._tags("records")
    assert first is not None
    assert first.keys() == {f"records/{number}" for number in range(3)}
    assert store._tags("records") == first
    store._write("records/1", b"another")
    changed = store._tags("records")
    assert changed is not None
    assert {name for name in first if changed[name] != first[name]} == {"records/1"}


def test_a_listing_of_very_many_is_given_up(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_LISTED_PAGES", 2)
    name = "before-parameter-build.s3.ListObjectsV2"
    store.client.meta.events.register(name, lambda params, **_: params.update(MaxKeys=3))
    for number in range(6):
        store._write(f"blobs/{number}", b"x")
    assert len(store._tags("blobs") or {}) == 6
    store._write("blobs/one more", b"x")
    assert store._tags("blobs") is None
    assert len(store._list("blobs")) == 7


def test_what_is_done_is_known_from_few_requests(store: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    def body(context: StageContext) -> StageResult:
        return StageResult({"out": context.store.put(context.key.encode())})

    leaves = [Stage(f"leaf {number}", "leaf", body, {"n": number}) for number in range(40)]
    top = Stage("top", "top", body, {}, {leaf.name: leaf for leaf in leaves})
    known = Lookups(store, [KEY])
    records = run_graph([top], known, InlineExecutor(store))
    known.pack(KEY, [record.key for record in records.values()])
    asked: list[str] = []
    store.client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.method))
    known = Lookups(store, [KEY])
    assert set(plan([top], known).values()) == {"done"}
    assert run_graph([top], known, InlineExecutor(store)) == records
    known.pack(KEY, [record.key for record in records.values()])
    assert asked == ["GET"] * 3  # two listings and a pack
    asked.clear()
    assert set(plan([top], Lookups(store)).values()) == {"done"}  # several at a time
    assert asked == ["GET"] * (2 + len(records))
    assert "pool is full" not in caplog.text


def test_check_passes_and_leaves_nothing(store: S3Store) -> None:
    store.check()
    assert keys(store) == []
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301
    copy.check()


def test_missing_bucket(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match=r"s3://absent-bucket/p.*there is no such bucket"):
        S3Store("absent-bucket", "p", s3_endpoint).check()


def test_bad_bucket_name(s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match=r"s3://a b/p.*not a bucket name"):
        S3Store("a b", "p", s3_endpoint).check()


def test_unreachable_endpoint_hides_its_password() -> None:
    with socket.socket() as taken:  # bound, never listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(StoreError, match="does not answer") as caught:
            S3Store("bucket", "p", f"http://me:{SECRET}@127.0.0.1:{port}").check()
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_bad_endpoint() -> None:
    with pytest.raises(StoreError, match=r"store\.endpoint_url"):
        S3Store("bucket", "p", "nonsense").check()


def test_wrong_credentials(strict_s3_endpoint: str) -> None:
    with pytest.raises(StoreError, match="credentials are refused") as caught:
        S3Store("bucket", "p", strict_s3_endpoint).check()
    assert SECRET not in str(caught.value)


def test_no_credentials(strict_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no credentials"):
        S3Store("bucket", "p", strict_s3_endpoint).check()


def test_a_user_in_the_address_is_no_part_of_it(store: S3Store, s3_endpoint: str) -> None:
    named = S3Store(store.bucket, store.prefix, s3_endpoint.replace("://", f"://me:{SECRET}@"))
    assert store.get(named.put(b"x")) == b"x"
    assert SECRET not in named.client.meta.endpoint_url
