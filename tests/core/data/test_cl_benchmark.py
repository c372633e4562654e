from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.data import load_sequence
from sapt_core.data.cl_benchmark import ORDERS
from sapt_core.data.task import Task, dev_rows
from sapt_core.data.templates import TEMPLATES
from sapt_core.errors import ConfigError, DataError
from sapt_core.settings import BenchmarkConfig

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "CL_Benchmark"


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"input": f"question {i}", "output": f"answer {i}"} for i in range(start, start + count)]


def write(folder: Path, train: Any = None, test: Any = None, definition: Any = "Answer.") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, instances in (("train", rows(10) if train is None else train), ("test", test or rows(3, 100))):
        (folder / f"{name}.json").write_text(
            json.dumps({"Definition": definition, "Instances": instances, "Source": ["x"]}), encoding="utf-8"
        )
    return folder


def load(data_dir: Path, tasks: Sequence[str], **fields: Any) -> tuple[Task, ...]:
    given_fields = {"template": "superni", "metric": "rouge_l", **fields}
    return load_sequence(BenchmarkConfig(suite="folder", data_dir=data_dir, tasks=tuple(tasks), **given_fields))


def faults_of(data_dir: Path, tasks: Sequence[str], **fields: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load(data_dir, tasks, **fields)
    return caught.value.faults


def test_a_folder_becomes_a_task(tmp_path: Path) -> None:
    write(tmp_path / "one", train=[*rows(9), {"input": "q", "output": ["first", "second"]}], definition=["Do it.\n"])
    (task,) = load(tmp_path, ["one"], dev_fraction=0.2)
    assert (task.name, task.definition, task.template, task.metric) == ("one", "Do it.\n", "superni", "rouge_l")
    assert (len(task.train), len(task.dev), len(task.test)) == (8, 2, 3)
    assert ("first", "second") in [row.references for row in (*task.train, *task.dev)]
    assert [row.input for row in task.test] == ["question 100", "question 101", "question 102"]
    numbers = [int(row.references[0].split()[-1]) for row in task.train if row.input != "q"]
    assert numbers == sorted(numbers)


def test_dev_comes_from_train_and_dev_json_is_not_read(tmp_path: Path) -> None:
    (write(tmp_path / "one") / "dev.json").write_text("not even JSON", encoding="utf-8")
    (task,) = load(tmp_path, ["one"])
    assert {row.input for row in (*task.train, *task.dev)} == {row["input"] for row in rows(10)}


def test_split_depends_on_its_seed_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", train=rows(200))
    devs = [load(tmp_path, ["one"], split_seed=seed)[0].dev for seed in (0, 0, 1)]
    assert devs[0] == devs[1] != devs[2]


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 5))
def test_split_leaves_rows_on_both_sides(count: int, fraction: float, seed: int) -> None:
    dev = dev_rows(count, fraction, seed)
    assert 1 <= len(dev) <= count - 1
    assert dev <= set(range(count))
    assert abs(len(dev) - count * fraction) <= 1


def test_first_rows_are_taken_before_the_split(tmp_path: Path) -> None:
    write(tmp_path / "one", train=[{"input": "no answer", "output": "-"}, *rows(10)], test=rows(5, 50))
    (task,) = load(tmp_path, ["one"], train_rows=4, test_rows=2)
    assert {row.input for row in (*task.train, *task.dev)} == {f"question {i}" for i in range(4)}
    assert [row.input for row in task.test] == ["question 50", "question 51"]


def test_a_number_is_enough_for_a_name(tmp_path: Path) -> None:
    write(tmp_path / "task74_short")
    write(tmp_path / "task748_glucose")
    assert [task.name for task in load(tmp_path, ["task748", "task74"])] == ["task748_glucose", "task74_short"]
    write(tmp_path / "task748_other")
    (fault,) = faults_of(tmp_path, ["task748"])
    assert "task748_glucose, task748_other" in fault
    (fault,) = faults_of(tmp_path, ["task74", "task74_short"])
    assert "already has" in fault


def test_names_never_leave_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path / "outside")
    write(tmp_path / "data" / "inside")
    assert "no such folder" in faults_of(tmp_path / "data", ["../outside"])[0]


def test_missing_folders_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "agnews")
    write(tmp_path / "suite" / "boolq")
    faults = faults_of(tmp_path, ["agnws", "agnews", "boolq"])
    assert faults[0] == "agnws: no such folder; nearest: agnews"
    assert faults[1].endswith(f"one level too high, give {tmp_path / 'suite'}")
    with pytest.raises(DataError, match="is not a folder"):
        load(tmp_path / "nowhere", ["agnews"])


def test_an_order_with_missing_folders_says_how_to_go_on(tmp_path: Path) -> None:
    for name in ("mnli", "yelp"):
        write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_sequence(BenchmarkConfig(suite="long_sequence", data_dir=tmp_path))
    assert len(caught.value.faults) == 14
    assert caught.value.faults[-1].endswith("benchmark.tasks=yelp,mnli")
    config = BenchmarkConfig(suite="long_sequence", data_dir=tmp_path, tasks=("yelp", "mnli"))
    assert [(task.name, task.template, task.metric) for task in load_sequence(config)] == [
        ("yelp", "long_sequence", "exact_match"),
        ("mnli", "long_sequence", "exact_match"),
    ]


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.order: 3; suite superni has the orders 1, 2"):
        load_sequence(BenchmarkConfig(suite="superni", data_dir=tmp_path, order=3))


