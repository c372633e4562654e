"""What always the commonest answer scores, by hand."""

from __future__ import annotations

import pytest

from sapt_core.judging.baselines import commonest_answer, constant_score

ROWS = [("no",), ("yes",), ("yes", "sure"), ("yes",), ("no",)]


def test_the_commonest_answer_is_right_for_the_most_rows() -> None:
    assert commonest_answer(ROWS) == "yes"
    assert commonest_answer([("b", "b", "b"), ("a",), ("a",)]) == "a"  # a row counts once
    assert commonest_answer([("b",), ("a",)]) == "b"  # the first of equals
    assert commonest_answer([]) is None


@pytest.mark.parametrize(
    ("metric", "answer", "score"),
    [
        ("exact_match", "yes", 60.0),
        ("exact_match", "no", 40.0),
        ("exact_match", "sure", 20.0),
        ("rouge_l", "yes", 60.0),
        # Two words of which one is right: F of 1/2 and 1 is 2/3, in the three rows that have it.
        ("rouge_l", "yes please", 100 * 3 * (2 / 3) / 5),
    ],
)
def test_its_score_is_the_tasks_own(metric: str, answer: str, score: float) -> None:
    assert constant_score(metric, answer, ROWS) == pytest.approx(score)
