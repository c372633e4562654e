"""Stages in several processes of this machine: side by side, and what becomes of them when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from cluster.processes import stage_processes
from cluster.stages import InlineExecutor, Stage, StageContext, StageRecord, StageResult, run_graph
from cluster.store import LocalStore
from cluster.store.lookups import Lookups
from sapt_core.errors import DataError, ServiceError
from sapt_core.settings import StoreConfig

ROOT = Path(__file__).parents[2]
SECONDS = 60


def await_file(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def write(context: StageContext) -> StageResult:
    """The inputs' text and one's own."""
    below = b"".join(context.store.get(record.outputs["text"]) for record in context.inputs.values())
    text = below + context.reads["text"].encode()
    return StageResult({"text": context.store.put(text)}, metrics={"threads": torch.get_num_threads()})


def meet(context: StageContext) -> StageResult:
    """Ends only if the other of two stages runs at the same time."""
    folder = Path(context.reads["folder"])
    (folder / context.name).touch()
    await_file(folder / context.reads["other"])
    return write(context)


def fail(context: StageContext) -> StageResult:
    raise DataError(context.name, ["is wrong"])


def wait_for_ever(context: StageContext) -> StageResult:
    part = Path(context.reads["file"] + ".part")
    part.write_text(str(os.getpid()))
    part.rename(context.reads["file"])
    time.sleep(600)
    raise AssertionError


def die(context: StageContext) -> StageResult:
    if not Path(context.reads["mended"]).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return write(context)


def diamond(body: Callable[[StageContext], StageResult], **reads: str) -> list[Stage]:
    """left and right -> both."""
    left = Stage("left", "leaf", body, {"text": "l", "other": "right", **reads})
    right = Stage("right", "leaf", body, {"text": "r", "other": "left", **reads})
    return [Stage("both", "join", write, {"text": "b"}, {"a": left, "b": right})]


def run(stages: list[Stage], folder: Path) -> Mapping[Stage, StageRecord]:
    with stage_processes(2, StoreConfig(uri=str(folder))) as executor:
        return run_graph(stages, Lookups(LocalStore(folder)), executor)


def test_two_stages_run_at_once(tmp_path: Path) -> None:
    stages = diamond(meet, folder=str(tmp_path))
    records = run(stages, tmp_path / "store")
    assert LocalStore(tmp_path / "store").get(records[stages[0]].outputs["text"]) == b"lrb"
    assert {record.metrics["threads"] for record in records.values()} == {max(1, torch.get_num_threads() // 2)}


def test_same_keys_and_results_as_in_one_process(tmp_path: Path) -> None:
    apart = run(diamond(write), tmp_path / "apart")
    store = LocalStore(tmp_path / "alone")
    alone = run_graph(diamond(write), Lookups(store), InlineExecutor(store))
    assert {(record.key, record.outputs["text"]) for record in apart.values()} == {
        (record.key, record.outputs["text"]) for record in alone.values()
    }


def test_a_failure_comes_out_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is wrong") as caught:
        run(diamond(fail), tmp_path)
    assert caught.value.faults == ("is wrong",)


def test_a_killed_process_is_told_of_and_the_next_run_goes_on(tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    stages = diamond(die, mended=str(mended))
    with pytest.raises(ServiceError, match="give fewer --processes"):
        run(stages, tmp_path)
    mended.touch()
    records = run(stages, tmp_path)
    assert [record.name for record in records.values()][-1] == "both"


def test_nothing_can_be_submitted_to_what_was_killed(tmp_path: Path) -> None:
    with stage_processes(2, StoreConfig(uri=str(tmp_path))) as executor:
        with pytest.raises(ServiceError, match="was killed"):
            run_graph(diamond(die, mended=str(tmp_path / "never")), Lookups(LocalStore(tmp_path)), executor)
        with pytest.raises(ServiceError, match="was killed"):
            run_graph(diamond(write), Lookups(LocalStore(tmp_path)), executor)


DRIVER = """
import signal
from pathlib import Path
from tests.cluster.test_processes import Stage, run, wait_for_ever

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    folder = Path({folder!r})
    run([Stage("endless", "endless", wait_for_ever, {{"file": str(folder / "pid")}})], folder / "store")
"""


@pytest.mark.chaos
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_leaves_no_process_behind(sent: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER.format(folder=str(tmp_path)))
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        await_file(tmp_path / "pid")
        workers = psutil.Process(driver.pid).children(recursive=True)
        assert int((tmp_path / "pid").read_text()) in {worker.pid for worker in workers}
        driver.send_signal(sent)  # to the driver alone
        _, stderr = driver.communicate(timeout=SECONDS)
        assert sent is signal.SIGKILL or b"KeyboardInterrupt" in stderr
        assert psutil.wait_procs(workers, timeout=SECONDS)[1] == []
    finally:
        driver.kill()
