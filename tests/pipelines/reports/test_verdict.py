"""The first lines of a report: learnt, kept, better than the champion, and what to type next."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import InlineExecutor, run_graph
from cluster.store import open_store
from cluster.store.lookups import Lookups
from pipelines.reports import page
from pipelines.reports.findings import Findings, bare_scores
from pipelines.reports.verdict import Champion, Registered, judge
from pipelines.sequence.experiment import load_experiment
from pipelines.sequence.making import StageMaker
from sapt_core.judging.metrics import ScoreMatrix
from tests.pipelines.commands import QUICKSTART, TINY, Finished


@pytest.fixture(scope="module")
def findings(finished: Finished) -> Findings:
    given = [*TINY, f"store.uri={finished.store}", "tracking.model=pool", "tracking.uri=sqlite:///m.db"]
    given.append("registry.max_drop=2")
    experiment = load_experiment(Path(QUICKSTART), given)
    return page.find(experiment, open_store(experiment.config.store), None)


@pytest.fixture(autouse=True)
def _started_as_sapt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sapt"])


def scored(findings: Findings, *rows: tuple[float, ...], **more: Any) -> Findings:
    """The findings with other scores, and baselines of 40 and 50."""
    matrix = ScoreMatrix(findings.tasks[: len(rows)], rows)
    return replace(findings, **{"matrix": matrix, "constant": (40.0, 50.0), "bare": (None, None), **more})


def lines(findings: Findings, registered: Registered | None = None) -> dict[str, str]:
    return {line.label: line.text for line in judge(findings, registered)}


def test_learnt_and_kept(findings: Findings) -> None:
    said = lines(scored(findings, (80.0,), (76.0, 60.0)))
    assert list(said) == ["learnt", "kept", "warnings", "next"]
    assert said["learnt"] == "all 2 tasks, AP 68.00; each better than always its commonest answer"
    assert said["kept"] == "no earlier task fell by more than 5 points; F.Ra 4.00; most fell animal (4.0)"
    both = lines(scored(findings, (80.0,), (76.0, 60.0), bare=(10.0, None)))
    assert both["learnt"].endswith("always its commonest answer and than the bare backbone (1 of 2 scored)")
    unknown = lines(scored(findings, (80.0,), (76.0, 60.0), constant=(None, None)))
    assert unknown["learnt"].endswith("held against no baseline, as none is known")


def test_not_learnt_and_not_kept(findings: Findings) -> None:
    found = scored(findings, (40.0,), (30.0, 60.0), bare=(None, 60.0))
    said = lines(found)
    assert said["not learnt"] == (
        "2 of 2 tasks, AP 45.00: animal scored 40.0 when just learnt, no better than always its commonest answer "
        "(40.0); basket scored 60.0 when just learnt, no better than the bare backbone (60.0)"
    )
    assert said["not kept"] == "1 of 1 earlier task fell by more than 5 points, most animal (10.0); F.Ra 10.00"
    assert "2 not learnt" in said["warnings"]
    assert "1 forgetting" in said["warnings"]
    text = page.build(found, judge(found))["index.html"].decode()
    assert "not learnt: animal (scored 40.0 when just learnt, no better than" in text
    assert '<td class="words">no</td><td>40.0</td><td>40.0</td>' in text


def test_one_task_has_nothing_to_forget(findings: Findings) -> None:
    (experiment, store) = findings.experiment, open_store(findings.experiment.config.store)
    said = lines(page.find(experiment, store, 1))
    assert said["learnt"].startswith("the one task, AP ")
    assert said["kept"] == "nothing to forget yet"


@pytest.mark.parametrize(
    ("scores", "label", "text"),
    [
        (
            {"animal": 70.0},
            "better than the champion",
            "mean 76.00 against 70.00 on 1 task that both know; 1 more learnt",
        ),
        (
            {"animal": 77.0, "basket": 50.0},
            "better than the champion",
            "mean 68.00 against 63.50 on 2 tasks that both know, most lost on animal (-1.00)",
        ),
        (
            {"animal": 79.0, "basket": 20.0},
            "not better than the champion",
            "mean 68.00 against 49.50 on 2 tasks that both know, most lost on animal (-3.00)",
        ),
        (
            {"animal": 70.0, "loan": 50.0},
            "not better than the champion",
            "mean 76.00 against 70.00 on 1 task that both know; it has not learnt loan; 1 more learnt",
        ),
        ({"animal": 76.0, "basket": 60.0}, "not better than the champion", "mean 68.00 against 68.00 on 2 tasks that"),
        ({}, "not better than the champion", "has no score on any of its tasks"),
    ],
)
def test_the_champion_is_held_against(findings: Findings, scores: dict[str, float], label: str, text: str) -> None:
    said = lines(scored(findings, (80.0,), (76.0, 60.0)), Registered(5, Champion(3, scores)))
    assert said[label].startswith("version 3 of pool")
    assert text in said[label]
    assert ("promote" in shlex.split(said["next"])) == (label == "better than the champion")


def test_what_is_next(findings: Findings) -> None:
    good, bad = scored(findings, (80.0,), (76.0, 60.0)), scored(findings, (80.0,), (76.0, 50.0))
    places = ["tracking.uri=sqlite:///m.db", "tracking.model=pool"]
    ask = ["--task", "animal", "--input", "your text"]

    def typed(found: Findings, registered: Registered | None) -> list[str]:
        return shlex.split(lines(found, registered)["next"])[-len(places) - 6 :]

    assert typed(good, Registered(5, None))[-5:] == ["pool", "promote", "5", *places]
    assert typed(bad, Registered(5, None)) == ["--version", "5", *ask, *places]
    itself = Registered(5, Champion(5, {"animal": 76.0}))
    assert lines(good, itself)["champion"] == "it is, as version 5 of pool"
    assert typed(good, itself) == ["--version", "5", *ask, *places]
    inline = shlex.split(lines(good)["next"])
    assert inline[-7:] == [
        "--snapshot",
        findings.manifest.digest,
        *ask,
        f"store.uri={findings.experiment.config.store.uri}",
    ]


def test_the_bare_backbone_is_known_once_somebody_scored_it(copied: Finished) -> None:
    experiment = load_experiment(Path(QUICKSTART), [*TINY, f"store.uri={copied.store}"])
    store = open_store(experiment.config.store)
    before = page.find(experiment, store, None)
    assert before.bare == (None, None)
    make = StageMaker(experiment.config, experiment.backbone, {}, 0)
    stage = make.zero_shot("zero_shot[basket]", experiment.graph.prepare[1], ["exact_match"])
    score = run_graph([stage], Lookups(store), InlineExecutor(store))[stage].metrics["score"]
    assert bare_scores(experiment, Lookups(store)) == {"basket": score}
    after = page.find(experiment, store, None)
    assert after.bare == (None, score)
    assert after.digest != before.digest
