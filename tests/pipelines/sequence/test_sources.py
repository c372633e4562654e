"""Every kind of data set through a sequence and an extension, and what is left when the files are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pipelines import continual, extend
from pipelines.running.publishing import _datasets
from pipelines.sequence.experiment import find_experiment, load_experiment
from sapt_core.errors import DataError
from sapt_core.settings import TrackingConfig
from tests.pipelines.commands import QUICKSTART, TINY, Outcome

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
ROWS = [{"text": f"the {word} was seen on day {n}", "label": n % 2} for n, word in enumerate(("fox", "owl") * 6)]
COLUMNS = {"columns": {"input": "text", "output": "label"}, "label_names": ["even", "odd"]}


def written(folder: Path) -> list[dict[str, Any]]:
    """A data set of every kind, as tasks of a config."""
    table = datasets.Dataset.from_list(ROWS)
    classes = table.cast_column("label", datasets.ClassLabel(names=["even", "odd"]))
    folder.mkdir()
    table.to_csv(folder / "a.csv", index=False)
    table.to_csv(folder / "b.tsv", index=False, sep="\t")
    table.to_json(folder / "c.jsonl")
    (folder / "d.json").write_text(json.dumps(ROWS))
    classes.to_parquet(folder / "e.parquet")
    classes.train_test_split(0.25, seed=0).save_to_disk(str(folder / "f"))
    for name, rows in (
        ("g", {"Definition": ["Say it."], "Instances": [{"input": row["text"], "output": "day"} for row in ROWS]}),
        ("h", [{"prompt": row["text"], "answer": row["label"]} for row in ROWS]),
    ):
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.json").write_text(json.dumps(rows))
    turns = [[{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "yes"}] for row in ROWS]
    (folder / "i.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    named = ("a.csv", "b.tsv", "c.jsonl", "d.json", "e.parquet", "f", "g", "h", "i.jsonl")
    return [{"name": name[0], "path": str(folder / name), **(COLUMNS if name[0] in "abcdef" else {})} for name in named]


def config(folder: Path, tasks: list[dict[str, Any]]) -> str:
    content = yaml.safe_load(Path(QUICKSTART).read_text())
    content["benchmark"] = {"tasks": tasks, "template": "superni", "metric": "exact_match", "max_source_tokens": 96}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "mine.yaml")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    small = [override for override in TINY if not override.startswith(("benchmark.tasks", "train.epochs"))]
    more = ["train.epochs=1", "method.name=sequential", "evaluation.single_task=false", f"store.uri={tmp_path}/store"]
    return [*small, *more]


def test_every_kind_is_learnt_and_another_comes_to_it(
    call: Call, tmp_path: Path, settings: list[str], sqlite_tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To registered versions: each is learnt inline, and published from the records of that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what asks for Ray ends with exit code 3
    tasks = written(tmp_path / "data")
    tracking = f"tracking.uri={sqlite_tracking.uri}"
    given = ["--config", config(tmp_path, tasks[:-2]), *settings, tracking, "tracking.model=kinds"]
    ended = call(continual.main, [*given, "--inline", "--summary", "summary.json"])
    assert ended.code == 0, ended.out + ended.err
    assert "after g: AP" in ended.out
    ended = call(continual.main, given)
    assert "registered: kinds version 7" in ended.out, ended.err
    version = json.loads(Path("summary.json").read_text())["snapshot"]
    Path("tasks.yaml").write_text(yaml.safe_dump(tasks[-2:]))
    shutil.move(tmp_path / "data" / "a.csv", tmp_path / "gone.csv")
    later = ["--tasks", "tasks.yaml", f"store.uri={tmp_path}/store"]
    ended = call(extend.main, ["--snapshot", version, *later, "--inline"])
    assert ended.code == 0, ended.out + ended.err
    assert "after i: AP" in ended.out
    ended = call(extend.main, ["--from", "models:/kinds@latest", *later[:2], tracking])
    assert "registered: kinds version 9" in ended.out, ended.err


def test_what_has_run_is_found_when_its_files_are_gone(call: Call, tmp_path: Path, settings: list[str]) -> None:
    path = config(tmp_path, written(tmp_path / "data")[:1])
    ended = call(continual.main, ["--config", path, "--inline", *settings])
    assert ended.code == 0, ended.err
    before = load_experiment(Path(path), settings)
    (logged,) = _datasets(before)
    assert logged.folder == str(tmp_path / "data/a.csv")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match="no such file or folder"):
        load_experiment(Path(path), settings)
    assert find_experiment(Path(path), settings).key == before.key
