"""Confidence intervals: repeatable, as wide as they should be, and cheap."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sapt_core.judging.scoring import intervals
from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.intervals import estimate
from sapt_core.judging.scoring.named import METRICS


def rows(right: int, wrong: int) -> list[Row]:
    return [Row("yes", ["yes"])] * right + [Row("no", ["yes"])] * wrong


def test_a_share_has_the_interval_of_a_binomial() -> None:
    found = estimate(METRICS["exact_match"], rows(60, 40))
    assert found.score == 60.0
    # 1.96 standard errors of 4.9 points, in steps of a row.
    assert (found.low, found.high) == (pytest.approx(50.4, abs=1.1), pytest.approx(69.6, abs=1.1))
    wide, narrow = (estimate(METRICS["exact_match"], rows(6 * n, 4 * n)) for n in (1, 100))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_it_says_the_same_again_and_nothing_where_rows_are_alike() -> None:
    assert estimate(METRICS["rouge_l"], rows(5, 3)) == estimate(METRICS["rouge_l"], rows(5, 3)[::-1])
    for name in METRICS:
        found = estimate(METRICS[name], [Row("one", ["two"], "one")])
        assert found.low == pytest.approx(found.score) == pytest.approx(found.high)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        right = int(random.binomial(80, 0.7))
        found = estimate(METRICS["accuracy"], rows(right, 80 - right))
        hits += found.low <= 70.0 <= found.high
    assert 88 <= hits <= 100


def test_a_corpus_is_drawn_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scoring texts that were drawn anew: the same spread, from figures alone."""
    random = np.random.default_rng(1)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    corpus = [Row(" ".join(random.choice(words, 7)), [" ".join(random.choice(words, 7))]) for _ in range(40)]
    slow = [METRICS["chrf"].score([corpus[i] for i in random.integers(0, 40, 40)]) for _ in range(300)]
    found = estimate(METRICS["chrf"], corpus)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.6)
    # In pieces, as many rows are drawn, it is the same.
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 40)
    assert estimate(METRICS["chrf"], corpus) == pytest.approx(found)


def test_many_rows_take_seconds_at_most() -> None:
    start = time.perf_counter()
    corpus = [Row(f"w{i % 977} b c d e", [f"w{i % 991} b c d f"]) for i in range(3000)]
    for name in ("bleu", "chrf", "accuracy"):
        estimate(METRICS[name], corpus)
    assert time.perf_counter() - start < 60
