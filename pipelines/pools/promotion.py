"""A change of the champion, and what is kept of it: who, when, why and by which figures."""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.tracking.lines import PoolVersion
    from cluster.tracking.registry import PoolRegistry
    from pipelines.sequence.gate import Row


@dataclass(frozen=True)
class Promotion:
    """A version that becomes the champion.

    Attributes:
        version: the version.
        before: the champion until now.
        record: what is kept.
    """

    version: PoolVersion
    before: PoolVersion | None
    record: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        version: PoolVersion,
        before: PoolVersion | None,
        why: str,
        rows: Sequence[Row] = (),
        against: Sequence[str] = (),
    ) -> Promotion:
        """One that happens now.

        Args:
            version, before: as of the class.
            why: for people.
            rows: scores that it was decided by.
            against: what the gate said against it.
        """
        record = {
            "version": version.version,
            "over": None if before is None else before.version,
            "by": _user(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "why": why,
            "against": list(against),
            "scores": [asdict(row) for row in rows],
        }
        return cls(version, before, record)

    def carry_out(self, registry: PoolRegistry) -> None:
        """Keep the record with the version and in its run, and then move the alias.

        Raises:
            TrackingError: MLflow cannot be used; the champion is the one that it was.
        """
        self.keep(registry)
        registry.crown(self.version)

    def keep(self, registry: PoolRegistry) -> None:
        """Keep the record: as tags of the version but for its scores, and as a file of its run.

        Raises:
            TrackingError: MLflow cannot be used.
        """
        from cluster.tracking.runs import Tracker

        record = self.record
        if self.version.run_id is not None:
            stamp = record["at"].replace(":", "").replace("+0000", "Z")
            name = f"promotions/version-{self.version.version}-{stamp}.json"
            Tracker(registry.config).log_artifacts(self.version.run_id, {name: json.dumps(record, indent=1)})
        said = {name: record[name] for name in ("by", "at", "why")}
        said |= {"over": str(record["over"] or "none"), "against": "\n".join(record["against"]) or "nothing"}
        registry.tag(self.version, {f"promoted.{name}": text for name, text in said.items()})


def _user() -> str:
    """Who types, as the machine knows him."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"
