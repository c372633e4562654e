"""The tiny sequence with every kind of block, source of reflection and departure from the paper, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines import continual, evaluate, extend, predict, report
from pipelines.sequence.experiment import DESCRIPTION
from sapt_core.config import preflight
from sapt_core.config.experiment import load_config
from sapt_core.data import load_sequence
from sapt_core.methods.base import known_methods
from sapt_core.training import generator
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import QUICKSTART, TINY, Finished, Outcome, command, write_task

Call = Callable[[Callable[[], None], list[str]], Outcome]
LLAMA = ("backbone.path=llama", "pet.target_modules=q_proj,v_proj", "generator.pet.target_modules=q_proj,v_proj")


def run(call: Call, store: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The summary, and the records by name of the stages that this run added."""
    known = set((store / "records").glob("*.json"))
    ended = call(continual.main, [*command(store)[2:], *overrides, "--summary", str(store / "summary.json")])
    assert ended.code == 0, ended.out + ended.err
    added = [json.loads(path.read_text()) for path in set((store / "records").glob("*.json")) - known]
    return json.loads((store / "summary.json").read_text()), {
        record["name"]: record for record in added if record["kind"] != DESCRIPTION
    }


def manifest(store: Path, digest: str) -> Manifest:
    (path,) = (path for path in store.rglob(digest) if path.is_file())
    return Manifest.from_bytes(path.read_bytes())


def given_samples(folder: Path) -> str:
    (folder / "animal").mkdir(parents=True)
    rows = {"Definition": "", "Instances": [{"input": "a grey fox ran", "output": ""}]}
    (folder / "animal/train.json").write_text(json.dumps(rows))
    return f"reflection.data_dir={folder}"


@pytest.mark.parametrize("source", ["memory", "statistics", "given"])
def test_every_source_is_reflected_on(copied: Finished, tmp_path: Path, call: Call, source: str) -> None:
    extra = [given_samples(tmp_path / "samples")] if source == "given" else []
    # Soft attention: a sharp one routes these tasks so well that the term is zero to the last bit.
    summary, added = run(call, copied.store, f"reflection.source={source}", "attention.temperature=5", *extra)
    assert not [name for name in added if name.startswith(("prepare", "single", "pseudo_samples"))]
    assert added[f"{source}[00 animal]"]["metrics"]["bytes"] > 0
    assert added["train[01 basket]"]["metrics"]["last"]["kl"] > 0
    assert summary["snapshot"] != copied.snapshot


def test_nothing_to_reflect_on(copied: Finished, call: Call) -> None:
    _, added = run(call, copied.store, "reflection.source=none", "attention.temperature=5")
    assert added["train[01 basket]"]["metrics"]["last"].get("kl", 0) == 0


