"""Metrics of whole corpora against the libraries that define them, and SARI against a formula of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import f1_score

from sapt_core.judging.metrics import score
from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.corpora import sari
from sapt_core.judging.scoring.intervals import estimate
from sapt_core.judging.scoring.named import METRICS, find_metric
from sapt_core.metric_settings import METRIC_NAMES

TEXT = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", ".", "很好", "isn't"]), max_size=8).map(
    " ".join
)
CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT.filter(bool), min_size=1, max_size=3), TEXT), min_size=1, max_size=6)


@pytest.mark.parametrize(("name", "library"), [("bleu", BLEU), ("chrf", CHRF)])
@given(corpus=CORPUS)
@settings(deadline=None)
def test_they_are_sacrebleus_whatever_the_number_of_references(
    name: str, library: Callable[[], Any], corpus: list[tuple[str, list[str], str]]
) -> None:
    predictions, references, _ = zip(*corpus, strict=True)
    most = max(map(len, references))
    streams = [[row[place] if place < len(row) else None for row in references] for place in range(most)]
    expected = library().corpus_score(list(predictions), streams).score
    assert score(name, predictions, references) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_one_row_alone_is_sacrebleus_sentence(name: str) -> None:
    library = {"bleu": BLEU(effective_order=True), "chrf": CHRF()}[name]
    row = Row("the cat", ["the cat sat", "a cat"])
    assert METRICS[name].of_row(row) == pytest.approx(
        library.sentence_score(row.prediction, list(row.references)).score
    )
    assert METRICS[name].of_row(Row("cat", ["cat"])) == pytest.approx(100.0)


@given(st.lists(st.tuples(st.sampled_from("abcx "), st.sampled_from("abc")), min_size=1, max_size=20))
def test_macro_f1_is_scikit_learns_over_the_classes_that_rows_are_of(pairs: list[tuple[str, str]]) -> None:
    given_labels, right = zip(*pairs, strict=True)
    expected = 100 * f1_score(right, given_labels, labels=sorted(set(right)), average="macro", zero_division=0)
    assert score("macro_f1", given_labels, [[label] for label in right]) == pytest.approx(expected)


def test_macro_f1_by_hand() -> None:
    # a: 1 of 2 found, 1 of 1 answered: F1 = 2/3; b: 1 of 1 found, 1 of 2 answered: 2/3. "none" costs recall alone.
    assert score("macro_f1", ["a", "b", "b"], [["a"], ["a"], ["b"]]) == pytest.approx(200 / 3)
    assert score("macro_f1", ["a", "none"], [["a"], ["a"]]) == pytest.approx(200 / 3)
    assert score("macro_f1", [" b\n"], [["a", "b"]]) == 100.0  # of several right ones the one that was answered
    # Not the mean over rows: one rare class that is never found halves it.
    assert score("macro_f1", ["a"] * 9 + ["a"], [["a"]] * 9 + [["b"]]) == pytest.approx(100 * (18 / 19) / 2)


def test_sari_by_hand_and_as_published() -> None:
    # The worked example of the paper's authors' script.
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    source = "About 95 species are currently accepted."
    assert sari(Row("About 95 you now get in.", references, source)) == pytest.approx(26.953601953601954)
    assert sari(Row("b c d e f", ["b c d e f"], "a b c d e")) == pytest.approx(100.0)
    # Nothing was to be kept (1), a rightly went (1), c wrongly came for b (0); of longer runs there are none (1 each).
    assert sari(Row("c", ["b"], "a")) == pytest.approx(100 * ((1 + 1 + 0) / 3 + 3) / 4)


def naive_sari(source: str, answer: str, references: list[str]) -> float:
    """SARI with one loop a run of words, straight from its definition."""

    def runs(text: str, n: int) -> list[str]:
        words = text.lower().split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 1.0

    total = 0.0
    for n in range(1, 5):
        s, c, r = runs(source, n), runs(answer, n), [run for each in references for run in runs(each, n)]
        copies = len(references)
        keep_good, keep_given, keep_types, keep_all, delete_good, delete_types = 0.0, 0.0, 0, 0.0, 0.0, 0
        for run in {*s, *c, *r}:
            before, after, wanted = copies * s.count(run), copies * c.count(run), r.count(run)
            keep_all += min(before, wanted)
            if kept := min(before, after):
                keep_types += 1
                keep_given += min(kept, wanted) / kept
                keep_good += min(kept, wanted)
            if deleted := max(before - after, 0):
                delete_types += 1
                delete_good += max(deleted - wanted, 0) / deleted
        add_given, add_all = {*c} - {*s}, {*r} - {*s}
        shares = [
            (ratio(keep_given, keep_types), ratio(keep_good, keep_all)),
            (ratio(len(add_given & add_all), len(add_given)), ratio(len(add_given & add_all), len(add_all))),
        ]
        f1 = [2 * p * q / (p + q) if p + q else 0.0 for p, q in shares]
        total += (f1[0] + ratio(delete_good, delete_types) + f1[1]) / 3
    return 100 * total / 4


PLAIN = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)


@given(PLAIN, PLAIN, st.lists(PLAIN, min_size=1, max_size=3))
def test_sari_is_its_definition(source: str, answer: str, references: list[str]) -> None:
    assert sari(Row(answer, references, source)) == pytest.approx(naive_sari(source, answer, references))


@pytest.mark.parametrize("name", METRIC_NAMES)
@given(corpus=CORPUS, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_every_metric_is_in_bounds_and_heeds_no_order(
    name: str, corpus: list[tuple[str, list[str], str]], seed: int
) -> None:
    rows = [Row(*each) for each in corpus]
    found = estimate(find_metric(name), rows)
    assert all(-1e-9 <= figure <= 100 + 1e-9 for figure in found)
    assert found.low <= found.high
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert estimate(find_metric(name), shuffled) == pytest.approx(found)


def test_every_metric_that_can_be_named_is_there() -> None:
    assert tuple(METRICS) == METRIC_NAMES
