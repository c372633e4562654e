"""Versions of the PET pool in MLflow's registry.

The bytes of a pool stay in the content-addressed store; a model version says where (``cluster.tracking.files``). So
version t+1 copies nothing of version t, and reading a version runs no code that lies in the registry.

MLflow itself resolves the alias ``latest`` to the newest version and refuses to have it set, so nothing
is done for it here.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.tracking.files import MANIFEST_FILE, POOL_FILE, read_version, save_version
from cluster.tracking.lines import (
    LINE,
    LINEAGE,
    PARENT,
    SNAPSHOT,
    Lineage,
    Place,
    PoolVersion,
    parent_of,
    place_of,
    require_continuation,
)
from cluster.tracking.runs import metric_name, score_time
from cluster.tracking.service import MODEL, client_of, experiment_of, reported
from sapt_core.errors import LineageError, SnapshotError, TrackingError
from sapt_core.io.addresses import redacted
from sapt_core.settings import StoreConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
NUMBER = "{version}"  # in a description: the version's own number
_AMBIENT = threading.Lock()

log = logging.getLogger(__name__)

_REFERENCE = re.compile(r"""(?:models:/(?P<model>[^/@'"]+)[/@])?(?P<selector>[^/@:]+)""")


@dataclass(frozen=True)
class PoolRegistry:
    """Publishes and finds pools. Every method raises ``TrackingError`` when MLflow cannot be used.

    Attributes:
        config: as ``cluster.tracking.service.check`` or ``resolved`` returned it.
    """

    config: TrackingConfig

    def check_continuation(self, lineage: Lineage) -> None:
        """Refuse a sequence that would not go on the line that it belongs to; see ``require_continuation``.

        Raises:
            LineageError: with what is there, what is asked and what to do.
        """
        require_continuation(self.versions(), lineage, model=self.config.model, line=self.config.line)

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
        parent: str | None = None,
        learnt_in: str | None = None,
    ) -> int:
        """Make the snapshot the next version of its line, or find the version that it already is.

        The version appears at once and complete: MLflow's logged model and its files come first. MLflow has no
        create-if-absent, so of two processes that publish the same snapshot at the same time both may make a
        version; each then looks again, and whoever has not the lowest number takes its own back. Another
        client can see the second one for that moment. Of two that go on from one version, whoever comes second
        becomes a line of its own, and is told.

        Args:
            manifest: ``manifest.json`` of the snapshot, UTF-8 JSON.
            store: where its blobs are; a folder must be absolute.
            lineage: of the sequence.
            digest: identity of the snapshot's content (hex).
            index: tasks learnt, from 1; the metrics' step and the tag ``index``.
            run_id: the sequence's run.
            description: of the version in the UI (Markdown), where a link to the run follows it; ``NUMBER`` in it
                becomes the version's number as soon as that is known.
            tags: task, tasks, method, backbone, ap, f_ra …
            metrics: scores so far by name, shown beside the version in the UI.
            parent: digest of the snapshot that it goes on from; None for a first task.
            learnt_in: the version's own run, by whose metrics MLflow compares versions, so that two of one sequence
                differ; None is ``run_id``. It gets the metrics too.

        Returns:
            The version's number.

        Raises:
            LineageError: another sequence, which has no version in common with this one, has published meanwhile.
        """
        with reported(self.config.uri):
            if (there := self._with_digest(digest)) is not None:
                self._number(there)
                return int(there.version)
            versions = self.versions()
            place = self._place(versions, lineage, index, parent)
            if isinstance(place, PoolVersion):
                return place.version
            client = client_of(self.config.uri)
            self._make_registered_model()
            own = learnt_in or run_id
            model = self._logged_model(manifest, store, digest=digest, index=index, run_id=own, metrics=metrics)
            before = parent_of(versions, parent, lineage.names[index - 2] if index > 1 else None)
            snapshot = parent if before is None else before.tags.get(SNAPSHOT, parent)
            with _ambient(self.config.uri):
                made = client.create_model_version(
                    self.config.model,
                    source=model.model_uri,
                    run_id=own,
                    model_id=model.model_id,
                    description=f"{description} [Run](#/experiments/{model.experiment_id}/runs/{run_id})",
                    tags={
                        **tags,
                        "index": str(index),
                        SNAPSHOT: digest,
                        LINEAGE: lineage.names[index - 1],
                        LINE: place.line,
                        **({} if snapshot is None else {PARENT: snapshot}),
                    },
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
            if first.version == made.version:
                self._settle(int(made.version), place, lineage, index, parent)
            self._number(first)
            return int(first.version)

    def _number(self, version: ModelVersion) -> None:
        """Write a version's number into its description, once it has one."""
        description = version.description or ""
        if NUMBER in description:
            text = description.replace(NUMBER, str(version.version))
            client_of(self.config.uri).update_model_version(self.config.model, version.version, text)

    def _place(
        self, versions: Sequence[PoolVersion], lineage: Lineage, index: int, parent: str | None
    ) -> Place | PoolVersion:
        config = self.config
        return place_of(versions, lineage, index, model=config.model, parent=parent, line=config.line)

    def _settle(self, version: int, place: Place, lineage: Lineage, index: int, parent: str | None) -> None:
        """See where a version belongs, now that it has its number: of two at once the lower one was first.

        Raises:
            LineageError: another sequence's first version was faster; this one is taken back.
        """
        client, model = client_of(self.config.uri), self.config.model
        earlier = [each for each in self.versions() if each.version < version]
        try:
            settled = self._place(earlier, lineage, index, parent)
        except LineageError:
            client.delete_model_version(model, str(version))
            raise
        if isinstance(settled, Place) and settled != place:
            client.set_model_version_tag(model, str(version), LINE, settled.line)
            place = settled
        if place.branched is not None:
            log.warning(
                "Version %d of %s is a line of its own, %s: while it was learnt, somebody else's version became the "
                "newest of line %s after version %d, which it goes on from. It is not the champion; to make it that, "
                "promote it by the name of its line",
                version,
                model,
                place.line,
                place.branched.line,
                place.branched.version,
            )

    def models(self) -> list[str]:
        """Names of all registered models, those of other tools too."""
        names: list[str] = []
        token = None
        with reported(self.config.uri):
            while True:
                page = client_of(self.config.uri).search_registered_models(page_token=token)
                names += [model.name for model in page]
                if not (token := page.token):
                    return names

    def versions(self, name: str | None = None) -> list[PoolVersion]:
        """All versions of a registered model, oldest first; none of one that is not there.

        Args:
            name: of the model; None is ``tracking.model``.
        """
        name = name or self.config.model
        with reported(self.config.uri):
            found = sorted(self._versions(name), key=lambda each: int(each.version))
            aliases = self._aliases(name) if found else {}
        return [
            PoolVersion(
                model=name,
                version=int(each.version),
                aliases=tuple(sorted(alias for alias, target in aliases.items() if target == int(each.version))),
                tags=dict(each.tags),
                run_id=each.run_id or None,
                source=each.source or "",
            )
            for each in found
        ]

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
        versions = {found.version: found for found in self.versions(name)}
        aliases = {alias: found.version for found in versions.values() for alias in found.aliases}
        number = int(selector) if selector.isascii() and selector.isdigit() else aliases.get(selector)
        if selector == "latest" and versions:
            number = max(versions)
        if number not in versions:
            raise TrackingError(f"{reference!r} does not exist in MLflow: {_inventory(name, versions, aliases)}")
        return versions[number]

    def crown(self, version: PoolVersion) -> None:
        """Make a version the champion; ``previous`` remembers the one that it was."""
        champion = self.with_alias(CHAMPION)
        if champion is None or champion.version != version.version:
            # In this order, so that between the two calls the champion is one of both.
            if champion is not None:
                self._set_alias(PREVIOUS, champion.version)
            self._set_alias(CHAMPION, version.version)

    def swap(self, champion: PoolVersion, previous: PoolVersion) -> None:
        """Take the champion back for the one before it, which it then is itself."""
        self._set_alias(CHAMPION, previous.version)
        self._set_alias(PREVIOUS, champion.version)

    def with_alias(self, alias: str) -> PoolVersion | None:
        """The version of ``tracking.model`` that has an alias; None if none has."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def with_snapshot(self, digest: str) -> PoolVersion | None:
        """The oldest version of ``tracking.model`` with this content; None if none has it."""
        return next((version for version in self.versions() if version.tags.get(SNAPSHOT) == digest), None)

    def tag(self, version: PoolVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version; those that are there are replaced."""
        with reported(self.config.uri):
            for name, value in tags.items():
                client_of(self.config.uri).set_model_version_tag(version.model, str(version.version), name, value)

    def scores(self, version: PoolVersion) -> dict[str, float]:
        """The figures that a version was published with, by their names in MLflow; none of a foreign one."""
        if not version.source.startswith("models:/"):
            return {}
        with reported(self.config.uri):
            model = client_of(self.config.uri).get_logged_model(version.source.removeprefix("models:/"))
        return {metric.key: metric.value for metric in model.metrics or ()}

    def _set_alias(self, alias: str, version: int) -> None:
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
                self.config.model,
                description="PET pools of SAPT on Ray: one version for every task learnt. In a line (tag `line`) a "
                "version knows all tasks of those before it; `champion` is the one that was chosen to answer.",
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
