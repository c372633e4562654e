"""Tasks from wherever ``datasets`` reads, as mappings of a config."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from sapt_core.data import load_sequence
from sapt_core.data.files import of_table
from sapt_core.data.task import LearntTask, Task
from sapt_core.data.tasks import load_additions
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig
from sapt_core.task_settings import TaskConfig

NAMES = ["negative", "positive"]
REVIEWS = {"columns": {"input": "text", "output": "label"}}
PLAIN = {"template": "superni", "metric": "exact_match"}


def reviews(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"review {number}", "label": number % 2} for number in range(start, start + count)]


def table(count: int, start: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(reviews(count, start)).cast_column("label", datasets.ClassLabel(names=NAMES))


def load(path: Path | str, fields: dict[str, Any] | None = None, **benchmark: Any) -> Task:
    task = {"name": "reviews", "path": str(path), **REVIEWS, **(fields or {})}
    options = {**PLAIN, **benchmark}
    (loaded,) = load_sequence(BenchmarkConfig.model_validate({"tasks": [task], **options}))
    return loaded


def faults_of(path: Path | str, fields: dict[str, Any] | None = None, **benchmark: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load(path, fields, **benchmark)
    return caught.value.faults


def answers(task: Task) -> Counter[str]:
    return Counter(row.references[0] for split in (task.train, task.dev, task.test) for row in split)


def as_lines(path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, reviews(20))))
    return path


def as_packed_lines(path: Path) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, reviews(20))).encode()))
    return path


def as_parquet(path: Path) -> Path:
    table(20).to_parquet(path)
    return path


def as_saved(path: Path) -> Path:
    table(20).save_to_disk(str(path))
    return path


def as_saved_shard(path: Path) -> Path:
    return next(as_saved(path).glob("*.arrow"))


def as_shards(path: Path) -> Path:
    """As a hub's repository lies on disk: shards that are found by their names."""
    (path / "data").mkdir(parents=True)
    table(10).to_parquet(path / "data" / "train-00000-of-00002.parquet")
    table(10, 10).to_parquet(path / "data" / "train-00001-of-00002.parquet")
    return path


FORMS = {
    "reviews.csv": lambda path: (table(20).to_pandas().to_csv(path, index=False), path)[1],
    "reviews.csv.gz": lambda path: (table(20).to_pandas().to_csv(path, index=False), path)[1],
    "reviews.tsv": lambda path: (table(20).to_pandas().to_csv(path, index=False, sep="\t"), path)[1],
    "reviews.jsonl": as_lines,
    "reviews.json": as_lines,
    "reviews.jsonl.gz": as_packed_lines,
    "reviews.parquet": as_parquet,
    "saved": as_saved,
    "saved shard": as_saved_shard,
    "shards": as_shards,
}


@pytest.mark.parametrize("form", FORMS)
def test_one_split_of_every_form_gives_the_same_task(form: str, tmp_path: Path) -> None:
    task = load(FORMS[form](tmp_path / form), {"label_names": NAMES})
    assert (len(task.train), len(task.dev), len(task.test)) == (14, 2, 4)
    assert answers(task) == {"negative": 10, "positive": 10}
    assert Counter(row.references[0] for row in task.test) == {"negative": 2, "positive": 2}
    assert load(as_lines(tmp_path / "other.jsonl"), {"label_names": NAMES}).test == task.test


def test_what_was_cut_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(as_lines(tmp_path / "reviews.jsonl"), {"label_names": NAMES})
    assert (
        "reviews: 4 test rows and 2 dev rows were split off train, by benchmark.split_seed=0, of every answer alike"
        in caplog.messages
    )


def test_a_hub_data_set_is_read_from_a_filled_cache_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {}
    for split, count, start in (("train", 20, 0), ("validation", 4, 20), ("test", 6, 24)):
        table(count, start).to_parquet(tmp_path / f"{split}.parquet")
        files[split] = str(tmp_path / f"{split}.parquet")
    made = datasets.load_dataset_builder("parquet", data_files=files)
    builder = Parquet(
        cache_dir=str(tmp_path),
        dataset_name="reviews",
        config_name="default",
        data_files=made.config.data_files,
        hash="0",
    )
    builder.download_and_prepare()
    # As load_dataset leaves a data set of the hub: its id is in the folder's name, and not where its files came from.
    kept = tmp_path / "somebody___reviews" / "default" / "0.0.0"
    kept.mkdir(parents=True)
    Path(builder.cache_dir).rename(kept / "0")
    task = load("somebody/reviews", train_rows=10)
    assert (len(task.train) + len(task.dev), len(task.test)) == (10, 6)
    assert {row.references[0] for row in task.test} == set(NAMES)
    given = load("somebody/reviews", {"splits": {"dev": "validation"}})
    assert (len(given.train), len(given.dev)) == (20, 4)
    (fault,) = faults_of("somebody/reviews", {"splits": {"test": "unsupervised"}})
    assert fault.startswith("somebody/reviews: has no split unsupervised, but train, validation, test")
    (fault,) = faults_of("somebody/nothing")
    assert fault.startswith("somebody/nothing: no such file or folder, and no data set that can be had from the hub: ")


