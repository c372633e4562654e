"""Going on from a version of two tasks whose data is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipelines import extend
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
NAMES = ("animal", "basket", "ticket")
FOLDERS = (
    "benchmark.suite=folder",
    "benchmark.template=superni",
    "benchmark.train_rows=null",
    "benchmark.test_rows=null",
)


class Learnt(NamedTuple):
    """A store with a version of two tasks, its digest, and the folder of a third."""

    store: Path
    version: str
    ticket: Path


def go_on(call: Call, store: Path, version: str, *given: str) -> Outcome:
    summary = ["--summary", str(store / "summary.json")]
    return call(extend.main, ["--snapshot", version, *given, "--inline", *summary, f"store.uri={store}"])


def manifest(store: Path, digest: str) -> Manifest:
    (path,) = (path for path in store.rglob(digest) if path.is_file())
    return Manifest.from_bytes(path.read_bytes())
