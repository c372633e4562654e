"""Publishing a finished sequence: what goes on from a registered pool, and what would take its place."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from cluster.tracking.runs import Tracker
from cluster.tracking.service import client_of
from pipelines import continual, extend, predict
from pipelines.reports.verdict import Champion, Registered
from pipelines.running.publishing import registered_as
from pipelines.sequence.experiment import load_experiment
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from sapt_core.settings import TrackingConfig
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, command, write_task

pytest_plugins = ["tests.mlflow_servers"]

Submit = Callable[..., Outcome]


@pytest.fixture
def submit(
    copied: Finished,
    sqlite_tracking: TrackingConfig,
    call: Callable[[Callable[[], None], list[str]], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Submit:
    """Run the finished sequence with MLflow; what asked for Ray would end with exit code 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    published = [argument for argument in command(copied.store)[2:] if argument != "--inline"]

    def submitted(*arguments: str) -> Outcome:
        return call(continual.main, [*published, f"tracking.uri={sqlite_tracking.uri}", *arguments])

    return submitted


def versions(tracking: TrackingConfig) -> list[dict[str, str]]:
    """Tags of all versions, oldest first."""
    found = client_of(tracking.uri).search_model_versions("name = 'quickstart'")
    return [dict(each.tags) for each in sorted(found, key=lambda each: int(each.version))]


@pytest.fixture
def published(submit: Submit, sqlite_tracking: TrackingConfig) -> list[dict[str, str]]:
    outcome = submit()
    assert outcome.code == 0, outcome.err
    found = versions(sqlite_tracking)
    assert [each["tasks"] for each in found] == ["animal", "animal, basket"]
    return found


def run_of(version: ModelVersion, client: MlflowClient) -> Run:
    """The sequence's run."""
    return client.get_run(client.get_run(version.run_id).data.tags["mlflow.parentRunId"])


@pytest.mark.usefixtures("published")
def test_what_mlflow_says_of_a_version_and_its_data(finished: Finished, sqlite_tracking: TrackingConfig) -> None:
    client = client_of(sqlite_tracking.uri)
    version = client.get_model_version("quickstart", "2")
    figures = finished.summary
    run = run_of(version, client)
    for part in (
        f"sapt after 2 tasks: AP {figures['ap']:.2f}, F.Ra {figures['f_ra']:.2f}. Backbone ",
        f"| animal | {figures['scores'][1][0]:.2f} | {figures['scores'][1][0] - figures['scores'][0][0]:+.2f} |",
        f"| basket | {figures['scores'][1][1]:.2f} | new |",
        'load_model("models:/quickstart/2")',
        "sapt pool promote 2 tracking.model=quickstart",
        f"[Run](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})",
    ):
        assert part in version.description
    assert (version.tags["line"], version.tags["ap"]) == ("main", f"{figures['ap']:.2f}")
    assert version.tags["tasks"] == "animal, basket"
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    scores = {metric.key: metric.value for metric in model.metrics}
    assert (scores["ap"], scores["score/animal"]) == (figures["ap"], figures["scores"][-1][0])
    # MLflow's page that compares versions shows the metrics of their runs.
    own = [client.get_run(client.get_model_version("quickstart", each).run_id) for each in ("1", "2")]
    assert [each.info.run_name for each in own] == ["train[00 animal]", "train[01 basket]"]
    assert [each.data.metrics["score/animal"] for each in own] == [row[0] for row in figures["scores"]]
    data = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert set(data) == {"animal", "basket"}
    assert {each.tags[0].value for each in data.values()} == {"training"}
    assert json.loads(data["animal"].dataset.profile) == {"train": 22, "dev": 2, "test": 12}
    assert data["animal"].dataset.digest != data["basket"].dataset.digest


@pytest.mark.usefixtures("published")
def test_what_a_run_says_of_itself(
    finished: Finished, sqlite_tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(sqlite_tracking.uri)
    run = run_of(client.get_model_version("quickstart", "2"), client)
    note = run.data.tags["mlflow.note.content"].splitlines()
    learnt, kept, _, typed = finished.summary["verdict"]
    assert [line.replace("**", "") for line in note[:2]] == [f"- {learnt}", f"- {kept}"]
    assert typed.startswith("next: ")
    assert note[-1].startswith("- **next**: `")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_tracking.uri)  # load_table searches there
    table = client.load_table(run.info.experiment_id, "predictions.json", [run.info.run_id])
    assert list(table.columns) == ["task", "input", "reference", "answer", "score", "weights"]
    assert table["task"].value_counts().to_dict() == {"animal": 12, "basket": 12}
    scores = table.groupby("task")["score"].mean().to_dict()
    assert scores == pytest.approx(dict(zip(("animal", "basket"), finished.summary["scores"][-1], strict=True)))
    assert all(set(json.loads(each)) == {"animal", "basket"} for each in table["weights"])


