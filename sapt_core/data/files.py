"""Rows of files and tables, as Python values, read no further than they are asked for.

``.json`` is an object of the CL_Benchmark layout or a list of rows, ``.jsonl`` a row a line, ``.csv``, ``.tsv``,
``.parquet`` and ``.arrow`` are tables. All but ``.parquet`` and ``.arrow`` may be packed, as in ``.csv.gz``.
"""

from __future__ import annotations

import gzip
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

CHUNK = 1_000  # rows of a table that are in memory at once


class ContentError(ValueError):
    """A file could be read, and what it holds is no rows."""


@dataclass(frozen=True)
class Rows:
    """Rows as they were found, unchecked.

    Attributes:
        instances: the rows; to go through them raises ``OSError`` or ``ValueError`` where they cannot be read.
        columns: what a table's rows have; None where every row says that for itself.
        classes: names of the classes that numbers in a column stand for; -1 stands for none.
        said: what the file says beside its rows, as CL_Benchmark's ``Definition``; None of a file that is rows alone.
    """

    instances: Iterable[Any]
    columns: tuple[str, ...] | None = None
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    said: Mapping[str, Any] | None = None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def suffix_of(path: Path) -> str | None:
    """The ending that says how a file is read; None where nothing here reads it."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith((suffix, f"{suffix}.gz"))), None)


def read_file(path: Path) -> Rows:
    """The rows of one file.

    Raises:
        OSError, ValueError: it cannot be read, or is of no kind that can.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise ContentError(f"is none of {', '.join(READERS)}")
    return READERS[suffix](path)


def of_table(table: datasets.Dataset | datasets.IterableDataset) -> Rows:
    """The rows of what ``datasets`` opened, a chunk in memory at a time."""
    arrow = table.with_format("arrow")
    rows = (row for chunk in arrow.iter(batch_size=CHUNK) for row in chunk.to_pylist())
    if table.features is None:
        return Rows(rows)
    return Rows(rows, tuple(table.features), class_names(table.features))


def class_names(features: datasets.Features) -> dict[str, tuple[str, ...]]:
    """Names of the classes that a table's numbers, or lists of them, stand for, by column."""
    import datasets  # noqa: PLC0415  seconds, and for its users alone

    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: tuple(each.names) for name, each in inner.items() if isinstance(each, datasets.ClassLabel)}


def _text(path: Path) -> io.TextIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _json(path: Path) -> Rows:
    with _text(path) as file:
        first = next((line for line in file if line.strip()), "")
        further = next((line for line in file if line.strip()), "")
    if further and _is_object(first):  # rows, one a line, whatever the file is called
        return _json_lines(path)
    with _text(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ContentError(
                f"line {error.lineno} column {error.colno}: not JSON, or cut short: {error.msg}"
            ) from error
    if isinstance(content, list):
        return Rows(content)
    if not isinstance(content, dict):
        raise ContentError(f"holds {kind(content)}, not an object with Definition and Instances or a list of rows")
    instances = content.get("Instances")
    if not isinstance(instances, list) or not instances:
        state = "is missing" if "Instances" not in content else "is empty" if instances == [] else "is not a list"
        raise ContentError(f"Instances {state}; give a list of objects with input and output")
    return Rows(instances, said=content)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _json_lines(path: Path) -> Rows:
    # Not by a library of tables: they make dates of texts that look like one.
    def rows() -> Iterator[Any]:
        with _text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ContentError(f"line {number} column {error.colno}: not JSON: {error.msg}") from error

    return Rows(rows())


def _csv(path: Path) -> Rows:
    import pandas as pd  # noqa: PLC0415  seconds, and for its users alone

    # As text: guessing turns an answer "NA" into nothing and "007" into 7. Without an index column: where the first row
    # is longer than the header, its first field would be taken for one, and every answer for the one beside it.
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
    separator = "\t" if suffix_of(path) == ".tsv" else ","

    def rows() -> Iterator[Any]:
        with _unshifted(lambda: pd.read_csv(path, sep=separator, chunksize=CHUNK, **options)) as chunks:
            while (chunk := _unshifted(lambda: next(chunks, None))) is not None:
                yield from chunk.to_dict("records")

    header = _unshifted(lambda: pd.read_csv(path, sep=separator, nrows=0, **options))
    return Rows(rows(), tuple(map(str, header.columns)))


def _unshifted(read: Callable[[], Any]) -> Any:
    """What a reader of tables gives, unless it left out fields of a row."""
    import pandas as pd  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return read()
        except pd.errors.ParserWarning as warning:
            raise ContentError("rows have more fields than the header: put texts in quotes") from warning


def _parquet(path: Path) -> Rows:
    import datasets  # noqa: PLC0415  seconds, and for its users alone
    import pyarrow.parquet as pq  # noqa: PLC0415

    def rows() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                yield from batch.to_pylist()

    features = datasets.Features.from_arrow_schema(pq.read_schema(path))
    return Rows(rows(), tuple(features), class_names(features))


def _arrow(path: Path) -> Rows:
    import datasets  # noqa: PLC0415  seconds, and for its users alone

    return of_table(datasets.Dataset.from_file(str(path)))


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
