"""Alignment, quality of pseudo-samples, and warnings: against naive formulas and figures worked out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.judging.analysis import (
    MIN_ROWS,
    Circumstances,
    TrainingEnd,
    alignment,
    diagnose,
    draw,
    gate_ends,
    sample_quality,
    spearman,
)
from sapt_core.judging.metrics import ScoreMatrix
from sapt_core.settings import DiagnosticsConfig

WORDS = ["red", "blue", "green", "fox", "owl", "hare", "sees", "finds", "meets", "the", "a", "one"]


def distributions(size: int) -> st.SearchStrategy[list[float]]:
    parts = st.lists(st.floats(0.001, 1), min_size=size, max_size=size)
    return parts.map(lambda values: [value / sum(values) for value in values])


def test_alignment_by_hand() -> None:
    # Half of the weight of [1, 0] has gone to a block that came later: 1 log(1 / 0.5).
    assert alignment([1.0, 0.0], [0.5, 0.0, 0.5]) == pytest.approx(math.log(2))
    assert alignment([0.75, 0.25], [0.25, 0.5, 0.25]) == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(0.5))


@given(distributions(3), distributions(5))
def test_alignment_is_the_kl_with_zeros_for_later_blocks(learnt: list[float], now: list[float]) -> None:
    naive = sum(p * math.log(p / q) for p, q in zip([*learnt, 0.0, 0.0], now, strict=True) if p > 0)
    assert alignment(learnt, now) == pytest.approx(max(naive, 0.0), abs=1e-12)
    assert alignment(learnt, [*learnt, 0.0]) == 0.0


def test_alignment_of_a_weight_that_vanished_is_large_and_finite() -> None:
    assert 50 < alignment([1.0], [0.0, 1.0]) < 100
    with pytest.raises(ValueError, match="never taken away"):
        alignment([0.5, 0.5], [1.0])


def test_ends_of_the_gate() -> None:
    curve = [{"gate": 1.0}] * 10 + [{"gate": 0.5}] * 5 + [{"gate": 0.25}] * 10
    assert gate_ends(curve) == (1.0, 0.25)
    assert gate_ends([{"gate": 0.2}, {"gate": 0.4}]) == (pytest.approx(0.3), pytest.approx(0.3))


def test_words_are_told_in_scripts_without_blanks_and_with_marks() -> None:
    pooled = np.zeros((1, 2))
    found = sample_quality(["今天天气很好", "आज मौसम अच्छा है"], ["今天不好"], pooled, pooled)
    assert (found.real_words, found.words, found.known_words) == (5.0, 4.0, 0.75)


def test_chinese_inputs_are_told_by_their_words() -> None:
    real = [f"今天的天气很好{digit}" for digit in "一二三四五六七八九十百千"]
    made = [f"明晚没有下雨吗{digit}" for digit in "一二三四五六七八九十百千"]
    pooled = np.random.default_rng(0).normal(size=(12, 4))
    assert sample_quality(real, made, pooled, pooled).word_accuracy == 1.0


def sentences(rows: int, seed: int, words: list[str] = WORDS) -> list[str]:
    draw_word = random.Random(seed)
    return [" ".join(draw_word.choice(words) for _ in range(12)) for _ in range(rows)]


def pooled(rows: int, seed: int, shift: float = 0.0) -> Any:
    return np.random.default_rng(seed).normal(shift, 1, (rows, 8)).astype(np.float32)


def test_what_is_alike_is_told_by_chance_alone() -> None:
    found = sample_quality(sentences(400, 0), sentences(200, 1), pooled(400, 0), pooled(200, 1))
    assert found.embedding_accuracy == pytest.approx(0.5, abs=0.08)
    assert found.word_accuracy == pytest.approx(0.5, abs=0.08)


def test_what_differs_is_told() -> None:
    other = [f"{text} zzz" for text in sentences(60, 1)]
    found = sample_quality(sentences(300, 0), other, pooled(300, 0), pooled(60, 1, shift=4))
    assert found.embedding_accuracy == pytest.approx(1, abs=0.03)
    assert found.word_accuracy == pytest.approx(1, abs=0.03)
    assert found.known_words == pytest.approx(12 / 13)


def test_the_larger_class_gives_no_head_start() -> None:
    # Guessing "real" would be right for 95 of 100 rows; over equally many of both it is right for half.
    found = sample_quality(sentences(380, 0), sentences(20, 1), pooled(380, 0), pooled(20, 1))
    assert found.word_accuracy is not None
    assert found.word_accuracy < 0.8


def test_counts_of_generated_texts() -> None:
    real = ["A red fox", "two blue owls here", "one"]
    generated = ["a  RED fox", "a new fox", "A new  fox", "two blue owls here"]
    found = sample_quality(real, generated, pooled(3, 0), pooled(4, 1))
    assert (found.real, found.generated) == (3, 4)
    assert (found.copies, found.duplicates) == (2, 1)
    assert found.words == pytest.approx((3 + 3 + 3 + 4) / 4)
    assert found.real_words == pytest.approx((3 + 4 + 1) / 3)
    assert found.real_vocabulary == 8
    assert found.known_words == pytest.approx(11 / 13)  # all but "new", twice
    assert found.embedding_accuracy is None
    assert found.word_accuracy is None


@pytest.mark.parametrize("rows", [0, 1, MIN_ROWS - 1])
def test_too_few_rows_are_not_judged(rows: int) -> None:
    found = sample_quality(sentences(30, 0), sentences(rows, 1), pooled(30, 0), pooled(rows, 1))
    assert found.embedding_accuracy is None
    assert found.word_accuracy is None
    assert found.generated == rows


def test_texts_without_words_are_not_told_by_words() -> None:
    found = sample_quality(["?!"] * 20, ["--"] * 20, pooled(20, 0), pooled(20, 1))
    assert found.word_accuracy is None
    assert found.embedding_accuracy is not None


@given(st.integers(0, 40), st.integers(0, 40))
def test_draw_is_in_order_without_repetition_and_always_the_same(rows: int, wanted: int) -> None:
    found = draw(rows, wanted)
    assert found == sorted(set(found)) == draw(rows, wanted)
    assert len(found) == min(rows, wanted)
    assert set(found) <= set(range(rows))


def test_spearman() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    assert spearman([0.1, 0.2, 0.3, 9.0], [1, 30, 20, 1000]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, None, 2, 3], [1, -5, 2, 3]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("first", "second"),
    [([], []), ([1, 2], [1, 2]), ([1, 2, None], [1, 2, 3]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0] * 3)],
)
def test_spearman_of_too_little(first: list[float | None], second: list[float | None]) -> None:
    assert spearman(first, second) is None


# --- warnings -----------------------------------------------------------------------------------------

#                    best 80 -> 60      50 -> 49
MATRIX = ScoreMatrix(("a", "b", "c"), ((70.0,), (80.0, 50.0), (60.0, 49.0, 30.0)), (72.0, 49.0, 40.0))
LIMITS = DiagnosticsConfig(forgetting=5, transfer=5, misalignment=0.5)
SETTLED = [TrainingEnd(steps=40, loss=0.1, falling=0.1)] * 3  # at the limit
CALM = Circumstances(
    shared=True,
    reflected=[True, True, False],
    alignment=[0.0, 0.0, 0.0],
    gates=[1.0, 1.0, 1.0],
    trainings=SETTLED,
    constant=[69.9, 49.9, None],
    bare=[None, 49.9, 29.9],
)


def test_warnings_by_hand() -> None:
    found = diagnose(MATRIX, LIMITS, CALM)
    assert [(each.kind, each.task, each.figure, each.limit) for each in found] == [
        ("forgetting", "a", 20.0, 5.0),
        ("no transfer", "c", 10.0, 5.0),
    ]
    assert "single inputs are routed elsewhere" in found[0].cure
    assert "train.epochs" in found[1].cure
    assert str(found[0]).startswith("forgetting: a fell by 20.0 points (limit 5). ")


def test_a_figure_at_its_limit_is_no_failure() -> None:
    at = DiagnosticsConfig(forgetting=20, transfer=10, misalignment=0.5)
    assert diagnose(MATRIX, at, replace(CALM, reflected=[True] * 3, alignment=[0.5, 0.5, 0.5])) == ()


def test_an_undertrained_task_is_told_with_its_evidence() -> None:
    matrix = ScoreMatrix(("a", "b", "c"), ((50.0,), (50.0, 0.0), (50.0, 0.0, 50.0)))
    trainings = [TrainingEnd(40, 2.5, 0.75), TrainingEnd(24, 3.1, 0.0), TrainingEnd(6, 1.0, None)]
    seen = replace(CALM, trainings=trainings, constant=[None] * 3, bare=[None] * 3)
    assert [(each.kind, each.figure, str(each).partition(". ")[0]) for each in diagnose(matrix, LIMITS, seen)] == [
        (
            "undertrained",
            0.75,
            "undertrained: a: its loss was still falling, by 0.75 nats over the last quarter (40 steps, last losses "
            "2.50 nats) (limit 0.1)",
        ),
        (
            "undertrained",
            0.0,
            "undertrained: b: score 0 when just learnt (24 steps, last losses 3.10 nats) (limit 0.1)",
        ),
        (
            "undertrained",
            0.0,
            "undertrained: c: too few steps to tell whether its loss had settled (6 steps, last losses 1.00 nats) "
            "(limit 0.1)",
        ),
    ]


def test_the_end_of_a_training_by_hand() -> None:
    losses = [9.0] * 8 + [3.0] * 4 + [2.0] * 4
    assert TrainingEnd.of([{"loss": loss} for loss in losses]) == TrainingEnd(steps=16, loss=2.0, falling=1.0)
    assert TrainingEnd.of([{"loss": 4.0}] * 15) == TrainingEnd(steps=15, loss=4.0, falling=None)
    assert TrainingEnd.of([{"loss": 4.0}]) == TrainingEnd(steps=1, loss=4.0, falling=None)


def test_a_task_no_better_than_a_baseline_is_not_learnt() -> None:
    seen = replace(CALM, constant=[70.0, 49.9, 40.0], bare=[71.5, 50.0, None])
    found = [each for each in diagnose(MATRIX, LIMITS, seen) if each.kind == "not learnt"]
    assert [(each.task, each.figure) for each in found] == [("c", 10.0), ("a", 1.5), ("b", 0.0)]
    assert [each.size for each in found] == [
        "scored 30.0 when just learnt, no better than always its commonest answer (40.0)",
        "scored 70.0 when just learnt, no better than always its commonest answer (70.0) and the bare backbone (71.5)",
        "scored 50.0 when just learnt, no better than the bare backbone (50.0)",
    ]
    assert str(found[2]).startswith(f"not learnt: b: {found[2].size}. Train longer (train.epochs)")
    starved = replace(seen, gates=[1.0, 1.0, 0.1])
    assert "attention.key_init=task_mean" in diagnose(MATRIX, LIMITS, starved)[0].cure
    alike = replace(seen, constant=[None, None, 100.0])
    assert "give test rows that differ" in diagnose(MATRIX, LIMITS, alike)[0].cure


def test_the_worst_comes_first_within_its_kind() -> None:
    seen = replace(CALM, alignment=[0.6, 2.0, 0.7])
    found = [each for each in diagnose(MATRIX, LIMITS, seen) if each.kind == "misalignment"]
    assert [(each.task, each.size) for each in found] == [("b", "2.00 nats"), ("c", "0.70 nats"), ("a", "0.60 nats")]
    assert "reflection.weight" in found[0].cure
    assert "held-out rows attend elsewhere" in found[1].cure


def test_cures_follow_what_is_behind() -> None:
    def cures(**changed: Any) -> dict[str, str]:
        seen = replace(CALM, **changed)
        return {each.kind: each.cure for each in diagnose(MATRIX, LIMITS, seen)}

    assert "Nothing holds it" in cures(reflected=[False] * 3)["forgetting"]
    assert "Hold it harder" in cures(alignment=[0.9, 0, 0])["forgetting"]
    assert "attention.key_init=task_mean" in cures(gates=[1.0, 1.0, 0.1])["no transfer"]
    alone = cures(shared=False, alignment=[None] * 3, gates=[None] * 3, reflected=[False] * 3)
    assert "method.name=sapt" in alone["forgetting"]
    assert "misalignment" not in alone


def test_without_tasks_alone_there_is_no_transfer_to_judge() -> None:
    without = ScoreMatrix(MATRIX.tasks, MATRIX.rows)
    assert [each.kind for each in diagnose(without, LIMITS, CALM)] == ["forgetting"]


def test_one_task_has_forgotten_nothing() -> None:
    one = ScoreMatrix(("a",), ((50.0,),), (50.0,))
    assert diagnose(one, LIMITS, replace(CALM, reflected=[False], constant=[None])) == ()
