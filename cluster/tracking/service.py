"""Reaching MLflow: where it is, whether it can be used, and what is said when it cannot.

Everything goes through ``MlflowClient`` with an explicit URI, so that nothing hangs on a process's settings.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cluster.interrupts import uninterrupted
from sapt_core.errors import TrackingError
from sapt_core.io.addresses import redacted
from sapt_core.settings import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL = "sapt.model"

_SERVER_ONLY = ("postgresql", "mysql", "mssql")
_CREDENTIALS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
# Before a run an unreachable server is told of in seconds; during one MLflow's own patience is right.
_IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}


def resolved(config: TrackingConfig) -> TrackingConfig:
    """The config with a URI that means the same in every working directory.

    Ray changes the working directory of its workers, so the driver calls this before it hands the config on.

    Raises:
        TrackingError: the URI is of a kind that cannot be used.
    """
    scheme, separator, rest = config.uri.partition("://")
    if not separator or scheme == "file":
        raise TrackingError(
            f"tracking.uri is {redacted(config.uri)}: MLflow 3 keeps no runs in plain folders. "
            "Give sqlite:///FOLDER/mlflow.db, or the http(s) address of an MLflow server."
        )
    if scheme.partition("+")[0] in _SERVER_ONLY:
        raise TrackingError(
            f"tracking.uri is {redacted(config.uri)}: a shared database needs a server in front of it, which also "
            "keeps the artifacts. Start `mlflow server --backend-store-uri ... --artifacts-destination ...` "
            "and give its http(s) address."
        )
    if scheme != "sqlite":
        return config
    path = rest.removeprefix("/")
    if path == rest or not path or path.startswith(":"):
        raise TrackingError(f"tracking.uri is {redacted(config.uri)}: give a file, as in sqlite:///FOLDER/mlflow.db.")
    return config.model_copy(update={"uri": f"sqlite:///{Path(path).absolute()}"})


def check(config: TrackingConfig) -> TrackingConfig:
    """Reach MLflow before anything is started, and make the experiment.

    A new sqlite file gets its tables here (some seconds), before several processes could race for it.

    Returns:
        The ``resolved`` config.

    Raises:
        TrackingError: MLflow cannot be reached within seconds, refuses the credentials or a write, or has
            no model registry.
    """
    config = resolved(config)
    with reported(config.uri):
        if (file := _sqlite_file(config.uri)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _try(file, config.uri, write=True)
        with environment_set(_IMPATIENT):
            client = client_of(config.uri)
            # A write, because a user may be let in to read only. It also says whose runs these are.
            client.set_experiment_tag(experiment_of(config), MODEL, config.model)
            client.search_registered_models(max_results=1)
    return config


def is_there(config: TrackingConfig) -> bool:
    """Whether MLflow can hold anything yet: it cannot where ``tracking.uri`` is a sqlite file still to be made.

    Raises:
        TrackingError: the URI is of a kind that cannot be used.
    """
    file = _sqlite_file(resolved(config).uri)
    return file is None or file.exists()


def check_readable(config: TrackingConfig) -> TrackingConfig:
    """Reach MLflow to read from it; nothing is made there.

    Returns:
        The ``resolved`` config.

    Raises:
        TrackingError: MLflow cannot be reached within seconds, refuses the credentials, or the sqlite file is missing.
    """
    config = resolved(config)
    if not is_there(config):
        raise TrackingError(
            f"tracking.uri is {redacted(config.uri)}: there is no such file. "
            "Give the URI that pipelines/continual.py ran with."
        )
    if (file := _sqlite_file(config.uri)) is not None:
        _try(file, config.uri, write=False)
    with reported(config.uri), environment_set(_IMPATIENT):
        client_of(config.uri).search_registered_models(max_results=1)
    return config


@lru_cache(maxsize=8)
def client_of(uri: str) -> MlflowClient:
    """The client of a ``resolved`` URI; its registry is the same server or file."""
    # Usage reports to a third party are not ours to send, and the links it prints would show a URI's password.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # files here are small
    from mlflow import MlflowClient  # noqa: PLC0415

    # "Creating initial MLflow tables...", "Waiting up to 300 seconds for model version..."
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or its transport raise into one ``TrackingError`` without secrets.

    An interrupt waits until the block is left: amid a statement it would leave a database locked for as long as its
    traceback lives, and so for the call that closes the run.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from requests import RequestException  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    try:
        with uninterrupted():
            yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        where = f"MLflow at {redacted(uri)}"
        said = redacted(" ".join(str(error).split("\n[SQL")[0].split()))
        code = getattr(error, "error_code", None)
        if code == "UNAUTHENTICATED":
            message = f"{where} refuses the credentials: set {_CREDENTIALS}. It said: {said}"
        elif code == "PERMISSION_DENIED":
            message = f"{where} forbids this: check the user's rights ({_CREDENTIALS}). It said: {said}"
        elif "failed with exception" in said:
            message = f"{where} cannot be reached: is the server running, and is tracking.uri right? {said}"
        else:
            message = f"{where} cannot be used: {said}"
        # The cause would print the URI as it was given.
        raise TrackingError(message) from None


def experiment_of(config: TrackingConfig) -> str:
    """Id of the experiment, made if it is missing.

    A server decides where artifacts lie; for a sqlite file it is the folder ``mlartifacts`` beside it.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    client = client_of(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        file = _sqlite_file(config.uri)
        location = None if file is None else (file.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(config.experiment, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return experiment_of(config)  # another process was faster
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The MLflow experiment {config.experiment!r} is deleted: restore it "
            f"(`mlflow experiments restore -x {experiment.experiment_id}`) or set tracking.experiment to another name."
        )
    return str(experiment.experiment_id)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _try(file: Path, uri: str, *, write: bool) -> None:
    """Find out at once what MLflow would try ten times, over two minutes and with a warning each.

    Raises:
        TrackingError: the file cannot be opened, or not be written, which takes a journal beside it.
    """
    mode = "rwc" if write else "ro"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode={mode}", uri=True, timeout=20)) as database:
            if write:
                database.executescript("BEGIN IMMEDIATE; CREATE TABLE sapt_can_write (x); ROLLBACK;")
            else:
                database.execute("SELECT name FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise TrackingError(
            f"MLflow at {uri} cannot be used: {error}. tracking.uri must name a sqlite file that this user can "
            f"{'write, in a folder that he can write to' if write else 'read'}, or the address of an MLflow server."
        ) from error


@contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Have environment variables set for a while, from which MLflow reads how patient it is to be."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
