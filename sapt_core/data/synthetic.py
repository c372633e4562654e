"""Text tasks that the project generates: small, seeded, and at odds with each other when learnt in a row.

The same inputs carry different answers under different definitions (``animal`` and ``place`` read the
same reports), and other tasks differ in style as well, so one adapter trained on one task after another
forgets, while the definition and the words of an input tell which task is meant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random

from sapt_core.data.lexicon import (
    ANIMALS,
    BAD,
    COLOURS,
    DAYS,
    DISHES,
    GOOD,
    GROCERIES,
    KIND,
    NAMES,
    NUMBERS,
    PLACES,
    QUEUES,
    STAFF,
    TOOLS,
    UNKIND,
)
from sapt_core.data.task import SEEN, Example, Task, dev_rows
from sapt_core.errors import DataError
from sapt_core.settings import BenchmarkConfig

TRAIN_ROWS = 240
TEST_ROWS = 50
MAX_ROWS = 2_000
TEST_SHARE = 5  # one distinct input in so many belongs to the test split


@dataclass(frozen=True)
class SyntheticTask:
    """How one task is made.

    Attributes:
        definition: the instruction put before every input.
        draw: an input and its only answer, drawn with the given generator.
    """

    definition: str
    draw: Callable[[Random], tuple[str, str]]


def _report(rng: Random) -> tuple[str, str, str]:
    """A walker's report, the animal seen and the place."""
    name, day, colour = rng.choice(NAMES), rng.choice(DAYS), rng.choice(COLOURS)
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    text = rng.choice(
        (
            f"on {day} {name} saw a {colour} {animal} near the {place}.",
            f"{name} met a {colour} {animal} behind the {place} on {day}.",
            f"near the {place} a {colour} {animal} ran past {name}.",
            f"{name} says a {colour} {animal} slept by the {place} all {day}.",
            f"a {colour} {animal} was seen on {day} beside the {place}.",
        )
    )
    return text, animal, place


def _animal(rng: Random) -> tuple[str, str]:
    text, animal, _ = _report(rng)
    return text, animal


def _place(rng: Random) -> tuple[str, str]:
    text, _, place = _report(rng)
    return text, place


def _ticket(rng: Random) -> tuple[str, str]:
    queue = rng.choice(tuple(QUEUES))
    subjects, troubles = QUEUES[queue]
    name, day, subject, trouble = rng.choice(NAMES), rng.choice(DAYS), rng.choice(subjects), rng.choice(troubles)
    text = rng.choice(
        (
            f"hello, this is {name}. since {day} my {subject} is {trouble}. please help!",
            f"dear team, the {subject} is {trouble} again. thanks, {name}.",
            f"my {subject} was {trouble} on {day}, what can i do? regards, {name}.",
            f"{name} here: can you look at my {trouble} {subject} before {day}?",
        )
    )
    return text, queue


def _basket(rng: Random) -> tuple[str, str]:
    items = rng.sample(GROCERIES, rng.randint(3, 6))
    return f"to buy for {rng.choice(NAMES)}: {', '.join(items)}.", items[-1]


def _review(rng: Random) -> tuple[str, str]:
    enjoyed = rng.random() < 0.5
    food, manners = (GOOD, KIND) if enjoyed else (BAD, UNKIND)
    dish, staff = rng.choice(DISHES), rng.choice(STAFF)
    text = rng.choice(
        (
            f"the {dish} was {rng.choice(food)} and the {staff} was {rng.choice(manners)}.",
            f"we had the {dish}: {rng.choice(food)}, and a {rng.choice(manners)} {staff} too.",
            f"a {rng.choice(manners)} {staff} brought us {rng.choice(food)} {dish} for dinner.",
        )
    )
    return text, "positive" if enjoyed else "negative"


def _stock(rng: Random) -> tuple[str, str]:
    shelf, price, count = rng.sample(NUMBERS, 3)
    fields = [
        f"item: {rng.choice(TOOLS)}",
        f"shelf: {shelf}",
        f"price: {price}",
        f"count: {count}",
    ]
    rng.shuffle(fields)
    return "; ".join(fields) + ".", price


def _loan(rng: Random) -> tuple[str, str]:
    owner, borrower = rng.sample(NAMES, 2)
    tool, day = rng.choice(TOOLS), rng.choice(DAYS)
    text = rng.choice(
        (
            f"{owner} lent the {tool} to {borrower} until {day}.",
            f"until {day} {borrower} borrowed the {tool} from {owner}.",
            f"last {day} the {tool} was lent to {borrower} by {owner}.",
            f"{borrower} returned the {tool} to {owner} on {day}.",
        )
    )
    return text, owner