def test_splits_may_be_files_of_a_folder(tmp_path: Path) -> None:
    for name, rows in (("a-1.jsonl", reviews(6)), ("a-2.jsonl", reviews(6, 6)), ("held.jsonl", reviews(4, 50))):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    task = load(tmp_path, {"splits": {"train": "a-*.jsonl", "test": "held.jsonl"}})
    assert len(task.train) + len(task.dev) == 12
    assert [row.input for row in task.test] == [f"review {number}" for number in range(50, 54)]
    (tmp_path / "inner").mkdir()
    (fault,) = faults_of(tmp_path / "inner", {"splits": {"train": "../a-*.jsonl"}})
    assert fault.startswith("inner/../a-*.jsonl.json: no such file")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_no_more_is_read_than_is_wanted(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{form}"
    rows = datasets.Dataset.from_list(reviews(30_000))
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[form](path)
    if form != "parquet":
        with path.open("a") as file:
            file.write('{"broken\n' * 3 if form == "jsonl" else "too,many,fields\n")
    task = load(path, train_rows=200, test_rows=50)
    assert (len(task.train), len(task.dev), len(task.test)) == (180, 20, 50)
    assert max(int(row.input.split()[1]) for row in (*task.train, *task.test)) < 250
    if form != "parquet":
        assert {"csv": "cannot be read", "jsonl": "line 30001 column"}[form] in faults_of(path)[0]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"columns": {"input": "sentence", "output": "label"}},
            "no column sentence (columns.input); there are: text, la",
        ),
        ({"columns": {"messages": "turns"}}, "no column turns (columns.messages); there are: text, label"),
        ({"columns": {"definition": "task", **REVIEWS["columns"]}}, "no column task (columns.definition); there are"),
        ({"columns": {}}, "no column input or prompt (columns.input) or output or answer (columns.output); there are"),
        ({"label_names": ["only"]}, "row 1: output '1' is none of label_names (0 only)"),
        ({"splits": {"test": "held"}}, "has no split held, but train: name one of them in splits"),
    ],
)
def test_what_a_data_set_lacks_is_named_with_what_it_has(fields: dict[str, Any], fault: str, tmp_path: Path) -> None:
    found = faults_of(FORMS["reviews.csv"](tmp_path / "reviews.csv"), fields)
    assert fault in found[0]


def test_rows_that_say_their_own_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, [*reviews(4), {"txt": "a", "label": 1}])))
    assert faults_of(path)[0].endswith("row 4: has no text; it has: txt, label")


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    datasets.DatasetDict(train=table(4), test=table(4).select([])).save_to_disk(str(folder))
    assert faults_of(folder) == ("reviews, split test: holds no rows",)


@pytest.mark.parametrize("path", ["data/reviews.csv", "nowhere/at/all"])
def test_what_is_no_hub_id_is_a_path(path: str) -> None:
    assert faults_of(path) == (f"{path}: no such file or folder",)


def chats() -> Iterator[list[dict[str, str]]]:
    for number in range(6):
        question, reply = {"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}
        yield [question, reply] if number % 2 else [{"role": "system", "content": "Be brief."}, question, reply]
    yield [{"role": "user", "content": "q9"}, {"role": "assistant", "content": "..."}]


def test_chats_are_read_up_to_their_last_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in chats()))
    with caplog.at_level(logging.WARNING):
        task = load(path, {"columns": {}})
    rows = {row.input: row.references for row in (*task.train, *task.dev, *task.test)}
    assert rows["q1"] == ("a1",)
    assert rows["system: Be brief.\nuser: q2"] == ("a2",)
    assert len(rows) == 6
    assert "chats.jsonl: 1 of 7 rows left out" in caplog.text
    faulty = [[{"role": "user"}], "hi", [{"role": "user", "content": "nobody answers"}]]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in faulty))
    assert [fault.partition(": row ")[2] for fault in faults_of(path, {"columns": {}})] == [
        "0: messages: turn 0 is no object with role and content, both text",
        "1: messages is text, not a list of turns",
        "2: messages has no turn of role assistant, the last of which is the answer: leave the row out",
    ]