def test_orders_hold_the_same_fifteen_tasks() -> None:
    for first, second in ORDERS.values():
        assert len(set(first)) == 15
        assert sorted(first) == sorted(second)


BROKEN_ROWS: list[tuple[Any, str]] = [
    ("text", "is text, not an object"),
    (None, "is null, not an object"),
    ({"output": "a"}, "input is missing"),
    ({"input": 3, "output": "a"}, "input is a number, not text"),
    ({"input": " \n", "output": "a"}, "input is blank"),
    ({"input": "q"}, "output is missing"),
    ({"input": "q", "output": {"a": 1}}, "output is neither text"),
    ({"input": "q", "output": ["a", None]}, "output is neither text"),
    ({"input": "q \ud800", "output": "a"}, "lone surrogate"),
    ({"input": "q", "output": "\udfff"}, "output is neither text"),
    ({"input": ""}, "input is blank; output is missing"),
]


@pytest.mark.parametrize(("row", "fault"), BROKEN_ROWS)
def test_a_broken_row_is_named_by_file_and_index(tmp_path: Path, row: Any, fault: str) -> None:
    write(tmp_path / "one", train=[*rows(3), row])
    (found,) = faults_of(tmp_path, ["one"])
    assert found.startswith("one/train.json: row 3: ")
    assert fault in found


def break_file(path: Path, content: str | bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"Definition": "x",\n "Instances": [{"in', "line 2 column"),
        (b"\xff\xfe{}", "cannot be read"),
        ("3", "holds a number, not an object"),
        ("[]", "holds no rows"),
        ('{"Definition": "x"}', "Instances is missing"),
        ('{"Definition": "x", "Instances": []}', "Instances is empty"),
        ('{"Definition": "x", "Instances": {}}', "Instances is not a list"),
        ('{"Instances": [{"input": "q", "output": "a"}]}', "Definition is missing"),
        ('{"Definition": {}, "Instances": [{"input": "q", "output": "a"}]}', "Definition is not text"),
        ('{"Definition": [1], "Instances": [{"input": "q", "output": "a"}]}', "Definition is not text"),
        ('{"Definition": "", "Instances": [{"input": "q", "output": " - "}]}', "no row is usable"),
    ],
)
def test_a_broken_file_is_a_fault(tmp_path: Path, content: str | bytes | None, fault: str) -> None:
    break_file(write(tmp_path / "one") / "test.json", content)
    (found,) = faults_of(tmp_path, ["one"])
    assert found.startswith("one/test.json: ")
    assert fault in found


def test_all_faults_of_all_tasks_come_at_once_and_long_lists_are_capped(tmp_path: Path) -> None:
    write(tmp_path / "one", train=[{"input": "q"}] * 12)
    break_file(write(tmp_path / "two") / "train.json", None)
    break_file(tmp_path / "two" / "test.json", "{")
    faults = faults_of(tmp_path, ["one", "two", "three"])
    assert [fault.split(":")[0] for fault in faults] == [
        "three", *["one/train.json"] * 6, "two/train.json", "two/test.json",
    ]  # fmt: skip
    assert faults[6] == "one/train.json: 7 more faulty rows"


def test_one_train_row_cannot_be_split(tmp_path: Path) -> None:
    write(tmp_path / "one", train=rows(1))
    assert "give at least 2" in faults_of(tmp_path, ["one"])[0]


@pytest.mark.parametrize("definition", ["", [], [""], None])
def test_an_empty_definition_and_a_byte_order_mark_are_fine(tmp_path: Path, definition: Any) -> None:
    folder = write(tmp_path / "copa", definition=definition)
    content = (folder / "train.json").read_bytes()
    (folder / "train.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert load(tmp_path, ["copa"])[0].definition == ""


def test_answers_that_are_no_text_are_taken_as_json_writes_them(tmp_path: Path) -> None:
    answers = [7, -1.5, True, False, ["a", 3], ["yes", "yeah"]]
    write(tmp_path / "one", test=[{"id": i, "input": f"q{i}", "output": given} for i, given in enumerate(answers)])
    (task,) = load(tmp_path, ["one"])
    assert [row.references for row in task.test] == [
        ("7",), ("-1.5",), ("true",), ("false",), ("a", "3"), ("yes", "yeah"),
    ]  # fmt: skip


def test_rows_without_any_output_are_left_out_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "one", test=[*rows(2, 50), {"input": "q1", "output": []}, {"input": "q2", "output": None}])
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, ["one"])[0].test) == 2
    assert "one/test.json: 2 of 4 rows left out" in caplog.text
    assert "(first: row 2, [])" in caplog.text


