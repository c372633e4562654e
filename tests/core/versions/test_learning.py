"""A sequence of three tasks: what is added by each, what never changes, and what steers a task's start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from sapt_core.data.collate import Collator, Sharing
from sapt_core.errors import SnapshotError
from sapt_core.pool.attention import max_pool, vocabulary_moments
from sapt_core.pool.model import SaptModel
from sapt_core.settings import AttentionConfig, ReflectionConfig
from sapt_core.versions import learning
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import Manifest
from tests.core.lessons import learn, sequence
from tests.core.tiny import (
    PAD,
    DictStore,
    lora,
    tiny_backbone,
    tiny_ref,
    tiny_task,
)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_each_task_adds_a_block_and_a_router_and_touches_nothing_before(name: str) -> None:
    store = DictStore()
    first, second, third = sequence(store, name=name)
    assert second.blocks[:1] == first.blocks
    assert third.blocks[:2] == second.blocks
    assert len(set(third.blocks)) == 3
    assert (second.parent, third.parent) == (first.digest, second.digest)
    assert third.targets[:2] == second.targets
    assert [task.name for task in third.tasks] == ["task0", "task1", "task2"]
    assert len(store.blobs) == 3 * 3  # a block, a router and a manifest a task: old blocks are never copied
    assert Manifest.from_bytes(store.get(third.digest)) == third
    keys = [load_tensors(store.get(version.router))["keys"] for version in (first, second, third)]
    assert torch.equal(keys[2][:2], keys[1])
    assert torch.equal(keys[1][:1], keys[0])
    projections = [load_tensors(store.get(version.router))["up.weight"] for version in (first, second, third)]
    assert not torch.equal(projections[0], projections[1])


def test_only_block_key_and_projection_of_the_task_get_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictStore()
    first, second, _ = sequence(store)
    seen: dict[str, set[str]] = {}

    def watch(model: SaptModel, *arguments: Any, **options: Any) -> list[dict[str, float]]:
        frozen = {name: value.clone() for name, value in model.pool.named_buffers()}
        curve = real(model, *arguments, **options)
        assert all(torch.equal(value, frozen[name]) for name, value in model.pool.named_buffers())
        seen["learnt"] = {name for name, p in model.named_parameters() if p.requires_grad}
        return curve

    real = learning.train
    monkeypatch.setattr(learning, "train", watch)
    learn(store, 2, second)
    assert {name.rsplit(".", 1)[-1] for name in seen["learnt"] if ".blocks." in name} == {"lora_A", "lora_B"}
    assert {name for name in seen["learnt"] if ".blocks." not in name} == {
        "pool.key",
        "pool.attention.down.weight",
        "pool.attention.up.weight",
        "pool.attention.norm.weight",
        "pool.attention.norm.bias",
    }
    assert first.blocks == second.blocks[:1]


def test_the_target_is_the_mean_attention_over_the_train_or_dev_rows() -> None:
    for split in ("train", "dev"):
        store = DictStore()
        manifest, _ = learn(store, 0, None)
        manifest, _ = learn(store, 1, manifest, reflection=ReflectionConfig(target_split=split))
        backbone = tiny_backbone("t5")
        model = SaptModel(backbone, load_pool(manifest, store, backbone))
        batch = Collator(PAD, True)(list(getattr(tiny_task(1), split)))
        with torch.no_grad():
            weights = model.pool.attend(model.pooled(batch))
        assert manifest.targets[1] == pytest.approx(weights.mean(dim=0).tolist(), abs=1e-6)
        assert manifest.targets[0] == (1.0,)


def test_learning_is_repeatable_and_depends_on_the_seed() -> None:
    again = [learn(DictStore(), 0, None, seed=seed)[0] for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0].blocks != again[2].blocks


def test_no_two_tasks_start_from_the_same_key_and_block() -> None:
    store = DictStore()
    still = {"train": {"learning_rate": 1e-12}}
    last = sequence(store, **still)[-1]
    keys = load_tensors(store.get(last.router))["keys"]
    assert torch.cdist(keys, keys).fill_diagonal_(9).min() > 0.5
    down = [next(v for n, v in load_tensors(store.get(digest)).items() if "lora_A" in n) for digest in last.blocks]
    assert not torch.allclose(down[0], down[1], atol=1e-3)
    assert not torch.allclose(down[1], down[2], atol=1e-3)


def test_task_mean_points_the_key_at_the_tasks_own_queries() -> None:
    store = DictStore()
    attention = AttentionConfig(bottleneck=5, key_init="task_mean")
    manifest, _ = learn(store, 0, None, attention=attention, train={"learning_rate": 1e-12})
    backbone = tiny_backbone("t5")
    pool = load_pool(manifest, store, backbone)
    queries = []
    for row in tiny_task(0).train:
        embedded = backbone.get_input_embeddings().weight[torch.tensor([row["prompt_ids"]])]
        queries.append(pool.attention.query(max_pool(embedded, torch.ones(1, len(row["prompt_ids"])))))
    mean = torch.cat(queries).mean(dim=0).detach()
    torch.testing.assert_close(pool.keys[0], 4 * mean / (mean**2).sum() ** 0.5, rtol=1e-4, atol=1e-5)  # √16 long


def test_the_centre_is_set_once_from_the_vocabulary_alone() -> None:
    store = DictStore()
    versions = sequence(store, attention=AttentionConfig(bottleneck=5, centre="vocabulary"))
    centres = [load_tensors(store.get(version.router))["centre"] for version in versions]
    assert torch.equal(centres[0], vocabulary_moments(tiny_backbone("t5").get_input_embeddings().weight)[0])
    assert all(torch.equal(centre, centres[0]) for centre in centres)
    plain = learn(store, 0, None)[0]
    assert not load_tensors(store.get(plain.router))["centre"].any()


def test_reflection_holds_the_old_attention() -> None:
    """KL on the old tasks' own inputs ends lower with the term than without."""
    after = {}
    for weight in (0.0, 5.0):
        store = DictStore()
        first, _ = learn(store, 0, None, seed=1)
        backbone = tiny_backbone("t5")
        batch = Collator(PAD, True)(list(tiny_task(0).train))
        pooled = max_pool(backbone.get_input_embeddings()(batch.input_ids).detach(), batch.query_mask)
        second, curve = learn(
            store,
            1,
            first,
            kept=[tiny_task(0).train["input"]],
            reflection=ReflectionConfig(weight=weight),
            train={"epochs": 10},
            seed=1,
        )
        pool = load_pool(second, store, backbone)
        after[weight] = float(pool.attend(pooled)[:, 0].detach().mean())
        assert (curve[0].get("kl", 0.0) > 0) == (weight > 0)
    assert after[5.0] > 0.95
    assert after[5.0] > after[0.0] + 0.05


