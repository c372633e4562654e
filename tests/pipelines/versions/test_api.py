"""The way in for code: the page's blocks, what they refuse, and that it learns what the pipeline learns."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import pipelines
import sapt_core
from sapt_core.errors import ConfigError, DataError, RequestError, SaptError, SnapshotError
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Finished

pytest_plugins = ["tests.mlflow_servers"]

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
MOST_ARGUMENTS = 6


def test_every_block_of_the_page_runs(at_work: None, copied: Finished) -> None:
    assert len(BLOCKS) == 5
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 - the page's own
    assert names["pool"].digest == names["again"].digest == copied.snapshot
    assert names["pool"].tasks == ("animal", "basket")
    assert [set(answer.weights) for answer in names["answers"]] == [{"animal", "basket"}] * 2
    assert sum(names["weights"].values()) == pytest.approx(1)
    assert names["larger"].tasks == ("animal", "basket", "colour")
    assert names["larger"].manifest.parent == names["pool"].manifest.as_parent
    larger, further = names["larger"].manifest, names["further"].manifest
    assert (further.tasks, further.blocks[:2], further.again) == (larger.tasks, larger.blocks[:2], "colour")
    assert further.blocks[2] != larger.blocks[2]
    exported = load_file("runs/adapters/colour/adapter_model.safetensors")
    assert any(tensor.abs().sum() for name, tensor in exported.items() if "lora_B" in name)
    assert len(load_file("runs/adapters/both/adapter_model.safetensors")) == len(exported)
    assert names["both"].tasks == ("animal", "basket", "colour", "paint")
    assert names["same"].digest == names["first"].digest
    assert repr(names["larger"]).endswith("of sapt on tiny: animal, basket, colour>")


def test_it_learns_what_the_pipeline_learns(finished: Finished, tmp_path: Path) -> None:
    config = sapt_core.load_config(QUICKSTART, TINY)
    tasks = sapt_core.load_sequence(config.benchmark)
    whole = pipelines.load(finished.snapshot, store=str(finished.store))
    first = sapt_core.learn_first(tasks[0], config, pipelines.open_store(str(tmp_path / "own")))
    assert first.digest == whole.manifest.parent


def test_what_is_refused(finished: Finished, tmp_path: Path) -> None:
    pool = pipelines.load(finished.snapshot, store=str(finished.store))
    config = sapt_core.load_config(QUICKSTART, TINY)
    task = sapt_core.make_task("new", [("a", "b")] * 4)
    with pytest.raises(SaptError, match="knows: animal, basket"):
        pool.generate(["x"], task="ticket")
    with pytest.raises(RequestError, match="row 1: prompt is blank") as told:
        pool.generate(["x", " ", None])  # type: ignore[list-item]
    assert len(told.value.faults) == 2
    with pytest.raises(RequestError, match="give a list of them"):
        pool.generate("x")
    with pytest.raises(SaptError, match="kept names ticket"):
        pool.learn(task, config, kept={"ticket": ["x"]})
    animal = sapt_core.make_task("animal", [("a", "b")] * 4)
    with pytest.raises(SaptError, match=r"the version has learnt it: give .*again= learns it"):
        pool.learn(animal, config)
    with pytest.raises(SaptError, match=r"kept names animal; what can be reflected on: basket"):
        pool.learn(animal, config, kept={"animal": ["x"]}, again="anew")
    with pytest.raises(SnapshotError, match="new cannot be learnt again: the version has not learnt new"):
        pool.learn(task, config, again="further")
    with pytest.raises(SnapshotError, match="other settings"):
        pool.learn(task, sapt_core.load_config(QUICKSTART, [*TINY, "pet.r=4"]))
    with pytest.raises(SaptError, match="there are: animal, basket"):
        pool.export("ticket", tmp_path / "adapter")
    with pytest.raises(DataError, match="1 train rows"):
        sapt_core.make_task("new", [("a", "b")])
    with pytest.raises(SnapshotError, match="64 hex digits"):
        pipelines.load("quickstart")
    with pytest.raises(ConfigError, match=r"store\.uri"):
        pipelines.open_store("http://x")


def test_importing_takes_no_time() -> None:
    heavy = ("torch", "transformers", "ray", "mlflow", "pydantic")
    asked = f"import sys, sapt_core, pipelines, cluster; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_every_name_is_there_and_described() -> None:
    for package in (sapt_core, pipelines):
        for name in package.__all__:
            assert name == "__version__" or inspect.getdoc(getattr(package, name))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            package.nothing  # noqa: B018


def test_nothing_that_a_user_calls_takes_many_arguments() -> None:
    called = [getattr(package, name) for package in (sapt_core, pipelines) for name in package.__all__]
    called = [each for each in called if inspect.isfunction(each)]
    called += [method for _, method in inspect.getmembers(sapt_core.Pool, inspect.isfunction)]
    assert len(called) > MOST_ARGUMENTS
    assert not [each for each in called if len(inspect.signature(each).parameters) > MOST_ARGUMENTS]
