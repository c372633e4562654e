"""MLflow runs on a sqlite file: what is written, what is written once, and what is said when it cannot be."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import Engine

from cluster.tracking import runs as tracking_runs
from cluster.tracking import service
from cluster.tracking.runs import LoggedDataset, Tracker, metric_name
from cluster.tracking.service import check, check_readable, client_of, resolved
from sapt_core.errors import DivergenceError, TrackingError
from sapt_core.settings import TrackingConfig

pytest_plugins = ["tests.mlflow_servers"]


@pytest.fixture
def config(sqlite_tracking: TrackingConfig) -> TrackingConfig:
    return sqlite_tracking


@pytest.fixture
def tracker(config: TrackingConfig) -> Tracker:
    return Tracker(config)


def start(tracker: Tracker, key: str = "a1") -> str:
    return tracker.start_sequence("sapt 3 tasks", key=key, params={"seed": 0}, tags={"sapt.config_digest": "c0"})


def runs(config: TrackingConfig) -> list:
    client = client_of(config.uri)
    return client.search_runs([client.get_experiment_by_name(config.experiment).experiment_id])


# --- URIs ---------------------------------------------------------------------------------------------


def test_relative_sqlite_file_is_fixed_to_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolved(TrackingConfig(uri="sqlite:///runs/mlflow.db"))
    assert config.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolved(config) == config


def test_server_address_stays() -> None:
    assert resolved(TrackingConfig(uri="https://mlflow.example:5000")).uri == "https://mlflow.example:5000"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///data/mlruns", "/data/mlruns"])
def test_file_store_is_refused_with_the_way_out(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"sqlite:///FOLDER/mlflow\.db"):
        check(TrackingConfig(uri=uri))


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://mlflow.db"])
def test_sqlite_without_a_file_is_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="give a file"):
        check(TrackingConfig(uri=uri))


def test_bare_database_is_refused_without_its_password() -> None:
    with pytest.raises(TrackingError, match="mlflow server") as caught:
        check(TrackingConfig(uri="postgresql+psycopg2://sapt:hunter2@db.example/mlflow"))
    assert "hunter2" not in str(caught.value)


# --- check --------------------------------------------------------------------------------------------


def test_check_makes_the_folder_the_tables_and_the_experiment(migrated_database: Path) -> None:
    assert [path.name for path in migrated_database.parent.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(migrated_database) as database:
        rows = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
    assert ("template", (migrated_database.parent / "mlartifacts").as_uri()) in rows


def test_artifacts_lie_beside_the_file_not_in_the_working_directory(
    migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs").mkdir()
    shutil.copy(migrated_database, "my runs")
    tracker = Tracker(check(TrackingConfig(uri="sqlite:///my runs/mlflow.db", experiment="fresh")))
    tracker.log_artifacts(start(tracker), {"report.html": "<p>ok</p>"})
    assert [path.read_text() for path in (tmp_path / "my runs" / "mlartifacts").rglob("report.html")] == ["<p>ok</p>"]
    assert [path.name for path in tmp_path.iterdir()] == ["my runs"]


def test_check_leaves_the_environment_as_it_was(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    check(config)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "4"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database " * 100)
    with pytest.raises(TrackingError, match=r"notes\.txt cannot be used.*file is not a database") as caught:
        check(TrackingConfig(uri=f"sqlite:///{tmp_path}/notes.txt"))
    assert "SELECT" not in str(caught.value)


@contextmanager
def another_user() -> Iterator[None]:
    """Root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o777, 0o444), (0o555, 0o666)], ids=["file", "folder"])
