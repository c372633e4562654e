"""What is loaded of a backbone by those who ask for its tokens alone, and that only one is held at a time."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sapt_core.backbones.last import Last
from sapt_core.backbones.loading import load_backbone, load_embeddings, load_encoding, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify
from sapt_core.pool.blocks.base import embedding_matrix
from tests.core.backbones.folders import config, rewritten, saved
from tests.core.tiny import BACKBONES, DictStore


def stored(folder: Path, **changes: str) -> tuple[BackboneRef, DictStore]:
    store, given = DictStore(), config(folder, **changes)
    ref = identify(given)
    store_backbone(given, ref, store)
    return ref, store


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever a whole model is loaded."""
    loads: list[str] = []
    real = PreTrainedModel.from_pretrained.__func__

    def counted(cls: type, *given: Any, **named: Any) -> Any:
        loads.append(cls.__name__)
        return real(cls, *given, **named)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    return loads


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_embeddings_are_those_of_the_whole_model(name: str, dtype: str, tmp_path: Path, whole: list[str]) -> None:
    ref, store = stored(saved(tmp_path / "model", name), dtype=dtype)
    whole.clear()
    model, tokenizer = load_embeddings(ref, store)
    settings, again = load_encoding(ref, store)
    assert not whole
    others = [value for value in model.parameters() if value is not embedding_matrix(model)]
    assert others
    assert all(value.is_meta for value in others)
    reference, _ = load_backbone(ref, store)
    assert whole
    assert torch.equal(embedding_matrix(model), embedding_matrix(reference))
    assert embedding_matrix(model).dtype == embedding_matrix(reference).dtype
    assert settings.is_encoder_decoder == reference.config.is_encoder_decoder
    assert tokenizer("w3 w4")["input_ids"] == again("w3 w4")["input_ids"]


def test_a_checkpoint_without_the_head_has_them_too(tmp_path: Path, whole: list[str]) -> None:
    folder = rewritten(
        saved(tmp_path / "model", "llama"), lambda all_: {k.removeprefix("model."): v for k, v in all_.items()}
    )
    ref, store = stored(folder)
    whole.clear()
    model, _ = load_embeddings(ref, store)
    assert not whole
    assert torch.equal(embedding_matrix(model), embedding_matrix(load_backbone(ref, store)[0]))


class Large:
    """Something that names itself, as models do."""

    def __init__(self) -> None:
        self.itself = self


def test_the_old_one_is_gone_before_the_new_one_is_loaded() -> None:
    alive: list[weakref.ref[Large]] = []
    held: list[int] = []

    def load(name: str) -> Large:
        held.append(sum(each() is not None for each in alive))
        made = Large()
        alive.append(weakref.ref(made))
        return made

    gc.collect()
    last = Last(load)
    assert last("a") is last("a")
    last("b")
    last("a")
    assert held == [0, 0, 0]
    last.cache_clear()
    assert [each() for each in alive] == [None, None, None]


def test_what_stands_on_another_goes_when_that_is_asked_for() -> None:
    def stand(name: str) -> Large:
        made = Large()
        alive.append(weakref.ref(made))
        ground("a")  # by itself it asks as well
        return made

    alive: list[weakref.ref[Large]] = []
    ground = Last(lambda _: Large())
    upon = Last(stand, on=ground)
    a = ground("a")
    assert upon("x") is upon("x")
    upon("y")
    assert [each() is None for each in alive] == [True, False]
    assert ground("a") is a
    assert alive[1]() is None
    upon("y")
    ground("b")
    assert alive[2]() is None
    upon("y")
    ground.cache_clear()
    assert alive[3]() is None


def test_neither_of_two_that_stand_on_each_other_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", int)  # seconds, of so many changes
    ground = Last(lambda _: Large())
    upon = Last(lambda _: ground("a"), on=ground)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda turn: ground(turn) if turn % 2 else upon(turn), range(40), timeout=60):
            pass


def test_what_cannot_be_loaded_leaves_nothing() -> None:
    def load(number: int) -> float:
        return 1 / number

    last = Last(load)
    last(1)
    with pytest.raises(ZeroDivisionError):
        last(0)
    assert last(2) == 0.5