TASKS = {
    "animal": SyntheticTask("A walker wrote down what passed by. Which animal was it?", _animal),
    "ticket": SyntheticTask(
        "Choose the help desk queue of this message among delivery, billing, repair and access.", _ticket
    ),
    "place": SyntheticTask("Tell where this happened, in a single word.", _place),
    "basket": SyntheticTask("The list shows groceries. Give its final item.", _basket),
    "review": SyntheticTask("Judge if our guest enjoyed eating there: positive or negative.", _review),
    "stock": SyntheticTask("Each card has several fields about an article. Find its price.", _stock),
    "loan": SyntheticTask("Neighbours share their tools. Decide who owns it.", _loan),
}

ORDERS = {
    1: ("animal", "basket", "ticket", "place", "stock", "loan", "review"),
    2: ("loan", "ticket", "place", "stock", "animal", "basket", "review"),
}


def synthetic_sequence(config: BenchmarkConfig) -> tuple[Task, ...]:
    """Generate the tasks that ``config`` names, in its order, and behind them the unseen ones.

    A task's rows are one fixed stream, so asking for fewer gives the first of them. Whether an input
    is a train or a test row is decided by its text alone: the splits can never overlap.

    Args:
        config: its tasks, order, unseen, rows, dev split, template, metric and answers are read; 240
            train and 50 test rows a task, order 1, ``superni`` prompts and ``exact_match`` by default.

    Raises:
        DataError: unknown tasks or order, or more rows than are generated; all faults at once.
    """
    ordered = ORDERS.get(config.order or 1, ())
    names = ordered if config.tasks is None else tuple(task.name for task in config.tasks)
    unseen = tuple(task.name for task in config.unseen)
    train_rows, test_rows = config.train_rows or TRAIN_ROWS, config.test_rows or TEST_ROWS
    faults = [
        f"benchmark.{field}: no synthetic task {name!r}{_nearest(name)}"
        for field, named in (("tasks", names), ("unseen", unseen))
        for name in named
        if name not in TASKS
    ]
    faults += [
        f"benchmark.unseen: {name}, {SEEN}" for place, name in enumerate(unseen) if name in (*names, *unseen[:place])
    ]
    if not names:
        faults.append(f"benchmark.order: {config.order} is not an order of synthetic; allowed: {_listed(ORDERS)}")
    faults += [
        f"benchmark.{field}: {rows} rows; at most {MAX_ROWS} are generated"
        for field, rows in (("train_rows", train_rows), ("test_rows", test_rows))
        if rows > MAX_ROWS
    ]
    if faults:
        raise DataError("The synthetic sequence cannot be generated:", faults)
    return tuple(_task(name, train_rows, test_rows, config) for name in (*names, *unseen))


def _task(name: str, train_rows: int, test_rows: int, config: BenchmarkConfig) -> Task:
    rows = _rows(name, train_rows, test=False)
    dev = dev_rows(len(rows), config.dev_fraction, config.split_seed)
    return Task(
        name=name,
        definition=TASKS[name].definition,
        train=tuple(row for index, row in enumerate(rows) if index not in dev),
        dev=tuple(row for index, row in enumerate(rows) if index in dev),
        test=_rows(name, test_rows, test=True),
        template=config.template or "superni",
        metric=next(iter(config.metrics), "exact_match"),
        other_metrics=config.metrics[1:],
        answers=config.answers,
    )


def _rows(name: str, count: int, *, test: bool) -> tuple[Example, ...]:
    """The first ``count`` distinct rows of a split."""
    rows: dict[str, Example] = {}
    for text, answer in _stream(name):
        if is_test_input(text) == test:
            rows.setdefault(text, Example(text, (answer,)))
            if len(rows) == count:
                break
    return tuple(rows.values())


def _stream(name: str) -> Iterator[tuple[str, str]]:
    rng = Random(name)
    while True:
        yield TASKS[name].draw(rng)


def is_test_input(text: str) -> bool:
    """Whether an input belongs to the test split, by its text alone."""
    return hashlib.sha256(text.encode()).digest()[0] % TEST_SHARE == 0


def _nearest(name: str) -> str:
    close = get_close_matches(name, TASKS, n=1)
    return f"; did you mean {close[0]}? known: {_listed(TASKS)}" if close else f"; known: {_listed(TASKS)}"


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names)
