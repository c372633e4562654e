"""Where a run puts what it makes, and whether that outlives it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sapt_core.errors import ConfigError

if TYPE_CHECKING:
    from sapt_core.settings import PlacesConfig

# As Ray 2.60 names the folders that it unpacks working directories into.
_UNPACKED = ("runtime_resources", "working_dir_files")


def is_passing(path: Path) -> bool:
    """Whether a path lies in the copy of its working directory that Ray made for a job, and which goes with the job."""
    parents = path.expanduser().absolute().parents
    return any((folder.parent.name, folder.name) == _UNPACKED for folder in parents)


def check_lasting(
    paths: Mapping[str, Path | None], config: PlacesConfig | None = None, *, inline: bool = False
) -> None:
    """Refuse a job of ``ray job submit`` whose results would go with the cluster, before any work.

    Args:
        paths: files and folders that are written, by what the user calls them.
        config: whose store is written, and whose tracking, unless ``inline``.
        inline: MLflow is not used.

    Raises:
        ConfigError: with every place that does not last.
    """
    faults = []
    if config is not None:
        store, tracking = config.store.uri, config.tracking.uri
        if not store.startswith("s3://") and is_passing(Path(store.removeprefix("file://"))):
            faults.append(f"store.uri={store}: give s3://BUCKET/PREFIX, or an absolute path that all nodes share")
        if not inline and tracking.startswith("sqlite:///") and is_passing(Path(tracking.removeprefix("sqlite:///"))):
            faults.append(f"tracking.uri={tracking}: give the http(s) address of an MLflow server")
    faults += [
        f"{name} {path}: give an absolute path on a disk that outlives the cluster"
        for name, path in paths.items()
        if path is not None and is_passing(path)
    ]
    if faults:
        raise ConfigError(
            "A Ray job runs in a copy of its working directory that goes with the cluster, and in it would lie:", faults
        )
