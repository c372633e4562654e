"""Several metrics a task, one of them the user's own, and answers held to labels: from the config to answers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import StageRecord
from cluster.store import open_store
from pipelines import continual, evaluate, extend, predict, report
from pipelines.reports.answers import read_predictions
from pipelines.sequence.experiment import load_experiment
from pipelines.sequence.scored import read_scored
from sapt_core.data.synthetic import synthetic_sequence
from sapt_core.judging.scoring import own
from sapt_core.settings import BenchmarkConfig, StoreConfig
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Finished, Outcome, write_task

Call = Callable[[Callable[[], None], list[str]], Outcome]
DOCS = (ROOT / "docs/metrics.md").read_text()
(SOURCE,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
((_, _, *COMMAND),) = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(r"^    sapt (?:.*\n    )*.*\n", DOCS, flags=re.MULTILINE)
]
WORDS = {"lovely": "positive", "grim": "negative", "great": "positive", "stale": "negative"}
OTHERS = ["chrf", "macro_f1", "scores:first_word"]  # as records have them: by name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("scores.py").write_text(SOURCE)
    yield tmp_path
    own._function.cache_clear()
    sys.modules.pop("scores", None)


def settings(*more: str) -> list[str]:
    tiny = [each for each in TINY if not each.startswith(("benchmark.metric", "benchmark.tasks", "train.epochs"))]
    given = [*tiny, "train.epochs=1", "evaluation.single_task=false", "store.uri=store"]
    return [*(word for word in COMMAND if word != "--inline"), *given, *more]


def evaluations(store: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (store / "records").glob("*.json")]
    return [record for record in found if record["kind"] == "evaluate"]


def test_metrics_and_labels_from_the_config_to_answers(call: Call, folder: Path) -> None:
    ran = call(continual.main, [*settings(), "--inline", "--summary", "summary.json"])
    assert ran.code == 0, ran.err
    assert "95 % interval" in ran.out
    assert "scores:first_word" in ran.out
    summary = json.loads(Path("summary.json").read_text())
    assert list(summary["other_scores"]) == OTHERS
    for scores, intervals in zip(summary["scores"], summary["intervals"], strict=True):
        assert all(low <= score <= high for score, (low, high) in zip(scores, intervals, strict=True))

    experiment = load_experiment(Path(QUICKSTART), settings()[2:])
    labels = {task.name: {*task.labels} for task in experiment.tasks}
    for record in evaluations(Path("store")):
        task = record["name"].removesuffix("]").rpartition(" ")[2]
        answers = read_predictions(StageRecord.model_validate(record), open_store(StoreConfig(uri="store")))
        assert {row["prediction"] for row in answers} <= labels[task]
        right = [row["prediction"] in row["references"] for row in answers]
        assert record["metrics"]["score"] == pytest.approx(100 * sum(right) / len(right))
        assert list(record["metrics"]["others"]) == OTHERS

    (page,) = Path("runs/report").glob("*/index.html")
    text = page.read_text()
    assert "Scores by macro_f1 with 95 % confidence intervals" in text
    assert "Scores, 0 to 100, on the test rows with 95 % confidence intervals" in text
    assert call(report.main, [*settings(), "--inline", "--out", "again"]).code == 0

    version = ["--config", QUICKSTART, "--snapshot", summary["snapshot"], "store.uri=store"]
    asked = call(predict.main, [*version[2:], "--task", "ticket", "--input", "my router is broken"])
    assert asked.code == 0, asked.err
    assert any(label in asked.out for label in labels["ticket"])
    judged = call(evaluate.main, [*settings(), "--snapshot", summary["snapshot"], "--summary", "figures.json"])
    assert judged.code == 0, judged.err
    figures = json.loads(Path("figures.json").read_text())["tasks"]
    assert [row["score"] for row in figures] == pytest.approx(summary["scores"][-1])
    assert [row["interval"] for row in figures] == summary["intervals"][-1]

    # Another task goes on with the labels of its own, and known ones are scored by all of their metrics.
    (third,) = synthetic_sequence(BenchmarkConfig(suite="synthetic", tasks=("loan",), train_rows=12, test_rows=6))
    write_task(folder / "data", third)
    grown = ["--snapshot", summary["snapshot"], "--task", "loan", "--data", "data/loan", "--metric"]
    shorter = ["store.uri=store", "train.epochs=1", "generator.steps=2", "--inline", "--summary", "grown.json"]
    refused = call(extend.main, [*grown, "accuracy,bleu", *shorter])
    assert refused.code == 2
    assert "loan: metric bleu is 0 of the right answers themselves" in refused.err
    went_on = call(extend.main, [*grown, "accuracy,edit_similarity", *shorter])
    assert went_on.code == 0, went_on.err
    others = json.loads(Path("grown.json").read_text())["other_scores"]
    assert set(others["chrf"]) == {"review", "ticket"}
    assert set(others["edit_similarity"]) == {"loan"}


def test_a_labelled_task_is_learnt_again_with_its_labels(call: Call, folder: Path) -> None:
    ran = call(continual.main, [*settings(), "--inline", "--summary", "summary.json"])
    assert ran.code == 0, ran.err
    summary = json.loads(Path("summary.json").read_text())
    version = ["--snapshot", summary["snapshot"], "--task", "review", "--again", "--data", "more.csv"]
    given = [*version, "store.uri=store", "train.epochs=1", "generator.steps=2", "--inline", "--summary", "again.json"]
    rows = [f"the {dish} was {word},{label}" for dish in ("soup", "cake") for word, label in WORDS.items()]
    Path("more.csv").write_text("\n".join(["input,output", *rows]))
    refused = call(extend.main, [*given, "benchmark.answers=free"])
    assert refused.code == 2
    assert "benchmark.answers=free: review was learnt with labels; leave it out" in refused.err
    ended = call(extend.main, given)
    assert ended.code == 0, ended.out + ended.err
    again = json.loads(Path("again.json").read_text())
    assert again["lessons"] == ["review", "ticket", "review again"]
    assert [len(row) for row in again["intervals"]] == [1, 2, 2]
    assert list(again["other_scores"]) == OTHERS
    assert all(set(scores) == {"review", "ticket"} for scores in again["other_scores"].values())
    page = max(Path("runs/report").glob("*/index.html"), key=lambda path: path.stat().st_mtime_ns).read_text()
    assert "Scores by macro_f1 with 95 % confidence intervals" in page
    assert "after review again" in page

    Path("more.csv").write_text("\n".join(["input,output", *rows, *(row.replace("tive", "ish") for row in rows)]))
    refused = call(extend.main, given)
    assert refused.code == 2
    assert "review: its train rows answer" in refused.err


def test_another_function_scores_anew_and_learns_nothing(call: Call, folder: Path) -> None:
    def keys(*more: str) -> tuple[list[Any], list[Any]]:
        own._function.cache_clear()
        sys.modules.pop("scores", None)
        graph = load_experiment(Path(QUICKSTART), [*settings()[2:], *more]).graph
        return [dict(stage.reads) for stage in graph.train], [dict(row[0].reads) for row in graph.evaluate]

    before = keys()
    Path("scores.py").write_text(f"{SOURCE}\n# changed\n")
    after = keys()
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    plain = keys("benchmark.metric=accuracy")
    assert plain[0] == before[0]  # a metric that stands beside the leading one is nothing to training
    assert "metrics" not in plain[1][0]


def test_all_that_is_wrong_with_metrics_and_labels_is_told_before_anything_runs(call: Call, folder: Path) -> None:
    own_ones = "benchmark.metric=accuracy,scores:missing,gone:any"
    ended = call(continual.main, [*settings(own_ones, "benchmark.max_target_tokens=1"), "--inline"])
    assert ended.code == 2
    assert "scores has no missing; it has: first_word" in ended.err
    assert "module gone cannot be imported" in ended.err
    assert "longer, with their end, than benchmark.max_target_tokens=1" in ended.err
    ended = call(continual.main, [*settings("benchmark.metric=rogue_l,accuracy,accuracy"), "--inline"])
    assert ended.code == 2
    assert "benchmark.metric: there is no metric 'rogue_l'; did you mean rouge_l?" in ended.err
    assert "accuracy is named twice" in ended.err
    ended = call(continual.main, [*settings("benchmark.metric=bleu", "benchmark.answers=free"), "--inline"])
    assert ended.code == 2
    assert "metric bleu is 0 of the right answers themselves" in ended.err
    assert not Path("store").exists()


def test_records_of_earlier_releases_are_read(copied: Finished, call: Call, folder: Path) -> None:
    for path in (copied.store / "records").glob("*.json"):
        record = json.loads(path.read_text())
        record["metrics"].pop("interval", None)
        path.write_text(json.dumps(record))
    shutil.rmtree(copied.store / "packs", ignore_errors=True)
    for record in evaluations(copied.store):
        assert read_scored(StageRecord.model_validate(record)) == (record["metrics"]["score"], None, {})
    given = ["--config", QUICKSTART, *TINY, f"store.uri={copied.store}"]
    ended = call(report.main, [*given, "--inline", "--out", str(folder / "page")])
    assert ended.code == 0, ended.err
    text = (folder / "page/index.html").read_text()
    assert "confidence interval" not in text
    again = call(continual.main, [*given, "--inline", "--summary", str(folder / "again.json")])
    assert again.code == 0, again.err
    summary = json.loads((folder / "again.json").read_text())
    assert summary["scores"] == copied.summary["scores"]
    assert summary["intervals"] == [[None], [None, None]]