@pytest.mark.usefixtures("published")
def test_a_run_is_held_against_the_champion(
    submit: Submit, finished: Finished, copied: Finished, sqlite_tracking: TrackingConfig
) -> None:
    client = client_of(sqlite_tracking.uri)
    (before,), (after, second) = finished.summary["scores"]
    client.set_registered_model_alias("quickstart", "champion", "1")
    told = f"version 1 of quickstart: mean {after:.2f} against {before:.2f} on 1 task that both know"
    outcome = submit()
    assert outcome.code == 0, outcome.err
    assert told in outcome.out
    client.set_registered_model_alias("quickstart", "champion", "2")
    assert "champion: it is, as version 2 of quickstart" in submit().out

    def registered(*overrides: str) -> Registered | None:
        given = [*TINY, f"store.uri={copied.store}", f"tracking.uri={sqlite_tracking.uri}", *overrides]
        experiment = load_experiment(Path(QUICKSTART), given)
        return registered_as(finished.snapshot, experiment, Tracker(experiment.config.tracking))

    assert registered() == Registered(2, Champion(2, dict(zip(("animal", "basket"), (after, second), strict=True))))
    assert registered("benchmark.test_rows=6") == Registered(2, Champion(2, {}))  # other rows, other scores
    assert registered("tracking.model=another") is None


@pytest.mark.parametrize("given", [["benchmark.tasks=basket"], ["seed=1"], ["method.name=per_task"]])
def test_another_pool_does_not_take_the_place_of_the_registered_one(
    given: list[str], submit: Submit, published: list[dict[str, str]], sqlite_tracking: TrackingConfig
) -> None:
    for dry_run in ([], ["--dry-run"]):
        refused = submit(*given, *dry_run)
        assert refused.code == 2, refused.err
        assert "Traceback" not in refused.err
        for part in (
            "tracking.model=quickstart holds another pool",
            "in its line main the newest version, 2, is of method sapt, tasks animal, basket.",
            "Asked is method",
            "Give --new-line NAME (tracking.line=NAME)",
        ):
            assert part in refused.err
    assert versions(sqlite_tracking) == published


