"""Tasks as a config has them: by name, as mappings, and in a file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sapt_core.config.experiment import ExperimentConfig, load_config, written
from sapt_core.errors import ConfigError
from sapt_core.settings import BenchmarkConfig

QUICKSTART = Path(__file__).resolve().parents[2] / "pipelines/configs/quickstart.yaml"


def config(tmp_path: Path, benchmark: dict[str, Any], *overrides: str) -> ExperimentConfig:
    content = yaml.safe_load(QUICKSTART.read_text())
    content["benchmark"] = {"template": "superni", "metric": "exact_match", **benchmark}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, overrides)


def faults_of(tmp_path: Path, benchmark: dict[str, Any], *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, benchmark, *overrides)
    return caught.value.faults


def tasks_file(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "tasks.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


SHARED = {"columns": {"input": "text"}, "label_names": ["no", "yes"]}
FILE = {
    "defaults": SHARED,
    "tasks": [{"name": "a", "path": "a.csv", "columns": {"output": "label"}}, {"name": "b", "path": "b"}],
}


def test_names_stay_names_in_all_that_is_written_down(tmp_path: Path) -> None:
    made = config(tmp_path, {"suite": "folder", "data_dir": "x", "tasks": ["a", "b"], "unseen": ["c"]})
    dumped = made.model_dump(mode="json")["benchmark"]
    assert (dumped["tasks"], dumped["unseen"]) == (["a", "b"], ["c"])
    assert not {"tasks_file", "defaults"} & dumped.keys()


def test_a_file_of_tasks_says_what_the_config_would(tmp_path: Path) -> None:
    made = config(tmp_path, {"tasks_file": tasks_file(tmp_path, FILE)})
    first, second = made.benchmark.tasks or ()
    assert (first.name, first.path, first.columns.input, first.columns.output) == ("a", "a.csv", "text", "label")
    assert (second.columns.input, second.columns.output) == ("text", None)
    assert first.label_names == second.label_names == {"0": "no", "1": "yes"}
    inline = config(tmp_path, {"tasks": FILE["tasks"], "defaults": SHARED})
    assert inline.benchmark.tasks == made.benchmark.tasks
    assert inline.digest() == made.digest()
    (tmp_path / "again.yaml").write_text(written(made))
    (tmp_path / "tasks.yaml").unlink()
    assert load_config(tmp_path / "again.yaml").benchmark.tasks == made.benchmark.tasks


def test_names_choose_among_the_tasks_of_a_file(tmp_path: Path) -> None:
    path = tasks_file(tmp_path, FILE)
    made = config(tmp_path, {"tasks_file": path}, "benchmark.tasks=b", "benchmark.unseen=a")
    assert [task.path for task in (*(made.benchmark.tasks or ()), *made.benchmark.unseen)] == ["b", "a.csv"]
    assert "needs data_dir" in faults_of(tmp_path, {"tasks_file": path}, "benchmark.tasks=b,c")[0]


def test_a_path_is_no_part_of_what_an_experiment_is(tmp_path: Path) -> None:
    tasks = [[{"name": "a", "path": path}] for path in ("x.csv", "y.csv")]
    left, right = (config(tmp_path, {"tasks": each}) for each in tasks)
    assert left.digest() == right.digest()
    assert left.benchmark != right.benchmark


def test_mappings_on_a_command_line(tmp_path: Path) -> None:
    made = config(tmp_path, {"data_dir": "x", "tasks": ["a"]}, "benchmark.tasks=[a, {name: b, path: b.csv}]")
    assert [(task.name, task.path) for task in made.benchmark.tasks or ()] == [("a", None), ("b", "b.csv")]


def test_all_faults_come_at_once_each_with_its_path(tmp_path: Path) -> None:
    tasks: list[Any] = [
        {"nam": "a", "path": "x"},
        {"name": "b", "path": "x", "columns": {"inptu": "x"}, "label_names": [False, True]},
        {"name": "c", "path": "x", "columns": {"messages": "m", "input": "i"}, "metric": "rogue_l"},
        7,
    ]
    found = {
        fault.partition(":")[0]: fault for fault in faults_of(tmp_path, {"tasks": tasks, "defaults": {"colums": {}}})
    }
    assert "did you mean name?" in found["benchmark.tasks.0.nam"]
    assert "benchmark.tasks.0.name" in found
    assert "did you mean input?" in found["benchmark.tasks.1.columns.inptu"]
    assert "put it in quotes" in found["benchmark.tasks.1.label_names.0"]
    assert "messages holds input and output" in found["benchmark.tasks.2.columns"]
    assert "did you mean rouge_l?" in found["benchmark.tasks.2.metric"]
    assert "put it in quotes" in found["benchmark.tasks.3.name"]
    assert "did you mean columns?" in found["benchmark.defaults.colums"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("tasks: [", "cannot be read: "),
        ("a: 3", "holds no tasks: give a list of them, or tasks with defaults"),
        ("tasks: []", "holds no tasks"),
        ({"tasks": ["a"], "more": 1}, "holds no tasks"),
        ({"tasks": [{"name": "a", "path": "x"}] * 2}, "tasks named twice: a"),
    ],
)
def test_a_file_that_holds_no_tasks(content: Any, fault: str, tmp_path: Path) -> None:
    assert fault in faults_of(tmp_path, {"tasks_file": tasks_file(tmp_path, content)})[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, {"tasks_file": "nosuch.yaml"})
    assert fault == "benchmark: tasks_file nosuch.yaml: no such file"


def test_generated_tasks_are_named_and_no_more() -> None:
    with pytest.raises(ValueError, match="of animal give the name alone"):
        BenchmarkConfig.model_validate({"suite": "synthetic", "tasks": [{"name": "animal", "path": "x"}]})
