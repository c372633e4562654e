"""A sequence on a GGUF file: learnt, asked and gone on from, the last two where the file is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import continual, predict
from sapt_core.backbones import loading
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from tests.core.backbones.ggufs import llama, write_gguf
from tests.pipelines.commands import QUICKSTART, TINY, Outcome, command, write_task
from tests.pipelines.extensions import go_on, manifest

Call = Callable[[Callable[[], None], list[str]], Outcome]


def test_a_version_says_the_file_and_is_all_that_is_needed_later(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = tmp_path / "store", tmp_path / "mine"
    folder.mkdir()
    write_gguf(folder / "model.gguf", llama(positions=1024))
    given = [f"backbone.path={folder}", "backbone.gguf_file=model.gguf", "pet.target_modules=q_proj,v_proj"]
    given += [
        "reflection.source=statistics",
        "train.epochs=0.5",
        "benchmark.max_target_tokens=8",
        "benchmark.max_source_tokens=200",
    ]
    learn = [*command(store)[2:], *given, "evaluation.single_task=false", "--summary", str(tmp_path / "summary.json")]
    ended = call(continual.main, learn)
    assert ended.code == 0, ended.out + ended.err
    version = json.loads((tmp_path / "summary.json").read_text())["snapshot"]
    backbone = manifest(store, version).backbone
    assert (backbone.path, backbone.gguf_file) == ("mine", "model.gguf")
    assert backbone.files is not None
    assert list(backbone.files) == ["model.gguf"]
    again = call(continual.main, learn)
    assert again.code == 0
    assert " started" not in again.out

    # Another machine, with the store alone.
    (folder / "model.gguf").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    loading._load_cached.cache_clear()
    asked = ["--snapshot", version, "--task", "animal", "--input", "ada met a grey fox.", f"store.uri={store}"]
    assert call(predict.main, asked).code == 0
    (ticket,) = load_sequence(load_config(QUICKSTART, [*TINY, "benchmark.tasks=ticket"]).benchmark)
    write_task(tmp_path / "later", ticket)
    later = go_on(call, store, version, "--task", "ticket", "--data", str(tmp_path / "later" / "ticket"))
    assert later.code == 0, later.err
    larger = manifest(store, json.loads((store / "summary.json").read_text())["snapshot"])
    assert larger.backbone == backbone
    assert [task.name for task in larger.tasks] == ["animal", "basket", "ticket"]


def test_a_file_that_cannot_be_read_is_bad_input_before_any_work(tmp_path: Path, call: Call) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no such thing")
    given = [f"backbone.path={tmp_path}", "backbone.gguf_file=model.gguf"]
    ended = call(continual.main, [*command(tmp_path / "store")[2:], *given])
    assert ended.code == 2
    assert "model.gguf is no GGUF file" in ended.err
    assert not (tmp_path / "store").exists()