def test_labels_by_name_number_and_list(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    given: list[Any] = ["5", 5, 5.0, "good", [1, "5"], 1]
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": label}) for i, label in enumerate(given)))
    task = load(path, {"label_names": {1: "bad", 5: "good"}})
    rows = {row.input: row.references for row in (*task.train, *task.dev, *task.test)}
    assert [rows[f"t{i}"] for i in range(6)] == [*[("good",)] * 4, ("bad", "good"), ("bad",)]


def test_several_right_answers_in_a_column(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": [f"a{i}", "b"]} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "qa.parquet")
    assert all(len(row.references) == 2 for row in load(tmp_path / "qa.parquet").train)


def test_a_definition_of_the_config_goes_before_that_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(json.dumps({**row, "definition": row["text"]}) for row in reviews(6)))
    assert "6 different definitions" in faults_of(path)[0]
    assert load(path, {"definition": "Judge."}).definition == "Judge."


def test_all_faults_of_all_tasks_come_at_once(tmp_path: Path) -> None:
    as_lines(tmp_path / "a.jsonl")
    tasks = [
        {"name": "a", "path": str(tmp_path / "a.jsonl"), "label_names": ["x"], **REVIEWS},
        {"name": "b", "path": str(tmp_path / "b.jsonl")},
        {"name": "c", "path": str(tmp_path / "a.jsonl"), "columns": {"input": "nosuch"}},
    ]
    config = BenchmarkConfig.model_validate({"tasks": tasks, "template": "superni", "metric": "exact_match"})
    with pytest.raises(DataError) as caught:
        load_sequence(config)
    assert [fault.split(":")[0].rpartition("/")[2] for fault in caught.value.faults] == [
        *["a.jsonl"] * 6, "b.jsonl", *["a.jsonl"] * 6,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_that_are_streamed_are_as_those_of_a_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    {"csv": lambda: table(6).to_csv(path, index=False), "parquet": lambda: table(6).to_parquet(path)}[kind]()
    streamed = of_table(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True))
    assert list(streamed.instances) == reviews(6)
    assert streamed.classes == ({"label": tuple(NAMES)} if kind == "parquet" else {})


def test_first_rows_of_a_sorted_file_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, sorted(reviews(40), key=lambda row: row["label"]))))
    load(path, {"label_names": NAMES}, train_rows=10)
    assert "reviews: all of its first 10 rows have the same answer; is it sorted?" in caplog.messages
    caplog.clear()
    load(path, {"label_names": NAMES})
    assert "sorted" not in caplog.text


def test_a_task_has_metrics_of_its_own_and_its_names_for_labels(tmp_path: Path) -> None:
    path = as_lines(tmp_path / "reviews.jsonl")
    every = {"label_names": [*NAMES, "mixed"], "metric": "accuracy,macro_f1"}
    task = load(path, every, answers="labels")
    assert task.metrics == ("accuracy", "macro_f1")
    assert task.labels == ("mixed", "negative", "positive")  # whatever its rows answer
    assert Task.from_json(task.to_json()) == task
    without = load(path, REVIEWS, answers="labels", metric=["exact_match", "chrf"])
    assert (without.labels, without.metrics) == (("0", "1"), ("exact_match", "chrf"))


def test_labels_are_in_no_task_that_may_answer_anything(tmp_path: Path) -> None:
    task = load(as_lines(tmp_path / "reviews.jsonl"), {"label_names": NAMES})
    assert (task.labels, task.label_names) == ((), ())
    assert not {"label_names", "answers", "other_metrics"} & json.loads(task.to_json()).keys()


@pytest.mark.parametrize("labels", [("negative", "positive", "so so"), ()])
def test_a_task_that_is_known_keeps_metric_and_labels(tmp_path: Path, labels: tuple[str, ...]) -> None:
    known = LearntTask(
        name="reviews",
        definition="Which?",
        template="long_sequence",
        metric="accuracy",
        max_source_tokens=64,
        max_target_tokens=8,
        labels=labels,
    )
    benchmark = BenchmarkConfig.model_validate(
        {"data_dir": tmp_path, "tasks": ["reviews"], **PLAIN, "answers": "labels"}
    )
    fields = {"name": "reviews", "path": str(as_lines(tmp_path / "reviews.jsonl")), **REVIEWS}
    more = TaskConfig.model_validate({**fields, "label_names": NAMES})
    (task,) = load_additions([more], benchmark, known=[known])
    assert (task.definition, task.template, task.metrics) == ("Which?", "long_sequence", ("accuracy",))
    assert task.labels == tuple(sorted(labels))
    if labels:
        with pytest.raises(DataError) as caught:
            load_additions([TaskConfig.model_validate(fields)], benchmark, known=[known])
        assert "reviews: its train rows answer '0', '1', and may be answered" in caught.value.faults[0]
