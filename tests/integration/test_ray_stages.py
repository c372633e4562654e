"""Stages on a local Ray: tasks, training workers, deaths and errors."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster.on_ray.session import check_resources, connect
from cluster.stages import Stage, StageContext, StageEvent, StageRecord, StageResult, plan, run_graph
from cluster.store import open_store
from cluster.store.lookups import Lookups
from cluster.store.s3 import S3Store
from sapt_core.errors import ClusterError, DataError
from sapt_core.settings import ClusterConfig, StoreConfig
from tests.states import load, save

if TYPE_CHECKING:
    from cluster.on_ray.executor import RayExecutor

pytestmark = pytest.mark.integration

CLUSTER = ClusterConfig(max_failures=1)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # workers get the environment of the start
            patch.setenv(name, "nobody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with connect(ClusterConfig(), num_cpus=4):
            yield


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return StoreConfig(uri=str(tmp_path / "store"))


def executor_of(config: StoreConfig) -> closing[RayExecutor]:
    """One whose workers do not go while a slow machine starts a process."""
    from cluster.on_ray.executor import RayExecutor

    return closing(RayExecutor(config, CLUSTER, idle_seconds=120))


def run(stages: list[Stage], config: StoreConfig, events: list[StageEvent] | None = None) -> dict[str, StageRecord]:
    on_event = events.append if events is not None else (lambda _: None)
    with executor_of(config) as executor:
        done = run_graph(stages, Lookups(open_store(config)), executor, on_event)
    return {stage.name: record for stage, record in done.items()}


def leaf(context: StageContext) -> StageResult:
    return StageResult({"text": context.store.put(context.reads["text"].encode())})


def train(context: StageContext) -> StageResult:
    """Sums ranks through the process group, checkpoints every step, and dies or is refused where told."""
    import torch
    from torch import distributed

    state = load(context.checkpoints)
    first = int(state["step"]) if state else 0
    for step in range(first, context.reads["steps"]):
        if context.reads.get("refuse_at") == step and context.rank == context.world_size - 1:
            with Path(context.reads["log"]).open("a") as log:
                log.write("refused\n")
            raise DataError("The rows are broken:", ["row 1"])
        if context.reads.get("die_at") == step and context.is_main and not Path(context.reads["log"]).exists():
            Path(context.reads["log"]).write_text("died\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if context.reads.get("keeper_dies_at") == step and not Path(context.reads["log"]).exists():
            keeper = json.loads(context.store._read(f"leases/{context.key}.json") or b"")["process"]
            Path(context.reads["log"]).write_text(f"{keeper}")
            os.kill(keeper, signal.SIGKILL)
            time.sleep(60)  # Ray ends this process too
        save(context.checkpoints, {"step": b"%d" % (step + 1)})
    total = torch.tensor([float(context.rank + 1)])
    distributed.all_reduce(total)
    texts = [context.store.get(digest) for record in context.inputs.values() for digest in record.outputs.values()]
    return StageResult(
        {"pool": context.store.put(b"+".join(texts))},
        {"sum": total.item(), "world_size": context.world_size},
        {"first_step": first, "threads": os.environ.get("OMP_NUM_THREADS")},
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_graph_with_a_training_stage(config: StoreConfig, workers: int) -> None:
    leaves = [Stage(f"prepare[{name}]", "prepare", leaf, {"text": name}) for name in ("a", "b")]
    stages = [
        *leaves,
        Stage("train", "train", train, {"steps": 2}, dict(zip("xy", leaves, strict=True)), workers=workers),
    ]
    start = time.monotonic()
    done = run(stages, config)
    print(f"graph with {workers} workers: {time.monotonic() - start:.1f} s, fit {done['train'].seconds:.1f} s")
    store = open_store(config)
    assert store.get(done["train"].outputs["pool"]) == b"a+b"
    assert done["train"].values == {"sum": workers * (workers + 1) / 2, "world_size": workers}
    assert done["train"].metrics == {"first_step": 0, "threads": "1"}
    assert done["train"].world_size == workers
    assert not any(Path(config.uri).glob("checkpoints/*"))  # dropped when the record is there
    events: list[StageEvent] = []
    assert run(stages, config, events) == done
    assert {event.kind for event in events} == {"planned", "cached"}
    assert set(plan(stages, Lookups(store)).values()) == {"done"}


def test_user_error_comes_out_clean_and_is_not_retried(config: StoreConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    reads = {"steps": 3, "refuse_at": 1, "log": str(log)}
    with pytest.raises(DataError) as caught:
        run([Stage("train", "train", train, reads, workers=2)], config)
    assert type(caught.value) is DataError
    assert str(caught.value) == "The rows are broken:\n  - row 1"
    assert log.read_text() == "refused\n"


def train_once(context: StageContext) -> StageResult:
    with Path(context.reads["log"]).open("a") as log:
        log.write("trained\n")
    time.sleep(5)  # the second driver is there by then
    save(context.checkpoints, {"step": b"1"})
    return StageResult({"pool": context.store.put(b"pool")})


def test_two_drivers_at_one_stage_do_its_work_once(config: StoreConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = Stage("train", "train", train_once, {"log": str(log)}, workers=1)
    store = open_store(config)
    with ThreadPoolExecutor(2) as pool, executor_of(config) as first, executor_of(config) as second:
        done = list(pool.map(lambda executor: run_graph([stage], Lookups(store), executor), (first, second)))
    assert log.read_text() == "trained\n"
    assert done[0] == done[1]
    assert not Path(config.uri, "leases").exists()


def where(context: StageContext) -> StageResult:
    return StageResult(values={"process": os.getpid()})


def places(context: StageContext) -> StageResult:
    """The processes of all workers."""
    from torch import distributed

    found = [0] * context.world_size
    distributed.all_gather_object(found, os.getpid())
    return StageResult(metrics={"processes": found})


@pytest.mark.parametrize("workers", [1, 2])
def test_training_stages_share_their_workers(config: StoreConfig, workers: int) -> None:
    stages = [Stage("train 0", "train", places, {"n": 0}, workers=workers)]
    for number in (1, 2):
        stages += [Stage(f"train {number}", "train", places, {"n": number}, {"x": stages[-1]}, workers=workers)]
    done = run(stages, config)
    print(f"stages: {[record.seconds for record in done.values()]} s")
    processes = [done[stage.name].metrics["processes"] for stage in stages]
    assert processes == [processes[0]] * 3
    assert len(set(processes[0])) == workers
    assert all(done[stage.name].seconds < done[stages[0].name].seconds / 2 for stage in stages[1:])
    assert not any(map(is_alive, processes[0]))  # closing lets them go


def test_idle_workers_make_way(config: StoreConfig) -> None:
    """Of four CPUs they hold two, which a stage needs; one that needs the other two leaves them where they are."""
    trained = Stage("train", "train", places, workers=2)
    beside = Stage("beside", "load", where, {"n": 1}, {"x": trained}, cpus=2)
    trained_on = Stage("train on", "train", places, {"n": 1}, {"x": beside}, workers=2)
    instead = Stage("instead", "load", where, {"n": 2}, {"x": trained_on}, cpus=4)
    seen: list[bool] = []

    def look(event: StageEvent) -> None:
        if event.kind == "finished" and event.stage == beside and event.record is not None:
            seen.append(any(map(is_alive, records["train"])))
        if event.kind == "finished" and event.record is not None and event.stage in {trained, trained_on}:
            records["train"] = event.record.metrics["processes"]

    records: dict[str, list[int]] = {}
    with executor_of(config) as executor:
        run_graph([instead], Lookups(open_store(config)), executor, look)
        assert seen == [True]
        deadline = time.monotonic() + 60  # Ray gives their places away a moment before the processes end
        while any(map(is_alive, records["train"])):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("memory", [0, 2**30, 2**60], ids=["small", "large", "larger than any node"])
def test_no_process_keeps_a_large_backbone(config: StoreConfig, memory: int) -> None:
    """What it had loaded would lie beside the training that comes next."""
    loading = [Stage(f"prepare {number}", "load", where, {"n": number}, memory=memory) for number in range(2)]
    seen: list[bool] = []

    def look(event: StageEvent) -> None:
        if event.kind == "started" and event.stage.name == "train":
            deadline = time.monotonic() + 10
            while (left := any(map(is_alive, processes))) and time.monotonic() < deadline and memory:
                time.sleep(0.1)
            seen.append(left)
        elif event.kind == "finished" and event.record is not None:
            processes.append(event.record.values["process"])

    processes: list[int] = []
    training = Stage("train", "train", where, inputs={stage.name: stage for stage in loading})
    with executor_of(config) as executor:
        run_graph([training, *loading], Lookups(open_store(config)), executor, look)
    assert len(processes) == 3
    assert seen == [not memory]


def refuse(context: StageContext) -> StageResult:
    raise DataError("Not these:", ["b.json"])


def defect(context: StageContext) -> StageResult:
    raise KeyError("lost_field")


def slow(context: StageContext) -> StageResult:
    time.sleep(2)
    return StageResult()


def test_plain_task_errors(config: StoreConfig) -> None:
    events: list[StageEvent] = []
    with pytest.raises(DataError, match=r"b\.json") as caught:
        run([Stage("bad", "bad", refuse), Stage("slow", "slow", slow)], config, events)
    assert type(caught.value) is DataError
    assert [event.stage.name for event in events if event.kind == "finished"] == ["slow"]  # in flight, so kept
    with pytest.raises(KeyError, match="defect"):  # Ray's error names the function and its trace
        run([Stage("defect", "defect", defect)], config)


def die(context: StageContext) -> StageResult:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.chaos
def test_plain_task_whose_worker_dies(config: StoreConfig) -> None:
    with pytest.raises(ClusterError, match="Stage mortal lost its worker 2 times"):
        run([Stage("mortal", "mortal", die)], config)


@pytest.mark.chaos
def test_killed_training_worker_resumes_from_its_checkpoint(config: StoreConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    reads = {"steps": 4, "die_at": 2, "log": str(log)}
    done = run([Stage("train", "train", train, reads, workers=2)], config)
    assert log.read_text() == "died\n"
    assert done["train"].metrics["first_step"] == 2


@pytest.mark.chaos
def test_a_training_worker_that_dies_for_good(config: StoreConfig) -> None:
    with pytest.raises(ClusterError, match="Stage mortal lost a training worker 2 times"):
        run([Stage("mortal", "mortal", die, workers=1)], config)


@pytest.mark.chaos
def test_a_killed_worker_costs_its_own_stage_alone(config: StoreConfig, tmp_path: Path) -> None:
    """The second stage of the same workers resumes; the one before stays, and the one after starts with others."""
    log = tmp_path / "log"
    first = Stage("first", "train", train, {"steps": 2}, workers=2)
    second = Stage("second", "train", train, {"steps": 4, "die_at": 2, "log": str(log)}, {"x": first}, workers=2)
    third = Stage("third", "train", train, {"steps": 3}, {"x": second}, workers=2)
    events: list[StageEvent] = []
    done = run([first, second, third], config, events)
    assert log.read_text() == "died\n"
    assert [done[name].metrics["first_step"] for name in ("first", "second", "third")] == [0, 2, 0]
    assert [event.stage.name for event in events if event.kind == "finished"] == ["first", "second", "third"]


@pytest.mark.chaos
def test_the_process_that_keeps_the_workers_dies(config: StoreConfig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    reads = {"steps": 3, "keeper_dies_at": 2, "log": str(log)}
    done = run([Stage("train", "train", train, reads, workers=1)], config)
    assert not is_alive(int(log.read_text()))
    assert done["train"].metrics["first_step"] == 2


def test_training_stage_on_s3(s3_endpoint: str, aws_environment: None) -> None:
    config = StoreConfig(uri="s3://ray-stages/some/prefix", endpoint_url=s3_endpoint)
    store = open_store(config)
    assert isinstance(store, S3Store)
    store.client.create_bucket(Bucket=store.bucket)
    prepared = Stage("prepare", "prepare", leaf, {"text": "a"})
    done = run([prepared, Stage("train", "train", train, {"steps": 2}, {"x": prepared}, workers=1)], config)
    assert store.get(done["train"].outputs["pool"]) == b"a"
    listed = store.client.list_objects_v2(Bucket=store.bucket)["Contents"]
    assert {item["Key"].split("/")[2] for item in listed if not item["Key"].endswith("/")} == {"blobs", "records"}


def test_more_workers_than_the_cluster_has() -> None:
    check_resources(ClusterConfig(train_workers=4))
    with pytest.raises(ClusterError, match=r"train_workers=5 .* need 5 CPUs, the cluster has 4"):
        check_resources(ClusterConfig(train_workers=5))
    with pytest.raises(ClusterError, match=r"need 2 GPUs, the cluster has 0"):
        check_resources(ClusterConfig(train_workers=2, gpus_per_worker=1))


def test_large_stages_wait_for_each_other_and_not_for_small_ones(config: StoreConfig) -> None:
    from cluster.on_ray.executor import RayExecutor
    from cluster.on_ray.session import capacity

    executor = RayExecutor(config, CLUSTER)
    memory = int(capacity()["memory"] * 0.6)
    large = [Stage(f"large {number}", "load", slow, {"n": number}, memory=memory) for number in range(2)]
    running = executor.submit(large[0], "ab" * 32, {})
    assert not executor.has_room(large[1])
    assert executor.has_room(Stage("small", "small", slow), [large[1]])
    executor.wait([running])
    assert executor.has_room(large[1])


def test_nobody_answers() -> None:
    from cluster.on_ray.session import _answer

    with pytest.raises(ClusterError, match=r"No Ray cluster answers at 127\.0\.0\.1:1"):
        _answer("127.0.0.1:1")
