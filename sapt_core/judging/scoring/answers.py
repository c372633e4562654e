"""Metrics of single answers: each row's score against its best reference, 0 to 100."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

from sapt_core.judging.words import find_words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
# A sign belongs to a number unless something that it could subtract from stands before it.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:e[-+]?\d{1,4}(?!\d))?",
    re.IGNORECASE,
)


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
        for word in find_words(folded(text)):
            found += self.latin.tokenize(word) if word.isascii() else [word]
        return found


def _rouge_l(prediction: str, references: Sequence[str], *, any_script: bool) -> float:
    scorer = _rouge(any_script=any_script)
    return 100.0 * max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with stemming, against the best reference (SuperNI's score, as in SAPT).

    Its tokens are runs of a-z and 0-9, so text in other scripts scores 0: see ``rouge_l_unicode``.
    """
    return _rouge_l(prediction, references, any_script=False)


def rouge_l_unicode(prediction: str, references: Sequence[str]) -> float:
    """``rouge_l`` with words of any script as tokens: the same on ASCII text."""
    return _rouge_l(prediction, references, any_script=True)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference but for case, ASCII punctuation and white space, else 0."""
    return 100.0 * any(normalised(prediction) == normalised(reference) for reference in references)


def exact_match_unicode(prediction: str, references: Sequence[str]) -> float:
    """``exact_match`` but for punctuation and width of letters in any script too: the same on ASCII text."""
    return exact_match(unpunctuated(prediction), list(map(unpunctuated, references)))


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction is a reference but for white space around it, else 0: case and signs tell labels apart."""
    return 100.0 * any(prediction.strip() == reference.strip() for reference in references)


def squad_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words that prediction and reference share, without case, punctuation and articles (SQuAD 2.0).

    Rajpurkar, Jia and Liang (2018). Of a text without words only another one is right.
    """
    return 100.0 * max(_word_f1(squad_words(prediction), squad_words(reference)) for reference in references)


def _word_f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right))


def squad_words(text: str) -> list[str]:
    """The words that ``squad_f1`` compares."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def numeric_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the last number in the prediction equals the last one in a reference, however either is written, else 0.

    A number may have a sign, commas between thousands, decimals and an exponent: 1,000.50 is 1000.5 and 1e3 is 1000.
    """
    given = last_number(prediction)
    return 100.0 * (given is not None and any(given == last_number(reference) for reference in references))


def last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly; None if there is none."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    found = _NUMBER.findall(plain)
    return Decimal(found[-1].replace(",", "")) if found else None


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """100 times the share of characters of both texts that need no insertion or deletion, against the best reference.

    The ratio that CodeXGLUE, and TRACE after it, scores code completion with, not rounded. White space around the texts
    does not count.
    """
    from rapidfuzz.fuzz import ratio  # noqa: PLC0415  only its users pay for it

    return max(ratio(prediction.strip(), reference.strip()) for reference in references)


def normalised(text: str) -> str:
    """What ``exact_match`` compares."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def folded(text: str) -> str:
    """Text without case and widths of letters."""
    return unicodedata.normalize("NFKC", text).casefold()


def unpunctuated(text: str) -> str:
    """``folded`` text without punctuation of any script."""
    return "".join(letter for letter in folded(text) if not unicodedata.category(letter).startswith("P"))
