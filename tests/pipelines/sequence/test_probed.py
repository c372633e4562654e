"""What the probe of a backbone changes in a sequence, and what it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, CTRLConfig, CTRLLMHeadModel

from cluster.store import LocalStore
from pipelines import continual
from pipelines.sequence import bodies
from sapt_core.pool.probe.loaded import probe
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Finished, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]


def records(store: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (store / "records").glob("*.json"):
        record = json.loads(path.read_text())
        found.setdefault(record["name"], []).append(record)
    return found


def test_what_is_learnt_has_the_key_that_it_had_without_a_probe(finished: Finished) -> None:
    there = records(finished.store)
    (probed,) = there["probe"]
    assert (probed["outputs"], probed["values"]) == ({}, {})
    assert probed["metrics"]["model"] == "T5ForConditionalGeneration"
    assert "backbone: T5ForConditionalGeneration is taught and asked with rows of any length" in finished.outcome.out
    for name in ("train[00 animal]", "train[01 basket]", "pseudo_samples[00 animal]"):
        assert probed["key"] in there[name][0]["inputs"].values()


def test_prompts_go_alone_where_the_probe_says_so(
    copied: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(model: Any, *given: Any, **named: Any) -> Any:
        layer = model.get_decoder().block[0]
        handle = layer.register_forward_hook(lambda _m, _i, out: (out[0] + out[0].mean(0, keepdim=True), *out[1:]))
        try:
            return probe(model, *given, **named)
        finally:
            handle.remove()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bodies, "probe_backbone", alone)
    before = records(copied.store)
    (copied.store / "records" / f"{before['probe'][0]['key']}.json").unlink()
    overrides = [*TINY, f"store.uri={copied.store}", "evaluation.single_task=false"]
    ended = call(continual.main, ["--config", QUICKSTART, "--inline", *overrides])
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "is taught and asked with single rows in a batch: asked beside a row of its length" in said
    after = records(copied.store)
    assert after["probe"][0]["values"] == {"training": "alone", "answering": "alone"}
    for name in ("train[00 animal]", "train[01 basket]"):
        assert len(after[name]) == 2
        blobs = [LocalStore(copied.store).get(each["outputs"]["manifest"]) for each in after[name]]
        assert {Manifest.from_bytes(blob).answering for blob in blobs} == {"any", "alone"}
    assert len(after["prepare[00 animal]"]) == 1


def test_a_backbone_that_cannot_be_learnt_on_stops_before_anything_is(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pipelines/backbones/tiny")
    config = CTRLConfig(vocab_size=len(tokenizer), n_embd=16, dff=24, n_layer=2, n_head=2, n_positions=256)
    CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    tokenizer.save_pretrained(tmp_path / "ctrl")
    monkeypatch.chdir(tmp_path)
    given = [*TINY, f"backbone.path={tmp_path / 'ctrl'}", "pet.target_modules=[Wq,Wv]", f"store.uri={tmp_path}/store"]
    ended = call(continual.main, ["--config", QUICKSTART, "--inline", *given, "train.gradient_checkpointing=true"])
    assert ended.code == 2
    assert ended.err.count("error: ") == 1
    assert "train.gradient_checkpointing: CTRLLMHeadModel does not support activation checkpointing" in ended.err
    assert not any(name.startswith(("train", "pseudo_samples")) for name in records(tmp_path / "store"))
