"""A version that forgets a task: what is left answers as before, and nothing leads to what is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sapt_core.errors import SnapshotError
from sapt_core.pool.model import SaptModel
from sapt_core.versions.contents import blobs_of, line_of
from sapt_core.versions.forgetting import forget, forgetting_faults, forgotten
from sapt_core.versions.loading import load_pool
from sapt_core.versions.manifest import CarriedTask, Manifest
from tests.core.lessons import learn, sequence
from tests.core.tiny import PAD, DictStore, random_rows, tiny_backbone
from tests.core.versions.made import RECIPE, version

LINEAGE = "1" * 64


def names(manifest: Manifest) -> list[str]:
    return [task.name for task in manifest.tasks]


def complete(manifest: Manifest, store: DictStore) -> Manifest:
    """The version with something carried of every task, and all of it in the store."""
    carried = [
        CarriedTask(
            data=store.put(f"text of {name}".encode()),
            rows={"test": 1},
            tokens={"test.arrow": store.put(f"tokens of {name}".encode())},
            reflection={"samples": store.put(f"samples of {name}".encode())},
            origin=store.put(b"origin"),
            curve=store.put(f"curve of {name}".encode()),
        )
        for name in names(manifest)
    ]
    made = manifest.complete(lineage="0" * 64, recipe=RECIPE, carried=carried)
    store.put(made.to_bytes())
    return made


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_attention_is_evened_out_over_what_is_left(name: str, tmp_path: Path) -> None:
    store = DictStore()
    full = version(store, tmp_path / "backbone", name, blocks=3)
    # A line of its own, whose versions before are not asked for anything but their tasks.
    before = full.model_copy(update={"tasks": full.tasks[:1], "blocks": full.blocks[:1], "targets": full.targets[:1]})
    router = version(store, tmp_path / "backbone", name, blocks=1).router
    before = before.model_copy(update={"router": router})
    second = version(store, tmp_path / "backbone", name, blocks=2)
    second = second.model_copy(update={"parent": store.put(before.to_bytes())})
    full = full.model_copy(
        update={"parent": store.put(second.to_bytes()), "targets": ((1.0,), (0.4, 0.6), (0.2, 0.3, 0.5))}
    )
    made = forget(full, full.tasks[1].name, store, lineage=LINEAGE)
    assert made.targets == (pytest.approx((1.0,)), pytest.approx((2 / 7, 5 / 7)))
    assert made.blocks == (full.blocks[0], full.blocks[2])
    assert made.parent == before.digest
    backbone = tiny_backbone(name)
    pooled = torch.randn(6, backbone.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = load_pool(full, store, backbone).attend(pooled)[:, [0, 2]]
        found = load_pool(made, store, backbone).attend(pooled)
    torch.testing.assert_close(found, weights / weights.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights.sum(dim=1), torch.ones(6), atol=1e-3)  # the block that is gone had its part


def test_tasks_with_a_block_each_answer_to_the_bit(tmp_path: Path) -> None:
    store = DictStore()
    versions = sequence(store, method="per_task")
    for each in versions:
        store.put(each.to_bytes())
    gone, *left = names(versions[-1])
    made = forget(versions[-1], gone, store, lineage=LINEAGE)
    assert names(made) == left
    assert made.targets == tuple(row[1:] for row in versions[-1].targets[1:])
    for task in left:
        logits = []
        for each in (versions[-1], made):
            backbone = tiny_backbone("t5")
            model = SaptModel(backbone, load_pool(each, store, backbone, task)).eval()
            with torch.no_grad():
                logits.append(model(model.collator(PAD)(random_rows(3))))
        assert torch.equal(*logits)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nothing_leads_to_the_task_and_another_is_learnt_on_top(index: int) -> None:
    store = DictStore()
    versions = sequence(store)
    for each in versions:
        store.put(each.to_bytes())
    full = complete(versions[-1], store)
    task = names(full)[index]
    made = forget(full, task, store, lineage=LINEAGE)
    assert full.carried is not None
    assert (names(made), made.lineage, made.recipe) == (
        [name for name in names(full) if name != task],
        LINEAGE,
        full.recipe,
    )
    assert made.carried == tuple(each for place, each in enumerate(full.carried) if place != index)
    line = list(line_of(made, store))
    assert [len(each.tasks) for each in line] == [2, 1]
    assert task not in {name for each in line for name in names(each)}
    gone = forgotten(full, made, task, store)
    expected = {full.digest, full.blocks[index], full.carried[index].data, full.carried[index].curve}
    expected |= {*full.carried[index].tokens.values(), *full.carried[index].reflection.values()}
    expected |= {each.digest for each in versions[index:]}
    expected |= {each.router for each in versions[index:] if each.router is not None}
    assert gone == expected
    reached = {digest for each in (made, *line) for digest in (each.digest, *blobs_of(each))}
    assert not gone & reached
    for digest in gone:
        del store.blobs[digest]
    again, _ = learn(store, 3, line[0])
    assert len(again.blocks) == 3
    assert again.parent == line[0].digest


def test_forgetting_all_but_one_ends_where_that_one_began() -> None:
    store = DictStore()
    versions = sequence(store)
    for each in versions:
        store.put(each.to_bytes())
    first, second, third = names(versions[-1])
    once = forget(versions[-1], third, store, lineage=LINEAGE)
    assert once == versions[1]
    assert forget(once, second, store, lineage=LINEAGE) == versions[0]
    alone = forget(forget(versions[-1], first, store, lineage=LINEAGE), third, store, lineage=LINEAGE)
    assert (names(alone), alone.parent, alone.targets) == ([second], None, ((1.0,),))


@pytest.mark.parametrize("index", [0, 1])
def test_a_line_in_which_tasks_were_learnt_again(index: int) -> None:
    """A task's own versions drop out, those of others are made anew without it."""
    store = DictStore()
    first, second = sequence(store)[:2]
    again, _ = learn(store, index, second, again="further")
    third, _ = learn(store, 2, again)
    other, _ = learn(store, 1 - index, third, again="further")
    for each in (first, second, again, third, other):
        store.put(each.to_bytes())
    task, left = names(other)[index], names(other)[1 - index]
    made = forget(other, task, store, lineage=LINEAGE)
    line = list(line_of(made, store))[::-1]
    assert [(names(each), each.again) for each in line] == [
        ([left], None),
        ([left, "task2"], None),
        (names(made), left),
    ]
    assert made.blocks == tuple(block for place, block in enumerate(other.blocks) if place != index)
    assert [sum(row) for row in made.targets] == pytest.approx([1, 1])


def test_what_cannot_be_forgotten() -> None:
    store = DictStore()
    versions = sequence(store)
    first = names(versions[0])[0]
    assert "the version has not learnt mail; it knows: " in forgetting_faults(versions[-1], "mail")[0]
    assert f"{first} is the version's only task" in forgetting_faults(versions[0], first)[0]
    assert forgetting_faults(versions[-1], first) == []
    for method, said in (("sequential", "share one block"), ("o_lora", "nothing evens out")):
        (fault,) = forgetting_faults(sequence(store, method=method)[-1], first)
        assert said in fault
    adrift = versions[-1].model_copy(update={"parent": store.put(versions[0].to_bytes())})
    with pytest.raises(SnapshotError, match="do not lead up to it"):
        forget(adrift, names(adrift)[1], store, lineage=LINEAGE)
