from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.judging.metrics import ScoreMatrix, score
from sapt_core.judging.scoring.answers import exact_match, exact_match_unicode, rouge_l, rouge_l_unicode
from sapt_core.judging.scoring.base import Row
from sapt_core.judging.scoring.named import METRICS
from sapt_core.judging.words import find_words
from sapt_core.settings import BenchmarkConfig

# Worked out by hand below.
MATRIX = ScoreMatrix(("a", "b", "c"), ((80.0,), (60.0, 50.0), (70.0, 30.0, 90.0)), (75.0, 55.0, 85.0))


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat mat" (3) of 4 and 6 tokens: P = 3/4, R = 1/2, F = 0.6.
    assert rouge_l("the cat mat red", ["the cat sat on the mat"]) == pytest.approx(60.0)
    assert rouge_l("Running!", ["runs"]) == pytest.approx(100.0)
    assert rouge_l("dog", ["cat"]) == 0.0
    assert rouge_l("", ["cat"]) == 0.0


def test_rouge_l_takes_the_best_reference() -> None:
    assert rouge_l("a small dog", ["cat", "a small dog", "a"]) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("World", "world", 100.0),
        (" Science  or\nTechnology. ", "science or technology", 100.0),
        ("the world", "world", 0.0),
        ("worlds", "world", 0.0),
        ("", "world", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert exact_match(prediction, [reference]) == expected
    assert exact_match(prediction, ["else", reference]) == expected


SCRIPTS = {
    "Chinese": "今天的天气很好",
    "Japanese": "今日はいい天気です",
    "Korean": "오늘은 날씨가 좋다",
    "Russian": "сегодня хорошая погода",
    "Hindi": "आज मौसम अच्छा है",
    "Arabic": "الطقس جميل اليوم",
    "Greek": "ωραίος καιρός σήμερα",
    "Thai": "วันนี้อากาศดี",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["rouge_l", "rouge_l_unicode", "exact_match", "exact_match_unicode"])
def test_a_right_answer_scores_100_in_every_script_or_is_known_to_be_unseen(script: str, name: str) -> None:
    text, metric = SCRIPTS[script], METRICS[name]
    assert metric.sees(text) == (name != "rouge_l")
    assert metric.of_row(Row(text, ["else", text])) == (100.0 if metric.sees(text) else 0.0)
    assert metric.of_row(Row("else", [text])) == 0.0
    assert not metric.sees(" -*\n")
    assert metric.sees("No. 7")
    assert 0.0 < rouge_l_unicode(text[:-2], [text]) < 100.0


def test_unicode_rouge_l_by_hand() -> None:
    # Longest common subsequence 今天好 (3) of 4 and 5 letters: P = 3/4, R = 3/5, F = 2/3.
    assert rouge_l_unicode("今天很好", ["今天 不太好"]) == pytest.approx(100 * 2 / 3)
    assert rouge_l_unicode("Ｒunning café", ["runs cafe\u0301"]) == pytest.approx(100.0)  # width, stem, composed or not
    assert rouge_l("café", ["cafx"]) == 0.0 != rouge_l("café", ["cafés"])  # a-z alone: caf and caf, s


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127), min_size=1))
def test_the_unicode_metrics_are_the_published_ones_on_ascii(prediction: str, reference: str) -> None:
    for near in (prediction, reference.swapcase() + "!", reference[:-1]):
        assert rouge_l_unicode(near, [reference]) == rouge_l(near, [reference])
        assert exact_match_unicode(near, [reference]) == exact_match(near, [reference])
    for name in ("rouge_l", "exact_match"):
        assert METRICS[name].sees(reference) == METRICS[f"{name}_unicode"].sees(reference)
    assert find_words(prediction) == re.findall("[A-Za-z0-9]+", prediction)
    assert find_words(prediction, identifiers=True) == re.findall(r"\w+", prediction)


def test_punctuation_of_any_script_is_no_matter_to_the_unicode_match() -> None:
    for given_text, reference in (("“是”。", "是"), ("¿sí?", "SÍ"), ("ＡＢＣ！", "abc"), ("نعم؟", "نعم")):
        assert exact_match_unicode(given_text, [reference]) == 100.0
        assert exact_match(given_text, [reference]) == 0.0
    assert exact_match_unicode("是的", ["是"]) == 0.0


