"""Scores of predictions, and what a continual-learning sequence's score matrix says."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sapt_core.judging.words import find_words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _rouge(*, any_script: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  seconds of scipy and scikit-learn by way of nltk
    from rouge_score.tokenizers import DefaultTokenizer  # noqa: PLC0415

    latin = DefaultTokenizer(use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=_AnyScript(latin) if any_script else latin)


@dataclass(frozen=True)
class _AnyScript:
    """Words of any script, those in a-z and 0-9 as ``latin`` has them: stemmed."""

    latin: Any

    def tokenize(self, text: str) -> list[str]:
        found: list[str] = []
        for word in find_words(_folded(text)):
            found += self.latin.tokenize(word) if word.isascii() else [word]
        return found


def _rouge_l(prediction: str, references: Sequence[str], *, any_script: bool) -> float:
    scorer = _rouge(any_script=any_script)
    return 100.0 * max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with stemming, 0 to 100, against the best reference (SuperNI's score, as in SAPT).

    Its tokens are runs of a-z and 0-9, so text in other scripts scores 0: see ``rouge_l_unicode``.
    """
    return _rouge_l(prediction, references, any_script=False)


def rouge_l_unicode(prediction: str, references: Sequence[str]) -> float:
    """``rouge_l`` with words of any script as tokens: the same on ASCII text."""
    return _rouge_l(prediction, references, any_script=True)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference but for case, ASCII punctuation and white space, else 0."""
    return 100.0 * any(_normalised(prediction) == _normalised(reference) for reference in references)


def exact_match_unicode(prediction: str, references: Sequence[str]) -> float:
    """``exact_match`` but for punctuation and width of letters in any script too: the same on ASCII text."""
    return exact_match(_unpunctuated(prediction), list(map(_unpunctuated, references)))


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _unpunctuated(text: str) -> str:
    return "".join(letter for letter in _folded(text) if not unicodedata.category(letter).startswith("P"))


class Metric(NamedTuple):
    """How answers are scored.

    Attributes:
        score: of a prediction against all right answers of its row, 0 to 100.
        sees: whether there is anything in a text that it compares.
    """

    score: Callable[[str, Sequence[str]], float]
    sees: Callable[[str], bool]


METRICS = {
    "rouge_l": Metric(rouge_l, lambda text: re.search("[a-z0-9]", text.lower()) is not None),
    "rouge_l_unicode": Metric(rouge_l_unicode, lambda text: bool(find_words(_folded(text)))),
    "exact_match": Metric(exact_match, lambda text: bool(_normalised(text))),
    "exact_match_unicode": Metric(exact_match_unicode, lambda text: bool(_normalised(_unpunctuated(text)))),
}


def score(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean score of predictions, 0 to 100.

    Args:
        metric: of ``METRICS``.
        predictions: one a row.
        references: for each row every answer that counts as right, at least one.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} rows: need one each, at least one")
    return math.fsum(map(METRICS[metric].score, predictions, references)) / len(predictions)


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores a[i][j] on task j after learning task i (SAPT section 4.1), oldest first, complete or so far.

    Every summary takes a stage i, the last one by default, and sees only the tasks learnt until then; below,
    T = i + 1.

    Attributes:
        tasks: names of the whole sequence.
        rows: lower triangle; row i holds the scores of tasks 0 to i. Fewer rows than tasks while it runs.
        single: for each task the score of the same PET trained on that task alone, needed by FWT.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    single: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "rows", tuple(tuple(map(float, row)) for row in self.rows))
        if self.single is not None:
            object.__setattr__(self, "single", tuple(map(float, self.single)))
            if len(self.single) != len(self.tasks):
                raise ValueError(f"{len(self.single)} single-task scores for {len(self.tasks)} tasks")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"{len(self.rows)} rows of scores for {len(self.tasks)} tasks")
        for i, row in enumerate(self.rows):
            if len(row) != i + 1:
                raise ValueError(f"row {i} holds {len(row)} scores, not those of tasks 0 to {i}")
        if not all(math.isfinite(value) for row in (*self.rows, self.single or ()) for value in row):
            raise ValueError("scores must be finite numbers")

    def ap(self, i: int | None = None) -> float:
        """Average performance: the mean of a[T-1][j] over the tasks learnt."""
        return _mean(self.rows[self._stage(i)])

    def f_ra(self, i: int | None = None) -> float:
        """Forgetting rate: mean over j < T-1 of (max of a[s][j] over s in j..T-2) - a[T-1][j]; 0 if T = 1."""
        return _mean(self.forgotten(i))

    def forgotten(self, i: int | None = None) -> tuple[float, ...]:
        """What ``f_ra`` is the mean of: for each earlier task its best earlier score minus the one at stage i."""
        last = self._stage(i)
        return tuple(max(self.rows[s][j] for s in range(j, last)) - self.rows[last][j] for j in range(last))

    def fwt(self, i: int | None = None) -> float | None:
        """Forward transfer: mean over j of a[j][j] - single[j]; None without single-task scores.

        This is SAPT's measure, not that of Lopez-Paz and Ranzato, which scores tasks not learnt yet.
        """
        gained = self.transferred(i)
        return None if gained is None else _mean(gained)

    def transferred(self, i: int | None = None) -> tuple[float, ...] | None:
        """What ``fwt`` is the mean of: for each task its score when it was learnt minus the one alone."""
        last = self._stage(i)
        if self.single is None:
            return None
        return tuple(self.rows[j][j] - self.single[j] for j in range(last + 1))

    def bwt(self, i: int | None = None) -> float:
        """Backward transfer: 1/(T-1) times the sum over j < T-1 of a[T-1][j] - a[j][j]; 0 if T = 1."""
        last = self._stage(i)
        return _mean([self.rows[last][j] - self.rows[j][j] for j in range(last)])

    def bwt_over_t(self, i: int | None = None) -> float:
        """The sum of ``bwt`` divided by T, as SAPT's published scoring does; for comparison with its tables."""
        last = self._stage(i)
        return self.bwt(last) * last / (last + 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "tasks": list(self.tasks),
            "rows": [list(row) for row in self.rows],
            "single": None if self.single is None else list(self.single),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ScoreMatrix:
        """Read what ``to_json`` gave."""
        return cls(value["tasks"], value["rows"], value["single"])

    def _stage(self, i: int | None) -> int:
        last = len(self.rows) - 1 if i is None else i
        if not 0 <= last < len(self.rows):
            raise ValueError(f"stage {i}: scores are there for {len(self.rows)} stages")
        return last


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
