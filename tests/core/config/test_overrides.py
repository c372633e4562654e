"""Overrides: text is taken as it was typed, in every field that holds text; all else is YAML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import BaseModel

from sapt_core.config import fields
from sapt_core.config.experiment import ExperimentConfig, load_config, load_places, merged
from sapt_core.config.overrides import parsed
from sapt_core.errors import ConfigError
from sapt_core.task_settings import NameList, TaskList

QUICKSTART = Path(__file__).resolve().parents[3] / "pipelines/configs/quickstart.yaml"
ODD = ("data/team #2/store", "2026", "on", "1e5", "null ", "a: b", "{x}", "${seed}", r"\${x}", "'a'", " x ", "~")


def text_fields(section: type[BaseModel] = ExperimentConfig, before: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if fields.is_text(field):
            yield before + name
            continue
        for inner in fields.sections_of(field):
            yield from text_fields(inner, f"{before}{name}.")


def laid(*overrides: str, over: str | None = None) -> Any:
    layers = [] if over is None else [OmegaConf.create(over)]
    return OmegaConf.to_container(merged([*layers, *parsed(overrides, ExperimentConfig)]), resolve=True)


def value(container: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        container = container[part]
    return container


def test_the_text_fields_are_found() -> None:
    found = set(text_fields())
    assert {"store.uri", "tracking.experiment", "backbone.path", "benchmark.tasks", "cluster.address"} <= found
    assert {"pet.target_modules", "method.name", "method.gates", "benchmark.data_dir"} <= found
    assert not {"seed", "train.learning_rate", "pet.detach_frozen", "pet", "method.share"} & found


@pytest.mark.parametrize("text", ODD)
def test_every_text_field_takes_its_text_as_it_is(text: str) -> None:
    for name in text_fields():
        before = {"store": {"uri": "old"}, "tracking": {"experiment": "old"}, "benchmark": {"tasks": ["old"]}}
        container = OmegaConf.to_container(
            merged([OmegaConf.create(before), *parsed([f"{name}={text}"], ExperimentConfig)]), resolve=True
        )
        assert value(container, name) == text, name


@given(st.text(alphabet="a$\\{}?#:'\" \n", max_size=8).filter(lambda text: text != "???"))
def test_any_text_arrives(text: str) -> None:
    assert value(laid(f"store.uri={text}"), "store.uri") == text


def test_the_validated_text_is_what_was_typed() -> None:
    places = load_places(["store.uri=/data/team #2/store", "tracking.experiment=2026"])
    assert (places.store.uri, places.tracking.experiment) == ("/data/team #2/store", "2026")
    assert load_places(["tracking.experiment=on"]).tracking.experiment == "on"


def test_null_empties_what_may_be_empty_and_is_text_elsewhere() -> None:
    config = load_config(QUICKSTART, ["backbone.revision=null", "tracking.experiment=null", "train.max_grad_norm=null"])
    assert (config.backbone.revision, config.tracking.experiment, config.train.max_grad_norm) == (None, "null", None)


@pytest.mark.parametrize(
    ("given_", "names"),
    [
        ("a,b, c", ("a", "b", "c")),
        ("[a, b]", ("a", "b")),
        ('["a, b", c]', ("a, b", "c")),
        ("[2026, on, null]", ("2026", "on", "null")),
        ("", ()),
    ],
)
def test_names(given_: str, names: tuple[str, ...]) -> None:
    config = load_config(QUICKSTART, [f"benchmark.unseen={given_}"])
    assert tuple(task.name for task in config.benchmark.unseen) == names


@pytest.mark.parametrize(("given_", "part"), [("[a", 'give a,b,c or ["a, b",c]'), ("[[a], b]", "valid string")])
def test_names_that_are_no_list(given_: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.unseen") as caught:
        load_config(QUICKSTART, [f"benchmark.unseen={given_}"])
    assert part in str(caught.value)


def test_other_values_are_yaml() -> None:
    config = load_config(QUICKSTART, ["train.learning_rate=1e-4", "generator.pet={r: 2, target_modules: [q]}"])
    assert (config.train.learning_rate, config.generator.pet.target_modules) == (1e-4, ("q",))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(QUICKSTART, ["seed=[1"])


def test_what_stands_for_a_missing_value_is_not_dropped() -> None:
    with pytest.raises(ConfigError, match=r"store\.uri: \?\?\?"):
        load_config(QUICKSTART, ["store.uri=???"])


def test_a_file_may_refer_to_what_an_override_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{QUICKSTART.read_text()}\nstore: {{uri: 'runs/${{tracking.experiment}}'}}\n")
    assert load_config(path, ["tracking.experiment=a #1"]).store.uri == "runs/a #1"


def test_a_file_whose_text_yaml_reads_as_something_else_is_told_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(QUICKSTART.read_text().replace("experiment: quickstart", "experiment: 2026"))
    with pytest.raises(ConfigError, match="put it in quotes"):
        load_config(path)


def test_names_are_a_kind_of_their_own() -> None:
    assert fields.kinds_of(fields.find(ExperimentConfig, "pet.target_modules")[0]) == [NameList]
    assert fields.kinds_of(fields.find(ExperimentConfig, "benchmark.unseen")[0]) == [TaskList]