def test_every_metric_can_be_chosen() -> None:
    for name in METRICS:
        assert BenchmarkConfig(suite="synthetic", metric=name).metric == name


def test_score_is_the_mean() -> None:
    assert score("exact_match", ["a", "b", "c", "d"], [["a"], ["x"], ["y", "c"], ["z"]]) == 50.0
    assert score("rouge_l", ["the cat mat red", "no"], [["the cat sat on the mat"], ["yes"]]) == pytest.approx(30.0)
    for predictions, references in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="need one each"):
            score("exact_match", predictions, references)


def test_summaries_by_hand() -> None:
    assert MATRIX.ap() == pytest.approx((70 + 30 + 90) / 3)
    assert MATRIX.f_ra() == pytest.approx(((80 - 70) + (50 - 30)) / 2)
    assert MATRIX.fwt() == pytest.approx(((80 - 75) + (50 - 55) + (90 - 85)) / 3)
    assert MATRIX.bwt() == pytest.approx(((70 - 80) + (30 - 50)) / 2)
    assert MATRIX.bwt_over_t() == pytest.approx(((70 - 80) + (30 - 50)) / 3)


def test_what_the_summaries_are_means_of() -> None:
    assert MATRIX.forgotten() == (10.0, 20.0)
    assert MATRIX.forgotten(1) == (20.0,)
    assert MATRIX.forgotten(0) == ()
    assert MATRIX.transferred() == (5.0, -5.0, 5.0)
    assert ScoreMatrix(MATRIX.tasks, MATRIX.rows).transferred() is None


def test_summaries_so_far() -> None:
    assert MATRIX.ap(1) == pytest.approx(55.0)
    assert MATRIX.f_ra(1) == pytest.approx(20.0)
    assert MATRIX.fwt(1) == pytest.approx(0.0)
    assert MATRIX.bwt(1) == pytest.approx(-20.0)
    assert MATRIX.bwt_over_t(1) == pytest.approx(-10.0)
    partial = ScoreMatrix(MATRIX.tasks, MATRIX.rows[:2], MATRIX.single)
    assert (partial.ap(), partial.f_ra(), partial.fwt()) == (MATRIX.ap(1), MATRIX.f_ra(1), MATRIX.fwt(1))


def test_forgetting_is_counted_from_the_best_earlier_stage() -> None:
    # Task a peaks at stage 1, not where it was learnt.
    peaked = ScoreMatrix(("a", "b", "c"), ((50.0,), (90.0, 10.0), (60.0, 10.0, 10.0)))
    assert peaked.f_ra() == pytest.approx((30 + 0) / 2)
    assert peaked.bwt() == pytest.approx((10 + 0) / 2)


def test_one_task_forgets_nothing() -> None:
    first = ScoreMatrix(("a", "b"), ((40.0,),))
    assert (first.ap(), first.f_ra(), first.bwt(), first.bwt_over_t(), first.fwt()) == (40.0, 0.0, 0.0, 0.0, None)


