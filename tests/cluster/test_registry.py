"""Publishing, finding and reading pool versions on a sqlite file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import ModuleType

import pytest

from cluster.store import open_store
from cluster.tracking.files import read_version
from cluster.tracking.lines import Lineage, PoolVersion
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.runs import Tracker
from cluster.tracking.service import client_of
from sapt_core.errors import LineageError, SnapshotError, StoreError, TrackingError
from sapt_core.io.blobs import BlobStore
from sapt_core.settings import StoreConfig, TrackingConfig
from sapt_core.versions.requests import Row

pytest_plugins = ["tests.mlflow_servers"]

TAGS = {"task": "task181", "method": "sapt", "backbone": "t5-mini", "config_hash": "c0", "data_digest": "d0"}
LINE = Lineage("method sapt, tasks a, b, c", ("first", "second", "third"))


@pytest.fixture
def registry(sqlite_tracking: TrackingConfig) -> PoolRegistry:
    return PoolRegistry(sqlite_tracking)


@pytest.fixture
def run_id(sqlite_tracking: TrackingConfig) -> str:
    return Tracker(sqlite_tracking).start_sequence("sequence", key="a1", params={}, tags={})


@pytest.fixture
def store(tmp_path: Path) -> StoreConfig:
    return StoreConfig(uri=str(tmp_path / "store"))


def manifest(number: int) -> bytes:
    return json.dumps({"schema_version": 1, "tasks": [{"name": f"task{each}"} for each in range(number)]}).encode()


def publish(
    registry: PoolRegistry,
    store: StoreConfig,
    run_id: str,
    number: int,
    content: bytes | None = None,
    **changes: object,
) -> int:
    values = {
        "lineage": LINE,
        "digest": f"{number:064x}",
        "index": number,
        "run_id": run_id,
        "description": "sapt after 3 tasks.",
        "tags": TAGS,
        "metrics": {"AP": 50.0 + number},
    }
    return registry.publish(content or manifest(number), store, **(values | changes))


# --- publish ------------------------------------------------------------------------------------------


def test_version_carries_tags_metrics_and_lineage(registry: PoolRegistry, store: StoreConfig, run_id: str) -> None:
    assert publish(registry, store, run_id, 1) == 1
    client = client_of(registry.config.uri)
    version = client.get_model_version("sapt", "1")
    assert version.status == "READY"
    assert version.run_id == run_id
    experiment = client.get_experiment_by_name("unit").experiment_id
    assert version.description == f"sapt after 3 tasks. [Run](#/experiments/{experiment}/runs/{run_id})"
    assert dict(version.tags) == TAGS | {
        "index": "1",
        "sapt.snapshot": f"{1:064x}",
        "sapt.lineage": "first",
        "line": "main",
    }
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY"
    assert model.source_run_id == run_id
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("AP", 51.0, 1)]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "sapt", "version": "1"}]
    assert client.get_run(run_id).data.metrics["AP"] == 51.0


def test_publishing_again_gives_the_same_version(registry: PoolRegistry, store: StoreConfig, run_id: str) -> None:
    assert [publish(registry, store, run_id, number) for number in (1, 2, 1, 2, 3)] == [1, 2, 1, 2, 3]
    client = client_of(registry.config.uri)
    assert len(client.search_model_versions("name = 'sapt'")) == 3
    assert len(client.get_metric_history(run_id, "AP")) == 3


@pytest.mark.parametrize("scores_first", [True, False])
def test_scores_of_the_run_and_of_the_version_are_one_point(
    registry: PoolRegistry, store: StoreConfig, run_id: str, scores_first: bool
) -> None:
    tracker, scores = Tracker(registry.config), {"AP": 51.0}
    for _ in range(2):
        if scores_first:
            tracker.log_scores(run_id, 1, scores)
        publish(registry, store, run_id, 1, metrics=scores)
        tracker.log_scores(run_id, 1, scores)
    client = client_of(registry.config.uri)
    assert len(client.get_metric_history(run_id, "AP")) == 1
    model = client.get_logged_model(client.get_model_version("sapt", "1").source.removeprefix("models:/"))
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("AP", 51.0, 1)]


def test_the_registry_holds_two_small_json_files_and_no_pickle(
    registry: PoolRegistry, store: StoreConfig, run_id: str, tmp_path: Path
) -> None:
    publish(registry, store, run_id, 1)
    written = [path for path in (tmp_path / "mlflow" / "mlartifacts").rglob("*") if path.is_file()]
    code = [path for path in written if "code" in path.parts]
    files = {path.name: path for path in set(written) - set(code)}
    assert {"manifest.json", "pool.json", "pool_model.py", "MLmodel", "requirements.txt"} <= set(files)
    assert {path.suffix for path in code} == {".py", ".typed"}
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert sum(path.stat().st_size for path in files.values()) < 20_000


def test_a_version_requires_what_public_indexes_have(
    registry: PoolRegistry, store: StoreConfig, run_id: str, tmp_path: Path
) -> None:
    """Not the project's own name, which anybody may take there, and no build of this machine's torch."""
    publish(registry, store, run_id, 1)
    written = {path.name: path.read_text() for path in (tmp_path / "mlflow" / "mlartifacts").rglob("*.[ty]*")}
    requirements = written["requirements.txt"].split()
    names = {line.partition("==")[0] for line in requirements}
    assert names >= {"boto3", "mlflow", "torch", "transformers"}  # a store in a folder may move to S3
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in requirements)
    assert names.isdisjoint({*packages_distributions().get("sapt_core", ()), "sapt-on-ray"})
    for name in ("conda.yaml", "python_env.yaml", "requirements.txt"):
        assert "sapt" not in written[name]


@pytest.mark.usefixtures("aws_environment")
def test_no_secret_of_the_store_is_published(registry: PoolRegistry, run_id: str, tmp_path: Path) -> None:
    store = StoreConfig(uri="s3://bucket/prefix", endpoint_url="http://key:hunter2@127.0.0.1:9000/path")
    publish(registry, store, run_id, 1)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "mlflow").rglob("*") if path.is_file())
    assert b"hunter2" not in everything
    written = json.loads(next((tmp_path / "mlflow").rglob("pool.json")).read_text())
    assert written["store"] == {"uri": "s3://bucket/prefix", "endpoint_url": "http://127.0.0.1:9000/path"}
    assert registry.load_manifest("1", store.endpoint_url)[1] == store


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback that is nobody's store, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization", "nothing"))
            self.send_error(404)

        do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.usefixtures("aws_environment", "ambient")
@pytest.mark.parametrize("own", [None, "http://127.0.0.1:1"])
def test_no_signed_request_goes_where_the_registry_says(
    registry: PoolRegistry,
    run_id: str,
    own: str | None,
    listener: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow.pyfunc

    address, asked = listener
    publish(registry, StoreConfig(uri="s3://bucket/prefix", endpoint_url=address), run_id, 1)
    with pytest.raises(SnapshotError, match=f"store.endpoint_url={address}, or .* AWS_ENDPOINT_URL_S3={address}"):
        registry.load_manifest("1", own)
    monkeypatch.setenv("AWS_ENDPOINT_URL", own or "")
    with pytest.raises(SnapshotError, match="they are not sent elsewhere"):
        mlflow.pyfunc.load_model("models:/sapt/1")
    assert asked == []


@pytest.mark.usefixtures("aws_environment")
def test_an_endpoint_is_the_readers_own_however_it_is_written(
    registry: PoolRegistry, run_id: str, listener: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = listener
    publish(registry, StoreConfig(uri="s3://bucket/prefix", endpoint_url=address), run_id, 1)
    assert registry.load_manifest("1", f"{address}/")[1].endpoint_url == f"{address}/"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    _, found, _ = registry.load_manifest("1", None)
    with pytest.raises(StoreError):
        open_store(found).get("ab" * 32)
    assert len(asked) == 1


@pytest.mark.usefixtures("aws_environment")
def test_a_store_without_an_endpoint_is_read_at_the_readers(registry: PoolRegistry, run_id: str) -> None:
    publish(registry, StoreConfig(uri="s3://bucket/prefix"), run_id, 1)
    assert registry.load_manifest("1", "http://127.0.0.1:1")[1].endpoint_url == "http://127.0.0.1:1"
    assert registry.load_manifest("1", None)[1].endpoint_url is None


@pytest.mark.parametrize("scheme", ["mlflow-artifacts", "http"])
def test_files_of_a_version_at_another_host_are_not_asked_for(
    registry: PoolRegistry,
    store: StoreConfig,
    listener: tuple[str, list[str]],
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, asked = listener
    elsewhere = f"{scheme}://{address.removeprefix('http://')}/files"
    monkeypatch.setattr(
        client_of(registry.config.uri), "get_model_version_download_uri", lambda name, version: elsewhere
    )
    run_id = Tracker(registry.config).start_sequence("sequence", key="a1", params={}, tags={})
    publish(registry, store, run_id, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the reader")
    with pytest.raises(SnapshotError, match="that host would get the credentials for MLflow"):
        registry.load_manifest("1", None)
    assert asked == []


def test_what_another_sequence_published_meanwhile_is_not_published_over(
    registry: PoolRegistry, store: StoreConfig, run_id: str
) -> None:
    other = Lineage("method ewc, tasks x", ("x",))
    publish(registry, store, run_id, 1)
    with pytest.raises(LineageError, match="newest version, 1, is of method sapt, tasks task181"):
        publish(registry, store, run_id, 1, lineage=other, digest="f" * 64)
    asked = PoolRegistry(registry.config.model_copy(update={"line": "others"}))
    assert publish(asked, store, run_id, 1, lineage=other, digest="f" * 64) == 2
    assert [version.line for version in registry.versions()] == ["main", "others"]


@pytest.mark.parametrize(("sweep", "goes_on"), [("daily", True), ("weekly", False), (None, False)])
def test_the_best_trial_follows_the_best_of_the_same_sweep(
    registry: PoolRegistry, store: StoreConfig, run_id: str, sweep: str | None, goes_on: bool
) -> None:
    publish(registry, store, run_id, 1, tags=TAGS | {"sweep": "daily"})
    with nullcontext() if goes_on else pytest.raises(LineageError):
        registry.check_continuation(Lineage("the best trial", (), sweep))


def test_relative_store_is_not_published(registry: PoolRegistry, run_id: str) -> None:
    with pytest.raises(ValueError, match="is relative"):
        publish(registry, StoreConfig(uri="runs/store"), run_id, 1)
    assert not client_of(registry.config.uri).search_model_versions("name = 'sapt'")


def test_ambient_tracking_uri_is_left_alone(
    registry: PoolRegistry, store: StoreConfig, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    publish(registry, store, run_id, 1)
    assert not mlflow.is_tracking_uri_set()
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize("step", ["log_model_artifacts", "finalize_logged_model", "create_model_version"])
def test_publish_that_died_half_way_is_completed(
    registry: PoolRegistry, store: StoreConfig, run_id: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    client = client_of(registry.config.uri)

    def die(*args: object, **kwargs: object) -> None:
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(client, step, die)
        with pytest.raises(TrackingError, match="connection lost"):
            publish(registry, store, run_id, 1)
    assert not client.search_model_versions("name = 'sapt'")
    assert publish(registry, store, run_id, 1) == 1
    experiment = client.get_experiment_by_name("unit").experiment_id
    (model,) = client.search_logged_models([experiment])
    assert model.status == "READY"
    assert len(client.get_metric_history(run_id, "AP")) == 1
    assert registry.load_manifest("1", None)[0] == manifest(1)


def together(call: Callable[..., object]) -> Callable[..., object]:
    """``call`` for two threads; the first call of each waits for the other's."""
    barrier, waited = Barrier(2, timeout=60), threading.local()

    def called(*args: object) -> object:
        if not hasattr(waited, "once"):
            waited.once = True
            barrier.wait()
        return call(*args)

    return called


