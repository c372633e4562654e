"""The reference of the config fields: whole, and as the models have it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipelines.maintenance.reference import KINDS
from sapt_core.config import fields
from tests.pipelines.commands import ROOT

CONFIGS = ROOT / "pipelines/configs"
SCHEMAS = {
    "experiment": CONFIGS / "schema.json",
    "comparison": CONFIGS / "comparisons/schema.json",
    "sweep": CONFIGS / "sweeps/schema.json",
}
# In a process of its own: tests may have made methods that do not ship.
PRINT = """
import json
from pipelines.maintenance.reference import KINDS, page, schema
print(json.dumps([page(), {kind: schema(kind) for kind in KINDS}]))
"""


@pytest.fixture(scope="module")
def made() -> tuple[str, dict[str, str]]:
    printed = subprocess.run([sys.executable, "-c", PRINT], cwd=ROOT, capture_output=True, text=True, check=True)
    page, schemas = json.loads(printed.stdout)
    return page, schemas


def validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMAS[kind].read_text(encoding="utf-8")))


def test_what_is_committed_is_up_to_date(made: tuple[str, dict[str, str]]) -> None:
    page, schemas = made
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == page, "make reference"
    assert {kind: path.read_text(encoding="utf-8") for kind, path in SCHEMAS.items()} == schemas, "make reference"


def test_every_field_is_described_and_on_the_page(made: tuple[str, dict[str, str]]) -> None:
    def walk(section: Any, before: str) -> None:
        for name, field in section.model_fields.items():
            inner = fields.sections_of(field)
            assert field.description or before + name == "method.name", f"{section.__name__}.{name}"
            assert (inner and not fields.is_text(field)) or f"| `{before}{name}` |" in made[0]
            if before + name == "benchmark.unseen":  # mappings as those of benchmark.tasks
                continue
            assert not inner or f"### `{before}{name}`" in made[0]
            for each in inner:
                if not each.__module__.startswith("sapt_core."):  # a method of another test's
                    continue
                walk(each, f"{before}{name}.")

    for model in KINDS.values():
        walk(model, "")


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, schema in SCHEMAS.items() for path in sorted(schema.parent.glob("*.yaml"))],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_what_ships_fits_its_schema(kind: str, path: Path) -> None:
    assert [str(error) for error in validator(kind).iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"epoch": 3}},
        {"train": {"epochs": 0}},
        {"pet": {"type": "prompt", "r": 8}},
        {"method": {"name": "saptt"}},
        {"method": {"name": "ewc", "share": 0.1}},
        {"method": {"share": 0.1}},
        {"benchmark": {"suite": "nosuch"}},
        {"benchmark": {"tasks": [{"name": "a", "colums": {}}]}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_config_does(change: dict[str, Any]) -> None:
    right = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert validator("experiment").is_valid(right)
    assert not validator("experiment").is_valid({**right, **change})


@pytest.mark.parametrize(
    "change",
    [{"pet": {"r": 2}}, {"pet": {"type": "prompt"}}, {"method": {}}, {"method": {"name": "replay", "share": 0.1}}],
)
def test_the_schema_takes_what_the_config_takes(change: dict[str, Any]) -> None:
    right = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert validator("experiment").is_valid({**right, **change})
