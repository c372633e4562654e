"""Metrics by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sapt_core.errors import ConfigError
from sapt_core.judging.scoring import answers, corpora
from sapt_core.judging.scoring.base import Metric, RowMean
from sapt_core.judging.scoring.labels import MacroF1
from sapt_core.judging.scoring.own import own_faults, own_metric, source_digest
from sapt_core.judging.words import find_words
from sapt_core.metric_settings import is_own, unknown_metric


def _of_answers(score: Callable[[str, Sequence[str]], float], sees: Callable[[str], bool]) -> RowMean:
    return RowMean(lambda row: score(row.prediction, row.references), sees)


def _not_blank(text: str) -> bool:
    return bool(text.strip())


METRICS: Mapping[str, Metric] = {
    "rouge_l": _of_answers(answers.rouge_l, lambda text: re.search("[a-z0-9]", text.lower()) is not None),
    "rouge_l_unicode": _of_answers(answers.rouge_l_unicode, lambda text: bool(find_words(answers.folded(text)))),
    "exact_match": _of_answers(answers.exact_match, lambda text: bool(answers.normalised(text))),
    "exact_match_unicode": _of_answers(
        answers.exact_match_unicode, lambda text: bool(answers.normalised(answers.unpunctuated(text)))
    ),
    "accuracy": _of_answers(answers.accuracy, _not_blank),
    "macro_f1": MacroF1(),
    "squad_f1": _of_answers(answers.squad_f1, lambda text: bool(answers.squad_words(text))),
    "numeric_match": _of_answers(answers.numeric_match, lambda text: answers.last_number(text) is not None),
    "bleu": corpora.Sacrebleu(corpora.bleu),
    "chrf": corpora.Sacrebleu(corpora.chrf),
    "sari": RowMean(corpora.sari, _not_blank),
    "edit_similarity": _of_answers(answers.edit_similarity, _not_blank),
}


def find_metric(name: str) -> Metric:
    """A metric by its name, or the user's own.

    Raises:
        ConfigError: there is none.
    """
    if is_own(name):
        return own_metric(name)
    if name not in METRICS:
        raise ConfigError("A metric cannot be used:", metric_faults([name]))
    return METRICS[name]


def metric_faults(names: Iterable[str]) -> list[str]:
    """What speaks against metrics, each asked once, the user's own of one row."""
    faults = []
    for name in dict.fromkeys(names):
        if is_own(name):
            faults += own_faults(name)
        elif name not in METRICS:
            faults.append(unknown_metric(name))
    return faults


def own_sources(names: Iterable[str]) -> dict[str, str]:
    """Of the user's own metrics what their files are, as keys of results hold it.

    Raises:
        ConfigError: there is no such function.
    """
    return {name: source_digest(name) for name in names if is_own(name)}


def require_sources(known: Mapping[str, str]) -> None:
    """Make sure that this machine scores as the one that a run was started from does.

    Args:
        known: as ``own_sources`` gave it there.

    Raises:
        ConfigError: a metric is not there, or its file is another.
    """
    other = [name for name, digest in known.items() if source_digest(name) != digest]
    if other:
        raise ConfigError(
            "Metrics differ between the machines of this run:",
            [f"{name}: its file here is another than where the run was started; bring the same one" for name in other],
        )
