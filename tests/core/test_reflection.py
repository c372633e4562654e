"""The KL term against one written out sample by sample and block by block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapt_core.config import AttentionConfig
from sapt_core.pool import PETPool
from sapt_core.reflection import Memory, Reflection
from sapt_core.snapshot import new_pool
from tests.core.tiny import fill, lora, tiny_backbone


def pool_of(blocks: int, temperature: float = 0.3) -> PETPool:
    config = AttentionConfig(bottleneck=5, temperature=temperature)
    return fill(new_pool(tiny_backbone("t5"), lora("t5"), config), blocks)


def naive(pool: PETPool, memories: list[Memory], rows: list[Tensor]) -> float:
    total = 0.0
    for memory, chosen in zip(memories, rows, strict=True):
        divergences = []
        for row in chosen.tolist():
            logits = pool.logits(memory.pooled[row : row + 1]).double()[0].tolist()
            top = max(logits)
            normaliser = top + math.log(sum(math.exp(value - top) for value in logits))
            target = [*memory.target.double().tolist(), *[0.0] * (len(logits) - len(memory.target))]
            divergences.append(
                sum(p * (math.log(p) - (z - normaliser)) for p, z in zip(target, logits, strict=True) if p > 0)
            )
        total += sum(divergences) / len(divergences)
    return total


def memories_of(sizes: list[int]) -> list[Memory]:
    return [Memory(torch.randn(size, 16), torch.randn(index + 1).softmax(dim=0)) for index, size in enumerate(sizes)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_the_term_equals_the_formula(sizes: list[int], batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    pool, memories = pool_of(len(sizes) + 1), memories_of(sizes)
    term = Reflection(memories, batch_size, weight=0.5)
    rows = term.draw(torch.Generator().manual_seed(seed))
    assert [len(chosen) for chosen in rows] == [min(batch_size, size) for size in sizes]
    assert all(len(set(chosen.tolist())) == len(chosen) for chosen in rows)
    assert term.loss(pool, rows).item() == pytest.approx(naive(pool, memories, rows), rel=1e-4, abs=1e-5)


def test_it_is_zero_where_the_attention_has_not_moved() -> None:
    pool = pool_of(2)
    pooled = torch.randn(1, 16)
    term = Reflection([Memory(pooled, pool.attend(pooled)[0].detach())], 4, 1.0)
    assert term.loss(pool, [torch.tensor([0])]).item() == pytest.approx(0, abs=1e-6)


def test_by_hand() -> None:
    # Keys of zeros: attention is uniform over T = 4, so KL(ā ‖ a) = log 4 - H(ā), with zeros in ā taken as 0 log 0 = 0.
    pool = pool_of(4)
    pool.frozen_keys.zero_()
    assert pool.key is not None
    with torch.no_grad():
        pool.key.zero_()
    memories = [Memory(torch.randn(3, 16), torch.tensor([1.0])), Memory(torch.randn(2, 16), torch.tensor([0.5, 0.5]))]
    term = Reflection(memories, 8, 1.0)
    value = term.loss(pool, term.draw(torch.Generator().manual_seed(0)))
    assert value.item() == pytest.approx(math.log(4) + (math.log(4) - math.log(2)), rel=1e-5)


def test_rows_are_averaged_and_tasks_summed() -> None:
    pool, memories = pool_of(3), memories_of([2, 5])
    term = Reflection(memories, 8, 1.0)
    apart = [Reflection([memory], 8, 1.0).loss(pool, [torch.arange(len(memory.pooled))]).item() for memory in memories]
    both = term.loss(pool, [torch.arange(2), torch.arange(5)])
    assert both.item() == pytest.approx(sum(apart), rel=1e-5)
    twice = Reflection([Memory(memories[0].pooled.repeat(2, 1), memories[0].target)], 8, 1.0)
    assert twice.loss(pool, [torch.arange(4)]).item() == pytest.approx(apart[0], rel=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 10.0])
def test_a_sharp_softmax_gives_finite_values_and_gradients(temperature: float) -> None:
    pool = pool_of(3, temperature)
    term = Reflection([Memory(torch.randn(4, 16), torch.tensor([0.0, 1.0]))], 8, 1.0)
    loss = term.loss(pool, [torch.arange(4)])
    loss.backward()
    assert pool.key is not None
    assert pool.attention is not None
    assert math.isfinite(loss.item())
    for parameter in (pool.key, *pool.attention.parameters()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_gradient_reaches_key_and_projection_alone_and_drives_the_new_key_away() -> None:
    pool, pooled = pool_of(2), torch.randn(6, 16)
    term = Reflection([Memory(pooled, torch.tensor([1.0]))], 8, 1.0)
    before = pool.attend(pooled)[:, 1].mean()
    term.loss(pool, [torch.arange(6)]).backward()
    with_gradient = {name for name, parameter in pool.named_parameters() if parameter.grad is not None}
    assert with_gradient == {
        "key", "attention.down.weight", "attention.up.weight", "attention.norm.weight", "attention.norm.bias"
    }  # fmt: skip
    assert pool.key is not None
    with torch.no_grad():
        pool.key -= 0.5 * pool.key.grad
    assert pool.attend(pooled)[:, 1].mean() < before
