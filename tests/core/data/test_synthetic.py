"""The generated tasks: the same for everyone, never overlapping, and with one right answer a row."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from sapt_core.data import lexicon
from sapt_core.data.synthetic import ORDERS, TASKS, is_test_input, synthetic_sequence
from sapt_core.data.task import Example, Task
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig

ROOT = Path(__file__).resolve().parents[3]


def sequence(**fields: object) -> tuple[Task, ...]:
    return synthetic_sequence(BenchmarkConfig(suite="synthetic", **fields))


def rows(task: Task) -> tuple[Example, ...]:
    return task.train + task.dev + task.test


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def only(found: set[str]) -> str:
    assert len(found) == 1, found
    return found.pop()


# The right answer of each task by other means than the generator's: from the finished text alone.
ORACLES = {
    "animal": lambda text: only(words(text) & set(lexicon.ANIMALS)),
    "place": lambda text: only(words(text) & set(lexicon.PLACES)),
    "ticket": lambda text: only(
        {queue for queue, parts in lexicon.QUEUES.items() for part in parts if words(text) & set(part)}
    ),
    "basket": lambda text: only(set(re.findall(r"(\w+)\.$", text))),
    "review": lambda text: only(
        ({"positive"} if words(text) & {*lexicon.GOOD, *lexicon.KIND} else set())
        | ({"negative"} if words(text) & {*lexicon.BAD, *lexicon.UNKIND} else set())
    ),
    "stock": lambda text: only(set(re.findall(r"price: (\w+)", text))),
    "loan": lambda text: only(set(re.findall(r"^(\w+) lent|from (\w+)|by (\w+)|to (\w+) on", text)[0]) - {""}),
}


@pytest.mark.parametrize("task", sequence(train_rows=1000, test_rows=200), ids=lambda task: task.name)
def test_every_answer_follows_from_its_input_alone(task: Task) -> None:
    for row in rows(task):
        assert row.references == (ORACLES[task.name](row.input),), row


def test_word_classes_share_no_word() -> None:
    assert [word for word, count in Counter(lexicon.open_class_words()).items() if count > 1] == []


def test_the_sequence_is_the_same_every_time() -> None:
    assert sequence() == sequence()
    animal = sequence()[0]
    assert animal.train[0] == Example("ada met a grey fox behind the orchard on tuesday.", ("fox",))


@pytest.mark.parametrize(("train_rows", "test_rows"), [(2, 1), (240, 50), (2000, 2000)])
def test_no_input_occurs_twice_in_a_task(train_rows: int, test_rows: int) -> None:
    for task in sequence(train_rows=train_rows, test_rows=test_rows):
        inputs = [row.input for row in rows(task)]
        assert len(set(inputs)) == len(inputs) == train_rows + test_rows


def test_a_train_row_of_one_task_is_a_test_row_of_no_other() -> None:
    tasks = sequence(train_rows=500, test_rows=200)
    assert all(is_test_input(row.input) for task in tasks for row in task.test)
    assert not any(is_test_input(row.input) for task in tasks for row in (*task.train, *task.dev))


def test_fewer_rows_are_the_first_of_more() -> None:
    for few, many in zip(sequence(train_rows=20, test_rows=5), sequence(train_rows=90, test_rows=40), strict=True):
        assert set(few.train + few.dev) <= set(many.train + many.dev)
        assert few.test == many.test[:5]


def test_the_task_that_ships_as_a_file_is_what_is_generated() -> None:
    with open(ROOT / "pipelines/data/place.csv", newline="") as file:
        rows = [(row["input"], row["output"]) for row in csv.DictReader(file)]
    (task,) = synthetic_sequence(BenchmarkConfig(suite="synthetic", tasks=("place",), train_rows=200, test_rows=50))
    assert sorted(rows) == sorted((row.input, *row.references) for row in (*task.train, *task.dev, *task.test))


def test_defaults() -> None:
    tasks = sequence()
    assert tuple(task.name for task in tasks) == ORDERS[1]
    for task in tasks:
        assert (len(task.train), len(task.dev), len(task.test)) == (216, 24, 50)
        assert (task.template, task.metric) == ("superni", "exact_match")
        assert task.definition == TASKS[task.name].definition


def test_classification_labels_are_balanced() -> None:
    tasks = {task.name: task for task in sequence()}
    for name, labels in (("ticket", 4), ("review", 2)):
        counts = Counter(row.references[0] for row in tasks[name].train)
        assert len(counts) == labels
        assert min(counts.values()) > 216 / labels / 2


def test_orders_are_permutations_of_all_tasks() -> None:
    assert len(ORDERS) >= 2
    assert len(set(ORDERS.values())) == len(ORDERS)
    assert all(sorted(order) == sorted(TASKS) for order in ORDERS.values())
    assert tuple(task.name for task in sequence(order=2)) == ORDERS[2]


def test_named_tasks_win_over_the_order() -> None:
    tasks = sequence(tasks="loan,animal", order=2, template="long_sequence", metric="rouge_l")
    assert [(task.name, task.template, task.metric) for task in tasks] == [
        ("loan", "long_sequence", "rouge_l"),
        ("animal", "long_sequence", "rouge_l"),
    ]


def test_the_dev_split_follows_its_seed_and_share() -> None:
    first, same, other = (sequence(split_seed=seed, dev_fraction=0.25)[0] for seed in (1, 1, 2))
    assert first.dev == same.dev != other.dev
    assert len(first.dev) == 60
    assert set(first.train + first.dev) == set(other.train + other.dev)
    tiny = sequence(train_rows=2, dev_fraction=0.99)[0]
    assert (len(tiny.train), len(tiny.dev)) == (1, 1)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(DataError) as caught:
        sequence(tasks="anmal,stock,xyzzy", train_rows=5000)
    message = str(caught.value)
    assert "no synthetic task 'anmal'; did you mean animal?" in message
    assert f"no synthetic task 'xyzzy'; known: {', '.join(TASKS)}" in message
    assert "benchmark.train_rows: 5000 rows; at most 2000" in message
    assert "'stock'" not in message


def test_an_unknown_order_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"benchmark\.order: 9 is not an order of synthetic; allowed: 1, 2"):
        sequence(order=9)