def test_json_round_trip() -> None:
    assert ScoreMatrix.from_json(json.loads(json.dumps(MATRIX.to_json()))) == MATRIX
    bare = ScoreMatrix(("a",), ())
    assert ScoreMatrix.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("tasks", "rows", "single", "match"),
    [
        (("a",), ((1.0,), (1.0, 2.0)), None, "2 rows of scores for 1 tasks"),
        (("a", "b"), ((1.0, 2.0),), None, "row 0 holds 2 scores"),
        (("a", "b"), ((1.0,),), (1.0,), "1 single-task scores for 2 tasks"),
        (("a",), ((float("nan"),),), None, "finite"),
    ],
)
def test_impossible_matrices_are_refused(
    tasks: tuple[str, ...], rows: tuple[tuple[float, ...], ...], single: tuple[float, ...] | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ScoreMatrix(tasks, rows, single)


@pytest.mark.parametrize("stage", [None, 0, 3, -1])
def test_a_stage_without_scores_is_refused(stage: int | None) -> None:
    with pytest.raises(ValueError, match="scores are there for 0 stages"):
        ScoreMatrix(("a", "b"), ()).ap(stage)


def triangle(scores: list[float], size: int) -> ScoreMatrix:
    bounds = [i * (i + 1) // 2 for i in range(size + 1)]
    rows = tuple(tuple(scores[start:end]) for start, end in pairwise(bounds))
    return ScoreMatrix(tuple(f"t{i}" for i in range(size)), rows)


@st.composite
def matrices(draw: st.DrawFn) -> ScoreMatrix:
    size = draw(st.integers(1, 6))
    count = size * (size + 1) // 2
    return triangle(draw(st.lists(st.floats(0, 100), min_size=count, max_size=count)), size)


@given(matrices())
def test_summaries_against_the_plain_formulas(matrix: ScoreMatrix) -> None:
    a, size = matrix.rows, len(matrix.rows)
    if size > 1:
        f_ra = bwt = 0.0
        for j in range(size - 1):
            f_ra += max(a[i][j] for i in range(size - 1) if i >= j) - a[-1][j]
            bwt += a[-1][j] - a[j][j]
        assert matrix.f_ra() == pytest.approx(f_ra / (size - 1), abs=1e-9)
        assert matrix.bwt() == pytest.approx(bwt / (size - 1), abs=1e-9)
        assert matrix.bwt_over_t() == pytest.approx(bwt / size, abs=1e-9)
    assert matrix.f_ra() >= -matrix.bwt() - 1e-9
    assert min(a[-1]) - 1e-9 <= matrix.ap() <= max(a[-1]) + 1e-9


@given(st.integers(1, 8), st.floats(0, 100))
def test_a_constant_matrix_forgets_and_transfers_nothing(size: int, value: float) -> None:
    flat = triangle([value] * (size * (size + 1) // 2), size)
    matrix = ScoreMatrix(flat.tasks, flat.rows, (value,) * size)
    assert (matrix.f_ra(), matrix.bwt(), matrix.fwt()) == (0.0, 0.0, 0.0)
    assert matrix.ap() == pytest.approx(value)


def test_a_task_that_is_learnt_again_has_a_row_of_its_own() -> None:
    rows = ((80.0,), (60.0, 50.0), (90.0, 45.0), (70.0, 40.0, 30.0), (75.0, 20.0, 35.0))
    matrix = ScoreMatrix(("a", "b", "c"), rows, (70.0, 60.0, 20.0), (0, 1, 0, 2, 1))
    assert matrix.labels == ("a", "b", "a again", "c", "b again")
    assert matrix.ap() == pytest.approx(130 / 3)
    # All tasks were known before, the one that is learnt again among them.
    assert matrix.forgotten() == (15.0, 30.0, -5.0)
    assert matrix.f_ra(2) == pytest.approx((-10 + 5) / 2)
    assert matrix.bwt() == pytest.approx((-5 - 30 + 5) / 3)
    assert matrix.bwt_over_t() == pytest.approx(matrix.bwt())
    assert matrix.transferred() == (20.0, -40.0, 10.0)
    assert (matrix.learnt(0), matrix.learnt(1), matrix.learnt(1, 3), matrix.taught()) == (2, 4, 1, 1)
    assert ScoreMatrix.from_json(matrix.to_json()) == matrix
    with pytest.raises(ValueError, match="lesson 1 learns task 2, and 1 are known"):
        ScoreMatrix(("a", "b", "c"), ((1.0,), (1.0, 2.0)), None, (0, 2))


def test_with_each_lesson_the_next_task_nothing_is_otherwise() -> None:
    told = ScoreMatrix(MATRIX.tasks, MATRIX.rows, MATRIX.single, (0, 1, 2))
    for name in ("ap", "f_ra", "forgotten", "fwt", "transferred", "bwt", "bwt_over_t"):
        for stage in range(3):
            assert getattr(told, name)(stage) == getattr(MATRIX, name)(stage)
