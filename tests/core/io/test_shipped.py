"""One rule for relative paths: the working folder, and behind it what ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapt_core.backbones.reference import identify, location
from sapt_core.config.experiment import load_config
from sapt_core.errors import ConfigError
from sapt_core.io.shipped import CONFIGS, INSTALLED, config_file, located
from sapt_core.settings import BackboneConfig


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("quickstart", ".", "quickstart.yaml"),
        ("quickstart.yaml", ".", "quickstart.yaml"),
        ("pipelines/configs/quickstart.yaml", ".", "quickstart.yaml"),
        ("quickstart", "comparisons", "comparisons/quickstart.yaml"),
        ("quickstart", "sweeps", "sweeps/quickstart.yaml"),
        ("comparisons/two_tasks", ".", "comparisons/two_tasks.yaml"),
        ("superni_llama", "sweeps", "superni_llama.yaml"),
    ],
)
def test_what_ships_is_found_from_any_folder(name: str, kind: str, file: str) -> None:
    assert config_file(name, kind) == CONFIGS / file


def test_a_file_in_the_working_folder_wins() -> None:
    Path("quickstart.yaml").touch()
    assert config_file("quickstart.yaml") == Path("quickstart.yaml")
    Path("pipelines/configs").mkdir(parents=True)
    Path("pipelines/configs/quickstart.yaml").touch()
    assert config_file("pipelines/configs/quickstart.yaml") == Path("pipelines/configs/quickstart.yaml")
    Path("superni_mini").mkdir()  # no file
    assert config_file("superni_mini") == CONFIGS / "superni_mini.yaml"


@pytest.mark.parametrize("name", ["nowhere.yaml", "../quickstart.yaml", "x" * 300, "pipelines/../tests", "sapt_core"])
def test_nothing_else_is_found(name: str) -> None:
    assert config_file(name) == Path(name)
    assert located(name) == Path(name)


def test_the_backbone_of_a_shipped_config_is_found_from_any_folder() -> None:
    config = load_config("quickstart").backbone
    assert config.path == "pipelines/backbones/tiny"  # as it was written, wherever it is read
    assert location(config) == INSTALLED / "pipelines/backbones/tiny"
    assert identify(config) == identify(BackboneConfig(path=str(INSTALLED / "pipelines/backbones/tiny")))


def test_a_config_that_is_not_there_is_told_what_is() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_config("quickstrat")
    with pytest.raises(ConfigError, match="these ship: comparisons/"):
        load_config("/nowhere/at/all.yaml")
