"""What a store holds: how much of what, and whether all of it is whole."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.store.base import ArtifactStore
from cluster.store.cleaning import all_records, kept_outputs, last_part, manifests_of, reached_from
from sapt_core.errors import StoreError, StoreUnavailableError


class Use(NamedTuple):
    """How many objects there are of a kind, and their bytes."""

    what: str
    objects: int
    size: int


def usage(store: ArtifactStore) -> list[Use]:
    """Sizes by the kind of stage that gave the blobs, largest first, each blob once; and of what lies beside them.

    Raises:
        StoreError: the store cannot be read, or what is named as a manifest is none.
    """
    records = all_records(store)
    kinds = dict.fromkeys(reached_from(store, manifests_of(records.values())), "versions")
    for record in records.values():
        kinds |= dict.fromkeys(_blobs_of(record).values(), str(record["kind"]))
    kinds |= dict.fromkeys(_backbones(store, records), "backbone")
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for entry in store._list("blobs"):
        sizes[f"blobs: {kinds.get(last_part(entry.name), 'no record names it')}"].append(entry.size)
    found = sorted((Use(what, len(each), sum(each)) for what, each in sizes.items()), key=lambda use: -use.size)
    for folder in ("records", "packs", "checkpoints"):
        entries = store._list(folder)
        found.append(Use(folder, len(entries), sum(entry.size for entry in entries)))
    return [*found, Use("all", sum(use.objects for use in found), sum(use.size for use in found))]


def faults_of(store: ArtifactStore) -> list[str]:
    """What is wrong with a store: blobs whose content is not what they are called by, and what records name in vain.

    Raises:
        StoreUnavailableError: the store does not answer.
        StoreError: it cannot be read.
    """
    records = all_records(store)
    told = {
        digest: f"{what} of {record['name']}"
        for record in records.values()
        for what, digest in _blobs_of(record).items()
    }
    told |= {digest: f"{file} of the backbone" for digest, file in _backbones(store, records).items()}
    there = {last_part(entry.name): "a blob" for entry in store._list("blobs")}
    return damaged(there | told, store)


def damaged(blobs: Mapping[str, str], store: ArtifactStore) -> list[str]:
    """What is wrong with blobs, one line each.

    Args:
        blobs: what each is, by its sha256.
        store: is to have them.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        read = Path(folder, "blob")
        for digest, what in blobs.items():
            try:
                store.fetch_to(digest, read)
            except StoreUnavailableError:
                raise
            except StoreError:
                state = "damaged" if store.has(digest) else "gone"
                faults.append(f"{what} ({digest}) is {state}")
    return faults


def _blobs_of(record: Mapping[str, Any]) -> dict[str, str]:
    curve = record["metrics"].get("curve")
    return {**kept_outputs(record), **({"curve": curve} if curve is not None else {})}


def _backbones(store: ArtifactStore, records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names of the backbones' files by their sha256."""
    found: dict[str, str] = {}
    for digest in filter(store.has, manifests_of(records.values())):
        files = json.loads(store.get(digest))["backbone"].get("files") or {}
        found |= {kept: name for name, kept in files.items()}
    return found
