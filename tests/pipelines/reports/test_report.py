"""The report of the tiny sequence: whole, of an older version, of an unfinished run, and what is refused."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from cluster.store import open_store
from cluster.tracking.runs import Tracker
from cluster.tracking.service import client_of
from pipelines import continual, report
from pipelines.reports import findings as told
from pipelines.reports import page as pages
from pipelines.reports.verdict import judge
from pipelines.sequence.experiment import DESCRIPTION, load_experiment
from sapt_core.judging.analysis import alignment
from sapt_core.settings import TrackingConfig
from tests.pipelines.commands import (
    QUICKSTART,
    ROOT,
    SETTLED,
    TINY,
    Finished,
    Outcome,
    change_metrics,
    command,
    level_scores,
)

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
SECTIONS = ["warnings", "scores", "data", "answers", "attention", "alignment", "training", "settings"]

PLOTS = {"scores", "attention", "attention-history", "alignment", "curves"}


def arguments(store: Path, *more: str) -> list[str]:
    return ["--config", QUICKSTART, *TINY, f"store.uri={store}", *more]


def found(store: Path, *overrides: str, version: int | None = None) -> told.Findings:
    experiment = load_experiment(Path(QUICKSTART), [*TINY, f"store.uri={store}", *overrides])
    return pages.find(experiment, open_store(experiment.config.store), version)


def built(findings: told.Findings, links: Sequence[pages.Link] = ()) -> dict[str, bytes]:
    return pages.build(findings, judge(findings), links)


def standing(folder: Path, findings: told.Findings) -> dict[str, bytes] | None:
    return pages.standing(folder, findings, judge(findings))


def forget(store: Path, *names: str) -> None:
    for path in (store / "records").glob("*.json"):
        if json.loads(path.read_text())["name"].startswith(names):
            path.unlink()


class Page(HTMLParser):
    """Headings, tables and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "section":
            self.sections.append(str(dict(attrs)["id"]))
        elif tag == "img":
            self.images.append(dict(attrs))


def test_the_report_of_a_finished_run(finished: Finished, call: Call, tmp_path: Path) -> None:
    ended = call(report.main, arguments(finished.store, "--inline", "--out", str(tmp_path / "new")))
    assert ended.code == 0, ended.err
    assert f"report: {tmp_path}/new/index.html, after 2 of 2 tasks" in ended.out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"index.html", *(f"{name}.png" for name in PLOTS)}
    text = (tmp_path / "new/index.html").read_text()
    page = Page(text)
    assert page.sections == [
        "warnings",
        "scores",
        "data",
        "answers",
        "attention",
        "alignment",
        "training",
        "pseudo-samples",
        "backbone",
        "settings",
    ]
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == len(PLOTS)
    assert f"<dd>{finished.summary['ap']:.2f}</dd>" in text
    assert finished.summary["key"] in text
    assert finished.snapshot in text


def test_the_page_needs_nothing_else(finished: Finished) -> None:
    text = built(found(finished.store))["index.html"].decode()
    page = Page(text)
    assert "script" not in page.tags
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "http" not in re.sub(r"http-equiv", "", re.sub(r"data:[^\"]*", "", text))


def test_findings_are_those_of_the_records(finished: Finished) -> None:
    findings = found(finished.store)
    assert [list(row) for row in findings.matrix.rows] == finished.summary["scores"]
    assert list(findings.matrix.single or ()) == finished.summary["single"]
    attention = findings.attention
    assert attention is not None
    assert attention.learnt == findings.manifest.targets
    for i, rows in enumerate(attention.dev):
        assert rows is not None
        assert [len(row) for row in rows] == [i + 1] * (i + 1)
        assert attention.kl[i] == tuple(
            alignment(target, row) for target, row in zip(attention.learnt[: i + 1], rows, strict=True)
        )
    assert [len(rows) for rows in attention.test] == [1, 2]
    (samples,) = findings.samples
    assert samples is not None
    assert samples.quality is not None
    assert samples.quality.generated == samples.counts["kept"]
    assert [{**each.__dict__, "text": str(each)} for each in findings.diagnoses] == finished.summary["warnings"]


