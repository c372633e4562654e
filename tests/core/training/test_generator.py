"""Pseudo-samples: what counts as clean, that the counts add up, and the whole way on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from sapt_core.data.collate import Batch
from sapt_core.pool.model import SaptModel
from sapt_core.settings import GeneratorConfig
from sapt_core.training import generator
from sapt_core.training.generator import SOURCE, PseudoSamples, clean, generate_pseudo_samples
from tests.core.tiny import (
    EOS,
    PAD,
    SPECIAL,
    T5_NAMES,
    KeptCheckpoints,
    lora,
    tiny_backbone,
    tiny_task,
    tiny_tokenizer,
)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("define __inp__ some words", (None, "some words")),
        ("__inp__x", (None, "x")),
        ("define__inp__ two \n lines ", (None, "two \n lines")),
        ("no marker", ("malformed", "")),
        ("", ("malformed", "")),
        ("a __inp__ b __inp__ c", ("malformed", "")),
        ("a __inp__ __inp__", ("malformed", "")),
        ("define __inp__", ("empty", "")),
        ("define __inp__ \n\t ", ("empty", "")),
    ],
)
def test_clean(text: str, outcome: tuple[str | None, str]) -> None:
    assert clean(text, "inputs") == (*outcome, "")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("define __inp__ some words __ans__ yes", (None, "some words", "yes")),
        ("__inp__x__ans__y", (None, "x", "y")),
        ("define __inp__ some words", ("malformed", "", "")),
        ("define __ans__ yes", ("malformed", "", "")),
        ("a __inp__ b __ans__ c __ans__ d", ("malformed", "", "")),
        ("a __inp__ b __inp__ c __ans__ d", ("malformed", "", "")),
        ("a __inp__ b __ans__ c __inp__ d", ("malformed", "", "")),
        ("a __ans__ b __inp__ c", ("malformed", "", "")),
        ("define __inp__ __ans__ yes", ("empty", "", "")),
        ("define __inp__ words __ans__ ", ("empty", "", "")),
    ],
)
def test_clean_pairs(text: str, outcome: tuple[str | None, str, str]) -> None:
    assert clean(text, "pairs") == outcome


@given(st.text(), st.text())
def test_what_was_taught_is_read_back(definition: str, text: str) -> None:
    if (definition + text).count("_") == 0:
        expected = (None, text.strip()) if text.strip() else ("empty", "")
        assert clean(f"{definition}__inp__{text}", "inputs") == (*expected, "")
        answer = "" if expected[0] else "yes"
        assert clean(f"{definition}__inp__{text}__ans__ yes", "pairs") == (*expected, answer)


def config(name: str, **changes: Any) -> GeneratorConfig:
    values = {
        "pet": lora(name, r=4, lora_dropout=0.1),
        "learning_rate": 0.05,
        "batch_size": 5,
        "steps": 3,
        "share": 0.3,
        "max_tokens": 16,
    }
    return GeneratorConfig(**{**values, **changes})


def run(
    name: str, backbone: PreTrainedModel | None = None, *, rows: int = 10, seed: int = 0, **changes: Any
) -> tuple[PseudoSamples, list[dict[str, float]]]:
    return generate_pseudo_samples(
        backbone or tiny_backbone(name),
        tiny_tokenizer(),
        tiny_task(0, rows=rows, is_encoder_decoder=name in T5_NAMES),
        config(name, **changes),
        precision="float32",
        seed=seed,
        checkpoints=KeptCheckpoints(),
    )


def scripted(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[dict[str, Any]]:
    """Let the model 'generate' these texts over and over; returns the settings it was asked with."""
    asked: list[dict[str, Any]] = []
    endless = cycle(texts)
    tokenizer = tiny_tokenizer()

    def generate(_: SaptModel, batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append({"input_ids": batch.input_ids.tolist(), **options})
        rows = [tokenizer(next(endless))["input_ids"] for _ in batch.input_ids]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return tokens, torch.ones(len(rows), 1)

    monkeypatch.setattr(SaptModel, "generate", generate)
    return asked


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_faults_are_counted_and_clean_texts_kept_once_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tiny_task(0).train["input"][4]
    texts = ["w1 w2", "w30 __inp__", "w30 __inp__ w5 w6", "w30 __inp__ w5 w6", f"w30 __inp__ {known}"]
    asked = scripted(monkeypatch, texts)
    samples, _ = run(name, share=0.4, max_attempts=3)  # 4 wanted of 10, at most 12 tried, 2 to be had
    assert samples == PseudoSamples(
        inputs=("w5 w6", known),
        answers=(),
        wanted=4,
        generated=12,
        malformed=3,
        empty=3,
        duplicate=4,
        copied=1,
        known_answers=0,
    )
    assert [len(request["input_ids"]) for request in asked] == [5, 5, 2]
    source = [SPECIAL.index(SOURCE), *([EOS] if name == "t5" else [])]
    assert asked[0]["input_ids"] == [source] * 5
    settings = {"max_new_tokens": 16, "do_sample": True, "top_k": 20, "repetition_penalty": 2.5, "pad_token_id": PAD}
    assert {key: value for key, value in asked[0].items() if key != "input_ids"} == settings


def test_pairs_keep_the_first_answer_of_an_input_and_count_those_that_the_task_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, tokenizer = tiny_task(0), tiny_tokenizer()
    known = tokenizer.decode(task.train["answer_ids"][2], skip_special_tokens=True)
    texts = [f"w30 __inp__ w1 w2 __ans__ {known}", "w30 __inp__ w1 w2 __ans__ w9", "w30 __inp__ w3 __ans__ w9 w9 w9"]
    scripted(monkeypatch, [*texts, "w30 __inp__ w4"])
    samples, _ = run("t5", share=0.3, content="pairs")
    assert (samples.inputs, samples.answers) == (("w1 w2", "w3"), (known, "w9 w9 w9"))
    assert (samples.known_answers, samples.malformed, samples.duplicate) == (1, 3, 7)


def test_a_text_that_the_template_does_not_take_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["w30 __inp__ w1 w2", "w30 __inp__ w3"])
    task = replace(tiny_task(0), template="{{ input.split()[1] }}")
    samples, _ = generate_pseudo_samples(
        tiny_backbone("t5"),
        tiny_tokenizer(),
        task,
        config("t5", max_attempts=2),
        precision="float32",
        seed=0,
        checkpoints=KeptCheckpoints(),
    )
    assert (samples.inputs, samples.malformed, samples.duplicate) == (("w1 w2",), 3, 2)


def test_it_stops_at_the_wanted_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(monkeypatch, [f"w30 __inp__ w{number}" for number in range(20)])
    samples, _ = run("t5", share=0.3)
    assert samples.inputs == ("w0", "w1", "w2")
    assert (samples.wanted, samples.generated, len(asked)) == (3, 5, 1)
    samples, _ = run("t5", share=0.01, min_samples=2)
    assert len(samples.inputs) == samples.wanted == 2


@pytest.mark.parametrize("content", ["inputs", "pairs"])
def test_it_learns_the_definition_the_input_and_in_pairs_the_answer(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def train(_: SaptModel, rows: list[Any], *arguments: Any, **options: Any) -> list[dict[str, float]]:
        seen.extend(rows)
        return []

    monkeypatch.setattr(generator, "train", train)
    scripted(monkeypatch, ["w30 __inp__ w1"])
    run("t5", max_tokens=32, content=content)
    tokenizer, task = tiny_tokenizer(), tiny_task(0)
    answers = tokenizer.batch_decode(list(task.train["answer_ids"]), skip_special_tokens=True)
    for row, text, answer in zip(seen, task.train["input"], answers, strict=True):
        assert tokenizer.decode(row["prompt_ids"]) == f"{SOURCE} </s>"
        # The word tokenizer does not part "w30__inp__w1"; real ones do, and ours has to see the same string.
        ending = f"__ans__{answer}" if content == "pairs" else ""
        whole = tokenizer(f"{task.definition}__inp__{text}{ending}")["input_ids"]
        assert row["answer_ids"] == whole


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_end_to_end_on_a_tiny_model(name: str) -> None:
    backbone = tiny_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    samples, curve = run(name, backbone)
    counted = samples.malformed + samples.empty + samples.duplicate
    assert len(samples.inputs) <= samples.wanted == 3
    assert 0 < samples.generated <= 3 * 4
    assert counted + len(samples.inputs) <= samples.generated
    assert [entry["step"] for entry in curve] == [1, 2, 3]
    assert {entry["gate"] for entry in curve} == {1.0}
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not [module for module in backbone.modules() if module._forward_hooks]
    assert run(name) == (samples, curve)  # repeatable
    assert run(name, seed=1)[1] != curve


def test_epochs_and_steps_say_how_long() -> None:
    assert len(run("t5", steps=7)[1]) == 7
    assert len(run("t5", steps=None, epochs=2)[1]) == 4
    assert len(run("t5", steps=5, rows=7)[1]) == 5  # batches of 5 and 2: steps are counted, not epochs


def test_the_backbone_is_bare_again_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    backbone = tiny_backbone("t5")
    monkeypatch.setattr(SaptModel, "token_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        run("t5", backbone)
    assert not [module for module in backbone.modules() if module._forward_hooks]