def test_read_only_sqlite_is_told_of_at_once_in_one_line(
    folder_mode: int, file_mode: int, migrated_database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        shutil.copy(migrated_database, folder)
        config = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
        Path(folder, "mlflow.db").chmod(file_mode)
        Path(folder).chmod(folder_mode)
        with another_user():
            with pytest.raises(TrackingError, match="attempt to write a readonly database") as caught:
                check(config)
            assert check_readable(config).uri == config.uri  # versions may be read from there
        Path(folder).chmod(0o700)
    assert "\n" not in str(caught.value)
    assert "in a folder that he can write to" in str(caught.value)
    assert caplog.messages == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("reach", [check, check_readable])
def test_sqlite_file_that_is_a_folder(reach: Callable[[TrackingConfig], TrackingConfig], tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"unable to open database file|disk I/O error"):
        reach(TrackingConfig(uri=f"sqlite:///{tmp_path}"))


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(TrackingError, match="taken"):
        check(TrackingConfig(uri=f"sqlite:///{tmp_path}/taken/mlflow.db"))


def test_deleted_experiment_is_named_with_the_way_out(config: TrackingConfig) -> None:
    client = client_of(config.uri)
    client.delete_experiment(client.get_experiment_by_name("unit").experiment_id)
    with pytest.raises(TrackingError, match=r"'unit' is deleted.*tracking\.experiment"):
        check(config)


def test_unreachable_server_is_told_of_at_once_and_without_its_password(unused_port: int) -> None:
    with pytest.raises(TrackingError, match="cannot be reached") as caught:
        check(TrackingConfig(uri=f"http://ann:hunter2@127.0.0.1:{unused_port}"))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.timeout(30)
def test_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(service._IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingError, match="cannot be reached"):
            check(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives the same answer to everything, as a login proxy does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, b"You are not authenticated.", "refuses the credentials: set MLFLOW_TRACKING_USERNAME"),
        (403, b"Permission denied", "forbids this: check the user's rights"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "forbids this: check the user's rights"),
        (200, b"<html>Welcome to nginx</html>", "cannot be used"),
    ],
)
def test_answers_that_are_not_yes(status: int, body: bytes, expected: str) -> None:
    with answering(status, body) as host, pytest.raises(TrackingError, match=expected) as caught:
        check(TrackingConfig(uri=f"http://ann:hunter2@{host}"))
    assert "hunter2" not in str(caught.value)


def test_a_sequence_is_found_as_it_stands(tracker: Tracker, config: TrackingConfig) -> None:
    assert tracker.find_sequence("a1") is None
    run = start(tracker)
    tracker.finish(run, "FINISHED")
    assert tracker.find_sequence("a1") == run
    assert tracker.find_sequence("b2") is None
    assert client_of(config.uri).get_run(run).info.status == "FINISHED"
    elsewhere = Tracker(config.model_copy(update={"experiment": "not there"}))
    assert elsewhere.find_sequence("a1") is None
    assert client_of(config.uri).get_experiment_by_name("not there") is None


def test_tags_are_replaced(tracker: Tracker, config: TrackingConfig) -> None:
    run = start(tracker)
    tracker.log_tags(run, {"warnings": "two"})
    tracker.log_tags(run, {"warnings": "none"})
    assert client_of(config.uri).get_run(run).data.tags["warnings"] == "none"


def test_data_sets_are_inputs_of_the_run_once_and_without_their_text(tracker: Tracker, config: TrackingConfig) -> None:
    run = start(tracker)
    made = LoggedDataset("made", "ab" * 32, None, {"train": 3}, "training")
    read = LoggedDataset("read", "cd" * 32, "/data/read", {"train": 4}, "evaluation")
    for _ in range(2):
        tracker.log_datasets(run, [made, read])
    logged = client_of(config.uri).get_run(run).inputs.dataset_inputs
    found = {each.dataset.name: (each.dataset.to_dictionary(), each.tags[0].value) for each in logged}
    assert len(logged) == 2
    assert found["made"] == (
        {
            "name": "made",
            "digest": "ab" * 18,
            "source_type": "code",
            "source": '{"tags": {"sha256": "' + "ab" * 32 + '"}}',
            "profile": '{"train": 3}',
            "schema": None,
        },
        "training",
    )
    assert (found["read"][0]["source_type"], found["read"][0]["source"]) == ("local", '{"uri": "/data/read"}')


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["score/task181_outcome_extraction", "AP", "a b-c.d:e/f_1"])
def test_good_names_stay(name: str) -> None:
    assert metric_name(name) == name


