"""What the config files may say: a page for people and JSON schemas for editors, made of the models that read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipelines.comparisons.cells import ComparisonConfig
from pipelines.sweeps.space import SweepConfig
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.methods.base import DEFAULT, known_methods

KINDS: Mapping[str, type[BaseModel]] = {
    "experiment": ExperimentConfig,
    "comparison": ComparisonConfig,
    "sweep": SweepConfig,
}
INTRODUCTION = """\
# Config fields

Made by `sapt fields`; change the descriptions in the code, not here.

Every field of an experiment can be given in its YAML file and, over it, as a dotted `key=value` on the command line
(`train.epochs=3`). There a field that holds text takes it as it is, names are given as `a,b` or, with commas in them,
as `["a, b", c]`, other values are read as YAML, and `null` empties what may be empty. `sapt learn --config FILE
--print-config` prints a config with its overrides and all defaults. Relative paths count from the working folder,
wherever they are written; what ships with the project (`pipelines/configs`, `pipelines/backbones`) is found from any.

The same as JSON schemas for editors: `schema.json` in `pipelines/configs`, and for the other kinds in its folders
`comparisons` and `sweeps`. Editors that use the YAML language server read it where a file begins with
`# yaml-language-server: $schema=PATH/schema.json`.
"""


def schema(kind: str) -> str:
    """The JSON schema of a kind of file, as text."""
    return json.dumps(_schema(KINDS[kind]), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """All fields of all kinds of files, as Markdown."""
    parts = [INTRODUCTION]
    for kind, model in KINDS.items():
        made = _schema(model)
        parts += [f"## The file of {'an' if kind[0] in 'aeiou' else 'a'} {kind}\n", *_sections(made, made, "")]
    return "\n".join(parts)


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema with what only its validators know: the methods, and which of two kinds is meant unnamed."""
    made = model.model_json_schema()
    definitions = made.get("$defs", {})
    if "Method" in definitions:
        methods = known_methods()
        _, all_of_them = models_json_schema([(method, "validation") for method in methods.values()])
        definitions |= all_of_them["$defs"]
        del definitions["Method"]
        made["properties"]["method"] = {
            "anyOf": [{"$ref": f"#/$defs/{method.__name__}"} for method in methods.values()],
            "default": {"name": DEFAULT},
            "description": made["properties"]["method"].get("description", ""),
        }
        for name, method in methods.items():
            described = definitions[method.__name__]
            described["properties"]["name"]["description"] = method.summary
            described["required"] = [] if name == DEFAULT else ["name"]
            if sets := ", ".join(
                f"attention.{key}={str(value).lower()}" for key, value in method.attention_defaults.items()
            ):
                described["description"] += f"\n\nWhere the config does not say otherwise, it sets {sets}."
    if "pet" in made.get("properties", {}):
        made["properties"]["pet"]["anyOf"] = made["properties"]["pet"].pop("oneOf")
        for name in ("PromptConfig", "FullConfig"):
            definitions[name]["required"] = ["type"]
    return made


def _sections(root: Mapping[str, Any], section: Mapping[str, Any], before: str) -> Iterator[str]:
    """Tables of a section's values, then of the sections in it, each under its dotted name."""
    fields = {f"{before}{name}": field for name, field in section["properties"].items()}
    inner = {name: _inner(root, field) for name, field in fields.items()}
    required = section.get("required", ())
    rows = [
        [f"`{name}`", _values(field), _default(name.removeprefix(before) in required, field), field["description"]]
        for name, field in fields.items()
        if not inner[name] or {"type": "string"} in field.get("anyOf", ())
    ]
    if rows:
        yield _table(["field", "values", "default", "what it is"], rows)
    listed: list[list[Mapping[str, Any]]] = []
    for name, kinds in inner.items():
        if {"type": "string"} in fields[name].get("anyOf", ()):
            if kinds in listed:  # mappings that another field's are as well
                continue
            listed.append(kinds)
        for kind in kinds:
            shown = kind["properties"].get("type") or kind["properties"].get("name") or {}
            told = f" ({shown['const']})" if "const" in shown else ""
            yield f"### `{name}`{told}\n"
            yield f"{_plain(kind['description'])}\n"
            if len(kinds) == 1 and (told := _left_out(fields[name], kind)):
                yield f"Left out altogether, it is {told}.\n"
            yield from _sections(root, kind, f"{name}.")


def _inner(root: Mapping[str, Any], field: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sections that a field, or what it lists, may be."""
    found = []
    for part in [field, *field.get("anyOf", ())]:
        each = part.get("items") or part.get("additionalProperties") or part
        for one in [each, *each.get("anyOf", ())] if isinstance(each, dict) and each is not field else [each]:
            if isinstance(one, dict) and "$ref" in one:
                found.append(root["$defs"][one["$ref"].rpartition("/")[2]])
    return found


def _values(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"]).replace("text or list of text", "names")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field or field["type"] in {"array", "object"}:
        return _several(field)
    if field["type"] == "boolean":
        return "`true`, `false`"
    words = {"integer": "whole number", "number": "number", "string": "text", "null": "`null`"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {field[name]:g}" for name, sign in limits.items() if name in field]
    text = "path" if field.get("format") == "path" else words[field["type"]]
    return " ".join([text, ", ".join(told)]).strip()


def _several(field: Mapping[str, Any]) -> str:
    """What a value is that holds others."""
    if "$ref" in field:
        return "mapping"
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    return f"mapping to {_values(field['additionalProperties'])}"


def _default(required: bool, field: Mapping[str, Any]) -> str:
    if required:
        return "must be given"
    value = field.get("default")
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`" if value else ""


def _left_out(field: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """What a section is that no file mentions, where that is more than each of its fields' defaults."""
    own = {name: each.get("default") for name, each in section["properties"].items()}
    default = field.get("default")
    differing = {name: value for name, value in default.items() if own.get(name) != value} if default else {}
    return ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in differing.items() if name in own)


def _plain(text: str) -> str:
    """A docstring as Markdown."""
    paragraphs = [" ".join(each.split()) for each in text.split("\n\n")]
    return "\n\n".join(paragraphs).replace("``", "`")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
