"""A version without one of its tasks: nothing is trained, and no manifest of it names a byte of that task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from safetensors.torch import save as save_tensors

from sapt_core.errors import SnapshotError
from sapt_core.io.blobs import BlobStore
from sapt_core.versions.contents import blobs_of, line_of
from sapt_core.versions.loading import load_blob
from sapt_core.versions.manifest import TRAINED, Manifest

Item = TypeVar("Item")


def forgetting_faults(manifest: Manifest, task: str) -> list[str]:
    """Why a version cannot forget a task; empty if it can."""
    names = [learnt.name for learnt in manifest.tasks]
    method = manifest.method
    if task not in names:
        return [f"the version has not learnt {task}; it knows: {', '.join(names)}"]
    faults = []
    if len(names) == 1:
        faults.append(f"{task} is the version's only task: delete the version in MLflow instead")
    if method.pool != "block per task":
        faults.append(
            f"the tasks of method {method.name} share one block, in which nothing belongs to {task} alone: learn the "
            "other tasks anew"
        )
    elif not method.shared_attention and any(list(method.active(index)) != [index] for index in range(len(names))):
        faults.append(
            f"with method {method.name} other tasks are answered with the block of {task} too, and nothing evens out "
            "that it is gone: learn the other tasks anew"
        )
    return faults


def forget(manifest: Manifest, task: str, store: BlobStore, *, lineage: str) -> Manifest:
    """Make the version that does not know ``task``, and store it with the versions that lead to it.

    The block goes, with shared attention the key, and of a complete version what is carried of the task. The softmax
    evens out what is left of the attention; targets are the earlier ones over the blocks that are left, made to sum to
    1. Versions before are made anew so far as they know the task, so that the new ``parent`` leads to none of its
    bytes; those in which the task itself was learnt, or learnt again, drop out.

    Args:
        manifest: the version; ``forgetting_faults`` has found nothing against it.
        task: the name of one of its tasks.
        store: holds its blobs, and receives the new version.
        lineage: the name of the new version that the registry compares.

    Returns:
        The new version, complete if ``manifest`` is.

    Raises:
        SnapshotError: a router is damaged, or a version before has tasks that this one has not.
        StoreError: a manifest or router of the version's line is missing or damaged.
    """
    index = [learnt.name for learnt in manifest.tasks].index(task)
    line = list(line_of(manifest, store))[::-1]
    known = 0
    for version in line:
        known += version.again is None
        if version.names != manifest.names[:known]:
            raise SnapshotError(f"The versions before {manifest.digest[:12]} do not lead up to it task by task")
    newest: Manifest | None = None
    for version in line:
        if len(version.tasks) <= index:
            newest = version
        elif version.taught != index:
            newest = _without(version, index, store, None if newest is None else newest.digest)
            store.put(newest.to_bytes())
    assert newest is not None  # noqa: S101 - of the only task there are faults
    if manifest.recipe is None or manifest.carried is None:
        return newest
    complete = newest.complete(lineage=lineage, recipe=manifest.recipe, carried=_dropped(manifest.carried, index))
    store.put(complete.to_bytes())
    return complete


def forgotten(before: Manifest, after: Manifest, task: str, store: BlobStore) -> set[str]:
    """Digests of what a version and those before it name, the text of ``task`` too, and the new one does not.

    Raises:
        StoreError: a manifest of their lines is missing or damaged.
    """
    index = [learnt.name for learnt in before.tasks].index(task)
    carried = None if before.carried is None else before.carried[index]
    text = set() if carried is None else {carried.data, *(each.data for each in carried.again)}
    return (_named(before, store) | text) - _named(after, store)


def _named(manifest: Manifest, store: BlobStore) -> set[str]:
    versions = [manifest, *line_of(manifest, store)]
    return {digest for version in versions for digest in (version.digest, *blobs_of(version))}


def _without(version: Manifest, index: int, store: BlobStore, parent: str | None) -> Manifest:
    router = version.router
    if router is not None:
        tensors = load_blob(router, store)
        keys = tensors["keys"]
        tensors["keys"] = torch.cat([keys[:index], keys[index + 1 :]])
        router = store.put(save_tensors(tensors))
    shared = version.method.shared_attention
    changed = {
        "schema_version": max(TRAINED, version.schema_version),
        "tasks": _dropped(version.tasks, index),
        "blocks": _dropped(version.blocks, index),
        "router": router,
        "targets": tuple(_evened(row, index, shared=shared) for row in _dropped(version.targets, index)),
        "parent": parent,
    }
    return Manifest(**{**dict(version), **changed})


def _evened(weights: Sequence[float], index: int, *, shared: bool) -> tuple[float, ...]:
    """Mean weights over the blocks that are left; those of a task's own block alone where all others had nothing."""
    if index >= len(weights):
        return tuple(weights)
    left = _dropped(tuple(weights), index)
    total = sum(left)
    if not shared:
        return left
    return tuple(weight / total for weight in left) if total > 0 else (*(0.0 for _ in left[1:]), 1.0)


def _dropped(items: tuple[Item, ...], index: int) -> tuple[Item, ...]:
    return (*items[:index], *items[index + 1 :])
