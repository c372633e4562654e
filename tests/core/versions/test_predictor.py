"""Answers of a version: the same as its model gives, whatever they are batched and mixed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sapt_core.backbones.loading import load_backbone
from sapt_core.data.templates import TEMPLATES
from sapt_core.errors import RequestError, SaptError, SnapshotError, StoreError
from sapt_core.methods.base import find_method
from sapt_core.versions import predictor as predictors
from sapt_core.versions.manifest import SCHEMA_VERSION, Manifest
from sapt_core.versions.predictor import Predictor
from sapt_core.versions.requests import Row, find_task, read_rows
from tests.core.tiny import DictStore
from tests.core.versions.made import TASKS, learnt, version


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store() -> DictStore:
    return DictStore()


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w1 w1 w1"]


@pytest.mark.parametrize("name", ["t5", "t5_gated", "llama"])
def test_weights_are_a_mixture_over_the_tasks_blocks(name: str, store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / name, name).to_bytes(), store)
    predictions = predictor.predict(TEXTS)
    assert len(predictions) == len(TEXTS)
    for prediction in predictions:
        assert list(prediction.weights) == ["qa_hard", "qa", "task7_sum"]
        assert sum(prediction.weights.values()) == pytest.approx(1, abs=1e-5)
        assert all(weight >= 0 for weight in prediction.weights.values())
    assert len({tuple(prediction.weights.values()) for prediction in predictions}) > 1


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_answer_does_not_depend_on_its_batch_or_its_place(name: str, store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / name, name).to_bytes(), store)
    tasks = ["qa_hard", None, "qa", "qa_hard"]
    together = predictor.predict(TEXTS, tasks)
    for text, task, prediction in zip(TEXTS, tasks, together, strict=True):
        (alone,) = predictor.predict([text], [task])
        assert alone.text == prediction.text
        assert list(alone.weights.values()) == pytest.approx(list(prediction.weights.values()), abs=1e-3)
    backwards = predictor.predict(TEXTS[::-1], tasks[::-1], batch_size=3)[::-1]
    assert [prediction.text for prediction in backwards] == [prediction.text for prediction in together]


def test_a_task_puts_its_definition_and_template_around_an_input(store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    prompts = ["".join(TEMPLATES["superni"].pieces(TASKS[0].definition, text)) for text in TEXTS]
    assert predictor.predict(TEXTS, ["qa_hard"] * 4) == predictor.predict(prompts)
    assert predictor.predict(TEXTS, ["qa_hard"] * 4) != predictor.predict(TEXTS)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter, one token, the blank too."""
    letters = sorted({*"".join(TEMPLATES["superni"].pieces("", "w0123456789"))})
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["</s>", *letters])}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")  # noqa: S106


