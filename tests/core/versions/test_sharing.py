"""Threads that ask one version, and versions that share a backbone: each as if it were alone."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from transformers import PreTrainedModel

from sapt_core.backbones import loading
from sapt_core.backbones.loading import load_backbone
from sapt_core.data.collate import Collator
from sapt_core.methods.base import find_method
from sapt_core.settings import FullConfig, PETConfig, PromptConfig
from sapt_core.versions.loading import load_version
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.predictor import Prediction, Predictor
from tests.core.tiny import PAD, DictStore, random_rows
from tests.core.versions.made import TASKS, version

T = TypeVar("T")

# Unlike sizes and lengths: one thread's weights on another's batch are then an error, and no near miss.
REQUESTS = (
    ["w1 w2 w3", "w4"],
    ["w5 w6 w7 w8 w9 w10", "w1 w1 w1", "w3"],
    ["w12"],
    ["w2 w4 w6", "w8", "w20 w21", "w22 w23 w24 w25 w26 w27 w28", "w1 w30"],
)
ROUNDS = 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _many_turns() -> Iterator[None]:
    """Threads change places often enough for any two of them to meet within a layer."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def at_once(asked: Sequence[Callable[[], T]]) -> list[list[T]]:
    """What each gives in ``ROUNDS`` rounds, every one in a thread of its own."""
    start = Barrier(len(asked))

    def rounds(ask: Callable[[], T]) -> list[T]:
        start.wait()
        return [ask() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(rounds, asked))


def asking(predictor: Predictor, texts: list[str], task: int | None = None) -> Callable[[], list[Prediction]]:
    told = None if task is None else [TASKS[task].name] * len(texts)
    return lambda: predictor.predict(texts, told)


def state_of(backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backbone.state_dict().items()}


def assert_as_loaded(backbone: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    assert not [module for module in backbone.modules() if module._forward_hooks or module._forward_pre_hooks]
    after = backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_threads_are_answered_as_one_after_the_other(name: str, count: int, tmp_path: Path) -> None:
    store = DictStore()
    manifest = version(store, tmp_path / name, name)
    predictor = Predictor.load(manifest.to_bytes(), store)
    backbone = load_backbone(manifest.backbone, store)[0]
    before = state_of(backbone)
    asked = [asking(predictor, texts) for texts in REQUESTS[:count]]
    alone = [ask() for ask in asked]
    assert len({tuple(each.weights.values()) for answers in alone for each in answers}) > count
    assert at_once(asked) == [[answers] * ROUNDS for answers in alone]
    assert_as_loaded(backbone, before)


def test_threads_that_name_tasks_are_answered_with_each_tasks_block(tmp_path: Path) -> None:
    """A method that is told the task loads its block when it is first asked, while others are answered."""
    store = DictStore()
    mixed = version(store, tmp_path / "t5")
    changes = {"method": find_method("per_task").model_validate({}), "attention": None, "router": None}
    manifest = mixed.model_copy(update=changes).to_bytes()
    texts = REQUESTS[1]
    alone = [asking(Predictor.load(manifest, store), texts, task)() for task in range(3)]
    assert len({tuple(each.text for each in answers) for answers in alone}) > 1
    predictor = Predictor.load(manifest, store)
    assert at_once([asking(predictor, texts, task) for task in range(3)]) == [[answers] * ROUNDS for answers in alone]


PAIRS: dict[str, tuple[PETConfig | None, PETConfig | None]] = {
    "lora and lora": (None, None),
    "prompt and lora": (PromptConfig(length=3), None),
    "full and full": (FullConfig(), FullConfig()),
    "full and lora": (FullConfig(), None),
}


def pair(store: DictStore, folder: Path, name: str, kinds: str) -> list[Manifest]:
    """Two versions on one backbone, with unlike weights."""
    made = []
    for seed, pet in enumerate(PAIRS[kinds], start=3):
        options = {"attention": None, "blocks": 1} if isinstance(pet, FullConfig) else {}
        made.append(version(store, folder, name, pet=pet, seed=seed, **options))
    return made


@pytest.mark.parametrize("kinds", PAIRS)
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_versions_on_one_backbone_are_each_as_if_alone(name: str, kinds: str, tmp_path: Path) -> None:
    store = DictStore()
    versions = pair(store, tmp_path / name, name, kinds)
    texts = REQUESTS[3]
    alone = []
    for manifest in versions:
        loading._load_cached.cache_clear()
        alone.append(Predictor.load(manifest.to_bytes(), store).predict(texts))
    assert [each.text for each in alone[0]] != [each.text for each in alone[1]]

    loading._load_cached.cache_clear()
    backbone = load_backbone(versions[0].backbone, store)[0]
    before = state_of(backbone)
    both = [Predictor.load(manifest.to_bytes(), store) for manifest in versions]
    assert load_backbone(versions[1].backbone, store)[0] is backbone
    for _ in range(2):
        for predictor, answers in zip(both, alone, strict=True):
            assert predictor.predict(texts) == answers
    assert at_once([asking(each, texts) for each in both]) == [[answers] * ROUNDS for answers in alone]
    assert_as_loaded(backbone, before)


def test_a_version_loaded_while_another_answers_is_as_if_alone(tmp_path: Path) -> None:
    """A block of whole weights, above all: what it takes for the backbone's own may be the other's."""
    store = DictStore()
    versions = pair(store, tmp_path / "t5", "t5", "full and full")
    texts = REQUESTS[1]
    alone = [Predictor.load(manifest.to_bytes(), store).predict(texts) for manifest in versions]
    loaded = Predictor.load(versions[0].to_bytes(), store)

    def load_and_ask() -> list[Prediction]:
        return Predictor.load(versions[1].to_bytes(), store).predict(texts)

    assert at_once([asking(loaded, texts), load_and_ask]) == [[answers] * ROUNDS for answers in alone]


def test_the_version_asked_for_last_stays_ready_until_something_else_is_loaded(tmp_path: Path) -> None:
    store, again = DictStore(), DictStore()
    first, second = pair(store, tmp_path / "t5", "t5", "lora and lora")
    other = version(store, tmp_path / "llama", "llama")
    again.blobs = store.blobs  # a stage on Ray opens the store anew
    backbone = load_backbone(first.backbone, store)[0]
    before = state_of(backbone)
    batch = Collator(PAD, is_encoder_decoder=True).prompts(random_rows(3))

    def weights(manifest: Manifest) -> torch.Tensor:
        return load_version(manifest, store, "qa")[0].generate(batch, max_new_tokens=2)[1]

    found = [weights(each) for each in (first, first, second, first)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2])
    assert_as_loaded(backbone, before)
    for load in (
        lambda: load_version(second, store, "qa"),
        lambda: load_backbone(first.backbone, store),  # to train on, say
        lambda: load_backbone(other.backbone, store),
    ):
        ready = weakref.ref(load_version(first, store, "qa")[0])
        assert load_version(first, again, "qa")[0] is ready()
        load()
        assert ready() is None
