"""Versions as MLflow serves them: every form of a request, and the blocks of the page on serving."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import requests
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import invocations

from cluster.store import LocalStore
from pipelines import sapt
from sapt_core.data.templates import TEMPLATES
from sapt_core.errors import StoreError
from sapt_core.methods.base import find_method
from sapt_core.settings import TrackingConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import ROOT, Finished, Outcome, publish

pytest_plugins = ["tests.mlflow_servers"]

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
TASKS = {"animal", "basket"}


@pytest.fixture
def tracked(at_work: None) -> Iterator[None]:
    """MLflow looks where that sequence is registered."""
    # In full: MLflow keeps its connection by the address, and another test's is another folder's.
    mlflow.set_tracking_uri(f"sqlite:///{Path.cwd()}/runs/mlflow.db")
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@pytest.fixture
def model(tracked: None) -> PyFuncModel:
    return mlflow.pyfunc.load_model("models:/quickstart@latest")


def posted(model: PyFuncModel, body: object) -> list[dict[str, Any]]:
    """What the server does with the body of a POST."""
    reply = invocations(json.dumps(body), "application/json", model, model.metadata.get_input_schema())
    assert reply.status == 200
    return list(json.loads(reply.response)["predictions"])


ROWS = [{"prompt": "ada saw a fox", "input": None, "task": None}, {"prompt": None, "input": "a fox", "task": "animal"}]
LISTS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
SPLIT = {"columns": list(LISTS), "data": [list(row.values()) for row in ROWS]}
SPARSE = [{name: cell for name, cell in row.items() if cell is not None} for row in ROWS]


def test_every_form_of_a_request_is_answered_alike(model: PyFuncModel) -> None:
    answers = model.predict(pd.DataFrame(ROWS, index=[7, 9]))
    assert list(answers.columns) == ["answer", "weights"]
    assert list(answers.index) == [7, 9]
    expected = answers.to_dict("records")
    assert all(set(json.loads(row["weights"])) == TASKS for row in expected)
    for given in (ROWS, SPARSE, LISTS):
        assert model.predict(given).to_dict("records") == expected
    for body in (
        {"dataframe_records": ROWS},
        {"dataframe_records": SPARSE},
        {"dataframe_split": SPLIT},
        {"inputs": ROWS},
        {"inputs": SPARSE},
        {"inputs": LISTS},
    ):
        assert posted(model, body) == expected, body
    # Lists without a gap, which MLflow takes for one row.
    prompts = {"prompt": ["ada saw a fox", "a fox", "an owl"]}
    inputs = {"input": prompts["prompt"], "task": "animal"}
    for columns in (prompts, inputs):
        told = model.predict(pd.DataFrame(columns)).to_dict("records")
        assert len(told) == 3
        assert model.predict(columns).to_dict("records") == told
        assert posted(model, {"inputs": columns}) == told
    assert model.predict({"prompt": "a fox"}).equals(model.predict(pd.DataFrame({"prompt": ["a fox"]})))


def test_the_task_puts_its_prompt_around_an_input(model: PyFuncModel) -> None:
    (task,) = [each for each in model.unwrap_python_model().predictor.manifest.tasks if each.name == "animal"]
    prompt = "".join(TEMPLATES[task.template].pieces(task.definition, "ada met a grey fox."))
    told = model.predict(pd.DataFrame({"input": ["ada met a grey fox."], "task": ["animal"]}))
    assert told.equals(model.predict(pd.DataFrame({"prompt": [prompt]})))


def test_a_store_that_has_moved(model: PyFuncModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = model.predict({"prompt": "a fox"})
    Path("runs/store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError) as refused:
        mlflow.pyfunc.load_model("models:/quickstart@latest")
    assert "SAPT_STORE says where" in "".join(refused.value.__notes__)
    monkeypatch.setenv("SAPT_STORE", str(tmp_path / "elsewhere"))
    assert mlflow.pyfunc.load_model("models:/quickstart@latest").predict({"prompt": "a fox"}).equals(told)


BAD = ["good", None, 3, "", "  ", "b " * 2000]
BAD_SAID = [
    "row 1: no text",
    "row 2: prompt is not text but int",
    "row 3: prompt is blank",
    "row 4",
    "row 5: prompt takes",
]


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.predict(pd.DataFrame({"prompt": BAD})),
        lambda model: model.predict({"prompt": BAD}),
        lambda model: model.predict([{"prompt": text} for text in BAD]),
        lambda model: posted(model, {"inputs": {"prompt": BAD}}),
        lambda model: posted(model, {"inputs": [{"prompt": text} for text in BAD]}),
        lambda model: posted(model, {"dataframe_split": {"columns": ["prompt"], "data": [[text] for text in BAD]}}),
        lambda model: posted(model, {"dataframe_records": [{"prompt": text} for text in BAD]}),
    ],
    ids=["table", "dict", "list", "inputs", "inputs of rows", "split", "records"],
)
def test_all_faults_of_a_request_are_told(ask: Callable[[PyFuncModel], object], model: PyFuncModel) -> None:
    with pytest.raises(mlflow.MlflowException) as refused:
        ask(model)
    assert refused.value.get_http_status_code() == 400
    lines = str(refused.value).partition("rows count from 0:\n")[2].splitlines()
    assert len(lines) == len(BAD_SAID)
    for line, said in zip(lines, BAD_SAID, strict=True):
        assert line.startswith(f"  - {said}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input": ["a", "b"], "task": ["nosuch", "animal"]}, "row 0: .*'nosuch'; it knows: animal, basket"),
        ({"input": ["a", "b"]}, "row 1: an input needs its task, one of: animal, basket"),
        ({"input": ["a", "b"], "task": ["animal"]}, "one length: input has 2, task has 1"),
        ({"prompt": [["a"], ["b"]]}, "row 1: prompt is not text but list"),
        ({"text": ["a"]}, "neither a column prompt"),
        (["a", "b"], "neither a column prompt"),
        ([{"prompt": "a", "input": "b", "task": "animal"}], "row 0: both"),
    ],
)
def test_what_is_refused(given: Any, said: str, model: PyFuncModel) -> None:
    with pytest.raises(mlflow.MlflowException, match=said):
        model.predict(given)
    with pytest.raises(mlflow.MlflowException, match=said):
        posted(model, {"inputs": given})


def test_params(model: PyFuncModel) -> None:
    prompt = {"dataframe_records": [{"prompt": "ada saw a fox"}]}
    lengths = [
        len(row["answer"].split())
        for params in ({"max_new_tokens": 1}, {"max_new_tokens": 5, "num_beams": 2})
        for row in posted(model, {**prompt, "params": params})
    ]
    assert lengths[0] <= 1
    assert posted(model, {**prompt, "params": {"num_beams": None}}) == posted(model, prompt)
    with pytest.raises(mlflow.MlflowException, match=r"max_new_tokens=0: give a whole number from 1 on\n  - num_beams"):
        posted(model, {**prompt, "params": {"max_new_tokens": 0, "num_beams": 0}})


def test_weights_may_be_left_out(model: PyFuncModel) -> None:
    asked = {"dataframe_records": [{"prompt": "ada saw a fox"}]}
    (whole,) = posted(model, {**asked, "params": {"return_weights": True}})
    assert posted(model, asked) == [whole]
    assert posted(model, {**asked, "params": {"return_weights": False}}) == [{"answer": whole["answer"]}]


def test_a_version_shows_what_may_be_asked(model: PyFuncModel) -> None:
    example = model.input_example
    assert isinstance(example, pd.DataFrame)
    assert list(example.columns) == ["input", "task"]
    assert example["task"].tolist() == ["basket"]
    (answered,) = model.predict(example).to_dict("records")
    assert set(json.loads(answered["weights"])) == TASKS
    folder = Path(mlflow.artifacts.download_artifacts("models:/quickstart@latest"))
    info = model.metadata.saved_input_example_info
    assert info is not None
    served = json.loads((folder / info["serving_input_path"]).read_text())
    assert posted(model, served) == [answered]
    described = model.metadata.get_params_schema().to_dict()
    assert [each["name"] for each in described] == ["max_new_tokens", "num_beams", "return_weights"]


@pytest.mark.usefixtures("tracked")
def test_a_method_that_needs_the_task_answers(copied: Finished) -> None:
    store = LocalStore("runs/store")
    changes = {"method": find_method("per_task").model_validate({}), "attention": None, "router": None}
    oracle = Manifest.from_bytes(store.get(copied.snapshot)).model_copy(update=changes)
    tracking = TrackingConfig(uri="sqlite:///runs/mlflow.db", experiment="quickstart", model="oracle")
    publish(replace(copied, store=Path("runs/store").absolute()), tracking, store.put(oracle.to_bytes()))
    model = mlflow.pyfunc.load_model("models:/oracle/1")
    rows = [{"input": "ada met a grey fox.", "task": task} for task in ("basket", "animal")]
    weights = [json.loads(row["weights"]) for row in posted(model, {"dataframe_records": rows})]
    assert weights == [{"basket": 1.0}, {"animal": 1.0}]
    with pytest.raises(mlflow.MlflowException, match=r"row 1: method per_task answers .* it knows: animal, basket"):
        posted(model, {"dataframe_records": [rows[0], {"prompt": "ada met a grey fox."}]})


@pytest.mark.usefixtures("tracked")
def test_the_python_of_the_page() -> None:
    (block,) = PYTHON
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - the page's own
    assert len(names["answers"]) == 2


@pytest.mark.integration
@pytest.mark.usefixtures("tracked")
def test_the_server_and_the_commands_of_the_page(
    call: Callable[[Callable[[], None], list[str]], Outcome], unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, *asked, predict = (block.replace("5001", str(unused_port)) for block in SHELL)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    with Path("log").open("wb") as log:
        server = subprocess.Popen(["sh", "-ec", serve], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not _is_up(f"http://127.0.0.1:{unused_port}/ping"):
            assert server.poll() is None, Path("log").read_text()
            assert time.monotonic() < deadline, Path("log").read_text()
            time.sleep(0.2)
        told = [json.loads(subprocess.check_output(["sh", "-ec", block], text=True)) for block in asked]
        address = f"http://127.0.0.1:{unused_port}/invocations"
        bad = requests.post(address, json={"dataframe_records": [{"prompt": text} for text in BAD]}, timeout=60)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)
    assert [len(each["predictions"]) for each in told] == [2, 1]
    assert all(set(json.loads(row["weights"])) == TASKS for each in told for row in each["predictions"])
    assert bad.status_code == 400
    assert all(said in bad.json()["message"] for said in BAD_SAID)
    answered = call(sapt.main, shlex.split(predict)[1:])
    assert answered.code == 0, answered.err
    assert answered.out.splitlines()[0] == told[0]["predictions"][0]["answer"]


def _is_up(address: str) -> bool:
    try:
        return requests.get(address, timeout=2).ok
    except requests.RequestException:
        return False
