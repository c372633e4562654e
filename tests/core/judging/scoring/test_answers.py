"""Metrics of single answers, worked out by hand and held against independent formulas."""

from __future__ import annotations

import re
import string
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.judging.scoring.answers import accuracy, edit_similarity, last_number, numeric_match, squad_f1

WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat.", "sat", "on", "mat!", "an"]), max_size=6).map(" ".join)


def test_accuracy_tells_labels_apart_that_exact_match_does_not() -> None:
    assert accuracy(" World\n", ["Sports", "World"]) == 100.0
    for near in ("world", "World.", "The World", ""):
        assert accuracy(near, ["World"]) == 0.0
    assert (accuracy("-", ["+"]), accuracy("+", ["+"])) == (0.0, 100.0)


def test_squad_f1_by_hand() -> None:
    # Without "the" and "on": cat sat mat against cat mat: P = 2/3, R = 1.
    assert squad_f1("The cat sat mat", ["a cat, mat"]) == pytest.approx(80.0)
    assert squad_f1("cat", ["dog", "the cat"]) == 100.0
    assert squad_f1("the", ["a"]) == 100.0  # neither has words
    assert squad_f1("", ["cat"]) == 0.0


def official(prediction: str, reference: str) -> float:
    """F1 as SQuAD's evaluation computes it, over positions and not over counts."""

    def words(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    given_words, right = words(prediction), words(reference)
    if not given_words or not right:
        return 100.0 * (given_words == right)
    left, same = list(right), 0
    for word in given_words:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(given_words), same / len(right)
    return 100 * 2 * precision * recall / (precision + recall)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_squad_f1_is_the_official_one(prediction: str, references: list[str]) -> None:
    assert squad_f1(prediction, references) == pytest.approx(max(official(prediction, each) for each in references))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it costs 1,000.50 dollars", "1000.5"),
        ("3 - 4 = -1", "-1"),
        ("3-4", "4"),
        ("x = \N{MINUS SIGN}7.", "-7"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("#### 42", "42"),
        ("50%", "50"),
        ("12,345,67", "67"),
        ("\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}", "12"),
        ("\N{ARABIC-INDIC DIGIT THREE}", "3"),
        ("1e99999999999999999999", "99999999999999999999"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)
    assert numeric_match(text, ["none", number]) == 100.0
    assert numeric_match(text, [f"{number}1"]) == 0.0


def test_what_holds_no_number_matches_none() -> None:
    assert last_number("none at all") is None
    assert numeric_match("none at all", ["none at all"]) == 0.0
    assert numeric_match("0.1", ["0.10", "2"]) == 100.0


@given(st.text(max_size=30))
def test_any_text_has_a_last_number_or_none(text: str) -> None:
    found = last_number(text)
    assert found is None or numeric_match(text, [text]) == 100.0


def longest_common(left: str, right: str) -> int:
    row = [0] * (len(right) + 1)
    for letter in left:
        before = row
        row = [0]
        for index, other in enumerate(right):
            row.append(before[index] + 1 if letter == other else max(before[index + 1], row[index]))
    return row[-1]


@given(st.text("abc ", max_size=12), st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=3))
def test_edit_similarity_is_the_share_of_the_longest_common_subsequence(prediction: str, references: list[str]) -> None:
    given_text = prediction.strip()
    shares = [
        200 * longest_common(given_text, right) / size if (size := len(given_text) + len(right)) else 100.0
        for right in map(str.strip, references)
    ]
    assert edit_similarity(prediction, references) == pytest.approx(max(shares))


def test_edit_similarity_by_hand() -> None:
    # Both have 8 characters and share 7 in a row; of ab and ba one in two stays.
    assert edit_similarity("return x", ["return y", "import"]) == pytest.approx(100 * 14 / 16)
    assert edit_similarity("ab", ["ba"]) == pytest.approx(50.0)
