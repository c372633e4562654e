"""What lies at a path or under a hub id: splits by name, each opened as it is asked for.

A path is a file of rows, a folder with a file a split (``train.csv``), a data set that ``datasets`` saved, or a folder
that ``datasets`` finds splits in by its own rules. What is neither file nor folder is a data set on the hub, or in its
cache where the hub is not to be asked (``HF_HUB_OFFLINE``). No code of a data set is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sapt_core.data.files import READERS, Rows, of_table, read_file, suffix_of
from sapt_core.errors import DataError
from sapt_core.io.shipped import located
from sapt_core.task_settings import HUB_ID, TaskConfig


class Split(NamedTuple):
    """What messages call a split, and how it is opened."""

    name: str
    open: Callable[[], Rows]


@dataclass(frozen=True)
class Source:
    """Where a task's rows are.

    Attributes:
        name: what messages call it.
        splits: by their names.
        of_files: a folder with a file a split.
        by_seed: what it lacks of splits has always been drawn by seed alone.
        single: all of it is one split, as a file is.
    """

    name: str
    splits: Mapping[str, Split]
    of_files: bool = False
    by_seed: bool = False
    single: bool = False


def open_source(task: TaskConfig, path: str, *, whole: bool) -> Source:
    """Find a task's splits; nothing of them is read but what says which there are.

    Args:
        task: names splits, and of a data set its subset and revision.
        path: the task's own, or its folder in ``data_dir``.
        whole: all rows will be read; a data set on the hub is then fetched, and otherwise read from there.

    Raises:
        DataError: with every reason why there are none.
    """
    here = located(path)
    if here.is_file():
        return Source(here.name, {task.splits.train: _of_file(here.name, [here])}, single=True)
    if here.is_dir():
        return open_folder(here, task)
    if not re.fullmatch(HUB_ID, path) or any(path.lower().endswith((each, f"{each}.gz")) for each in READERS):
        raise DataError("There are no rows:", [f"{path}: no such file or folder"])
    try:
        return _of_library(path, path, task, streaming=not whole)
    except _unreadable() as error:
        reason = " ".join(str(error).split())
        fault = f"{path}: no such file or folder, and no data set that can be had from the hub: {reason}"
        raise DataError("There are no rows:", [fault]) from error


def open_folder(folder: Path, task: TaskConfig) -> Source:
    """Find the splits of a folder, which need not be there.

    Raises:
        DataError: with every reason why there are none.
    """
    wanted = {name: name for name in ("train", "test")} | task.splits.model_dump(exclude_none=True)
    found, faults = {}, []
    for split in dict.fromkeys(wanted.values()):
        files = [
            path for suffix in READERS for end in ("", ".gz") if (path := folder / f"{split}{suffix}{end}").is_file()
        ]
        if len(files) > 1:
            faults.append(f"{folder.name}: holds {' and '.join(path.name for path in files)}: leave one of them")
        elif files := files or _matching(folder, split):
            shown = files[0].relative_to(folder) if len(files) == 1 else split
            found[split] = _of_file(f"{folder.name}/{shown}", files)
    if faults:
        raise DataError("There are no rows:", faults)
    if task.splits.train not in found:
        try:
            other = _by_library(folder, task)
        except _unreadable() as error:
            if not found:
                kinds, reason = ", ".join(list(READERS)[1:]), " ".join(str(error).split())
                fault = f"{folder.name}/{task.splits.train}.json: no such file, nor with {kinds}"
                raise DataError("There are no rows:", [f"{fault}, nor rows that datasets finds: {reason}"]) from error
        else:
            if task.splits.train in other.splits or not found:
                return other
    return Source(folder.name, found, of_files=True, by_seed=True)


def _by_library(folder: Path, task: TaskConfig) -> Source:
    if not folder.is_dir():  # which would be looked for on the hub
        raise FileNotFoundError(f"there is no folder {folder}")
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _saved(folder, task)
    return _of_library(folder.name, str(folder), task, streaming=True)


def _matching(folder: Path, split: str) -> list[Path]:
    """Files that a split of a folder names itself, as ``part-*.csv``; never one outside."""
    if suffix_of(Path(split)) is None or Path(split).is_absolute() or ".." in Path(split).parts:
        return []
    exact = folder / split
    return [exact] if exact.is_file() else sorted(path for path in folder.glob(split) if path.is_file())


def _of_file(name: str, files: list[Path]) -> Split:
    def opened() -> Rows:
        first = read_file(files[0])
        if len(files) == 1:
            return first
        return replace(first, instances=chain(first.instances, _further(files[1:])))

    return Split(name, opened)


def _further(files: list[Path]) -> Any:
    for file in files:
        yield from read_file(file).instances


def _saved(folder: Path, task: TaskConfig) -> Source:
    named = folder / "dataset_dict.json"
    if not named.is_file():
        split = Split(folder.name, lambda: _saved_split(folder))
        return Source(folder.name, {task.splits.train: split}, single=True)
    names = json.loads(named.read_text(encoding="utf-8"))["splits"]
    splits = {name: Split(f"{folder.name}, split {name}", partial(_saved_split, folder / name)) for name in names}
    return Source(folder.name, splits, by_seed=True)


def _saved_split(folder: Path) -> Rows:
    import datasets  # noqa: PLC0415  seconds, and for its users alone

    # Of no rows there is no file, which datasets 5.2 stumbles over.
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return of_table(datasets.load_from_disk(str(folder))) if state["_data_files"] else Rows(())


def _of_library(name: str, path: str, task: TaskConfig, *, streaming: bool) -> Source:
    """Splits as ``datasets`` finds them; files of rows are then read as all others are."""
    import datasets  # noqa: PLC0415

    chosen: dict[str, Any] = {"name": task.config, "revision": task.revision}
    if Path(path).is_dir():
        files = datasets.load_dataset_builder(path, name=task.config).config.data_files
        local = {str(split): [Path(each) for each in found] for split, found in files.items()}
        if all(suffix_of(each) is not None for found in local.values() for each in found):
            splits = {split: _of_file(f"{name}, split {split}", found) for split, found in local.items()}
            return Source(name, splits, single=len(splits) == 1)
        chosen = {"name": task.config}
    datasets.disable_progress_bars()
    tables = datasets.load_dataset(path, streaming=streaming, **chosen)
    return Source(name, _of_tables(name, tables), single=len(tables) == 1)


def _of_tables(name: str, tables: Mapping[str, Any]) -> dict[str, Split]:
    # Its names of splits are no text.
    return {str(split): Split(f"{name}, split {split}", partial(of_table, table)) for split, table in tables.items()}


def _unreadable() -> tuple[type[Exception], ...]:
    """What ``datasets`` raises where it finds nothing that it can read."""
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    return (OSError, ValueError, NotImplementedError, DatasetsError)
