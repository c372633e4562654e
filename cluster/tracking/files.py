"""The files of a registered version: what is written into it, and what is believed of it when it is read.

A version holds the snapshot's ``manifest.json``, a ``pool.json`` that says which store has its blobs, and the code
that answers with them, so that it is served from what it names itself.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

import cluster
import sapt_core
from cluster.store import open_store
from sapt_core.errors import SnapshotError
from sapt_core.io.addresses import without_user
from sapt_core.settings import StoreConfig

MANIFEST_FILE = "manifest.json"
POOL_FILE = "pool.json"
POOL_SCHEMA = 1
EXAMPLE_FILE = "input_example.json"
SERVED_EXAMPLE_FILE = "serving_input_example.json"

# MLflow 3.17 runs a model's code with an entry of its own in sys.modules, and two threads that do leave it there.
_SAVING = threading.Lock()

# What the code imports to answer. Our own name is none of them: whoever had it in a public index would run there.
_PACKAGES = (
    "accelerate",
    "boto3",
    "datasets",
    "gguf",
    "httpx2",
    "huggingface-hub",
    "jinja2",
    "mlflow",
    "numpy",
    "pandas",
    "pydantic",
    "regex",
    "safetensors",
    "scikit-learn",
    "torch",
    "transformers",
)


def read_version(
    manifest_path: Path, pool_path: Path, endpoint: str | None, moved: str | None = None
) -> tuple[bytes, StoreConfig]:
    """Manifest and store of a published pool, from the two files of its model version.

    Args:
        manifest_path, pool_path: the files.
        endpoint: S3 endpoint of the reader; None is the AWS environment's. It is the one that is used.
        moved: where the reader says that the store lies now; None: where the version was published.

    Raises:
        SnapshotError: a file is missing or damaged, written by a newer release, or names another endpoint than the
            reader's: who can write to the registry must not draw requests that are signed with his credentials.
    """
    try:
        manifest = manifest_path.read_bytes()
        pool = json.loads(pool_path.read_bytes())
    except FileNotFoundError as error:
        raise SnapshotError(
            f"The model version holds no PET pool: {error.filename and Path(error.filename).name} is missing. "
            "Give a version that pipelines/continual.py published."
        ) from error
    except (OSError, ValueError) as error:
        raise SnapshotError(f"The model version's {POOL_FILE} cannot be read: {error}") from error
    schema = pool.get("schema_version") if isinstance(pool, dict) else None
    if schema != POOL_SCHEMA:
        raise SnapshotError(
            f"{POOL_FILE} has schema_version {schema!r}, and this release reads {POOL_SCHEMA}: "
            "update SAPT on Ray, or publish the pool again."
        )
    found, stated = hashlib.sha256(manifest).hexdigest(), pool.get("manifest_sha256")
    if found != stated:
        raise SnapshotError(
            f"{MANIFEST_FILE} is damaged: its sha256 is {found}, {POOL_FILE} states {stated}. Publish the pool again."
        )
    try:
        stated = StoreConfig.model_validate(pool.get("store"))
    except ValidationError as error:
        raise SnapshotError(f"{POOL_FILE} names no usable store: {error.errors()[0]['msg']}") from error
    if moved is not None:
        return manifest, StoreConfig(uri=moved, endpoint_url=endpoint)
    store = stated.model_copy(update={"endpoint_url": endpoint})
    if stated.endpoint_url is not None and stated.uri.startswith("s3://"):
        own = _endpoint_in_use(store)
        if _place(stated.endpoint_url) != _place(own):
            public = without_user(stated.endpoint_url)
            raise SnapshotError(
                f"The version says that its store {stated.uri} is at {public!r}, and your S3 requests go to "
                f"{without_user(own)}: they are not sent elsewhere because a registry says so. If that address is to "
                f"be trusted with your credentials, give store.endpoint_url={public}, or where a model is served, "
                f"AWS_ENDPOINT_URL_S3={public}."
            )
    return manifest, store


def _endpoint_in_use(store: StoreConfig) -> str:
    from cluster.store.s3 import S3Store  # noqa: PLC0415  boto3 only where S3 is used

    opened = open_store(store)
    assert isinstance(opened, S3Store)  # noqa: S101
    return str(opened.client.meta.endpoint_url)


def _place(endpoint: str) -> tuple[str, str | None, int | None, str]:
    """Where an endpoint is, however it is written."""
    parts = urlsplit(endpoint)
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    try:
        return parts.scheme, parts.hostname, parts.port or usual, parts.path.rstrip("/")
    except ValueError as error:
        raise SnapshotError(f"{POOL_FILE} names no usable store: {error}") from error


def save_version(folder: Path, manifest: bytes, store: StoreConfig, *, model_id: str, run_id: str) -> None:
    """Write the pyfunc model: the two files, pool_model.py, the packages that it imports and an example request."""
    import mlflow.pyfunc  # noqa: PLC0415
    from mlflow.models import Model, ModelSignature  # noqa: PLC0415
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema  # noqa: PLC0415
    from mlflow.types.schema import AnyType  # noqa: PLC0415

    # Texts. Of a "string" MLflow 3.17 makes the text "None" where JSON inputs have null, and that would be answered.
    any_type = AnyType()  # type: ignore[no-untyped-call]
    sources = folder.with_name("sources")
    sources.mkdir()
    (sources / MANIFEST_FILE).write_bytes(manifest)
    pool = {
        "schema_version": POOL_SCHEMA,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "store": _public(store),
    }
    (sources / POOL_FILE).write_text(json.dumps(pool, indent=1))
    with _SAVING, warnings.catch_warnings():
        # An example that it is given makes MLflow load and run the model here: its files are written below.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pool_model.py")),
            artifacts={"manifest": str(sources / MANIFEST_FILE), "pool": str(sources / POOL_FILE)},
            signature=ModelSignature(
                inputs=Schema([ColSpec(any_type, name, required=False) for name in ("prompt", "input", "task")]),
                outputs=Schema([ColSpec("string", "answer"), ColSpec("string", "weights")]),
                params=ParamSchema(
                    [
                        *(ParamSpec(name, "long", None) for name in ("max_new_tokens", "num_beams")),
                        ParamSpec("return_weights", "boolean", True),
                    ]
                ),
            ),
            code_paths=[str(Path(room.__path__[0])) for room in (sapt_core, cluster)],
            # Stated, because MLflow would find them by loading the model in another process.
            pip_requirements=_requirements(),
            mlflow_model=Model(
                model_id=model_id,
                run_id=run_id,
                saved_input_example_info={
                    "artifact_path": EXAMPLE_FILE,
                    "serving_input_path": SERVED_EXAMPLE_FILE,
                    "type": "dataframe",
                    "pandas_orient": "split",
                },
            ),
        )
    example = _example(manifest)
    (folder / EXAMPLE_FILE).write_text(json.dumps(example))
    (folder / SERVED_EXAMPLE_FILE).write_text(json.dumps({"dataframe_split": example}, indent=2))


def _example(manifest: bytes) -> dict[str, Any]:
    """A request as MLflow's pages show it and its server takes it: of the newest task, and no row of its data."""
    task = json.loads(manifest)["tasks"][-1]["name"]
    return {"columns": ["input", "task"], "data": [["Put the text of an input here.", task]]}


def _public(store: StoreConfig) -> dict[str, Any]:
    """The store's address as anybody may read it: absolute, and without credentials."""
    if "://" not in store.uri and not Path(store.uri).is_absolute():
        raise ValueError(f"store.uri {store.uri!r} is relative: readers of the registry have another working directory")
    return {"uri": store.uri, "endpoint_url": store.endpoint_url and without_user(store.endpoint_url)}


def _requirements() -> list[str]:
    # Without a local label such as +cpu, which public indexes do not have.
    return [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]
