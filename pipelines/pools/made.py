"""A version that was made without training: kept in the store, and registered."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.store import ArtifactStore
    from cluster.tracking.lines import Lineage
    from sapt_core.settings import StoreConfig, TrackingConfig
    from sapt_core.versions.manifest import Manifest


def keep(store: ArtifactStore, manifest: Manifest, kind: str, what: str, metrics: Mapping[str, Any]) -> None:
    """Record the version, so that nobody takes its bytes for something that nothing needs.

    Args:
        store: has its blobs.
        manifest: the version.
        kind: of the record: how it was made.
        what: was brought in or taken out.
        metrics: of the record.
    """
    from cluster.stages import StageRecord
    from sapt_core.io.hashing import canonical_hash

    key = canonical_hash([kind, manifest.digest])
    record = StageRecord(
        kind=kind,
        name=f"{kind}:{what}",
        key=key,
        inputs={},
        outputs={"manifest": manifest.digest},
        values={},
        metrics=dict(metrics),
        seconds=0.0,
        finished_at=datetime.now(UTC),
        world_size=1,
    )
    store.commit_record(key, record.model_dump(mode="json"))


def register(
    manifest: Manifest,
    store: StoreConfig,
    tracking: TrackingConfig,
    lineage: Lineage,
    *,
    run: str,
    description: str,
    tags: Mapping[str, str] | None = None,
    parent: str | None,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> int:
    """Make the version the next of its model, in a run of its own; returns its number.

    Args:
        manifest: the version.
        store: has its blobs.
        tracking: with the model.
        lineage: of the version.
        run: name of the run.
        description: of the version, for people.
        tags: beside those that every version has.
        parent: snapshot of the version that it goes on from.
        params: of the run.
        metrics: of the version.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    from cluster.store import resolved
    from cluster.tracking.registry import PoolRegistry
    from cluster.tracking.runs import Tracker
    from cluster.tracking.service import check
    from pipelines.console.checkout import git_commit

    checked = check(tracking)
    tracker = Tracker(checked)
    common = {"method": manifest.method.name, "backbone": manifest.backbone.path, **(tags or {})}
    made_from = {"git_commit": git_commit()}
    run_id = tracker.start_sequence(run, key=lineage.names[-1], params=dict(params or {}), tags={**common, **made_from})
    names = [task.name for task in manifest.tasks]
    number = PoolRegistry(checked).publish(
        manifest.to_bytes(),
        resolved(store),
        lineage=lineage,
        digest=manifest.digest,
        index=len(lineage.names),
        run_id=run_id,
        description=description,
        tags={"task": names[-1], "tasks": ", ".join(names), **common},
        metrics=metrics or {},
        parent=parent,
    )
    tracker.finish(run_id, "FINISHED")
    return number
