"""The baselines: what each keeps, and its own term against a naive formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.collate import Collator
from sapt_core.errors import SnapshotError
from sapt_core.methods.base import find_method
from sapt_core.methods.ewc import EWC, PARTS, Springs, diagonal_fisher
from sapt_core.methods.o_lora import Orthogonality
from sapt_core.pool.blocks.lora import LoRABlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import FullConfig, LoRAConfig
from sapt_core.training.rehearsal import choose, unpack
from sapt_core.versions.export import export_block
from sapt_core.versions.loading import load_pool
from tests.core.lessons import learn, lesson, sequence
from tests.core.tiny import (
    PAD,
    DictStore,
    fill,
    lora,
    random_rows,
    tiny_backbone,
    tiny_task,
)

CONFIG = {"benchmark": {"suite": "synthetic"}, "backbone": {"path": "x"}}


def test_an_oracle_asks_for_the_task() -> None:
    store = DictStore()
    versions = sequence(store, method="per_task")
    backbone = tiny_backbone("t5")
    for index, task in enumerate(("task0", "task1", "task2")):
        pool = load_pool(versions[-1], store, backbone, task)
        block = load_tensors(store.get(versions[-1].blocks[index]))
        assert isinstance(pool.blocks, LoRABlocks)
        assert pool.blocks.count == 1
        name, site = next(pool.blocks.named_sites())
        assert torch.equal(site.frozen_A, block[f"base_model.model.{name}.lora_A.weight"])
    with pytest.raises(SnapshotError, match=r"only where the task is told, and none is named; it knows: task0, task1"):
        load_pool(versions[-1], store, backbone)
    with pytest.raises(SnapshotError, match="it has not learnt task9"):
        load_pool(versions[-1], store, backbone, "task9")
    unseen = {"suite": "synthetic", "tasks": ["animal"], "unseen": ["stock"]}
    with pytest.raises(ValueError, match=r"leave benchmark.unseen out"):
        ExperimentConfig.model_validate({**CONFIG, "benchmark": unseen, "method": {"name": "per_task"}})


def test_an_oracles_blocks_do_not_know_of_each_other() -> None:
    """Task 2 after two others is learnt from the same start, and to the same block, as beside others."""
    store = DictStore()
    versions = sequence(store, method="per_task")
    other = learn(store, 5 % 3, learn(store, 1, None, method="per_task")[0], method="per_task")[0]
    again = learn(store, 2, other, method="per_task")[0]
    assert again.blocks[-1] == versions[-1].blocks[-1]


def test_replay_learns_kept_rows_again() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "replay", "share": 0.3})
    memories = [unpack(store.get(versions[-1].state[f"memory {index:02d}"])) for index in range(3)]
    for index, memory in enumerate(memories):
        train = [list(ids) for ids in tiny_task(index).train["prompt_ids"]]
        assert len(memory) == 3
        assert all(row["prompt_ids"] in train for row in memory)
    method = find_method("replay").model_validate({"share": 0.3})
    rows = method.begin(lesson(versions[1], 2, store)).rows
    assert [row["prompt_ids"] for row in rows[10:]] == [row["prompt_ids"] for row in memories[0] + memories[1]]
    assert len(rows) == 16


def test_multi_task_starts_afresh_on_all_rows() -> None:
    store = DictStore()
    versions = sequence(store, method="multi_task")
    rows = find_method("multi_task")().begin(lesson(versions[1], 2, store)).rows  # type: ignore[call-arg]
    assert len(rows) == 30
    still = learn(store, 2, versions[1], method="multi_task", train={"learning_rate": 1e-12})[0]
    untrained = load_tensors(store.get(still.blocks[0]))
    assert all(value.abs().max() < 1e-9 for name, value in untrained.items() if "lora_B" in name)


def test_a_share_of_the_rows() -> None:
    rows = random_rows(20)
    assert len(choose(rows, 0.1, 0)) == 2
    assert len(choose(rows, 0.001, 0)) == 1
    assert choose(rows, 1, 3) == rows
    assert choose(rows, 0.5, 1) == choose(rows, 0.5, 1) != choose(rows, 0.5, 2)


def test_orthogonality_is_the_sum_over_pairs_of_rows() -> None:
    blocks = fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 3)
    model = SaptModel(tiny_backbone("t5"), blocks)
    expected = 0.0
    assert isinstance(blocks.blocks, LoRABlocks)
    for _, site in blocks.blocks.named_sites():
        assert site.lora_A is not None
        for old in site.frozen_A.tolist():
            for new in site.lora_A.tolist():
                expected += abs(sum(a * b for a, b in zip(old, new, strict=True)))
    assert Orthogonality(1.0).value(model, None).item() == pytest.approx(expected, rel=1e-5)


def test_o_lora_adds_its_blocks_up() -> None:
    """Logits equal those of a backbone whose linears hold the sum of all updates."""
    pool = fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 3)
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    with torch.no_grad():
        found = SaptModel(tiny_backbone("t5"), pool).eval()(batch)
        merged = tiny_backbone("t5")
        assert isinstance(pool.blocks, LoRABlocks)
        for name, site in pool.blocks.named_sites():
            assert site.lora_A is not None
            assert site.lora_B is not None
            A, B = torch.cat([site.frozen_A, site.lora_A]), torch.cat([site.frozen_B, site.lora_B], dim=1)
            merged.get_submodule(name).weight += site.scaling * B @ A  # type: ignore[operator]
        plain = SaptModel(merged, new_pool(merged, LoRAConfig(target_modules=("q",)), None)).eval()
        plain.pool.add()
        assert torch.allclose(found, plain(batch), atol=1e-5)


def test_fisher_information_is_the_mean_squared_gradient() -> None:
    taught = lesson(None, 0, DictStore())
    rows = taught.rows[:3]
    found = diagonal_fisher(taught, rows)
    model = taught.model
    collator = Collator(PAD, is_encoder_decoder=True)
    expected: dict[str, Tensor] = {}
    for row in rows:
        batch = collator([row])
        assert batch.labels is not None
        model.zero_grad()
        logits = model(batch).log_softmax(-1)[0]
        loss = -sum(logits[place, token] for place, token in enumerate(batch.labels[0].tolist()))
        loss.backward()  # type: ignore[union-attr]
        for name, value in model.pool.blocks.named_parameters():
            assert value.grad is not None
            expected[name] = expected.get(name, torch.zeros_like(value)) + value.grad**2 / 3
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-8) for name in found)


def test_the_springs_of_all_tasks_are_one() -> None:
    """Up to a constant, the kept sums give λ/2 Σ_i Σ F_i (θ - θ_i)², so also its gradient."""
    model = SaptModel(tiny_backbone("t5"), fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 1))
    parameters = dict(model.pool.blocks.named_parameters())
    torch.manual_seed(0)
    tasks = [
        (
            {n: torch.rand_like(v) for n, v in parameters.items()},
            {n: torch.randn_like(v) for n, v in parameters.items()},
        )
        for _ in range(3)
    ]
    stiffness = {name: sum(fisher[name] for fisher, _ in tasks) for name in parameters}
    pull = {name: sum(fisher[name] * at[name] for fisher, at in tasks) for name in parameters}
    springs = Springs(1.0, stiffness, pull)  # type: ignore[arg-type]

    def naive() -> Tensor:
        parts = [(f[n] * (parameters[n] - at[n]) ** 2).sum() for f, at in tasks for n in parameters]
        return 0.5 * torch.stack(parts).sum()

    constant = (springs.value(model, None) - naive()).item()
    gradients = torch.autograd.grad(springs.value(model, None), list(parameters.values()))
    expected = torch.autograd.grad(naive(), list(parameters.values()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad():
        for value in parameters.values():
            value.add_(torch.randn_like(value))
    assert (springs.value(model, None) - naive()).item() == pytest.approx(constant, rel=1e-3, abs=1e-2)


def test_ewc_keeps_two_numbers_a_parameter() -> None:
    store = DictStore()
    versions = sequence(store, method={"name": "ewc", "fisher_rows": 4})
    kept = [load_tensors(store.get(version.state["fisher"])) for version in versions]
    assert [len(each) for each in kept] == [2 * len(load_tensors(store.get(versions[0].blocks[0])))] * 3
    for name in kept[0]:
        if name.startswith(PARTS[0]):
            assert (kept[1][name] >= kept[0][name]).all()
            assert (kept[2][name] >= kept[1][name]).all()

    def moved(penalty: float) -> float:
        first, second, _ = sequence(store, method={"name": "ewc", "penalty": penalty, "fisher_rows": 4})
        blocks = [load_tensors(store.get(version.blocks[0])) for version in (first, second)]
        return sum((blocks[1][name] - blocks[0][name]).norm().item() for name in blocks[0])

    assert moved(1e9) < 0.75 * moved(1e-9)
    with pytest.raises(ValueError, match="greater than 0"):
        EWC(penalty=0)


def test_full_fine_tuning_trains_every_weight_and_gives_the_backbone_back() -> None:
    store = DictStore()
    versions = sequence(store, method="sequential", pet=FullConfig())
    backbone = tiny_backbone("t5")
    first = load_tensors(store.get(versions[0].blocks[0]))
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        name: tuple(value.shape) for name, value in backbone.named_parameters()
    }
    batch = Collator(PAD, is_encoder_decoder=True)(random_rows(4))
    with torch.no_grad():
        model = SaptModel(backbone, load_pool(versions[0], store, backbone)).eval()
        found = model(batch)
        loaded = tiny_backbone("t5", seed=7)
        loaded.load_state_dict(first, strict=False)
        plain = SaptModel(loaded, new_pool(loaded, LoRAConfig(target_modules=("q",)), None)).eval()
        plain.pool.add()
        assert torch.allclose(found, plain(batch), atol=1e-5)
    with pytest.raises(SnapshotError, match="no PEFT adapter"):
        export_block(versions[0], 0, store, Path("unused"))