def test_pairs_are_kept_beside_the_inputs_that_are_reflected_on(
    copied: Finished, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A backbone this small writes no pair within seconds, and its tokenizer not even the marker.
    pairs = {"a grey fox ran": "fox", "a red hen sat": "sat"}
    counts = {"generated": 4, "malformed": 2, "empty": 0, "duplicate": 0}
    monkeypatch.setattr(generator, "sample", lambda *_, **__: (pairs, counts))
    monkeypatch.setattr(preflight, "check_writable", lambda *_: None)
    _, added = run(call, copied.store, "attention.temperature=5", "generator.content=pairs")
    record = added["pseudo_samples[00 animal]"]
    texts, answers = (
        json.loads(next(copied.store.rglob(record["outputs"][name])).read_text()) for name in ("samples", "answers")
    )
    assert dict(zip(texts, answers, strict=True)) == pairs
    assert record["metrics"]["known_answers"] == 1
    assert record["metrics"]["bytes"] == len(json.dumps(texts)) + len(json.dumps(answers))
    assert added["train[01 basket]"]["metrics"]["last"]["kl"] > 0


def test_a_task_without_any_pair_is_counted_and_not_reflected_on(
    copied: Finished, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"generated": 4, "malformed": 4, "empty": 0, "duplicate": 0}
    monkeypatch.setattr(generator, "sample", lambda *_, **__: ({}, counts))
    monkeypatch.setattr(preflight, "check_writable", lambda *_: None)
    _, added = run(call, copied.store, "generator.content=pairs")
    metrics = added["pseudo_samples[00 animal]"]["metrics"]
    assert (metrics["known_answers"], metrics["kept"], metrics["bytes"]) == (0, 0, 0)


def test_pairs_that_the_tokenizer_cannot_write_are_refused(call: Call, tmp_path: Path) -> None:
    ended = call(continual.main, [*command(tmp_path / "store")[2:], "generator.content=pairs"])
    assert ended.code == 2
    assert "cannot write __ans__" in ended.err
    assert "generator.content=inputs" in ended.err
    assert not (tmp_path / "store").exists()


def test_departures_of_the_published_code_and_targets_of_an_input(copied: Finished, call: Call) -> None:
    summary, added = run(
        call,
        copied.store,
        "method.name=sapt_paper",
        "attention.silu=after",
        "attention.query=input",
        "attention.pool_padding=true",
        "attention.scale=vocabulary",
        "attention.selection=uniform",
        "pet.detach_frozen=true",
        "reflection.target=instance",
        "reflection.per_micro_batch=true",
        "train.micro_batch_size=2",
    )
    assert added["train[01 basket]"]["metrics"]["last"]["kl"] > 0
    assert added["evaluate[v01 on 00 animal]"]["metrics"]["weights"] == [0.5, 0.5]
    kept = manifest(copied.store, summary["snapshot"])
    assert kept.method.name == "sapt_paper"
    assert kept.attention is not None
    assert (kept.attention.temperature, kept.attention.query) == (1.0, "input")


def test_prompts_are_learnt_and_asked(copied: Finished, call: Call) -> None:
    summary, _ = run(call, copied.store, "pet.type=prompt", "pet.length=3", "train.learning_rate=0.1")
    assert manifest(copied.store, summary["snapshot"]).pet.type == "prompt"
    assert len(summary["single"]) == 2
    asked = ["--snapshot", summary["snapshot"], "--task", "animal", "--input", "ada met a grey fox."]
    answered = call(predict.main, [*asked, f"store.uri={copied.store}"])
    assert answered.code == 0, answered.err
    assert "animal" in answered.out


@pytest.mark.parametrize("pet", ["lora", "prompt"])
def test_a_decoder_only_backbone_end_to_end(
    pet: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY[0].partition("=")[2])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    kind = ["pet.type=prompt", "pet.length=2", LLAMA[0], LLAMA[2]] if pet == "prompt" else list(LLAMA)
    summary, added = run(call, tmp_path / "store", *kind, "reflection.source=statistics")
    assert [len(row) for row in summary["scores"]] == [1, 2]
    assert added["train[01 basket]"]["metrics"]["last"]["kl"] >= 0
    assert manifest(tmp_path / "store", summary["snapshot"]).backbone.path == "llama"


METHODS = [
    *((name, method.pet_types[0]) for name, method in known_methods().items() if not method.shared_attention),
    ("sequential", "full"),
]
# The tiny backbone has 2 layers of 2 heads in encoder and decoder each; learning to write takes longer than seconds.
FITTING = {"seekr": ("method.layers=4", "method.heads=3"), "lfpt5": ("method.max_tokens=24", "method.max_attempts=1")}


@pytest.mark.parametrize(("method", "kind"), METHODS)
def test_every_method_end_to_end(copied: Finished, tmp_path: Path, call: Call, method: str, kind: str) -> None:
    """Trained, scored, reported and asked, without any of these knowing its name."""
    overrides = [f"method.name={method}", *FITTING.get(method, ())]
    overrides += {"prompt": ["pet.type=prompt", "pet.length=3"], "full": ["pet.type=full"]}.get(kind, [])
    summary, added = run(call, copied.store, *overrides)
    assert not [name for name in added if name.startswith(("prepare", "pseudo_samples", "attend", "quality"))]
    assert summary["method"] == method
    assert len(summary["scores"]) == 2
    kept = manifest(copied.store, summary["snapshot"])
    assert kept.pet.type == kind
    metrics = added["cost"]["metrics"]
    assert metrics["trained_parameters"] > 0
    assert metrics["forward_cost"] == 1 if kind == "full" else metrics["forward_cost"] > 1
    arguments = [*command(copied.store)[2:], *overrides, "--out", str(tmp_path / "report")]
    reported = call(report.main, arguments)
    assert reported.code == 0, reported.err
    asked = ["--snapshot", summary["snapshot"], "--task", "animal", "--input", "ada met a grey fox."]
    answered = call(predict.main, [*asked, f"store.uri={copied.store}"])
    assert answered.code == 0, answered.err
    # The second task on top of the version of the first alone: all but what that carries is there, so it is the same.
    (basket,) = load_sequence(load_config(QUICKSTART, [*TINY, "benchmark.tasks=basket"]).benchmark)
    write_task(tmp_path, basket)
    first = added["complete[00 animal]"]["outputs"]["manifest"]
    given = ["--snapshot", first, "--task", "basket", "--data", str(tmp_path / "basket"), "--inline"]
    later = call(extend.main, [*given, f"store.uri={copied.store}", "--summary", str(tmp_path / "later.json")])
    assert later.code == 0, later.err
    assert " started" not in later.out
    assert json.loads((tmp_path / "later.json").read_text())["snapshot"] == summary["snapshot"]


def test_settings_are_chosen_on_dev_rows(copied: Finished, tmp_path: Path, call: Call) -> None:
    """Nothing is trained anew, and no test row is looked at."""
    summary, added = run(call, copied.store, "evaluation.split=dev")
    assert {name.partition("[")[0] for name in added} == {"evaluate"}
    assert summary["snapshot"] == copied.snapshot
    assert {record["metrics"]["rows"] for record in added.values()} == {2}  # a tenth of 24 train rows
    ended = call(continual.main, [*command(copied.store)[2:], "evaluation.split=dev"])
    assert "row i after task i, dev rows" in " ".join(ended.out.split())
    reported = call(
        report.main, [*command(copied.store)[2:], "evaluation.split=dev", "--out", str(tmp_path / "report")]
    )
    assert reported.code == 0, reported.err
    page = (tmp_path / "report/index.html").read_text()
    assert "on the dev rows" in page
    assert "test rows" not in page


def test_an_oracle_is_scored_again_on_what_it_has_learnt_alone(copied: Finished, call: Call) -> None:
    summary, _ = run(call, copied.store, "method.name=per_task")
    arguments = [word for word in command(copied.store)[2:] if word != "--inline"]
    asked = ["--snapshot", summary["snapshot"], "method.name=per_task"]
    scored = call(evaluate.main, [*arguments, *asked])
    assert scored.code == 0, scored.err
    assert "animal 100%" in scored.out
    assert "basket 100%" in scored.out
    refused = call(evaluate.main, [*arguments, *asked, "benchmark.tasks=animal,stock"])
    assert refused.code == 2
    assert "it has not learnt stock; it knows: animal, basket" in refused.err
