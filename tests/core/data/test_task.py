"""Which rows are cut off train."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sapt_core.data.task import are_labels, dev_rows, stratified_rows


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=200), st.floats(0.05, 0.5), st.integers(0, 3))
def test_every_answer_gives_its_share(answers: list[str], share: float, seed: int) -> None:
    cut = stratified_rows(answers, share, seed)
    assert len(cut) == len(dev_rows(len(answers), share, seed))
    assert cut == stratified_rows(answers, share, seed)
    if are_labels(answers):
        taken = Counter(answers[row] for row in cut)
        # One more or less of each is rounding, and the rounding of all is shared out among them.
        assert all(abs(taken[answer] - share * count) <= 2 for answer, count in Counter(answers).items())


def test_free_text_is_cut_as_ever() -> None:
    answers = [f"answer {number}" for number in range(50)]
    assert not are_labels(answers)
    assert not are_labels(["yes"] * 50)
    assert stratified_rows(answers, 0.1, 7) == dev_rows(50, 0.1, 7)


def test_another_seed_draws_other_rows() -> None:
    answers = ["yes", "no"] * 50
    assert stratified_rows(answers, 0.1, 0) != stratified_rows(answers, 0.1, 1)