def test_an_older_version(finished: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call(report.main, arguments(finished.store, "--inline", "--version", "1"))
    assert ended.code == 0, ended.err
    page = tmp_path / "runs/report" / finished.summary["key"][:12] / "version-1/index.html"
    assert "The first 1 of 2 tasks are learnt" in page.read_text()
    assert Page(page.read_text()).sections == [
        "warnings",
        "scores",
        "data",
        "answers",
        "attention",
        "alignment",
        "training",
        "backbone",
        "settings",
    ]


@pytest.mark.parametrize("version", ["3", "0", "-1"])
def test_a_version_that_is_not_there(finished: Finished, call: Call, tmp_path: Path, version: str) -> None:
    ended = call(
        report.main, arguments(finished.store, "--inline", f"--version={version}", "--out", str(tmp_path / "x"))
    )
    assert ended.code == 2
    assert ended.err.startswith(f"error: --version {version}: scored so far are 1 (animal), 2 (basket) of 2")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more", [[], ["seed=7"]])
def test_no_such_run_in_the_store(finished: Finished, call: Call, tmp_path: Path, more: list[str]) -> None:
    store = finished.store if more else tmp_path / "nowhere"
    ended = call(report.main, arguments(store, *more, "--inline", "--out", str(tmp_path / "x")))
    assert ended.code == 2
    assert ended.err.startswith(f"error: {store} holds no scored version of experiment ")
    assert "pipelines/continual.py" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run(copied: Finished, call: Call, tmp_path: Path) -> None:
    forget(copied.store, "evaluate[v01 on 01", "single[01", "quality", "attend")
    ended = call(report.main, arguments(copied.store, "--inline", "--out", str(tmp_path / "x")))
    assert ended.code == 0, ended.err
    assert "after 1 of 2 tasks" in ended.out
    refused = call(report.main, arguments(copied.store, "--inline", "--out", str(tmp_path / "y"), "--version", "2"))
    assert "scored so far are 1 (animal) of 2" in refused.err


def test_what_was_not_measured_is_left_out(copied: Finished) -> None:
    forget(copied.store, "single", "quality", "attend")
    text = built(found(copied.store))["index.html"].decode()
    assert "alignment" not in Page(text).sections
    assert "not measured" in text
    assert "<dd>–</dd>" in text  # FWT


def test_an_out_that_cannot_be_written(finished: Finished, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = call(report.main, arguments(finished.store, "--inline", "--out", str(tmp_path / "file")))
    assert ended.code == 2
    assert "cannot be written" in ended.err


def test_a_report_stands_until_something_else_is_found(copied: Finished, tmp_path: Path) -> None:
    findings = found(copied.store)
    assert standing(tmp_path, findings) is None
    files = built(findings)
    pages.write(tmp_path, files)
    assert standing(tmp_path, found(copied.store)) == files
    assert standing(tmp_path, found(copied.store, "diagnostics.forgetting=1")) is None
    assert standing(tmp_path, found(copied.store, version=1)) is None
    (tmp_path / "scores.png").unlink()
    assert standing(tmp_path, findings) is None
    (tmp_path / "index.html").write_text("someone else's")
    assert standing(tmp_path, findings) is None


def test_names_of_tasks_are_text_and_no_markup(finished: Finished) -> None:
    findings = found(finished.store)
    object.__setattr__(findings.matrix, "tasks", ("<b>a</b>", "b&c"))
    text = built(findings)["index.html"].decode()
    assert html.escape("<b>a</b>") in text
    assert "<b>" not in text


def test_answers_of_pairs_are_held_against_the_tasks_own(copied: Finished) -> None:
    heading = "answers that a train row has"
    assert heading not in built(found(copied.store))["index.html"].decode()
    change_metrics(copied.store, "pseudo_samples[00 animal]", kept=7, known_answers=5)
    text = built(found(copied.store))["index.html"].decode()
    assert heading in text
    assert "5 of 7" in text


def test_warnings_are_told_with_their_cures(copied: Finished) -> None:
    level_scores(copied.store)
    quiet = built(found(copied.store, SETTLED))["index.html"].decode()
    assert "None: no task had a score of 0" in quiet
    # Half of the first task's weight has gone to the second one's block: 1 log(1 / 0.5) nats.
    change_metrics(copied.store, "attend[v01]", weights=[[0.5, 0.5], [0.0, 1.0]])
    (diagnosis,) = found(copied.store, SETTLED).diagnoses
    assert (diagnosis.kind, diagnosis.task, diagnosis.size) == ("misalignment", "animal", "0.69 nats")
    text = built(found(copied.store, SETTLED))["index.html"].decode()
    assert "misalignment: animal (0.69 nats)" in text
    assert diagnosis.cure in text
    assert found(copied.store, SETTLED, "diagnostics.misalignment=0.7").diagnoses == ()


def test_an_undertrained_run_warns(finished: Finished) -> None:
    found_now = found(finished.store, "diagnostics.falling=0.05")
    told_of = [each for each in found_now.diagnoses if each.kind == "undertrained"]
    assert [each.task for each in told_of] == ["animal", "basket"]
    assert all("24 steps, last losses" in each.evidence for each in told_of)
    text = built(found_now)["index.html"].decode()
    assert "undertrained: animal (" in text
    assert "warning: undertrained: animal: " in finished.outcome.out


def test_answers_are_shown_beside_the_right_ones(finished: Finished) -> None:
    findings = found(finished.store)
    assert [len(each) for each in findings.answers] == [12, 12]
    task = findings.experiment.tasks[0]
    right = {row.input: row.references for row in task.test}
    assert all(right[each.prompt] == each.right for each in findings.answers[0])
    assert all(set(each.weights) == {"animal", "basket"} for each in findings.answers[0])
    # All twelve rows are there, so that their mean is the task's score.
    means = [fmean(each.score for each in rows) for rows in findings.answers]
    assert means == pytest.approx(findings.matrix.rows[-1])
    assert all(each.learnt == each.now for each in findings.answers[1])  # no task came after it
    text = built(findings)["index.html"].decode()
    shown = [html.escape(each.prompt, quote=False)[:200] in text for each in findings.answers[1]]
    assert sum(shown) == 3


def test_an_inline_run_ends_with_its_report(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", command(finished.store)[1:])  # as what comes next is told as this was started
    page = f"runs/report/{finished.summary['key'][:12]}/index.html"
    assert f"report: {page}" in finished.outcome.out
    assert (finished.store.parent / page).read_bytes() == built(found(finished.store))["index.html"]


def test_the_page_begins_with_a_verdict_and_a_date(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", command(finished.store)[1:])
    findings = found(finished.store)
    text = html.unescape(built(findings)["index.html"].decode())
    (block,) = re.findall(r'<dl class="verdict".*?</dl>', text, re.DOTALL)
    said = re.findall(r"<dt>(.*?)</dt><dd>(?:<code>)?(.*?)(?:</code>)?</dd>", block)
    assert said == [(line.label, line.text) for line in judge(findings)]
    assert [f"{label}: {line}" for label, line in said] == finished.summary["verdict"]
    assert text.index(block) < text.index('<dl class="figures">')
    printed = finished.outcome.out.splitlines()
    first = printed.index(str(judge(findings)[0]))
    assert printed[first : first + len(said)] == finished.summary["verdict"]
    assert printed[first + len(said)].startswith("Scores of sapt")
    records = [json.loads(path.read_text()) for path in (finished.store / "records").glob("*.json")]
    newest = max(record["finished_at"] for record in records if record["kind"] != DESCRIPTION)
    assert f"Last stage ended {newest[:16].replace('T', ' ')} UTC." in text


def test_links_lead_to_the_run(finished: Finished) -> None:
    links = [
        pages.Link("MLflow run 1", "https://mlflow.example/#/experiments/0/runs/1"),
        pages.Link("quickstart version 4", None),
    ]
    text = built(found(finished.store), links)["index.html"].decode()
    assert '<a href="https://mlflow.example/#/experiments/0/runs/1">MLflow run 1</a>.' in text
    assert "quickstart version 4." in text


def test_the_folders_may_be_gone(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "pipelines/backbones/tiny", "backbone")
    for name, word in (("first", "fox"), ("second", "owl")):
        rows = [{"input": f"{who} met a {word}.", "output": [word]} for who in ("ada", "ben", "cid", "dan", "eve")]
        Path("data", name).mkdir(parents=True)
        for split in ("train", "test"):
            Path("data", name, f"{split}.json").write_text(json.dumps({"Definition": "", "Instances": rows}))
    tiny = [each for each in TINY if not each.startswith(("backbone", "benchmark"))]
    given = ["--config", QUICKSTART, *tiny, "--inline", "backbone.path=backbone", "benchmark.suite=folder"]
    given += ["benchmark.data_dir=data", "benchmark.tasks=first,second", "benchmark.template=superni"]
    given += ["benchmark.metric=rouge_l", "evaluation.single_task=false", "train.epochs=1", "store.uri=store"]
    assert (ran := call(continual.main, given)).code == 0, ran.err
    (page,) = Path("runs/report").glob("*/index.html")
    before = page.read_bytes()
    shutil.rmtree("data")
    shutil.rmtree("backbone")
    ended = call(report.main, [*given, "--out", "again"])
    assert ended.code == 0, ended.err
    assert Path("again/index.html").read_bytes() == before
    other = call(report.main, [*given, "seed=1", "--out", "other"])
    assert other.code == 2
    assert "data" in other.err


@pytest.fixture
def tracked(finished: Finished, sqlite_tracking: TrackingConfig) -> tuple[TrackingConfig, str]:
    """MLflow with a finished run of the tiny sequence."""
    tracker = Tracker(sqlite_tracking)
    run = tracker.start_sequence("tiny", key=finished.summary["key"], params={}, tags={})
    tracker.finish(run, "FINISHED")
    return sqlite_tracking, run


def tracking_arguments(tracking: TrackingConfig) -> list[str]:
    return [f"tracking.uri={tracking.uri}", f"tracking.experiment={tracking.experiment}"]


def test_the_report_is_logged_to_the_run(
    finished: Finished, tracked: tuple[TrackingConfig, str], call: Call, tmp_path: Path
) -> None:
    tracking, run = tracked
    given = arguments(finished.store, *tracking_arguments(tracking), "--out", str(tmp_path / "out"))
    ended = call(report.main, given)
    assert ended.code == 0, ended.err
    assert f"in MLflow: report of run {run}" in ended.out
    assert call(report.main, [*given, "--version", "1"]).code == 0
    client = client_of(tracking.uri)
    logged = {entry.path for entry in client.list_artifacts(run, "report")}
    assert logged == {f"report/{name}" for name in ("index.html", "version-1", *(f"{plot}.png" for plot in PLOTS))}
    assert client.get_run(run).info.status == "FINISHED"


def test_a_run_that_mlflow_does_not_know(
    finished: Finished, sqlite_tracking: TrackingConfig, call: Call, tmp_path: Path
) -> None:
    given = arguments(finished.store, *tracking_arguments(sqlite_tracking), "--out", str(tmp_path / "out"))
    ended = call(report.main, given)
    assert ended.code == 3
    assert "has no run of experiment" in ended.err
    assert "--inline" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def publish(
    copied: Finished, sqlite_tracking: TrackingConfig, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Outcome]:
    """Publish the tiny sequence, of which no stage is left to run, so that Ray is not asked for."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return lambda: call(continual.main, arguments(copied.store, *tracking_arguments(sqlite_tracking), SETTLED))


def test_a_published_run_ends_with_its_report(
    copied: Finished,
    sqlite_tracking: TrackingConfig,
    publish: Callable[[], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level_scores(copied.store)
    change_metrics(copied.store, "attend[v01]", weights=[[0.5, 0.5], [0.0, 1.0]])
    ended = publish()
    assert ended.code == 0, ended.err
    page = pages.FOLDER / copied.summary["key"][:12] / "index.html"
    assert f"report: {page}" in ended.out
    client = client_of(sqlite_tracking.uri)
    run = Tracker(sqlite_tracking).find_sequence(copied.summary["key"])
    assert run is not None
    logged = Path(client.download_artifacts(run, "report"))
    assert (logged / "index.html").read_bytes() == page.read_bytes()
    assert {path.stem for path in logged.glob("*.png")} == PLOTS

    parent = client.get_run(run)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["warnings"].startswith("misalignment: attention of animal is 0.69 nats")
    assert parent.data.metrics["warnings"] == 1
    history = {name: client.get_metric_history(run, name) for name in ("attention_kl/animal", "own_weight/animal")}
    assert [(point.step, round(point.value, 2)) for point in history["attention_kl/animal"]] == [(1, 0.0), (2, 0.69)]
    assert [(point.step, round(point.value, 2)) for point in history["own_weight/animal"]] == [(1, 1.0), (2, 0.5)]
    assert [point.step for point in client.get_metric_history(run, "gate/first_steps")] == [1, 2]
    assert 0 <= parent.data.metrics["gate/end"] <= 1
    (child,) = [
        each for each in client.search_runs([parent.info.experiment_id]) if each.info.run_name == "quality[00 animal]"
    ]
    assert child.data.metrics["real"] == 22

    def fail(_: told.Findings, __: object) -> dict[str, bytes]:
        raise AssertionError("drawn again")

    monkeypatch.setattr(pages, "build", fail)
    again = publish()
    assert again.code == 0, again.err
    assert f"report: {page}" in again.out


def test_a_folder_that_cannot_be_written_costs_the_run_nothing(
    copied: Finished, sqlite_tracking: TrackingConfig, publish: Callable[[], Outcome]
) -> None:
    Path("runs").write_text("")
    ended = publish()
    assert ended.code == 0, ended.err
    assert "report: in MLflow alone, for runs/report/" in ended.out
    run = Tracker(sqlite_tracking).find_sequence(copied.summary["key"])
    assert run is not None
    assert client_of(sqlite_tracking.uri).list_artifacts(run, "report")


PROBE = """<script>
const wide = [...document.querySelectorAll("section, header")].filter(e => e.scrollWidth > innerWidth + 1).length;
const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
document.title = JSON.stringify([document.images.length, broken, wide,
    document.documentElement.scrollWidth <= innerWidth + 1, getComputedStyle(document.body).backgroundColor]);
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (420, False)])
def test_a_browser_shows_it(finished: Finished, tmp_path: Path, width: int, dark: bool) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    text = built(found(finished.store))["index.html"].decode()
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(text)
    # The page forbids scripts, so the copy that a script looks at does not.
    (tmp_path / "page.html").write_text(policy.sub("", text).replace("</body>", f"{PROBE}</body>"))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    shown = subprocess.run(
        [
            browser,
            "--headless",
            *(f"--{flag}" for flag in f"{quiet} disable-sync".split()),
            f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},900",
            *scheme,
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{tmp_path}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None
    images, broken, wide, fits, background = json.loads(html.unescape(title[1]))
    assert (images, broken, wide, fits) == (len(PLOTS), 0, 0, True)
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(247, 248, 250)")
