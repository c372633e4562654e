"""The KL term against one written out sample by sample and block by block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapt_core.pool.attention import SharedAttention
from sapt_core.pool.pool import PETPool, new_pool
from sapt_core.settings import AttentionConfig
from sapt_core.training.reflection import Drawn, GaussianQueries, Memory, RecordedAttention, Reflection, StoredQueries
from tests.core.tiny import fill, lora, tiny_backbone


def pool_of(blocks: int, temperature: float = 0.3) -> PETPool:
    config = AttentionConfig(bottleneck=5, temperature=temperature)
    return fill(new_pool(tiny_backbone("t5"), lora("t5"), config), blocks)


def naive(pool: PETPool, drawn: list[Drawn]) -> float:
    total = 0.0
    for task in drawn:
        divergences = []
        for row, held in zip(task.pooled, task.target.double().tolist(), strict=True):
            logits = pool.logits(row.unsqueeze(0)).double()[0].tolist()
            top = max(logits)
            normaliser = top + math.log(sum(math.exp(value - top) for value in logits))
            target = [*held, *[0.0] * (len(logits) - len(held))]
            divergences.append(
                sum(p * (math.log(p) - (z - normaliser)) for p, z in zip(target, logits, strict=True) if p > 0)
            )
        total += sum(divergences) / len(divergences)
    return total


def stored(pooled: Tensor, target: Tensor) -> Memory:
    return Memory(StoredQueries(pooled), target)


def drawn(pooled: Tensor, target: Tensor) -> list[Drawn]:
    return [Drawn(pooled, target.expand(len(pooled), -1))]


def memories_of(sizes: list[int]) -> list[Memory]:
    return [stored(torch.randn(size, 16), torch.randn(index + 1).softmax(dim=0)) for index, size in enumerate(sizes)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_the_term_equals_the_formula(sizes: list[int], batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    pool, memories = pool_of(len(sizes) + 1), memories_of(sizes)
    term = Reflection(memories, batch_size, weight=0.5)
    found = term.draw(torch.Generator().manual_seed(seed))
    assert [len(task.pooled) for task in found] == [min(batch_size, size) for size in sizes]
    assert all(len(torch.unique(task.pooled, dim=0)) == len(task.pooled) for task in found)
    assert term.loss(pool, found).item() == pytest.approx(naive(pool, found), rel=1e-4, abs=1e-5)


def test_it_is_zero_where_the_attention_has_not_moved() -> None:
    pool = pool_of(2)
    pooled = torch.randn(1, 16)
    term = Reflection([stored(pooled, pool.attend(pooled)[0].detach())], 4, 1.0)
    assert term.loss(pool, term.draw(torch.Generator())).item() == pytest.approx(0, abs=1e-6)


def test_by_hand() -> None:
    # Keys of zeros: attention is uniform over T = 4, so KL(ā ‖ a) = log 4 - H(ā), with zeros in ā taken as 0 log 0 = 0.
    pool = pool_of(4)
    pool.frozen_keys.zero_()
    assert pool.key is not None
    with torch.no_grad():
        pool.key.zero_()
    memories = [stored(torch.randn(3, 16), torch.tensor([1.0])), stored(torch.randn(2, 16), torch.tensor([0.5, 0.5]))]
    term = Reflection(memories, 8, 1.0)
    value = term.loss(pool, term.draw(torch.Generator().manual_seed(0)))
    assert value.item() == pytest.approx(math.log(4) + (math.log(4) - math.log(2)), rel=1e-5)


def test_rows_are_averaged_and_tasks_summed() -> None:
    pool = pool_of(3)
    tasks = [drawn(torch.randn(2, 16), torch.tensor([1.0])), drawn(torch.randn(5, 16), torch.tensor([0.3, 0.7]))]
    term = Reflection(memories_of([1]), 8, 1.0)
    apart = [term.loss(pool, task).item() for task in tasks]
    assert term.loss(pool, [*tasks[0], *tasks[1]]).item() == pytest.approx(sum(apart), rel=1e-5)
    twice = drawn(tasks[0][0].pooled.repeat(2, 1), torch.tensor([1.0]))
    assert term.loss(pool, twice).item() == pytest.approx(apart[0], rel=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 10.0])
def test_a_sharp_softmax_gives_finite_values_and_gradients(temperature: float) -> None:
    pool = pool_of(3, temperature)
    term = Reflection([stored(torch.randn(4, 16), torch.tensor([0.0, 1.0]))], 8, 1.0)
    loss = term.loss(pool, term.draw(torch.Generator()))
    loss.backward()
    assert pool.key is not None
    assert pool.attention is not None
    assert math.isfinite(loss.item())
    for parameter in (pool.key, *pool.attention.parameters()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_gradient_reaches_key_and_projection_alone_and_drives_the_new_key_away() -> None:
    pool, pooled = pool_of(2), torch.randn(6, 16)
    term = Reflection([stored(pooled, torch.tensor([1.0]))], 8, 1.0)
    before = pool.attend(pooled)[:, 1].mean()
    term.loss(pool, term.draw(torch.Generator())).backward()
    with_gradient = {name for name, parameter in pool.named_parameters() if parameter.grad is not None}
    assert with_gradient == {
        "key", "attention.down.weight", "attention.up.weight", "attention.norm.weight", "attention.norm.bias"
    }  # fmt: skip
    assert pool.key is not None
    with torch.no_grad():
        pool.key -= 0.5 * pool.key.grad
    assert pool.attend(pooled)[:, 1].mean() < before


def test_every_input_is_held_at_its_own_recorded_attention() -> None:
    before, pooled = pool_of(2), torch.randn(6, 16)
    assert before.attention is not None
    recorded = RecordedAttention(before.attention, before.keys.detach())
    own = before.attend(pooled).detach()
    assert float(own.std(dim=0).max()) > 0.01
    term = Reflection([Memory(StoredQueries(pooled), recorded)], 8, 1.0)
    (task,) = term.draw(torch.Generator())
    for row, target in zip(task.pooled, task.target, strict=True):
        torch.testing.assert_close(target, own[(pooled == row).all(dim=1)][0])
    assert not task.target.requires_grad
    # Nothing has moved: no divergence, where the task's mean would have had some.
    assert term.loss(before, [task]).item() == pytest.approx(0, abs=1e-6)
    assert term.loss(before, drawn(pooled, own.mean(dim=0))).item() > 1e-5


@pytest.mark.parametrize("options", [{}, {"residual": True, "scale": "vocabulary", "silu": "after"}])
def test_recorded_attentions_are_asked_all_at_once_and_each_answers_as_alone(options: dict[str, Any]) -> None:
    """Of unlike numbers of blocks and of inputs, beside a task that is held at its mean."""
    torch.manual_seed(2)
    recorded = []
    for blocks in (1, 2, 4):
        attention = SharedAttention(16, AttentionConfig(bottleneck=5, temperature=0.3, **options))
        for value in (*attention.parameters(), *attention.buffers()):
            value.data.copy_(torch.rand_like(value) + 0.5)
        recorded.append(RecordedAttention(attention, torch.randn(blocks, 16)))
    pooled = [torch.randn(size, 16) for size in (3, 9, 6)]
    memories = [Memory(StoredQueries(each), target) for each, target in zip(pooled, recorded, strict=True)]
    memories.insert(1, stored(torch.randn(5, 16), torch.tensor([0.25, 0.75])))
    term = Reflection(memories, 4, 1.0)
    passes: list[SharedAttention] = []
    for each in recorded:
        each.attention.register_forward_pre_hook(lambda module, _: passes.append(module))
    found = term.draw(torch.Generator().manual_seed(0))
    assert len(passes) == 1
    assert [tuple(task.target.shape) for task in found] == [(3, 1), (4, 2), (4, 2), (4, 4)]
    assert found[1].target.tolist() == [[0.25, 0.75]] * 4
    for task, held in zip([found[0], *found[2:]], recorded, strict=True):
        wanted = held.attention(task.pooled, held.keys).softmax(dim=-1)
        torch.testing.assert_close(task.target, wanted, rtol=1e-5, atol=1e-6)
        assert not task.target.requires_grad


def test_stored_inputs_of_all_tasks_are_drawn_in_one_go_and_each_as_alone() -> None:
    """Of unlike numbers of inputs, and to the bit: what was learnt with them was learnt so."""
    gathered: list[object] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.index.Tensor:
                gathered.append(function)
            return function(*args, **(kwargs or {}))

    torch.manual_seed(3)
    queries = [StoredQueries(torch.randn(size, 16)) for size in (3, 9, 1, 6)]
    term = Reflection([Memory(each, torch.ones(1)) for each in queries], 4, 1.0).to(torch.device("cpu"))
    with Watched():
        drawn = term.draw(torch.Generator().manual_seed(5))
    assert len(gathered) == 1
    alone = torch.Generator().manual_seed(5)
    for task, each in zip(drawn, queries, strict=True):
        assert torch.equal(task.pooled, each.draw(4, alone))


@pytest.mark.parametrize("rank", [0, 2, 5, 99])
def test_draws_have_the_moments_of_the_task(rank: int) -> None:
    """Few directions keep the mean and every variance, enough of them the whole covariance."""
    torch.manual_seed(0)
    pooled = torch.randn(40, 5) @ torch.randn(5, 5) + torch.arange(5.0)
    queries = GaussianQueries.of(pooled, rank)
    assert queries.directions.shape == (min(rank, 5), 5)
    covariance = queries.directions.T @ queries.directions + torch.diag(queries.rest**2)
    torch.testing.assert_close(queries.mean, pooled.mean(dim=0))
    torch.testing.assert_close(covariance.diagonal(), pooled.var(dim=0), rtol=1e-4, atol=1e-4)
    if rank >= 5:
        torch.testing.assert_close(covariance, torch.cov(pooled.T), rtol=1e-4, atol=1e-4)
    draws = queries.draw(20000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws.mean(dim=0), queries.mean, rtol=0, atol=0.15)
    torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0.1, atol=0.3)
    assert torch.equal(
        queries.draw(3, torch.Generator().manual_seed(1)), queries.draw(3, torch.Generator().manual_seed(1))
    )


def test_statistics_of_one_input_give_that_input() -> None:
    pooled = torch.randn(1, 16)
    torch.testing.assert_close(GaussianQueries.of(pooled, 4).draw(3, torch.Generator()), pooled.expand(3, -1))


def test_the_term_takes_statistics_and_inputs_side_by_side() -> None:
    pool, pooled = pool_of(3), torch.randn(8, 16)
    memories = [
        stored(pooled, torch.tensor([1.0])),
        Memory(GaussianQueries.of(pooled, 2), torch.tensor([0.5, 0.5])),
    ]
    found = Reflection(memories, 4, 1.0).draw(torch.Generator().manual_seed(0))
    assert [task.pooled.shape for task in found] == [(4, 16), (4, 16)]
    assert Reflection(memories, 4, 1.0).loss(pool, found).item() == pytest.approx(naive(pool, found), rel=1e-4)


@pytest.mark.parametrize("rank", [2, 8])
def test_moments_of_two_lots_of_rows_are_those_of_all_rows(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(40, 8, generator=generator), 2 + 0.5 * torch.randn(120, 8, generator=generator)
    parts = [(GaussianQueries.of(rows, 8), len(rows)) for rows in (first, second)]
    found = GaussianQueries.joined(parts, rank)
    every = GaussianQueries.of(torch.cat([first, second]), rank)
    torch.testing.assert_close(found.mean, every.mean)
    variances = [queries.directions.square().sum(dim=0) + queries.rest.square() for queries in (found, every)]
    torch.testing.assert_close(*variances, rtol=0.02, atol=0.02)  # by n in the place of n - 1
    covariances = [queries.directions.T @ queries.directions for queries in (found, every)]
    torch.testing.assert_close(*covariances, rtol=0.02, atol=0.04)