@pytest.mark.parametrize(
    "given",
    [
        ["benchmark.tasks=animal,basket,loan"],
        ["benchmark.test_rows=6"],
        ["benchmark.tasks=basket", "--new-line", "baskets"],
        ["benchmark.tasks=basket", "tracking.model=another"],
        ["benchmark.tasks=basket", "--inline"],
    ],
    ids=["longer", "other test rows", "a new line", "another model", "inline"],
)
def test_what_may_be_published(given: list[str], submit: Submit, published: list[dict[str, str]]) -> None:
    outcome = submit(*given, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")


def test_an_earlier_part_of_the_sequence_is_there_already(
    submit: Submit, published: list[dict[str, str]], sqlite_tracking: TrackingConfig
) -> None:
    assert submit("benchmark.tasks=animal", "--inline").code == 0  # what its one version costs
    outcome = submit("benchmark.tasks=animal")
    assert outcome.code == 0, outcome.err
    assert "registered: quickstart version 1" in outcome.out
    assert versions(sqlite_tracking) == published


def test_going_on_after_another_took_the_place_is_asked_for_again(
    submit: Submit, sqlite_tracking: TrackingConfig, tmp_path: Path
) -> None:
    for how in (["--inline"], []):
        assert submit("benchmark.tasks=animal", *how).code == 0
    (tmp_path / "foreign").mkdir()
    client = client_of(sqlite_tracking.uri)
    client.create_model_version("quickstart", str(tmp_path / "foreign"), tags={"method": "ewc", "task": "loan"})
    refused = submit()
    assert refused.code == 2
    assert "somebody else's version 2 (method ewc, tasks loan) is the newest of its line main by now" in refused.err
    assert "Extend that one (sapt extend --from models:/quickstart/2)" in refused.err
    assert submit("--new-line", "mine").code == 0
    assert [each.get("tasks") for each in versions(sqlite_tracking)] == ["animal", None, "animal, basket"]
    assert [each.get("line") for each in versions(sqlite_tracking)] == ["main", None, "mine"]
    assert versions(sqlite_tracking)[2]["sapt.parent"] == versions(sqlite_tracking)[0]["sapt.snapshot"]
    assert submit().code == 0  # goes on in the line that its newest version is in


@pytest.mark.parametrize(
    ("version", "given", "code"),
    [("1", [], 2), ("1", ["--new-line", "branch-of-1"], 0), ("2", [], 0), ("latest", [], 0)],
)
def test_a_version_that_somebody_has_extended_is_told_of_before_training(
    *,
    version: str,
    given: list[str],
    code: int,
    published: list[dict[str, str]],
    sqlite_tracking: TrackingConfig,
    tmp_path: Path,
    call: Callable[..., Outcome],
) -> None:
    (task,) = load_sequence(load_config(QUICKSTART, [*TINY, "benchmark.tasks=ticket"]).benchmark)
    write_task(tmp_path / "data", task)
    words = ["--from", f"models:/quickstart/{version}", "--task", "ticket", "--data", str(tmp_path / "data/ticket")]
    ended = call(extend.main, [*words, "--dry-run", *given, f"tracking.uri={sqlite_tracking.uri}"])
    assert ended.code == code, ended.out + ended.err
    if code:
        assert "goes on from version 1 of tracking.model=quickstart, and somebody else's version 2" in ended.err
        assert "tracking.line=branch-of-1" in ended.err
    assert versions(sqlite_tracking) == published


# A process that has a version's requirements, what those require, and nothing else: no project, no other package.
ALONE = """
import importlib.metadata, json, sys
from importlib.machinery import PathFinder
from pathlib import Path

packages, model = sys.argv[1:]
sys.path.append(packages)
from packaging.requirements import Requirement

needed, waiting = set(), Path(model, "requirements.txt").read_text().split()
while waiting:
    requirement = Requirement(waiting.pop())
    if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name not in needed:
        needed.add(requirement.name)
        try:
            waiting += importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            pass  # of another platform or an extra
named = {importlib.metadata.Prepared.normalize(name) for name in needed}
owners = importlib.metadata.packages_distributions()

class Needed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        installed = spec is not None and (spec.origin or "").startswith(packages)
        owned = owners.get(name.partition(".")[0], ())
        if installed and owned and named.isdisjoint(map(importlib.metadata.Prepared.normalize, owned)):
            return None
        return spec

sys.meta_path[:] = [Needed if finder is PathFinder else finder for finder in sys.meta_path]
import mlflow.pyfunc, pandas

answers = mlflow.pyfunc.load_model(model).predict(pandas.DataFrame({"prompt": ["ada saw a fox by the river"]}))
import sapt_core

assert sapt_core.__file__.startswith(model), sapt_core.__file__
print(json.dumps(answers.to_dict("records")))
"""


@pytest.mark.usefixtures("published")
def test_a_version_answers_from_its_own_requirements_and_code(
    sqlite_tracking: TrackingConfig, finished: Finished, tmp_path: Path, call: Callable[..., Outcome]
) -> None:
    client = client_of(sqlite_tracking.uri)
    model = client.get_model_version_download_uri("quickstart", "2").removeprefix("file://")
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, sysconfig.get_path("purelib"), model],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (answered,) = json.loads(ended.stdout)
    given = ["--snapshot", finished.snapshot, f"store.uri={finished.store}", "--input", "ada saw a fox by the river"]
    assert answered["answer"] == call(predict.main, given).out.split("\n")[0]
    assert set(json.loads(answered["weights"])) == {"animal", "basket"}


def test_a_dry_run_goes_on_where_mlflow_cannot_be_reached(
    submit: Submit, unused_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = submit("--dry-run", f"tracking.uri=http://127.0.0.1:{unused_port}")
    assert outcome.code == 0
    (told,) = caplog.messages
    assert told.startswith(f"Not checked whether tracking.model is free: MLflow at http://127.0.0.1:{unused_port}")
