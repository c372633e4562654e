"""Only labels can be answered: whatever a model would rather say, of both kinds of backbone, padded, in beams."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapt_core.config.preflight import check_answers, check_labels
from sapt_core.data.prepare import PreparedTask, prepare_task
from sapt_core.data.task import Example, Task
from sapt_core.errors import DataError
from sapt_core.judging.choices import Choices, choices_of, label_encoder, task_choices
from sapt_core.judging.decoding import answer
from sapt_core.settings import EvaluationConfig, PromptConfig
from tests.core.data.test_prepare import byte_bpe
from tests.core.tiny import BACKBONES, T5_NAMES, sapt_model, tiny_tokenizer

# Of one first token, one the beginning of another, of different lengths.
LABELS = ("w1 w2", "w1 w2 w3", "w1 w4", "w5")


def task(*labels: str, **changes: Any) -> Task:
    rows = tuple(
        Example(" ".join(f"w{(7 * i + j) % 33}" for j in range(1 + i % 5)), (label,))
        for i, label in enumerate(labels * 3)
    )
    values = {"template": "superni", "metric": "accuracy", "answers": "labels", **changes}
    return Task("one", "w30", rows, rows[:2], rows, **values)


def prepared(name: str, given_task: Task) -> PreparedTask:
    return prepare_task(
        given_task, tiny_tokenizer(), max_source_tokens=64, max_target_tokens=6, is_encoder_decoder=name in T5_NAMES
    )


@pytest.mark.parametrize("num_beams", [1, 3, 6])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_random_model_answers_labels_alone(name: str, num_beams: int) -> None:
    model, ready = sapt_model(name), prepared(name, task(*LABELS))
    rows = list(ready.test)
    evaluation = EvaluationConfig(batch_size=5, num_beams=num_beams)
    free, _ = answer(model, tiny_tokenizer(), rows, evaluation, max_new_tokens=6, precision="float32")
    assert not {*free} & {*LABELS}
    choices = task_choices(ready, rows, tiny_tokenizer(), model, joined=None, max_target_tokens=6)
    # Labels are said whole, however short answers are to be.
    held, weights = answer(
        model, tiny_tokenizer(), rows, evaluation, max_new_tokens=1, precision="float32", choices=choices
    )
    assert {*held} <= {*LABELS}
    alone = [
        answer(
            model,
            tiny_tokenizer(),
            [row],
            evaluation,
            max_new_tokens=6,
            precision="float32",
            choices=choices[i : i + 1],
        )
        for i, row in enumerate(rows)
    ]
    assert held == [texts[0] for texts, _ in alone]
    assert torch.allclose(weights, torch.cat([each for _, each in alone]), atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_greedily_each_token_is_the_likeliest_of_those_that_go_on_with_a_label(name: str) -> None:
    """Step by step from the logits of plain forwards, and in front of soft prompts, whose ids do not come back."""
    for pet in (None, PromptConfig(length=2)):
        model, ready = sapt_model(name, pet=pet), prepared(name, task(*LABELS))
        rows = list(ready.test)
        (choices, *_) = every = task_choices(ready, rows, tiny_tokenizer(), model, joined=None, max_target_tokens=6)
        texts, _ = answer(
            model, tiny_tokenizer(), rows, EvaluationConfig(), max_new_tokens=6, precision="float32", choices=every
        )
        collate = model.collator(0)
        for row, text in zip(rows, texts, strict=True):
            said: list[int] = []
            while allowed := choices.after(said):
                # The label at the last place predicts nothing: what stands there is no matter.
                batch = collate([{**row, "answer_ids": [*said, 1]}])
                with torch.no_grad():
                    logits = model.answer_logits(model(batch)[0], batch.labels[0])[len(said)]
                said.append(max(allowed, key=lambda token: float(logits[token])))
            assert choices.read(said) == text


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize("template", ["superni", "none"])
def test_labels_have_the_tokens_that_training_teaches(is_encoder_decoder: bool, template: str) -> None:
    tokenizer = byte_bpe()
    labels = ("positive", "negative", "neutral")
    inputs = ["Is it good?", "Is it good? ", "Answer:", "Answer: ", "ends in a\n"]
    rows = tuple(Example(text, (label,)) for text in inputs for label in labels)
    given_task = Task("one", "", rows, rows, rows, template, "accuracy", answers="labels")
    ready = prepare_task(
        given_task, tokenizer, max_source_tokens=256, max_target_tokens=40, is_encoder_decoder=is_encoder_decoder
    )
    encoder = label_encoder(tokenizer, is_encoder_decoder=is_encoder_decoder, joined=None)
    choices = choices_of(encoder, ready, [row.input for row in rows], 40)
    for row, each in zip(ready.train, choices, strict=True):
        assert each.read([*row["answer_ids"], 0, 0]) == row["references"][0]
        assert tuple(row["answer_ids"]) in each.ids


@given(st.sets(st.text("abcd", max_size=4), min_size=1, max_size=8))
def test_every_label_can_be_reached_and_nothing_else(paths: set[str]) -> None:
    ids = tuple((*map(ord, path), 1) for path in sorted(paths))
    choices = Choices(tuple(map(str, ids)), ids)
    found, open_paths = set(), [()]
    while open_paths:
        path = open_paths.pop()
        ways = choices.after(path)
        if not ways:
            found.add(path)
            assert choices.read([*path, 0, 0]) == str(path)
        else:
            assert choices.read(path) is None
        open_paths += [(*path, way) for way in ways]
    assert found == {*ids}
    assert choices.after((9, 9)) == []
    assert choices.read((9, 9)) is None


def fault(given_task: Task, max_target_tokens: int = 6) -> list[str]:
    with pytest.raises(DataError, match="Labels cannot be told apart") as caught:
        check_labels([given_task], tiny_tokenizer(), max_target_tokens=max_target_tokens, is_encoder_decoder=True)
    return list(caught.value.faults)


def test_labels_that_no_answer_could_tell_apart_are_refused_together() -> None:
    check_labels([task(*LABELS)], tiny_tokenizer(), max_target_tokens=6, is_encoder_decoder=True)
    check_labels(
        [task("nobody", "else", answers="free")], tiny_tokenizer(), max_target_tokens=6, is_encoder_decoder=True
    )
    cut, alike = fault(task("w1 w2 w3 w4", "w1 w2 w3 w5", "w6", "unknown", "unheard"), 4)
    assert cut == (
        "one: 'w1 w2 w3 w4', 'w1 w2 w3 w5': longer, with their end, than benchmark.max_target_tokens=4: raise it"
    )
    assert alike.startswith("one: 'unheard', 'unknown' are the same to the tokenizer: name them otherwise")
    assert fault(task("w1")) == ["one: all train rows answer 'w1': there is nothing to choose from"]


def test_rows_that_no_label_answers_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    given_task = task("w1", "w2")
    rows = (Example("w3", ("w1",)), Example("w3", ("w9",)))
    some = Task("one", "w30", given_task.train, given_task.dev, rows, "superni", "accuracy", answers="labels")
    with caplog.at_level(logging.WARNING):
        check_answers([some], tiny_tokenizer())
    assert "of 2 test answers 0 hold nothing that metric accuracy sees, and 1 are none of its labels" in caplog.text
    none = Task("one", "w30", given_task.train, given_task.dev, rows[1:], "superni", "accuracy", answers="labels")
    with pytest.raises(DataError, match="labels are what train rows answer"):
        check_answers([none], tiny_tokenizer())


def test_a_generative_task_that_is_taken_for_one_of_labels_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = tuple(Example(f"w{i}", (f"w{i}",)) for i in range(6))
    with caplog.at_level(logging.WARNING):
        check_labels(
            [Task("one", "", rows, rows, rows, "superni", "accuracy", answers="labels")],
            tiny_tokenizer(),
            max_target_tokens=6,
            is_encoder_decoder=True,
        )
    assert "6 train rows have 6 different answers, which are taken for labels" in caplog.text
