"""Two runs at one stage: the second waits for the first one's result, and never for a dead one's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.stages import InlineExecutor, Stage, StageContext, StageResult, run_graph
from cluster.store import LocalStore, lease
from cluster.store.lease import leased
from cluster.store.lookups import Lookups
from sapt_core.errors import StoreError

KEY = hashlib.sha256(b"key").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    # Expiry only where a test is about it: a machine that is busy elsewhere may stop a renewal for a second.
    for name, seconds in (("RENEW", 0.05), ("EXPIRY", 600), ("POLL", 0.02), ("SETTLE", 0.1)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


def lease_file(store: LocalStore) -> Path:
    return store.folder / "leases" / f"{KEY}.json"


def test_one_at_a_time_and_nothing_is_left(store: LocalStore) -> None:
    inside, most = [], []

    def work(number: int) -> None:
        with leased(store, KEY, "train"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.03)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == [1] * 8
    assert not lease_file(store).exists()


def test_a_lease_is_renewed_for_as_long_as_the_work_takes(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 2)
    got = []

    def second() -> None:
        with leased(store, KEY, "train[01 b]"):
            got.append(time.monotonic())

    with leased(store, KEY, "train[01 b]"):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(1.5 * lease.EXPIRY_SECONDS)
        assert got == []
        ended = time.monotonic()
    waiting.join()
    assert got[0] > ended
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"train[01 b] waits: another run (process {os.getpid()} on ")


def test_two_drivers_do_the_work_once(store: LocalStore) -> None:
    runs = []

    def body(context: StageContext) -> StageResult:
        runs.append(context.name)
        time.sleep(0.3)
        return StageResult({"text": context.store.put(b"text")})

    first = Stage("first", "train", body)
    second = Stage("second", "train", body, {"n": 2}, {"parent": first})
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: run_graph([second], Lookups(store), InlineExecutor(store)), range(2)))
    assert runs == ["first", "second"]
    assert done[0] == done[1]
    assert list(store.folder.glob("leases/*")) == []


def owner(**changes: object) -> bytes:
    return json.dumps({"id": "x", "host": "elsewhere", "process": 1, "renewals": 0, **changes}).encode()


@pytest.mark.parametrize("held", [owner(), b"", b"[1]", b"{", owner(process=10**30, host=lease.socket.gethostname())])
def test_a_lease_that_nobody_renews_is_taken(store: LocalStore, monkeypatch: pytest.MonkeyPatch, held: bytes) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.5)
    store._write(f"leases/{KEY}.json", held)
    start = time.monotonic()
    with leased(store, KEY, "train"):
        assert time.monotonic() - start > lease.EXPIRY_SECONDS
        assert json.loads(lease_file(store).read_bytes())["process"] == os.getpid()
    assert not lease_file(store).exists()


def test_of_several_that_find_one_dead_one_has_it(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 2)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 1)
    store._write(f"leases/{KEY}.json", owner())
    inside, most = [], []

    def work(number: int) -> None:
        with leased(store, KEY, "train"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.03)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1] * 4


HOLD = """
import sys, time
from cluster.store import LocalStore
from cluster.store.lease import leased
with leased(LocalStore(sys.argv[1]), sys.argv[2], "train"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_of_this_machine_is_not_waited_for(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 600)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(store.folder), KEY], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lease_file(store).exists()
    start = time.monotonic()
    with leased(store, KEY, "train"):
        assert time.monotonic() - start < 10
    holder.stdout.close()


def test_who_lost_a_lease_leaves_the_new_owner_his(store: LocalStore) -> None:
    with leased(store, KEY, "train"):
        store._write(f"leases/{KEY}.json", owner())  # taken while this process was asleep
        time.sleep(4 * lease.RENEW_SECONDS)
    assert lease_file(store).read_bytes() == owner()


def test_an_error_in_the_work_frees_the_lease(store: LocalStore) -> None:
    with pytest.raises(KeyboardInterrupt), leased(store, KEY, "train"):
        raise KeyboardInterrupt
    assert not lease_file(store).exists()


@pytest.mark.parametrize("broken", ["_read", "_delete"])
def test_a_store_that_fails_amid_the_work_costs_no_result(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: object) -> None:
        raise StoreError("gone")

    with leased(store, KEY, "train"):
        monkeypatch.setattr(store, broken, fail)
        time.sleep(4 * lease.RENEW_SECONDS)


def test_a_key_cannot_leave_its_folder(store: LocalStore) -> None:
    with pytest.raises(StoreError, match="not a sha256"), leased(store, "../../x", "train"):
        raise AssertionError


def test_work_that_ends_waits_for_no_renewal(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 600)
    start = time.monotonic()
    with leased(store, KEY, "train"):
        pass
    assert time.monotonic() - start < 5