def test_two_publishers_at_once_leave_one_version(
    registry: PoolRegistry, store: StoreConfig, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(registry.config.uri)
    # Both copy into the same logged model, and both have looked for the version and found none.
    for name in ("log_model_artifacts", "finalize_logged_model"):
        monkeypatch.setattr(client, name, together(getattr(client, name)))
    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(lambda _: publish(registry, store, run_id, 1), range(2)))
    assert versions == [1, 1]
    assert [each.version for each in client.search_model_versions("name = 'sapt'")] == [1]
    (model,) = client.search_logged_models([client.get_experiment_by_name("unit").experiment_id])
    assert client.get_model_version("sapt", "1").source == model.model_uri
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "sapt", "version": "1"}]
    assert registry.load_manifest("latest", None)[0] == manifest(1)


def test_of_two_that_extend_one_version_the_second_becomes_a_branch(
    registry: PoolRegistry,
    store: StoreConfig,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither sees the other before both have made a version."""
    publish(registry, store, run_id, 1)
    client, first = client_of(registry.config.uri), f"{1:064x}"
    monkeypatch.setattr(client, "finalize_logged_model", together(client.finalize_logged_model))

    def extend(name: str) -> int:
        lineage = Lineage(f"tasks a, {name}", ("first", name))
        return publish(registry, store, run_id, 2, lineage=lineage, digest=f"{name:0>64}", parent=first)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(extend, "bc")) == [2, 3]
    one, two, three = registry.versions()
    assert (one.line, two.line, three.line, three.is_branch) == ("main", "main", "branch-of-1", True)
    assert {two.tags["sapt.parent"], three.tags["sapt.parent"]} == {first}
    (told,) = caplog.messages
    assert told.startswith("Version 3 of sapt is a line of its own, branch-of-1: while it was learnt,")


def test_threads_save_one_after_the_other(
    registry: PoolRegistry, store: StoreConfig, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    save, both, met = mlflow.pyfunc.save_model, Barrier(2, timeout=1), []

    def saved(*args: object, **kwargs: object) -> None:
        with suppress(BrokenBarrierError):
            met.append(both.wait())
        save(*args, **kwargs)

    monkeypatch.setattr(mlflow.pyfunc, "save_model", saved)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: publish(registry, store, run_id, 1), range(2))) == [1, 1]
    assert not met
    assert "dbutils" not in sys.modules  # what MLflow leaves when two threads run a model's code


# --- resolve ------------------------------------------------------------------------------------------


@pytest.fixture
def three(registry: PoolRegistry, store: StoreConfig, run_id: str) -> PoolRegistry:
    for number in (1, 2, 3):
        publish(registry, store, run_id, number)
    client_of(registry.config.uri).set_registered_model_alias("sapt", "champion", "2")
    return registry


def test_resolve(three: PoolRegistry, run_id: str) -> None:
    wanted = {"3": 3, " 1 ": 1, "latest": 3, "champion": 2, "models:/sapt/1": 1, "models:/sapt/latest": 3}
    wanted |= {"models:/sapt@champion": 2, "models:/sapt@latest": 3}
    assert {reference: three.resolve(reference).version for reference in wanted} == wanted
    found = three.resolve("champion")
    tags = {"index": "2", "sapt.snapshot": f"{2:064x}", "sapt.lineage": "second", "line": "main"}
    assert found == PoolVersion(
        model="sapt",
        version=2,
        aliases=("champion",),
        tags=TAGS | tags | {"sapt.parent": f"{1:064x}"},
        run_id=run_id,
        source=found.source,
    )
    assert three.resolve("champion").uri == "models:/sapt/2"


def test_mlflow_itself_knows_latest(three: PoolRegistry) -> None:
    assert int(client_of(three.config.uri).get_model_version_by_alias("sapt", "latest").version) == 3


@pytest.mark.parametrize("reference", ["9", "0", "challenger", "models:/sapt/9", "models:/sapt@challenger"])
def test_missing_version_lists_what_there_is(three: PoolRegistry, reference: str) -> None:
    with pytest.raises(TrackingError) as caught:
        three.resolve(reference)
    assert str(caught.value) == (
        f"'{reference}' does not exist in MLflow: "
        "'sapt' has the versions 1, 2, 3 and the aliases latest -> 3, champion -> 2."
    )


@pytest.mark.parametrize("reference", ["latest", "1", "models:/other@champion"])
def test_model_without_versions(registry: PoolRegistry, reference: str) -> None:
    with pytest.raises(TrackingError, match=r"'(sapt|other)' has no versions yet\. Is tracking\.model right"):
        registry.resolve(reference)


@pytest.mark.parametrize("reference", ["", "runs:/abc/model", "models:/sapt", "models:/sapt/3/x", "models:/a'b/1"])
def test_nonsense_reference(registry: PoolRegistry, reference: str) -> None:
    with pytest.raises(TrackingError, match="names no model version: give a number, latest or an alias"):
        registry.resolve(reference)


def test_the_champion_and_the_one_before(three: PoolRegistry) -> None:
    one, two, last = three.versions()
    three.crown(two)  # it is champion
    assert three.with_alias("previous") is None
    three.crown(last)
    three.swap(last, two)
    assert [version.aliases for version in three.versions()] == [(), ("champion",), ("previous",)]
    three.crown(one)
    assert [version.aliases for version in three.versions()] == [("champion",), ("previous",), ()]
    assert three.scores(last) == {"AP": 53.0}


# --- load ---------------------------------------------------------------------------------------------


def test_load_manifest(three: PoolRegistry, store: StoreConfig) -> None:
    found = three.load_manifest("champion", None)
    assert found[:2] == (manifest(2), store)
    assert found[2].version == 2


def test_version_that_is_no_pool(registry: PoolRegistry, run_id: str, tmp_path: Path) -> None:
    client = client_of(registry.config.uri)
    (tmp_path / "foreign" / "artifacts").mkdir(parents=True)
    (tmp_path / "foreign" / "artifacts" / "weights.txt").write_text("x")
    client.create_registered_model("sapt")
    client.create_model_version("sapt", str(tmp_path / "foreign"), run_id=run_id)
    with pytest.raises(SnapshotError, match=r"holds no PET pool: manifest\.json is missing"):
        registry.load_manifest("1", None)


def test_damaged_manifest_is_refused(three: PoolRegistry, tmp_path: Path) -> None:
    damaged = 0
    for path in (tmp_path / "mlflow" / "mlartifacts").rglob("manifest.json"):
        if path.read_bytes() == manifest(2):
            path.write_bytes(manifest(1))
            damaged += 1
    assert damaged == 1
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        three.load_manifest("2", None)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("{", "cannot be read"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2, and this release reads 1"),
        ('{"schema_version": 1, "manifest_sha256": "SHA"}', "names no usable store"),
        ('{"schema_version": 1, "manifest_sha256": "SHA", "store": {"uri": "ftp://x"}}', "names no usable store: .*s3"),
        ('{"schema_version": 1, "store": {"uri": "/data"}}', "is damaged"),
    ],
)
def test_bad_pool_file(tmp_path: Path, pool: str, expected: str) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest(1))
    (tmp_path / "pool.json").write_text(pool.replace("SHA", sha256(manifest(1)).hexdigest()))
    with pytest.raises(SnapshotError, match=expected):
        read_version(tmp_path / "manifest.json", tmp_path / "pool.json", None)


# --- the model MLflow loads ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    text: str
    weights: dict[str, float]


class ReadingPredictor:
    """Stands in for the backbone: answers from the manifest and from a blob of the store."""

    def __init__(self, tasks: list[str], block: bytes) -> None:
        self.tasks, self.block = tasks, block

    @classmethod
    def load(cls, manifest: bytes, store: BlobStore) -> ReadingPredictor:
        stated = json.loads(manifest)
        return cls([task["name"] for task in stated["tasks"]], store.get(stated["block"]))

    def answer(self, rows: Sequence[Row], **_: int | None) -> list[Prediction]:
        return [Prediction(f"{row.prompt}:{self.block.decode()}", dict.fromkeys(self.tasks, 0.5)) for row in rows]


@pytest.fixture
def ambient(registry: PoolRegistry) -> Iterator[None]:
    import mlflow

    mlflow.set_tracking_uri(registry.config.uri)
    yield
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("ambient")
def test_pyfunc_builds_the_pool_from_the_store(
    registry: PoolRegistry, store: StoreConfig, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    import pandas as pd

    module = ModuleType("sapt_core.versions.predictor")
    module.Predictor = ReadingPredictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sapt_core.versions.predictor", module)
    content = json.dumps({"tasks": [{"name": "a"}, {"name": "b"}], "block": open_store(store).put(b"bytes")}).encode()
    registry.publish(
        content, store, lineage=LINE, digest="ab", index=2, run_id=run_id, description="", tags=TAGS, metrics={}
    )
    model = mlflow.pyfunc.load_model("models:/sapt@latest")
    answers = model.predict(pd.DataFrame({"prompt": ["one", "two"]}, index=[7, 9]))
    assert answers.to_dict() == {
        "answer": {7: "one:bytes", 9: "two:bytes"},
        "weights": {7: '{"a": 0.5, "b": 0.5}', 9: '{"a": 0.5, "b": 0.5}'},
    }
    assert list(model.predict(pd.DataFrame({"prompt": ["one"]}), params={"return_weights": False})) == ["answer"]
    with pytest.raises(mlflow.MlflowException, match="neither a column prompt"):
        model.predict(pd.DataFrame({"question": ["one"]}))


def test_modules_import_without_mlflow() -> None:
    code = "import sys, cluster.tracking.registry; sys.exit(bool({'mlflow', 'ray', 'boto3'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