def test_a_task_without_pseudo_samples_is_not_reflected_on() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None)
    _, curve = learn(store, 1, first, kept=[[]])
    assert not [entry for entry in curve if "kl" in entry]


def test_sequential_goes_on_with_one_block() -> None:
    store = DictStore()
    versions = sequence(store, method="sequential")
    assert [len(version.blocks) for version in versions] == [1, 1, 1]
    assert len({version.blocks for version in versions}) == 3
    assert {version.router for version in versions} == {None}
    assert versions[-1].targets == ((1.0,),) * 3
    still, _ = learn(store, 2, versions[1], method="sequential", train={"learning_rate": 1e-12})
    moved, kept = (load_tensors(store.get(version.blocks[0])) for version in (still, versions[1]))
    for name, value in kept.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-6)


def test_dev_scores_choose_the_weights() -> None:
    _, curve = learn(DictStore(), 0, None, train={"epochs": 3, "eval_every_epochs": 1})
    scored = [entry for entry in curve if "dev" in entry]
    assert [entry["step"] for entry in scored] == [3, 6, 9]
    assert all(0 <= entry["dev"] <= 100 for entry in scored)


def test_going_on_from_a_version_that_was_asked_otherwise_is_refused() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, name="llama")
    with pytest.raises(SnapshotError, match=r"earlier release.*start the sequence anew"):
        learn(store, 1, first, name="llama", ref=tiny_ref(joined=True))


def test_going_on_from_another_kind_of_version_is_refused() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None)
    with pytest.raises(SnapshotError, match="learnt on backbone"):
        learn(store, 1, first, ref=tiny_ref(dtype="bfloat16"))
    for changes, message in (
        ({"method": "sequential"}, r"method.name sequential \(was sapt\)"),
        ({"pet": lora("t5", r=3)}, r"pet.r 3 \(was 2\)"),
        ({"attention": AttentionConfig(bottleneck=5, temperature=0.3)}, r"attention.temperature 0.3 \(was 0.2\)"),
    ):
        with pytest.raises(SnapshotError, match=message):
            learn(store, 1, first, **changes)
    learn(store, 1, first, attention=AttentionConfig(bottleneck=5, temperature=0.2, hold=0.5, learning_rate_ratio=0.1))


def test_a_version_keeps_that_prompts_may_not_share_a_batch() -> None:
    store = DictStore()
    plain, _ = learn(store, 0, None)
    assert b"answering" not in plain.to_bytes(), "as versions were before it could be said"
    first, _ = learn(store, 0, None, sharing=Sharing(answering="alone"))
    assert first.answering == "alone"
    assert first.blocks == plain.blocks
    assert Manifest.from_bytes(first.to_bytes()) == first
    second, _ = learn(store, 1, first, sharing=Sharing(answering="alone"))
    assert second.answering == "alone"
