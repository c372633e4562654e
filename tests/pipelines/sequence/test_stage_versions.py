"""A stage whose code has changed keeps its version only if somebody says so.

What is stored under a key is never computed again, so code that gives something else must raise the version of its
stage (``pipelines.sequence.making.VERSIONS``) or method. Whether it does, only a person can tell: when a test here
fails, raise the version if results change, then write the sources down as they are now:

    python -m tests.pipelines.sequence.test_stage_versions
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

import pytest

from pipelines.sequence.making import VERSIONS
from sapt_core.methods.base import known_methods

ROOT = Path(__file__).resolve().parents[3]
WRITTEN = Path(__file__).with_name("stage_versions.json")
TOKENS = ("data/prepare", "data/encoding", "data/rendering", "data/templates", "data/turns", "template_settings")
MODEL = (
    "pool/attention",
    "pool/blocks",
    "pool/model",
    "pool/pool",
    "data/collate",
    "backbones/loading",
    "backbones/traits",
)
ANSWERS = (*MODEL, "judging/choices", "judging/decoding", "judging/metrics", "judging/scoring", "versions/loading")
TRAINING = (*MODEL, "training/trainer", "methods/base", "versions/learning", "versions/loading")
POOLED = (*TOKENS, "pool/attention", "judging/decoding")
SOURCES: dict[str, tuple[str, ...]] = {
    "probe": (*MODEL, "pool/probe"),
    "prepare": TOKENS,
    "pseudo_samples": (*TOKENS, *TRAINING, "training/generator"),
    "given": (),
    "memory": (),
    "statistics": (*POOLED, "training/reflection"),
    "joined": ("training/reflection",),
    "train": (*TOKENS, *TRAINING, "training/reflection", "training/rehearsal"),
    "complete": ("versions/manifest",),
    "carried": (),
    "evaluate": ANSWERS,
    "attend": POOLED,
    "quality": (*POOLED, "judging/analysis"),
    "zero_shot": ANSWERS,
    "cost": (*MODEL, "pool/cost", "versions/size"),
}


def meaning(tree: ast.Module) -> str:
    """The code without its comments, docstrings and layout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
    return ast.dump(tree)


def digest(*parts: str) -> str:
    """sha256 over files and folders of sapt_core."""
    paths = [path for part in parts for path in sorted((ROOT / "sapt_core").glob(f"{part}*/**/*.py"))]
    paths += [path for part in parts if (path := ROOT / "sapt_core" / f"{part}.py").is_file()]
    assert paths or not parts
    return hashlib.sha256("".join(meaning(ast.parse(path.read_text())) for path in paths).encode()).hexdigest()


def body(kind: str) -> str:
    """The source of a stage's body, without its docstring."""
    name = {"given": "given_samples"}.get(kind, kind)
    tree = ast.parse((ROOT / "pipelines/sequence/bodies.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return meaning(ast.Module([found], []))


@cache
def sources() -> dict[str, dict[str, object]]:
    """Version and source of every kind of stage and of every method."""
    stages = {
        kind: {
            "version": version,
            "source": hashlib.sha256((digest(*SOURCES[kind]) + body(kind)).encode()).hexdigest()[:16],
        }
        for kind, version in VERSIONS.items()
    }
    files = {name: found.__module__.rpartition(".")[2] for name, found in known_methods().items()}
    methods = {
        f"method {name}": {"version": found.version, "source": digest(f"methods/{files[name]}")[:16]}
        for name, found in known_methods().items()
        if found.__module__.startswith("sapt_core.")
    }
    return {**stages, **methods}


@pytest.mark.parametrize("name", sources())
def test_a_changed_source_is_looked_at(name: str) -> None:
    assert sources()[name] == json.loads(WRITTEN.read_text()).get(name), (
        f"{name} has changed: raise its version if it gives something else now, then run "
        "python -m tests.pipelines.sequence.test_stage_versions"
    )


def test_comments_and_docstrings_are_no_change() -> None:
    plain = "def f(x):\n    return x + 1\n"
    told = '"""Module."""\n\n\ndef f(x):\n    """Add one."""\n    # why\n    return x + 1\n'
    assert meaning(ast.parse(plain)) == meaning(ast.parse(told))
    assert meaning(ast.parse(plain)) != meaning(ast.parse(plain.replace("1", "2")))


if __name__ == "__main__":
    WRITTEN.write_text(json.dumps(sources(), indent=1) + "\n")
