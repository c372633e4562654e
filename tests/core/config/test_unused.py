"""Fields that change nothing are told of: those that were set, and only those."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sapt_core.config.experiment import load_config
from sapt_core.config.unused import keys_of, unused, warn_of_unused

QUICKSTART = Path(__file__).resolve().parents[3] / "pipelines/configs/quickstart.yaml"


def told(overrides: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_unused(unused(load_config(QUICKSTART, overrides)), keys_of(overrides))
    return caplog.messages


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_ships_sets_nothing_in_vain(path: Path) -> None:
    assert unused(load_config(path)) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["attention.temperature=1", "method.name=ewc"], "attention.temperature has no effect: method ewc has no"),
        (["reflection.weight=1", "method.name=replay"], "reflection.weight has no effect: method replay has no shared"),
        (["reflection={weight: 1}", "method.name=replay"], "reflection.weight has no effect: method replay has no"),
        (["generator.share=1", "method.name=replay"], "generator.share has no effect: method replay has no shared"),
        (["generator.pet.r=1", "method.name=replay"], "generator.pet has no effect: method replay has no shared"),
        (["reflection.share=0.1"], "reflection.share has no effect: reflection.source is generated"),
        (["reflection.rank=1", "reflection.source=memory"], "reflection.rank has no effect: reflection.source is mem"),
        (["reflection.weight=1", "reflection.source=none"], "reflection.weight has no effect: reflection.source is no"),
        (["generator.share=1", "reflection.source=memory"], "generator.share has no effect: reflection.source is mem"),
        (["generator.share=1", "reflection.weight=0"], "generator.share has no effect: reflection.weight is 0"),
        (["pet.detach_frozen=true", "method.name=ewc"], "pet.detach_frozen has no effect: method ewc has no finished"),
        (["benchmark.order=1"], "benchmark.order has no effect: benchmark.tasks says the order"),
        (["store.endpoint_url=http://x"], "store.endpoint_url has no effect: store.uri is a folder"),
    ],
)
def test_what_is_set_in_vain(overrides: list[str], line: str, caplog: pytest.LogCaptureFixture) -> None:
    (message,) = told(overrides, caplog)
    assert message.startswith(line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention.temperature=1", "reflection.weight=1", "generator.share=1"],
        ["reflection.share=0.1", "reflection.source=memory"],
        ["reflection.rank=1", "reflection.source=statistics"],
        ["reflection.target_split=dev", "reflection.source=none"],
        ["method.name=o_lora", "pet.detach_frozen=true"],
        ["store.endpoint_url=http://x", "store.uri=s3://bucket"],
        ["method.name=sequential"],  # what the file says of the generator is for its own method
        ["reflection.source=none"],
    ],
    ids=str,
)
def test_what_has_an_effect_is_not_told(overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert told(overrides, caplog) == []


def test_fields_of_one_reason_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["method.name=ewc", "attention.hold=0", "reflection.weight=1"]
    assert told(overrides, caplog) == [
        "attention.hold, reflection.weight have no effect: method ewc has no shared attention"
    ]


def test_a_file_is_told_what_it_sets_in_vain_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(QUICKSTART.read_text() + "method: {name: ewc}\n")
    with caplog.at_level(logging.WARNING):
        warn_of_unused(unused(load_config(path)), set())
    (message,) = caplog.messages
    assert message.endswith("generator.max_tokens have no effect: method ewc has no shared attention")
