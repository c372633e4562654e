"""Answers of a version: the same as its model gives, whatever they are batched and mixed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import identify
from sapt_core.data.task import LearntTask
from sapt_core.data.templates import TEMPLATES
from sapt_core.errors import SaptError, SnapshotError, StoreError
from sapt_core.methods.base import find_method
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, BackboneConfig
from sapt_core.versions import predictor as predictors
from sapt_core.versions.loading import store_block, store_router
from sapt_core.versions.manifest import SCHEMA_VERSION, Manifest
from sapt_core.versions.predictor import Predictor, find_task
from tests.core.tiny import DictStore, fill, lora, tiny_backbone, tiny_tokenizer

ATTENTION = AttentionConfig(bottleneck=5, temperature=0.2)


def learnt(name: str, **changes: object) -> LearntTask:
    values = {
        "definition": "w30 w31",
        "template": "superni",
        "metric": "rouge_l",
        "max_source_tokens": 64,
        "max_target_tokens": 6,
    }
    return LearntTask(**{"name": name, **values, **changes})


TASKS = (learnt("qa_hard"), learnt("qa", definition="w32", max_source_tokens=40), learnt("task7_sum", template="none"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def version(
    store: DictStore, folder: Path, name: str = "t5", *, blocks: int = 3, attention: AttentionConfig | None = ATTENTION
) -> Manifest:
    """A version with random blocks and keys on a random backbone, in ``store``."""
    backbone, pet = tiny_backbone(name), lora(name)
    backbone.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = BackboneConfig(path=str(folder))
    ref = identify(config)
    store_backbone(config, ref, store)
    pool = new_pool(backbone, pet, attention)
    digests = []
    if attention is None:
        fill(pool, 1)
        digests.append(store_block(pool, store))
    else:
        torch.manual_seed(3)
        for _ in range(blocks):
            pool.add()
            state = {key: torch.randn_like(value) * 0.4 for key, value in pool.blocks.current_state().items()}
            pool.blocks.load_current(state)
            digests.append(store_block(pool, store))
            pool.freeze()
    tasks = TASKS[:blocks]
    sizes = [1] * blocks if attention is None else range(1, blocks + 1)
    return Manifest(
        method={"name": "sequential" if attention is None else "sapt"},
        backbone=ref,
        pet=pet,
        attention=attention,
        tasks=tasks,
        blocks=tuple(digests),
        router=store_router(pool, store),
        targets=tuple((1 / size,) * size for size in sizes),
        parent=None,
    )


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
    tasks = [TASKS[0], None, TASKS[1], TASKS[0]]
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
    assert predictor.predict(TEXTS, [TASKS[0]] * 4) == predictor.predict(prompts)
    assert predictor.predict(TEXTS, [TASKS[0]] * 4) != predictor.predict(TEXTS)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One letter, one token, the blank too."""
    letters = sorted({*"".join(TEMPLATES["superni"].pieces("", "w0123456789"))})
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["</s>", *letters])}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")  # noqa: S106


def test_a_version_is_asked_as_it_was_taught(store: DictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier releases tokenised a decoder-only model's prompts with the blank at their end."""
    monkeypatch.setattr("tests.core.versions.test_predictor.tiny_tokenizer", letter_tokenizer)
    now = version(store, tmp_path / "llama", "llama")
    written = json.loads(now.to_bytes())
    assert written["backbone"].pop("joined") is True
    asked: list[Any] = []

    def answer(_: Any, tokenizer: Any, rows: Any, *given: Any, **options: Any) -> tuple[list[str], torch.Tensor]:
        asked.append([tokenizer.decode(row["prompt_ids"]) for row in rows])
        return [""] * len(rows), torch.zeros(len(rows), 3)

    monkeypatch.setattr(predictors, "answer", answer)
    for manifest in (now.to_bytes(), json.dumps(written).encode()):
        Predictor.load(manifest, store).predict(["w1", "Output: "], [learnt("qa", definition="w2"), None])
    joined, apart = asked
    assert [text[-7:] for text in joined] == ["Output:", "Output:"]
    assert [text[-8:] for text in apart] == ["Output: ", "Output: "]


def test_a_prompt_that_is_too_long_loses_its_middle(store: DictStore, tmp_path: Path) -> None:
    predictor = Predictor.load(version(store, tmp_path / "t5").to_bytes(), store)
    middle = " ".join(["w9"] * 200)
    head, tail = " ".join(["w1"] * 40), " ".join(["w2"] * 40)
    long, longer = (" ".join([head, middle, *extra, tail]) for extra in ([], ["w7"]))
    # 63 tokens and the end-of-text token stay of a full prompt; what is cut out cannot count.
    assert predictor.predict([long]) == predictor.predict([longer])
    kept = f"{' '.join(['w1'] * 32)} {' '.join(['w2'] * 31)}"
    assert predictor.predict([long]) == predictor.predict([kept])


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
    tasks = [TASKS[2], TASKS[0], TASKS[2], TASKS[1]]
    found = predictor.predict(TEXTS, tasks)
    assert [dict(prediction.weights) for prediction in found] == [{task.name: 1.0} for task in tasks]
    for index, task in enumerate(TASKS[:3]):
        alone = oracle.model_copy(
            update={
                "method": find_method("sequential").model_validate({}),
                "tasks": (task,),
                "blocks": (oracle.blocks[index],),
                "targets": ((1.0,),),
            }
        )
        plain = Predictor.load(alone.to_bytes(), store).predict(TEXTS, [task] * len(TEXTS))
        told = predictor.predict(TEXTS, [task] * len(TEXTS))
        assert [each.text for each in told] == [each.text for each in plain]
    with pytest.raises(SnapshotError, match="only where the task is told, and none is named"):
        predictor.predict(TEXTS)