def test_a_version_is_asked_as_it_was_taught(store: DictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier releases tokenised a decoder-only model's prompts with the blank at their end."""
    monkeypatch.setattr("tests.core.versions.made.tiny_tokenizer", letter_tokenizer)
    now = version(store, tmp_path / "llama", "llama")
    written = json.loads(now.to_bytes())
    assert written["backbone"].pop("joined") is True
    asked: list[Any] = []

    def answer(_: Any, tokenizer: Any, rows: Any, *given: Any, **options: Any) -> tuple[list[str], torch.Tensor]:
        asked.append([tokenizer.decode(row["prompt_ids"]) for row in rows])
        return [""] * len(rows), torch.zeros(len(rows), 3)

    monkeypatch.setattr(predictors, "answer", answer)
    for manifest in (now.to_bytes(), json.dumps(written).encode()):
        Predictor.load(manifest, store).predict(["w1", "Output: "], ["qa_hard", None])
    joined, apart = asked
    assert [text[-7:] for text in joined] == ["Output:", "Output:"]
    assert [text[-8:] for text in apart] == ["Output: ", "Output: "]


def test_an_input_that_is_too_long_loses_its_middle(store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    middle = " ".join(["w9"] * 200)
    head, tail = " ".join(["w1"] * 40), " ".join(["w2"] * 40)
    long, longer = (" ".join([head, middle, *extra, tail]) for extra in ([], ["w7"]))
    # 63 tokens and the end-of-text token stay; what is cut out cannot count.
    kept = f"{' '.join(['w1'] * 32)} {' '.join(['w2'] * 31)}"
    task = ["task7_sum"]
    assert predictor.predict([long], task) == predictor.predict([longer], task) == predictor.predict([kept], task)


def test_a_prompt_that_is_too_long_is_refused(store: DictStore, tmp_path: Path) -> None:
    """Nobody knows which of its words may be lost."""
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    with pytest.raises(RequestError, match=r"row 1: prompt takes 65 tokens, and the version reads up to 64"):
        predictor.predict([" ".join(["w1"] * 63), " ".join(["w1"] * 64)])


def test_all_that_is_wrong_is_told_and_nothing_is_answered(
    store: DictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    monkeypatch.setattr(predictors, "answer", lambda *_, **__: pytest.fail("answered"))
    texts: list[Any] = ["w1", None, 3, "", " \n", "w1", "\ud800", " ".join(["w1"] * 99), "w1"]
    with pytest.raises(RequestError) as refused:
        predictor.predict(texts, [None] * 5 + ["nosuch"] + [None] * 3)
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [f"row {place}" for place in range(1, 8)]
    told = str(refused.value)
    for part in ("no text is given", "not text but int", "is blank", "it knows: qa_hard, qa, task7_sum", "takes 100"):
        assert part in told
    with pytest.raises(RequestError) as refused:
        predictor.answer([Row(prompt="w1"), Row(input=" ", task=4)], max_new_tokens=0, num_beams=-1)
    assert refused.value.faults == (
        "max_new_tokens=0: give a whole number from 1 on",
        "num_beams=-1: give a whole number from 1 on",
        "row 1: input is blank; task is not text but int; the version knows: qa_hard, qa, task7_sum",
    )


@pytest.mark.parametrize(
    ("texts", "tasks", "said"),
    [
        (["w1", "w2"], ["qa"], "there are 2 texts and 1 tasks"),
        (["w1"], ["qa", None], "there are 1 texts and 2 tasks"),
        (["w1"], [], "there are 1 texts and 0 tasks"),
        ("w1 w2", None, "texts are one text: give a list"),
        (["w", "2"], "qa", "tasks are one text: give a list"),
    ],
)
def test_a_task_for_every_text(texts: Any, tasks: Any, said: str, store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    with pytest.raises(RequestError, match=said):
        predictor.predict(texts, tasks)


def test_longer_answers_and_more_beams(store: DictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    given: list[tuple[int, int]] = []

    def answer(*given_: Any, max_new_tokens: int, **_: Any) -> tuple[list[str], torch.Tensor]:
        given.append((max_new_tokens, given_[3].num_beams))
        return [""], torch.zeros(1, 3)

    monkeypatch.setattr(predictors, "answer", answer)
    predictor.answer([Row(prompt="w1")])
    predictor.answer([Row(prompt="w1")], max_new_tokens=2, num_beams=3)
    assert given == [(6, 1), (2, 3)]


def test_a_method_with_one_block_answers_with_it_alone(store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5", attention=None).to_bytes(), store)
    assert [dict(prediction.weights) for prediction in predictor.predict(TEXTS)] == [{"all tasks": 1.0}] * 4


def test_a_manifest_that_was_read_back_names_the_backbone_that_is_loaded(store: DictStore, tmp_path: Path) -> None:
    made = version(store, tmp_path / "t5")
    read = Manifest.from_bytes(made.to_bytes())
    assert list(made.backbone.files or ()) != list(read.backbone.files or ()), "the order differs, the content does not"
    assert load_backbone(made.backbone, store)[0] is load_backbone(read.backbone, store)[0]


def test_nothing_asked_nothing_answered(store: DictStore, tmp_path: Path) -> None:
    assert Predictor.load(version(store, tmp_path / "t5").to_bytes(), store).predict([]) == []


def test_find_task_by_its_name_or_its_number(store: DictStore, tmp_path: Path) -> None:
    manifest = version(store, tmp_path / "t5")
    assert find_task(manifest, "qa") is manifest.tasks[1]
    assert find_task(manifest, "task7") is manifest.tasks[2]
    with pytest.raises(SaptError, match=r"not learnt task 'tas'; it knows: qa_hard, qa, task7_sum"):
        find_task(manifest, "tas")
    twins = manifest.model_copy(update={"tasks": (learnt("task7_a"), learnt("task7_b"), learnt("x"))})
    with pytest.raises(SaptError, match="task7_a, task7_b"):
        find_task(twins, "task7")


def test_rows_as_they_are_given(store: DictStore, tmp_path: Path) -> None:
    manifest = version(store, tmp_path / "t5")
    newer = manifest.model_copy(update={"tasks": (learnt("qa_hard", template="of_tomorrow"), *TASKS[1:])})
    rows = {
        Row(prompt="w1"): None,
        Row(input="w1", task="task7"): None,
        Row(): "no text is given: give either prompt",
        Row(task="qa"): "no text is given",
        Row(prompt="w1", input="w2", task="qa"): "both prompt and input are given",
        Row(prompt="w1", task="qa"): "a prompt is answered as it is",
        Row(input="w1"): "an input needs its task, one of: qa_hard, qa, task7_sum",
    }
    requests, faults = read_rows(manifest, rows)
    assert [(request.text, request.task) for request in requests.values()] == [("w1", None), ("w1", TASKS[2])]
    for place, said in enumerate(rows.values()):
        assert faults.get(place, "").startswith(said or "")
        assert (place in faults) == (said is not None)
    (fault,) = read_rows(newer, [Row(input="w1", task="qa_hard")])[1].values()
    assert "a template that this release cannot fill in (there is no template 'of_tomorrow'; there are superni" in fault


def test_damage_is_found_when_it_is_loaded(store: DictStore, tmp_path: Path) -> None:
    manifest = version(store, tmp_path / "t5")
    with pytest.raises(SnapshotError, match="not JSON"):
        Predictor.load(manifest.to_bytes()[:-5], store)
    newer = json.dumps({**json.loads(manifest.to_bytes()), "schema_version": SCHEMA_VERSION + 1}).encode()
    with pytest.raises(SnapshotError, match="Update SAPT on Ray"):
        Predictor.load(newer, store)
    store.blobs[manifest.blocks[1]] = b"no tensors"
    with pytest.raises(StoreError, match="missing or damaged"):
        Predictor.load(manifest.to_bytes(), store)
    swapped = manifest.model_copy(update={"router": manifest.blocks[0]})
    del store.blobs[manifest.blocks[1]]
    with pytest.raises(StoreError, match="missing or damaged"):
        Predictor.load(swapped.to_bytes(), store)


def test_an_oracle_answers_each_text_with_its_tasks_block(store: DictStore, tmp_path: Path) -> None:
    mixed = version(store, tmp_path / "t5")
    changes = {"method": find_method("per_task").model_validate({}), "attention": None, "router": None}
    oracle = mixed.model_copy(update=changes)
    predictor = Predictor.load(oracle.to_bytes(), store)
    tasks = ["task7_sum", "qa_hard", "task7_sum", "qa"]
    found = predictor.predict(TEXTS, tasks)
    assert [dict(prediction.weights) for prediction in found] == [{task: 1.0} for task in tasks]
    for index, task in enumerate(TASKS[:3]):
        alone = oracle.model_copy(
            update={
                "method": find_method("sequential").model_validate({}),
                "tasks": (task,),
                "blocks": (oracle.blocks[index],),
                "targets": ((1.0,),),
            }
        )
        plain = Predictor.load(alone.to_bytes(), store).predict(TEXTS, [task.name] * len(TEXTS))
        told = predictor.predict(TEXTS, [task.name] * len(TEXTS))
        assert [each.text for each in told] == [each.text for each in plain]
    with pytest.raises(RequestError, match="row 3: method per_task answers only where the task is told"):
        predictor.predict(TEXTS)
