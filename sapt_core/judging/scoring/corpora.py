"""Metrics of n-grams, counted over a whole corpus or its single rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sapt_core.judging.scoring.base import Figures, Metric, Row


@dataclass(frozen=True)
class Sacrebleu(Metric):
    """A score of sacrebleu's, with its own figures and its own formula: what ``corpus_score`` gives.

    Attributes:
        make: the library's metric; with True as it is to be asked of a single row.
    """

    make: Callable[[bool], Any]

    def figures(self, rows: Sequence[Row]) -> Figures:
        # One at a time: rows may have different numbers of references.
        metric = self.make(False)
        return np.array(
            [
                metric._extract_corpus_statistics([row.prediction], [[each] for each in row.references])[0]
                for row in rows
            ],
            dtype=np.float64,
        )

    def scores(self, sums: Figures, rows: int) -> Figures:
        metric = self.make(False)
        return np.array([metric._compute_score_from_stats(each).score for each in sums.tolist()])

    def sees(self, text: str) -> bool:
        return bool(text.strip())

    def of_row(self, row: Row) -> float:
        return float(self.make(True).sentence_score(row.prediction, list(row.references)).score)


@cache
def bleu(single: bool) -> Any:
    """BLEU as WMT counts it: 13a tokens, up to four in a row. Of a single row only as many as the row has."""
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  only its users pay for it

    # force: keeps quiet about answers that end in " .".
    return BLEU(effective_order=single, force=True)


@cache
def chrf(single: bool) -> Any:
    """chrF2: up to six characters in a row, and recall counts twice."""
    from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415

    return CHRF()


@cache
def _words_13a() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # noqa: PLC0415

    tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]
    return tokenize


def sari(row: Row) -> float:
    """How well an answer keeps, deletes and adds n-grams of its input as its references do (Xu et al. 2016), 0 to 100.

    The mean over n from 1 to 4, and over the F1 of what is kept, the precision of what is deleted and the F1 of what is
    added. Where there was nothing to do and nothing was done, that is right. Tokens are 13a's in lower case.
    """
    words = [_words_13a()(text.lower()).split() for text in (row.source, row.prediction, *row.references)]
    source, answer, *references = words
    return 100 * sum(_operations(source, answer, references, n) for n in range(1, 5)) / 4


def _operations(source: list[str], answer: list[str], references: list[list[str]], n: int) -> float:
    """Mean of the three operations' scores on runs of ``n`` words, 0 to 1."""
    before, after = _runs(source, n), _runs(answer, n)
    wanted: Counter[tuple[str, ...]] = sum((_runs(reference, n) for reference in references), Counter())
    # Every reference has a say: counts are of as many copies of input and answer as there are references.
    copies = len(references)
    many_before = Counter({run: count * copies for run, count in before.items()})
    many_after = Counter({run: count * copies for run, count in after.items()})

    kept, to_keep = many_before & many_after, many_before & wanted
    well_kept = kept & to_keep
    keeping = _f1(_mean_share(well_kept, kept), _share(well_kept.total(), to_keep.total()))

    deleted = many_before - many_after
    deleting = _mean_share(deleted - wanted, deleted)

    added, to_add = after.keys() - before.keys(), wanted.keys() - before.keys()
    adding = _f1(_share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add)))
    return (keeping + deleting + adding) / 3


def _runs(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _mean_share(good: Counter[tuple[str, ...]], all_of_them: Counter[tuple[str, ...]]) -> float:
    return _share(sum(count / all_of_them[run] for run, count in good.items()), len(all_of_them))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
