"""One split of a task's folder, in whatever format it lies there, as rows of Python values.

``<split>.json`` is an object of the CL_Benchmark layout or a list of rows, ``.jsonl`` a row a line, ``.csv``, ``.tsv``
and ``.parquet`` are tables; or the folder is a ``DatasetDict`` that ``datasets`` saved. A row is named ``input`` and
``output``, or ``prompt`` and ``answer`` as in TRACE; other columns are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

ALIASES = {"prompt": "input", "answer": "output"}


def read_split(folder: Path, split: str, faults: list[str]) -> tuple[str, dict[str, Any] | None]:
    """A split as an object with ``Definition`` and ``Instances``, unchecked, and what messages call it.

    None if it cannot be read, with the reason added to ``faults``.
    """
    found = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        faults.append(f"{folder.name}: holds {' and '.join(path.name for path in found)}: leave one of them")
        return folder.name, None
    saved = not found and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    name = f"{folder.name}, split {split}" if saved else f"{folder.name}/{found[0].name if found else f'{split}.json'}"
    if not found and not saved:
        faults.append(f"{name}: no such file, nor with {', '.join(list(READERS)[1:])}{_CURES.get(split, '')}")
        return name, None
    return name, _content(name, lambda: _saved(folder, split) if saved else READERS[found[0].suffix](found[0]), faults)


def read_file(path: Path, faults: list[str]) -> tuple[str, dict[str, Any] | None]:
    """The rows of one file, as ``read_split`` gives those of a split."""
    if path.suffix not in READERS:
        faults.append(f"{path.name}: is none of {', '.join(READERS)}")
        return path.name, None
    return path.name, _content(path.name, lambda: READERS[path.suffix](path), faults)


def _content(name: str, read: Callable[[], Any], faults: list[str]) -> dict[str, Any] | None:
    try:
        content = read()
    except json.JSONDecodeError as error:
        faults.append(f"{name}: line {error.lineno} column {error.colno}: not JSON, or cut short: {error.msg}")
    except (OSError, ValueError) as error:
        faults.append(f"{name}: cannot be read: {' '.join(str(error).split())}")
    else:
        if isinstance(content, dict):
            return content
        faults.append(f"{name}: holds {kind(content)}, not an object with Definition and Instances or a list of rows")
    return None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


_CURES = {"test": "; scores are of rows that are not learnt: move some of the train rows there"}


def _json(path: Path) -> Any:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return _of_rows(content) if isinstance(content, list) else content


def _json_lines(path: Path) -> dict[str, Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} column {error.colno}: not JSON: {error.msg}") from error
    return _of_rows(rows)


def _csv(path: Path) -> dict[str, Any]:
    import pandas as pd  # noqa: PLC0415  seconds, and for its users alone

    # As text: guessing turns an answer "NA" into nothing and "007" into 7.
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", **options)
    return _of_rows(table.to_dict("records"))


def _parquet(path: Path) -> dict[str, Any]:
    import datasets  # noqa: PLC0415  seconds, and for its users alone
    import pyarrow.parquet as pq  # noqa: PLC0415

    return _of_table(datasets.Dataset(datasets.table.InMemoryTable(pq.read_table(path))))


def _saved(folder: Path, split: str) -> dict[str, Any]:
    import datasets  # noqa: PLC0415  seconds, and for its users alone

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        raise ValueError("the saved data set has no splits; save a DatasetDict of train and test (train_test_split)")
    if split not in saved:
        raise ValueError(f"the saved data set has {', '.join(saved)} alone{_CURES.get(split, '')} (train_test_split)")
    return _of_table(saved[split])


def _of_table(table: datasets.Dataset) -> dict[str, Any]:
    """Rows of a table, a class by its name; the number -1 stands for none."""
    import datasets  # noqa: PLC0415

    rows: list[dict[str, Any]] = table.to_list()
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            for row in rows:
                number = row[column]
                row[column] = None if number is None or number < 0 else feature.names[number]
    return _of_rows(rows)


def _of_rows(rows: Sequence[Any]) -> dict[str, Any]:
    definitions: list[Any] = []
    for row in rows:
        if isinstance(row, dict):
            row.update({name: row[alias] for alias, name in ALIASES.items() if alias in row and name not in row})
            if (given := row.get("definition")) and given not in definitions:
                definitions.append(given)
    if len(definitions) > 1:
        raise ValueError(f"its rows have {len(definitions)} different definitions; a task has one instruction")
    return {"Definition": next(iter(definitions), None), "Instances": rows}


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
