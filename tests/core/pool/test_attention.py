"""Query, keys and softmax against the formula of SAPT section 3.2, written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapt_core.pool.attention import SharedAttention, max_pool, vocabulary_moments
from sapt_core.pool.pool import PETPool, new_pool
from sapt_core.settings import AttentionConfig
from tests.core.tiny import fill, lora, tiny_backbone


def naive_weights(
    attention: SharedAttention, pooled: Tensor, keys: Tensor, config: AttentionConfig
) -> list[list[float]]:
    """Scalars only, in float64."""
    down, up = attention.down.weight.double().tolist(), attention.up.weight.double().tolist()
    gain, bias = attention.norm.weight.double().tolist(), attention.norm.bias.double().tolist()
    centre = attention.centre.double().tolist()
    rows = []
    for e in pooled.double().tolist():
        centred = [value - c for value, c in zip(e, centre, strict=True)]
        hidden = [sum(w * value for w, value in zip(row, centred, strict=True)) for row in down]
        if config.silu == "between":
            hidden = [value / (1 + math.exp(-value)) for value in hidden]
        wide = [sum(w * value for w, value in zip(row, hidden, strict=True)) for row in up]
        if config.silu == "after":
            wide = [value / (1 + math.exp(-value)) for value in wide]
        if config.residual:
            wide = [value + c for value, c in zip(wide, centred, strict=True)]
        mean = sum(wide) / len(wide)
        variance = sum((value - mean) ** 2 for value in wide) / len(wide)
        q = [(v - mean) / math.sqrt(variance + 1e-5) * g + b for v, g, b in zip(wide, gain, bias, strict=True)]
        logits = [
            sum(k * v for k, v in zip(key, q, strict=True)) / (config.temperature * math.sqrt(len(q)))
            for key in keys.double().tolist()
        ]
        top = max(logits)
        powers = [math.exp(value - top) for value in logits]
        rows.append([power / sum(powers) for power in powers])
    return rows


def pool_of(blocks: int, config: AttentionConfig) -> PETPool:
    return fill(new_pool(tiny_backbone("t5"), lora("t5"), config), blocks)


@pytest.mark.parametrize("silu", ["between", "after"])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("blocks", [1, 3, 15])
@pytest.mark.parametrize("residual", [False, True])
def test_weights_equal_the_formula(silu: str, temperature: float, blocks: int, residual: bool) -> None:
    config = AttentionConfig(bottleneck=5, temperature=temperature, silu=silu, residual=residual)
    pool = pool_of(blocks, config)
    assert pool.attention is not None
    with torch.no_grad():
        pool.attention.norm.weight.normal_()
        pool.attention.norm.bias.normal_()
        pool.attention.centre.normal_()
        pool.attention.up.weight.normal_()
    pooled = torch.randn(4, 16)
    weights = pool.attend(pooled)
    torch.testing.assert_close(
        weights, torch.tensor(naive_weights(pool.attention, pooled, pool.keys, config)), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))


def test_by_hand() -> None:
    # D = 2, one hidden unit: W_down e = 1; SiLU(1) = σ(1); W_up gives (2σ, 0); LayerNorm gives (1, -1) but for ε.
    config = AttentionConfig(bottleneck=1, temperature=0.5)
    attention = SharedAttention(2, config)
    with torch.no_grad():
        attention.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        attention.up.weight.copy_(torch.tensor([[2.0], [0.0]]))
    logits = attention(torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    sigma = 1 / (1 + math.exp(-1))
    unit = sigma / math.sqrt(sigma**2 + 1e-5) / (0.5 * math.sqrt(2))
    assert logits.tolist()[0] == pytest.approx([unit, -unit], rel=1e-5)


def test_both_places_of_the_silu_differ() -> None:
    pooled = torch.randn(3, 16)
    between, after = (pool_of(3, AttentionConfig(bottleneck=5, silu=silu)) for silu in ("between", "after"))
    assert not torch.allclose(between.attend(pooled), after.attend(pooled), atol=1e-4)


def test_a_residual_query_starts_as_the_pooled_embedding_itself() -> None:
    attention = SharedAttention(16, AttentionConfig(bottleneck=5, residual=True))
    pooled = torch.randn(3, 16)
    torch.testing.assert_close(attention.query(pooled), torch.nn.functional.layer_norm(pooled, (16,)))


def test_the_vocabulary_moments_are_those_of_what_random_tokens_pool_to() -> None:
    constant = torch.tensor([1.0, -2.0]).expand(9, 2)
    mean, deviation = vocabulary_moments(constant, draws=3)
    torch.testing.assert_close(mean, torch.tensor([1.0, -2.0]))
    assert not deviation.any()
    coin = torch.tensor([[0.0], [1.0]])
    mean, deviation = vocabulary_moments(coin, draws=500, length=1)
    assert (float(mean), float(deviation)) == (pytest.approx(0.5, abs=0.08), pytest.approx(0.5, abs=0.05))
    assert float(vocabulary_moments(coin, draws=20, length=64)[0]) == 1.0
    normal = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    centre, _ = vocabulary_moments(normal, draws=50)
    assert centre.dtype == torch.float32
    assert bool(((centre > 2) & (centre < 4)).all())  # the largest of 128 normal values is near 2.6, in 500 below 4


def test_centre_and_scale_are_set_as_configured() -> None:
    embedding = torch.cat([torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.1]), torch.ones(50, 1)], dim=1)
    mean, deviation = vocabulary_moments(embedding)
    attention = SharedAttention(4, AttentionConfig(centre="vocabulary", scale="vocabulary", residual=True))
    attention.start(embedding)
    torch.testing.assert_close(attention.centre, mean)
    torch.testing.assert_close(attention.spread, torch.where(deviation > 0, deviation, 1.0))
    pooled = torch.randn(3, 4)
    wanted = torch.nn.functional.layer_norm((pooled - mean) / attention.spread, (4,))
    torch.testing.assert_close(attention.query(pooled), wanted)
    plain = SharedAttention(4, AttentionConfig())
    plain.start(embedding)
    assert not plain.centre.any()
    assert "spread" not in plain.state_dict()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.data())
def test_the_pool_takes_the_largest_visible_value(batch: int, length: int, width: int, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = data.draw(st.lists(row, min_size=batch, max_size=batch))
    embeddings = torch.randn(batch, length, width)
    pooled = max_pool(embeddings, torch.tensor(mask))
    for b in range(batch):
        for d in range(width):
            assert pooled[b, d].item() == max(embeddings[b, s, d].item() for s in range(length) if mask[b][s])


def test_pooling_makes_no_copy_of_all_embeddings_in_float32() -> None:
    """Of half as many bytes the maximum is the same to the last bit, and only it is cast."""
    embeddings, mask = torch.randn(4, 64, 32).bfloat16(), torch.rand(4, 64) < 0.5
    widest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            made = function(*args, **(kwargs or {}))
            if made.dtype == torch.float32:
                widest = max(widest, made.numel())
            return made

    with Watched():
        pooled = max_pool(embeddings, mask)
    assert widest == 4 * 32
    before = embeddings.float().masked_fill(~mask.unsqueeze(-1), -math.inf).amax(dim=1)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, before)


def test_the_moments_are_those_of_draws_one_by_one() -> None:
    embedding = torch.randn(50, 6).bfloat16()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(150):
        tokens = torch.randint(len(embedding), (7,), generator=generator)
        rows.append(embedding[tokens].float().amax(dim=0))
    pooled = torch.stack(rows)
    mean, deviation = vocabulary_moments(embedding, draws=150, length=7)
    assert torch.equal(mean, pooled.mean(dim=0))
    assert torch.equal(deviation, pooled.std(dim=0, correction=0))


def test_attention_stays_in_float32_under_autocast() -> None:
    pool = pool_of(3, AttentionConfig(bottleneck=5))
    pooled = torch.randn(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pool.attend(pooled)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, pool.attend(pooled))


def test_the_held_share_goes_to_the_newest_block() -> None:
    pool = pool_of(3, AttentionConfig(bottleneck=5))
    pooled = torch.randn(2, 16)
    free = pool.attend(pooled)
    assert torch.equal(pool.mixture(pooled), free)
    pool.hold = 0.25
    torch.testing.assert_close(pool.mixture(pooled), 0.75 * free + torch.tensor([0.0, 0.0, 0.25]))
    pool.hold = 1.0
    assert pool.mixture(pooled).tolist() == [[0.0, 0.0, 1.0]] * 2
    assert torch.equal(pool.attend(pooled), free)  # what reflection keeps in place is the attention itself


def test_while_a_block_is_held_the_loss_does_not_move_the_attention() -> None:
    pool = pool_of(3, AttentionConfig(bottleneck=5))
    assert pool.key is not None
    for hold, moved in ((0.25, False), (0.0, True)):
        pool.zero_grad()
        pool.hold = hold
        (pool.mixture(torch.randn(2, 16)) * torch.randn(2, 3)).sum().backward()
        assert pool.key.grad is not None  # workers that train together wait for every gradient
        assert bool(pool.key.grad.any()) is moved
        assert bool(pool.attention.down.weight.grad.any()) is moved


def test_a_block_is_in_use_above_rounding_error_or_while_it_is_learnt() -> None:
    pool = pool_of(3, AttentionConfig(bottleneck=5))
    assert pool.in_use(torch.tensor([[1.0, 1e-8, 0.0], [1e-6, 1.0, 0.0]])).tolist() == [0, 1, 2]
    assert pool.in_use(torch.tensor([[1.0, 1e-8, 0.0]])).tolist() == [0, 2]
    pool.freeze()
    assert pool.in_use(torch.tensor([[1.0, 1e-8, 0.0]])).tolist() == [0]
    assert pool.in_use(torch.tensor([[0.4, 0.3, 0.3]])).tolist() == [0, 1, 2]


def test_blocks_without_attention_have_weight_one() -> None:
    pool = fill(new_pool(tiny_backbone("t5"), lora("t5"), None), 1)
    assert pool.mixture(torch.randn(3, 16)).tolist() == [[1.0]] * 3
    pool.freeze()
    pool.add()
    assert pool.mixture(torch.randn(3, 16)).tolist() == [[1.0, 1.0]] * 3


def test_keys_are_kept_oldest_first_and_drawn_from_the_unit_cube() -> None:
    pool = new_pool(tiny_backbone("t5"), lora("t5"), AttentionConfig(bottleneck=5))
    drawn = []
    for _ in range(3):
        pool.add()
        assert pool.key is not None
        drawn.append(pool.key.detach().clone())
        pool.freeze()
    assert torch.equal(pool.keys, torch.stack(drawn))
    assert float(pool.keys.abs().max()) <= 1
    assert float(pool.keys.min()) < -0.8
    assert float(pool.keys.max()) > 0.8