def test_a_published_file_has_more_keys_than_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "task1_supernatural")
    more = {"Contributors": ["a"], "Positive Examples": [], "Negative Examples": [{"input": 1}], "Instance License": 3}
    for name in ("train", "test"):
        content = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(more | content | {"Definition": "One text."}))
    (folder / "labels.json").write_text('["yes", "no"]')
    assert load(tmp_path, ["task1"])[0].definition == "One text."


def test_a_folder_of_trace_is_read_with_whole_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "NumGLUE-cm"
    folder.mkdir()
    for name, count in (("train", 6), ("eval", 2), ("test", 3)):
        content = [{"prompt": f"{name} {i} + 1 = ?\nAnswer:", "answer": i + 1} for i in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(content))
    (task,) = load(tmp_path, ["NumGLUE-cm"], template="none", metric="exact_match")
    assert (task.definition, len(task.train) + len(task.dev)) == ("", 6)
    assert [(row.input, row.references) for row in task.test][1] == ("test 1 + 1 = ?\nAnswer:", ("2",))


def test_a_whole_prompt_has_no_definition_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "one")
    assert "one: nothing would part definition and input" in faults_of(tmp_path, ["one"], template="none")[0]
    with pytest.raises(DataError, match="animal"):
        load_sequence(BenchmarkConfig(suite="synthetic", template="none"))


def test_a_large_file_is_checked_in_no_time(tmp_path: Path) -> None:
    write(tmp_path / "one", train=[{"input": f"{i} " + "long text " * 1000, "output": "a"} for i in range(200)])
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        load(tmp_path, ["one"])
    finally:
        sys.setprofile(None)
    assert calls < 20_000  # 2 million characters: none is walked in Python


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unanswered = [{"input": "q1", "output": "-"}, {"input": "q2", "output": ["", "**"]}]
    partly = {"input": "q3", "output": ["", "yes"]}
    write(tmp_path / "mnli", train=[*rows(6), *unanswered, partly], test=[*rows(2, 50), unanswered[0]])
    with caplog.at_level(logging.WARNING):
        (task,) = load(tmp_path, ["mnli"])
    assert len(task.train) + len(task.dev) == 7
    assert ("yes",) in [row.references for row in (*task.train, *task.dev)]
    assert [row.references[0] for row in task.test] == ["answer 50", "answer 51"]
    assert [record.getMessage() for record in caplog.records] == [
        "mnli/train.json: 2 of 9 rows left out: their output holds no more than punctuation (first: row 6, '-')",
        "mnli/test.json: 1 of 3 rows left out: their output holds no more than punctuation (first: row 2, '-')",
    ]


def test_an_answer_in_any_script_or_of_one_symbol_is_an_answer(tmp_path: Path) -> None:
    answers = ["很好", "да", "हाँ", "نعم", "네", "ใช่", "👍", "°", "½"]
    write(tmp_path / "one", test=[{"input": f"q{i}", "output": [a, "。"]} for i, a in enumerate(answers)])
    assert [row.references for row in load(tmp_path, ["one"])[0].test] == [(answer,) for answer in answers]


def test_overlap_and_further_wordings_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "one", test=[*rows(2), *rows(1, 70)], definition=["First.", "Second."])
    with caplog.at_level(logging.WARNING):
        (task,) = load(tmp_path, ["one"])
    assert task.definition == "First."
    messages = [record.getMessage() for record in caplog.records]
    assert sum("2 wordings" in message for message in messages) == 2
    assert sum("2 inputs of test (3 rows) are also in train (10 rows)" in text for text in messages) == 1


def test_templates_are_those_of_the_papers() -> None:
    assert "".join(TEMPLATES["superni"].pieces("DEF", "IN")) == (
        "Definition: DEF\n\nNow complete the following example -\nInput: IN\nOutput: "
    )
    assert "".join(TEMPLATES["long_sequence"].pieces("DEF", "IN")) == "DEF\nIN\nOutput: "


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real benchmarks are not at {REAL}")
@pytest.mark.parametrize("order", [1, 2])
def test_real_superni_loads(order: int) -> None:
    tasks = load_sequence(BenchmarkConfig(suite="superni", data_dir=REAL / "SuperNI", order=order))
    assert [task.name for task in tasks] == list(ORDERS["superni"][order - 1])
    sizes = {task.name.split("_")[0]: (len(task.train) + len(task.dev), len(task.test)) for task in tasks}
    assert sizes["task1572"] == (160, 20)
    assert sizes["task748"] == (1000, 100)
    # Nine train summaries and one test summary are blank or mere punctuation.
    assert sizes["task511"] == (991, 99)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real benchmarks are not at {REAL}")
def test_real_long_sequence_loads() -> None:
    data_dir = REAL / "Long_Sequence"
    names = tuple(sorted(folder.name for folder in data_dir.iterdir() if folder.is_dir()))
    tasks = load_sequence(BenchmarkConfig(suite="long_sequence", data_dir=data_dir, tasks=names))
    assert len(tasks) == 10
    mnli = tasks[names.index("mnli")]
    # 16 of the 1000 test rows carry the label "-".
    assert (len(mnli.train), len(mnli.dev), len(mnli.test)) == (2700, 300, 984)
    assert {row.references[0] for row in mnli.test} == {"entailment", "neutral", "contradiction"}