def test_two_bad_names_stay_two() -> None:
    assert metric_name("score/a+b") != metric_name("score/a@b")
    assert metric_name("score/a+b").startswith("score/a_b-")


@given(st.text(min_size=1, max_size=400))
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    _validate_metric_name(metric_name(name))
    assert len(metric_name(name)) <= MAX_ENTITY_KEY_LENGTH


# --- runs ---------------------------------------------------------------------------------------------


def test_same_key_goes_on_in_the_same_run(tracker: Tracker, config: TrackingConfig) -> None:
    first = start(tracker)
    tracker.finish(first, "FAILED")
    assert client_of(config.uri).get_run(first).info.status == "FAILED"
    again = tracker.start_sequence("sapt 3 tasks", key="a1", params={"seed": 5, "late": 1}, tags={"try": "2"})
    run = client_of(config.uri).get_run(first)
    assert again == first
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "0", "late": "1"}
    assert run.data.tags["sapt.config_digest"] == "c0"
    assert run.data.tags["try"] == "2"
    assert start(tracker, key="b2") != first
    assert len(runs(config)) == 2


def test_hundreds_of_params_and_a_long_one(tracker: Tracker, config: TrackingConfig) -> None:
    params = {f"field{number}": number for number in range(230)} | {"tasks": "x" * 9000}
    run_id = tracker.start_sequence("many", key="a1", params=params, tags={"plan": "y" * 9000})
    run = client_of(config.uri).get_run(run_id)
    assert run.data.params["field229"] == "229"
    assert run.data.params["tasks"] == "x" * 5999 + "…"
    assert len(run.data.params) == 231
    assert run.data.tags["plan"].endswith("y…")


