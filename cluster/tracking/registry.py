"""Versions of the PET pool in MLflow's registry.

The bytes of a pool stay in the content-addressed store; a model version says where (``cluster.tracking.files``). So
version t+1 copies nothing of version t, and reading a version runs no code that lies in the registry.

MLflow itself resolves the alias ``latest`` to the newest version and refuses to have it set, so nothing
is done for it here.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.tracking.files import MANIFEST_FILE, POOL_FILE, read_version, save_version
from cluster.tracking.runs import metric_name, score_time
from cluster.tracking.service import MODEL, client_of, experiment_of, reported
from sapt_core.errors import LineageError, SnapshotError, TrackingError
from sapt_core.io.addresses import redacted
from sapt_core.settings import StoreConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

SNAPSHOT = "sapt.snapshot"
LINEAGE = "sapt.lineage"
SWEEP = "sweep"
_AMBIENT = threading.Lock()

_REFERENCE = re.compile(r"""(?:models:/(?P<model>[^/@'"]+)[/@])?(?P<selector>[^/@:]+)""")


@dataclass(frozen=True)
class PoolVersion:
    """One version of the registered model.

    Attributes:
        model: name of the registered model.
        version: its number, from 1.
        aliases: without ``latest``, which MLflow derives.
        tags: task, index, method and so on, as published.
        run_id: the sequence's run.
    """

    model: str
    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{self.model}/{self.version}"


@dataclass(frozen=True)
class Lineage:
    """Whose versions a sequence publishes.

    Attributes:
        asked: the sequence in words, for messages.
        names: of its versions, oldest first, as known before they are learnt; an ancestor has the same name. Empty
            where it is not said, for versions before one that the sequence goes on from.
        sweep: the sweep whose best trial it is: the next one may learn with other settings.
    """

    asked: str
    names: tuple[str, ...]
    sweep: str | None = None

    def holds(self, tags: Mapping[str, str]) -> bool:
        """Whether a version with these tags is one of the sequence's own, or of the sweep that it is of."""
        return tags.get(LINEAGE) in self.names or (self.sweep is not None and tags.get(SWEEP) == self.sweep)


@dataclass(frozen=True)
class PoolRegistry:
    """Publishes and finds pools. Every method raises ``TrackingError`` when MLflow cannot be used.

    Attributes:
        config: as ``cluster.tracking.service.check`` or ``resolved`` returned it.
    """

    config: TrackingConfig

    def check_continuation(self, lineage: Lineage) -> None:
        """Refuse a sequence that would publish over a pool that it does not go on from.

        It does where the newest version is one of its own or an ancestor, and where all of its versions are there
        already. ``tracking.replace`` allows the rest.

        Raises:
            LineageError: with what is there, what is asked and what to do.
        """
        with reported(self.config.uri):
            versions = {int(found.version): found for found in self._versions(self.config.model)}
        if not versions or self.config.replace:
            return
        newest = versions[max(versions)]
        known = {found.tags.get(LINEAGE) for found in versions.values()}
        if lineage.holds(newest.tags) or (lineage.names and known.issuperset(filter(None, lineage.names))):
            return
        learnt = newest.tags.get("tasks") or newest.tags.get("task", "not known")
        raise LineageError(
            f"tracking.model={self.config.model} holds another pool: its newest version, {newest.version}, is of "
            f"method {newest.tags.get('method', 'not known')}, tasks {learnt}. Asked is {lineage.asked}, which does "
            "not go on from it: other tasks, data, settings or another release. Give a tracking.model of its own, or "
            "tracking.replace=true, which leaves the versions that are there and makes this sequence `latest`."
        )

    def publish(
        self,
        manifest: bytes,
        store: StoreConfig,
        *,
        lineage: Lineage,
        digest: str,
        index: int,
        run_id: str,
        description: str,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> int:
        """Make the snapshot the next version, or find the version that it already is.

        The version appears at once and complete: MLflow's logged model and its files come first. MLflow has no
        create-if-absent, so of two processes that publish the same snapshot at the same time both may make a
        version; each then looks again, and whoever has not the lowest number takes its own back. Another
        client can see the second one for that moment.

        Args:
            manifest: ``manifest.json`` of the snapshot, UTF-8 JSON.
            store: where its blobs are; a folder must be absolute.
            lineage: of the sequence.
            digest: identity of the snapshot's content (hex).
            index: tasks learnt, from 1; the metrics' step and the tag ``index``.
            run_id: the sequence's run, which gets the metrics too.
            description: of the version in the UI (Markdown), where a link to the run follows it.
            tags: task, method, backbone, config hash, data digest, git commit …
            metrics: scores so far by name, shown beside the version in the UI.

        Returns:
            The version's number.

        Raises:
            LineageError: another sequence has published there meanwhile.
        """
        with reported(self.config.uri):
            if (there := self._with_digest(digest)) is not None:
                return int(there.version)
            self.check_continuation(lineage)
            client = client_of(self.config.uri)
            self._make_registered_model()
            model = self._logged_model(manifest, store, digest=digest, index=index, run_id=run_id, metrics=metrics)
            with _ambient(self.config.uri):
                made = client.create_model_version(
                    self.config.model,
                    source=model.model_uri,
                    run_id=run_id,
                    model_id=model.model_id,
                    description=f"{description} [Run](#/experiments/{model.experiment_id}/runs/{run_id})",
                    tags={**tags, "index": str(index), SNAPSHOT: digest, LINEAGE: lineage.names[index - 1]},
                )
            first = self._with_digest(digest) or made
            if first.version != made.version:
                client.delete_model_version(self.config.model, made.version)
            if first.source != made.source:
                client.delete_logged_model(model.model_id)
            else:
                # What MLflow's own log_model sets: the logged model's page links to the version.
                names = json.dumps([{"name": self.config.model, "version": str(first.version)}])
                client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": names})
            return int(first.version)

    def resolve(self, reference: str) -> PoolVersion:
        """Find the version that a user means.

        Args:
            reference: ``3``, ``latest``, an alias such as ``champion``, or ``models:/NAME/3``,
                ``models:/NAME@champion``.

        Raises:
            TrackingError: nothing of that name; the message lists what exists.
        """
        match = _REFERENCE.fullmatch(reference.strip())
        if match is None:
            raise TrackingError(
                f"{reference!r} names no model version: give a number, latest or an alias, "
                f"or in full models:/{self.config.model}/3 or models:/{self.config.model}@champion."
            )
        name, selector = match["model"] or self.config.model, match["selector"]
        with reported(self.config.uri):
            versions = {int(found.version): found for found in self._versions(name)}
            aliases = self._aliases(name) if versions else {}
        number = int(selector) if selector.isascii() and selector.isdigit() else aliases.get(selector)
        if selector == "latest" and versions:
            number = max(versions)
        if number not in versions:
            raise TrackingError(f"{reference!r} does not exist in MLflow: {_inventory(name, versions, aliases)}")
        found = versions[number]
        return PoolVersion(
            model=name,
            version=number,
            aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
            tags=dict(found.tags),
            run_id=found.run_id or None,
        )

    def set_alias(self, alias: str, version: int) -> None:
        """Give a version an alias, which it takes from the one that had it."""
        with reported(self.config.uri):
            client_of(self.config.uri).set_registered_model_alias(self.config.model, alias, str(version))

    def load_manifest(self, reference: str, endpoint: str | None) -> tuple[bytes, StoreConfig, PoolVersion]:
        """The manifest of a version, verified, and the store that has its blobs.

        Args:
            reference: as for ``resolve``.
            endpoint: S3 endpoint of the reader, ``store.endpoint_url``; None is the AWS environment's.

        Raises:
            SnapshotError: the version is no pool, is damaged, was written by a newer release, or names a host that
                is not the reader's own.
            TrackingError: there is no such version, or its files cannot be fetched.
        """
        from mlflow.artifacts import download_artifacts  # noqa: PLC0415

        found = self.resolve(reference)
        with reported(self.config.uri), tempfile.TemporaryDirectory() as folder:
            location = client_of(self.config.uri).get_model_version_download_uri(found.model, str(found.version))
            _require_own_host(location, self.config.uri)
            local = download_artifacts(f"{location}/artifacts", dst_path=folder, tracking_uri=self.config.uri)
            manifest, store = read_version(Path(local, MANIFEST_FILE), Path(local, POOL_FILE), endpoint)
        return manifest, store, found

    def _versions(self, name: str, tag: str = "") -> Iterator[ModelVersion]:
        token = None
        while True:
            page = client_of(self.config.uri).search_model_versions(f"name = '{name}'{tag}", page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _with_digest(self, digest: str) -> ModelVersion | None:
        """The oldest version with this content."""
        found = self._versions(self.config.model, f" and tags.`{SNAPSHOT}` = '{digest}'")
        return min(found, key=lambda each: int(each.version), default=None)

    def _aliases(self, name: str) -> dict[str, int]:
        aliases = client_of(self.config.uri).get_registered_model(name).aliases
        return {alias: int(number) for alias, number in aliases.items()}

    def _make_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            client_of(self.config.uri).create_registered_model(
                self.config.model, description="PET pools of SAPT on Ray: one version for every task learnt."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _logged_model(
        self,
        manifest: bytes,
        store: StoreConfig,
        *,
        digest: str,
        index: int,
        run_id: str,
        metrics: Mapping[str, float],
    ) -> LoggedModel:
        """The logged model behind a version. One that a killed process left behind is completed."""
        from mlflow.entities import Metric  # noqa: PLC0415

        client, experiment = client_of(self.config.uri), experiment_of(self.config)
        tags = {SNAPSHOT: digest, MODEL: self.config.model}
        condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        left = client.search_logged_models([experiment], condition, max_results=1)
        model: LoggedModel = (
            left[0]
            if left
            else client.create_logged_model(
                experiment, name=f"pool-{index:03d}", source_run_id=run_id, tags=tags, model_type="pool"
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder, "model")
            save_version(saved, manifest, store, model_id=model.model_id, run_id=run_id)
            try:
                client.log_model_artifacts(model.model_id, str(saved))
            except FileExistsError:
                # MLflow's copy stumbles when who publishes the same at this moment makes a folder a step ahead of it.
                client.log_model_artifacts(model.model_id, str(saved))
        if metrics:
            when = score_time(self.config, run_id, index)
            points = [Metric(metric_name(n), float(v), when, index, model.model_id) for n, v in metrics.items()]
            client.log_batch(run_id, metrics=points)
        client.finalize_logged_model(model.model_id, "READY")
        return model


@contextmanager
def _ambient(uri: str) -> Iterator[None]:
    """Make ``uri`` the process's own for a moment.

    MLflow's database store looks up a ``models:/m-...`` source there instead of in the client that calls it
    (mlflow/store/model_registry/sqlalchemy_store.py); a server does so on its own side.
    """
    import mlflow  # noqa: PLC0415

    with _AMBIENT:
        is_set = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
        before = mlflow.get_tracking_uri() if is_set else None
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it


def _require_own_host(location: str, uri: str) -> None:
    """Refuse files at another host than the tracking server's: MLflow would send it the server's credentials."""
    address, own = urlsplit(location), urlsplit(uri)
    sends = address.scheme in {"http", "https", "mlflow-artifacts"} and bool(address.netloc)
    if sends and (address.hostname, address.port) != (own.hostname, own.port):
        raise SnapshotError(
            f"The version's files are at {redacted(location)}, which is not MLflow at {redacted(uri)}: they are not "
            "fetched, as that host would get the credentials for MLflow. Publish the pool again."
        )


def _inventory(name: str, versions: Mapping[int, Any], aliases: Mapping[str, int]) -> str:
    if not versions:
        return f"the registered model {name!r} has no versions yet. Is tracking.model right?"
    shown = ", ".join(str(number) for number in sorted(versions))
    named = "".join(f", {alias} -> {number}" for alias, number in sorted(aliases.items()))
    return f"{name!r} has the versions {shown} and the aliases latest -> {max(versions)}{named}."
