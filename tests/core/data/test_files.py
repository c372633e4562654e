"""One task in every format that it may lie in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from sapt_core.data import load_inputs, load_sequence
from sapt_core.data.task import Task
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig

SIZES = {"train": 6, "test": 3}
LABELS = ["no", "yes"]


def rows(split: str) -> list[dict[str, Any]]:
    texts = (f'{split} {number}, "quoted"\nNA' for number in range(SIZES[split]))
    return [{"input": text, "output": LABELS[index % 2]} for index, text in enumerate(texts)]


def load(folder: Path, **changes: Any) -> Task:
    options = {"template": "superni", "metric": "exact_match", **changes}
    (task,) = load_sequence(BenchmarkConfig(suite="folder", data_dir=folder.parent, tasks=(folder.name,), **options))
    return task


def faults_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load(folder)
    return caught.value.faults


def table(split: str, **more: Any) -> pd.DataFrame:
    return pd.DataFrame([{**row, **more} for row in rows(split)])


def classes(split: str, **more: Any) -> datasets.Dataset:
    """With integer labels and their names, as hubs keep them."""
    content = [{**row, "output": LABELS.index(row["output"]), "idx": 1, **more} for row in rows(split)]
    whole = datasets.Dataset.from_list(content)
    return whole.cast_column("output", datasets.ClassLabel(names=LABELS))


def saved(folder: Path) -> None:
    datasets.DatasetDict({split: classes(split) for split in SIZES}).save_to_disk(str(folder))


def each(suffix: str, write: Callable[[str, Path], object]) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        folder.mkdir()
        for split in SIZES:
            write(split, folder / f"{split}.{suffix}")

    return written


FORMATS: dict[str, Callable[[Path], None]] = {
    "json": each("json", lambda split, path: path.write_text(json.dumps({"Definition": [], "Instances": rows(split)}))),
    "list": each("json", lambda split, path: path.write_text(json.dumps(rows(split)))),
    "jsonl": each("jsonl", lambda split, path: path.write_text("\n".join(map(json.dumps, rows(split))) + "\n\n")),
    "csv": each("csv", lambda split, path: table(split).to_csv(path, index=False)),
    "tsv": each("tsv", lambda split, path: table(split).to_csv(path, index=False, sep="\t", encoding="utf-8-sig")),
    "parquet": each("parquet", lambda split, path: table(split).to_parquet(path)),
    "classes": each("parquet", lambda split, path: classes(split).to_parquet(path)),
    "saved": saved,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_task(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / "one")
    task = load(tmp_path / "one")
    assert [(row.input, list(row.references)) for row in task.test] == [
        (row["input"], [row["output"]]) for row in rows("test")
    ]
    assert {row.input for row in (*task.train, *task.dev)} == {row["input"] for row in rows("train")}
    assert task.definition == ""
    assert len(load_inputs(tmp_path, ["one"])["one"]) == SIZES["train"]


def test_answers_of_a_table_stay_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for split in SIZES:
        (folder / f"{split}.csv").write_text(f"input,output\n{split} a,NA\n{split} b,007\n{split} c,True\n")
    assert [row.references for row in load(folder).test] == [("NA",), ("007",), ("True",)]


def test_a_definition_may_stand_in_a_column_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    for split in SIZES:
        table(split, definition="Answer.").to_csv(folder / f"{split}.csv", index=False)
    assert load(folder).definition == "Answer."
    both = pd.concat([table("test", definition=text) for text in ("Answer.", "Say it.")])
    both.to_csv(folder / "test.csv", index=False)
    assert "2 different definitions" in faults_of(folder)[0]


def test_a_row_without_a_class_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "one"
    saved_rows = classes("train")
    hidden = classes("test").map(lambda row, index: {"output": -1 if index == 1 else row["output"]}, with_indices=True)
    datasets.DatasetDict(train=saved_rows, test=hidden).save_to_disk(str(folder))
    assert len(load(folder).test) == 2
    assert "one, split test: 1 of 3 rows left out" in caplog.text


def test_a_missing_train_split_names_what_there_is(tmp_path: Path) -> None:
    FORMATS["csv"](tmp_path / "one")
    (tmp_path / "one" / "train.csv").unlink()
    assert faults_of(tmp_path / "one") == (
        "one/train.json: no such file, nor with .jsonl, .csv, .tsv, .parquet, .arrow",
    )
    datasets.DatasetDict(test=classes("train"), validation=classes("test")).save_to_disk(str(tmp_path / "two"))
    assert faults_of(tmp_path / "two") == ("two: has no split train, but test, validation: name one of them in splits",)


def test_two_files_of_one_split_are_not_chosen_between(tmp_path: Path) -> None:
    FORMATS["csv"](tmp_path / "one")
    (tmp_path / "one" / "train.json").write_text("[]")
    assert faults_of(tmp_path / "one") == ("one: holds train.json and train.csv: leave one of them",)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("test.jsonl", b'{"input": "a", "output": "b"}\n{"input"', "line 2 column"),
        ("test.jsonl", b"[1]\n", "row 0: is a list, not an object"),
        ("test.csv", b"", "cannot be read: No columns"),
        ("test.csv", b"input,output\n", "holds no rows"),
        ("test.csv", b"input,output\na,b,c\n", "rows have more fields than the header: put texts in quotes"),
        ("test.csv", b"input,output\na,b\nc,d,e\n", "line 3, saw 3"),
        (
            "test.csv",
            b"text,label\na,b\n",
            "no column input or prompt (columns.input) or output or answer (columns.output); there are: text, label",
        ),
        ("test.csv", b"input,output\na,\xff\n", "cannot be read: 'utf-8' codec"),
        ("test.csv", b'input,output\na,"b\n', "cannot be read: Error tokenizing"),
        ("test.parquet", b"PAR1 no", "cannot be read: "),
    ],
)
def test_a_broken_file_is_a_fault(tmp_path: Path, file: str, content: bytes, fault: str) -> None:
    FORMATS["json"](tmp_path / "one")
    (tmp_path / "one" / "test.json").unlink()
    (tmp_path / "one" / file).write_bytes(content)
    (found,) = faults_of(tmp_path / "one")
    assert found.startswith(f"one/{file}: ")
    assert fault in found