def test_stage_is_a_finished_child_with_its_curves(tracker: Tracker, config: TrackingConfig) -> None:
    parent = start(tracker)
    curve = [(step, 1 / (step + 1)) for step in range(2500)]
    run_id = tracker.log_stage(
        parent,
        "train[01 task181]",
        key="f00d",
        metrics={"loss": 0.25},
        curves={"train/loss": curve},
        seconds=90.0,
        tags={"task": "task181"},
    )
    client = client_of(config.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 90_000
    assert run.info.run_name == "train[01 task181]"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["task"] == "task181"
    assert run.data.metrics["loss"] == 0.25
    assert run.data.metrics["seconds"] == 90.0
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")] == curve


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_told_and_nothing_is_written(
    tracker: Tracker, config: TrackingConfig, value: float
) -> None:
    parent = start(tracker)
    said = (
        r"Figures of train\[01 b\] are no finite numbers, so they are not published: kl, loss\. .*train\.learning_rate"
    )
    with pytest.raises(DivergenceError, match=said):
        tracker.log_stage(
            parent,
            "train[01 b]",
            key="f00d",
            metrics={"kl": value, "rows": 3},
            curves={"loss": [(1, value)]},
            seconds=1,
        )
    with pytest.raises(DivergenceError, match=r"Figures of step 2 are no finite numbers.*: ap"):
        tracker.log_scores(parent, 2, {"ap": value, "f_ra": 0.0})
    (run,) = runs(config)
    assert run.data.metrics == {}


def test_stage_is_written_once_under_each_parent(tracker: Tracker, config: TrackingConfig) -> None:
    parents = [start(tracker, "a1"), start(tracker, "b2")]
    written = [
        tracker.log_stage(parent, "train", key="f00d", metrics={"loss": loss}, seconds=1.0)
        for parent in parents
        for loss in (0.5, 0.25)
    ]
    assert written[0] == written[1]
    assert written[2] == written[3] != written[0]
    assert client_of(config.uri).get_run(written[0]).data.metrics["loss"] == 0.5
    assert len(runs(config)) == 4


def test_half_written_stage_is_replaced(
    tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start(tracker)
    with monkeypatch.context() as patch:
        patch.setattr(
            client_of(config.uri), "set_terminated", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("x"))
        )
        with pytest.raises(TrackingError):
            tracker.log_stage(parent, "train", key="f00d", metrics={"loss": 0.5}, seconds=1.0)
    run_id = tracker.log_stage(parent, "train", key="f00d", metrics={"loss": 0.5}, seconds=1.0)
    children = [run for run in runs(config) if "mlflow.parentRunId" in run.data.tags]
    assert [run.info.run_id for run in children] == [run_id]
    assert len(client_of(config.uri).get_metric_history(run_id, "loss")) == 1


def test_two_drivers_at_once_write_one_run_and_each_stage_once(
    tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, processes = client_of(config.uri), iter([os.getpid(), os.getppid()])
    mine = threading.local()

    def writer() -> dict[str, object]:
        mine.process = getattr(mine, "process", None) or next(processes)
        return {"host": socket.gethostname(), "process": mine.process}

    monkeypatch.setattr(tracking_runs, "this_process", writer)
    # Both have looked for a run, and for the stage's, and found none; both make one.
    meeting = threading.Barrier(2, timeout=60)

    def together(call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **kwargs: object) -> object:
            meeting.wait()
            done = call(*args, **kwargs)
            meeting.wait()
            return done

        return called

    monkeypatch.setattr(client, "create_run", together(client.create_run))

    def driver(loss: float) -> tuple[str, str]:
        parent = start(tracker)
        return parent, tracker.log_stage(parent, "train", key="f00d", metrics={"loss": loss}, seconds=1.0)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(driver, [0.5, 0.5])
    assert first == second
    assert {run.info.run_id: run.info.status for run in runs(config)} == {first[0]: "RUNNING", first[1]: "FINISHED"}
    assert len(client.get_metric_history(first[1], "loss")) == 1


def test_another_drivers_stage_is_left_until_that_one_has_died(
    tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, client = start(tracker), client_of(config.uri)

    def stop(*args: object, **kwargs: object) -> None:
        raise OSError("x")

    with monkeypatch.context() as patch:
        patch.setattr(client, "set_terminated", stop)
        patch.setattr(tracking_runs, "this_process", lambda: {"host": "elsewhere", "process": 1})
        with pytest.raises(TrackingError):
            tracker.log_stage(parent, "train", key="f00d", metrics={}, seconds=1.0)
    tracker.finish(parent, "KILLED")
    assert sorted(run.info.status for run in runs(config)) == ["KILLED", "RUNNING"]
    monkeypatch.setattr(tracking_runs, "_WRITING_SECONDS", -1)
    tracker.finish(parent, "KILLED")
    assert [run.info.status for run in runs(config)] == ["KILLED"]


def test_closing_a_sequence_leaves_no_stage_half_written(
    tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    comparison, parent = start(tracker, "c3"), start(tracker)
    nested = tracker.start_sequence("runs still", key="d4", params={}, tags={}, parent=parent)
    whole = tracker.log_stage(parent, "prepare", key="beef", metrics={}, seconds=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(client_of(config.uri), "set_terminated", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tracker.log_stage(parent, "train", key="f00d", metrics={"loss": 0.5}, seconds=1.0)
    tracker.finish(parent, "KILLED")
    statuses = {run.info.run_id: run.info.status for run in runs(config)}
    assert statuses == {comparison: "RUNNING", nested: "RUNNING", parent: "KILLED", whole: "FINISHED"}


def test_an_interrupt_amid_a_statement_leaves_the_database_usable(tracker: Tracker, config: TrackingConfig) -> None:
    """Its traceback lives while the run is closed: a statement that it broke off would hold sqlite's lock."""
    sent = []

    def interrupt(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "INTO tags" in statement and not sent:
            sent.append(statement)
            signal.raise_signal(signal.SIGINT)

    parent = start(tracker)
    event.listen(Engine, "after_cursor_execute", interrupt)
    try:
        tracker.log_stage(parent, "train", key="f00d", metrics={"loss": 0.5}, seconds=1.0)
    except KeyboardInterrupt:
        tracker.finish(parent, "KILLED")
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    assert sent
    statuses = {run.info.run_name: run.info.status for run in runs(config)}
    assert statuses == {"sapt 3 tasks": "KILLED", "train": "FINISHED"}


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])  # the second breaks into the call
@pytest.mark.parametrize("call", ["create_run", "log_batch"])
def test_a_sequence_that_is_interrupted_while_it_is_opened_is_closed(
    call: str, times: int, tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(client_of(config.uri), call)

    def interrupted(*args: object, **kwargs: object) -> object:
        made = whole(*args, **kwargs)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return made

    comparison = start(tracker, "c3")
    with monkeypatch.context() as patch:
        patch.setattr(client_of(config.uri), call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.start_sequence("trial", key="d4", params={"a": 1}, tags={}, parent=comparison)
    statuses = {run.info.run_name: run.info.status for run in runs(config)}
    assert statuses.pop("trial") == "KILLED"
    assert list(statuses.values()) == ["RUNNING"]
    assert tracker.start_sequence("trial", key="d4", params={"a": 1}, tags={}) in {
        run.info.run_id for run in runs(config)
    }
    assert len(runs(config)) == 2


def test_scores_are_points_over_the_tasks_learnt(tracker: Tracker, config: TrackingConfig) -> None:
    run_id = start(tracker)
    tracker.log_scores(run_id, 1, {"AP": 90.0, "score/a+b": 90.0})
    tracker.log_scores(run_id, 2, {"AP": 80.0, "F.Ra": 2.5})
    history = client_of(config.uri).get_metric_history(run_id, "AP")
    assert [(point.step, point.value) for point in history] == [(1, 90.0), (2, 80.0)]
    assert set(client_of(config.uri).get_run(run_id).data.metrics) == {"AP", "F.Ra", metric_name("score/a+b")}


def test_artifacts_text_and_bytes(tracker: Tracker, config: TrackingConfig, tmp_path: Path) -> None:
    run_id = start(tracker)
    tracker.log_artifacts(run_id, {"report.html": "old", "plots/scores.png": b"\x89PNG"})
    tracker.log_artifacts(run_id, {"report.html": "τ"})
    local = Path(client_of(config.uri).download_artifacts(run_id, "", str(tmp_path)))
    assert (local / "report.html").read_text(encoding="utf-8") == "τ"
    assert (local / "plots" / "scores.png").read_bytes() == b"\x89PNG"


def test_a_table_is_replaced_and_read_by_mlflow(
    tracker: Tracker, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = client_of(config.uri), start(tracker)
    columns = ("task", "answer", "score", "weights")
    tracker.log_table(run_id, "answers.json", columns, [("a", "old", 0.0, "")])
    tracker.log_table(run_id, "other.json", columns, [("a", "x", 0.0, "")])
    rows = [("a", "fox τ", 66.7, '{"a": 0.25, "b": 0.75}'), ("b", "", 0.0, "")]
    tracker.log_table(run_id, "answers.json", columns, rows)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.uri)  # load_table searches there, whatever its client is of
    table = client.load_table(client.get_run(run_id).info.experiment_id, "answers.json", [run_id])
    assert list(table.itertuples(index=False, name=None)) == rows
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert sorted(each["path"] for each in listed) == ["answers.json", "other.json"]
    assert {each["type"] for each in listed} == {"table"}


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt"])
def test_artifact_paths_stay_inside(tracker: Tracker, name: str) -> None:
    with pytest.raises(ValueError, match="leaves the run"):
        tracker.log_artifacts(start(tracker), {name: "x"})


def test_tracker_travels(tracker: Tracker) -> None:
    run_id = start(tracker)
    assert start(pickle.loads(pickle.dumps(tracker))) == run_id  # noqa: S301
