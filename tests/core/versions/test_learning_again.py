"""A task that is learnt again: its own block and key move, all others stay, and so does where they are asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch.nn import functional as F

from sapt_core.data.collate import Collator
from sapt_core.errors import SnapshotError
from sapt_core.pool.attention import max_pool
from sapt_core.pool.model import SaptModel
from sapt_core.settings import AttentionConfig, ReflectionConfig
from sapt_core.versions import learning
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import SCHEMA_VERSION, TRAINED, Manifest
from tests.core.lessons import learn, sequence
from tests.core.tiny import PAD, DictStore, KeptCheckpoints, tiny_backbone, tiny_task

ATTENTION = AttentionConfig(bottleneck=5, key_init="task_mean", temperature=0.2)


def keys(version: Manifest, store: DictStore) -> torch.Tensor:
    return load_tensors(store.get(version.router))["keys"]


def logits(version: Manifest, store: DictStore, number: int, task: str | None = None) -> torch.Tensor:
    backbone = tiny_backbone("t5")
    model = SaptModel(backbone, load_pool(version, store, backbone, task)).eval()
    with torch.no_grad():
        return model(Collator(PAD, True)(list(tiny_task(number).test)))


@pytest.mark.parametrize("again", ["further", "anew"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_its_own_block_and_key_change_alone(again: Any, place: int) -> None:
    store = DictStore()
    before = sequence(store, attention=ATTENTION)[-1]
    after, curve = learn(store, place, before, attention=ATTENTION, again=again, train={"epochs": 2})
    assert [old == new for old, new in zip(before.blocks, after.blocks, strict=True)] == [i != place for i in range(3)]
    stay = [index for index in range(3) if index != place]
    assert torch.equal(keys(after, store)[stay], keys(before, store)[stay])
    assert not torch.equal(keys(after, store)[place], keys(before, store)[place])
    assert after.tasks == before.tasks
    assert (after.again, after.parent, after.schema_version) == (f"task{place}", before.digest, SCHEMA_VERSION)
    assert [old == new for old, new in zip(before.targets, after.targets, strict=True)] == [
        i != place for i in range(3)
    ]
    assert "kl" in curve[0]
    # What the target says of a block is said of that block, wherever it stood while it was learnt.
    backbone = tiny_backbone("t5")
    pool = load_pool(after, store, backbone)
    batch = Collator(PAD, True)(list(tiny_task(place).train))
    with torch.no_grad():
        weights = pool.attend(SaptModel(backbone, pool).pooled(batch)).mean(dim=0)
    torch.testing.assert_close(torch.tensor(after.targets[place]), weights, rtol=0, atol=1e-6)
    assert Manifest.from_bytes(store.get(after.digest)) == after


def test_further_starts_where_it_stands_and_anew_does_not() -> None:
    store = DictStore()
    before = sequence(store, attention=ATTENTION)[-1]
    still = {"learning_rate": 1e-12}
    further, _ = learn(store, 1, before, attention=ATTENTION, again="further", train=still)
    anew, _ = learn(store, 1, before, attention=ATTENTION, again="anew", train=still)
    for name, value in load_tensors(store.get(before.blocks[1])).items():
        torch.testing.assert_close(load_tensors(store.get(further.blocks[1]))[name], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(keys(further, store), keys(before, store), rtol=0, atol=1e-6)
    for number in range(3):
        torch.testing.assert_close(logits(further, store, number), logits(before, store, number), rtol=0, atol=1e-4)
    lora_b = [value for name, value in load_tensors(store.get(anew.blocks[1])).items() if "lora_B" in name]
    assert max(float(value.abs().max()) for value in lora_b) < 1e-9


def test_the_others_attention_is_held_where_it_is() -> None:
    """Of a task in the middle, so that blocks stand on both sides of it."""
    after = {}
    for weight in (0.0, 20.0):
        store = DictStore()
        texts = [tiny_task(number).train["input"] for number in range(3)]
        before = None
        for number in range(3):
            held = ReflectionConfig(weight=5.0)
            before, _ = learn(store, number, before, attention=ATTENTION, kept=texts[:number], reflection=held, seed=1)
        version, _ = learn(
            store,
            1,
            before,
            attention=ATTENTION,
            kept=[texts[0], texts[2]],
            reflection=ReflectionConfig(weight=weight),
            again="further",
            train={"epochs": 20, "learning_rate": 0.05},
            seed=2,
        )
        backbone = tiny_backbone("t5")
        pool = load_pool(version, store, backbone)
        moved = 0.0
        for number in (0, 2):
            batch = Collator(PAD, True)(list(tiny_task(number).train))
            pooled = max_pool(backbone.get_input_embeddings()(batch.input_ids).detach(), batch.query_mask)
            target = F.pad(torch.tensor(version.targets[number]), (0, 2 - number))
            now = pool.attend(pooled).detach()
            moved += float((torch.xlogy(target, target) - target * now.log()).sum(dim=1).mean())
        after[weight] = moved
    assert after[20.0] < after[0.0] / 2


def test_targets_an_input_are_of_the_version_that_learnt_the_task_last(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictStore()
    before = sequence(store, attention=ATTENTION)[-1]
    again, _ = learn(store, 0, before, attention=ATTENTION, again="further")
    routers = [keys(version, store) for version in (again, before)]
    seen = []
    real = learning.train
    monkeypatch.setattr(
        learning, "train", lambda *given, **more: (seen.append(more["objective"]), real(*given, **more))[1]
    )
    instance = ReflectionConfig(target="instance", batch_size=2)
    version, _ = learn(store, 2, again, attention=ATTENTION, again="anew", reflection=instance)
    first, second = seen[0].terms[0].memories
    assert torch.equal(first.target.keys, routers[0])
    assert len(second.target.keys) == 2
    assert version.schema_version == SCHEMA_VERSION


def test_what_comes_after_goes_on_from_it() -> None:
    store = DictStore()
    first, second, _ = sequence(store, attention=ATTENTION)
    again, _ = learn(store, 0, second, attention=ATTENTION, again="further")
    third, _ = learn(store, 2, again, attention=ATTENTION)
    assert third.blocks[:2] == again.blocks
    assert third.targets[:2] == again.targets
    assert [len(target) for target in third.targets] == [2, 2, 3]
    assert (third.again, third.taught, again.taught) == (None, 2, 0)
    assert third.schema_version == SCHEMA_VERSION  # an earlier release cannot read such targets
    assert first.schema_version == TRAINED


def test_others_answer_to_the_bit_where_each_has_its_own_block() -> None:
    store = DictStore()
    before = sequence(store, method="per_task")[-1]
    after, _ = learn(store, 1, before, method="per_task", again="further", train={"epochs": 2})
    for number in (0, 2):
        assert torch.equal(
            logits(after, store, number, f"task{number}"), logits(before, store, number, f"task{number}")
        )
    assert not torch.equal(logits(after, store, 1, "task1"), logits(before, store, 1, "task1"))
    assert after.targets == before.targets


@pytest.mark.parametrize("method", ["sequential", {"name": "ewc", "fisher_rows": 2}])
def test_one_block_for_all_tasks_learns_on(method: Any) -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method=method)
    second, _ = learn(store, 1, first, method=method)
    after, _ = learn(store, 0, second, method=method, again="further")
    assert (len(after.blocks), after.targets, after.again) == (1, second.targets, "task0")
    assert after.blocks != second.blocks
    with pytest.raises(SnapshotError, match="one block for all tasks, which cannot begin anew for task0"):
        learn(store, 0, second, method=method, again="anew")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("o_lora", "other tasks are answered with the block of task0 too"),
        ("am_lora", "other tasks are answered with the block of task0 too"),
        ("replay", "is of one learning of it"),
        ("multi_task", "is of one learning of it"),
    ],
)
def test_methods_that_cannot_honestly_say_so(method: str, said: str) -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method=method)
    with pytest.raises(SnapshotError, match=said):
        learn(store, 0, first, method=method, again="further")


def test_an_unknown_task_is_refused() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None)
    with pytest.raises(SnapshotError, match="has not learnt task1; it knows: task0"):
        learn(store, 1, first, again="further")


def test_interrupted_and_resumed_it_is_the_same() -> None:
    store = DictStore()
    before = sequence(store, attention=ATTENTION)[-1]
    given: dict[str, Any] = {"attention": ATTENTION, "again": "further", "train": {"checkpoint_every_steps": 1}}
    kept = KeptCheckpoints()
    whole, _ = learn(store, 1, before, checkpoints=kept, **given)
    assert json.loads(kept.kept[0]["state.json"])["step"] == 1
    resumed, _ = learn(store, 1, before, checkpoints=KeptCheckpoints(kept.kept[:1]), **given)
    assert resumed == whole
