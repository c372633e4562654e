# ruff: noqa: N803 - A and B are the matrices of the LoRA paper
"""The stacked pool against ``y = W x + Σ_i a_i s B_i A_i x``, written as the sum it is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sapt_core.errors import BackboneError, SnapshotError
from sapt_core.pool.blocks.lora import LoRABlocks, LoRASite, find_sites
from sapt_core.pool.calls import Call
from sapt_core.settings import LoRAConfig
from tests.core.tiny import tiny_backbone


def naive(x: Tensor, weights: Tensor, A: list[Tensor], B: list[Tensor], scaling: float) -> Tensor:
    """One row and one block at a time."""
    beams = len(x) // len(weights)
    rows = []
    for index, row in enumerate(x):
        total = torch.zeros(row.shape[0], B[0].shape[0])
        for block, (down, up) in enumerate(zip(A, B, strict=True)):
            total = total + weights[index // beams, block] * scaling * (row @ down.T @ up.T)
        rows.append(total)
    return torch.stack(rows)


def every(weights: Tensor) -> Call:
    """A call that uses every block."""
    return Call(weights, torch.arange(weights.shape[1]))


def filled_site(
    n_in: int, n_out: int, r: int, blocks: int, alpha: float
) -> tuple[LoRASite, list[Tensor], list[Tensor]]:
    site = LoRASite(n_in, n_out, LoRAConfig(r=r, lora_alpha=alpha))
    A = [torch.randn(r, n_in) for _ in range(blocks)]
    B = [torch.randn(n_out, r) for _ in range(blocks)]
    for down, up in zip(A[:-1], B[:-1], strict=True):
        site.append_frozen({"lora_A.weight": down, "lora_B.weight": up})
    site.add()
    assert site.lora_A is not None
    assert site.lora_B is not None
    with torch.no_grad():
        site.lora_A.copy_(A[-1])
        site.lora_B.copy_(B[-1])
    return site, A, B


def check_against_naive(  # noqa: PLR0917
    n_in: int, n_out: int, r: int, blocks: int, batch: int, beams: int, length: int
) -> None:
    torch.manual_seed(n_in * 1000 + n_out * 100 + blocks)
    alpha = 1.5 * r
    site, A, B = filled_site(n_in, n_out, r, blocks, alpha)
    x = torch.randn(batch * beams, length, n_in, requires_grad=True)
    weights = torch.randn(batch, blocks).softmax(dim=-1).requires_grad_()
    site(x, every(weights)).backward(upstream := torch.randn(batch * beams, length, n_out))

    wanted_x = x.detach().clone().requires_grad_()
    wanted_weights = weights.detach().clone().requires_grad_()
    A[-1].requires_grad_()
    B[-1].requires_grad_()
    wanted = naive(wanted_x, wanted_weights, A, B, alpha / r)
    wanted.backward(upstream)

    close = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, float(wanted.detach().abs().max()))}
    torch.testing.assert_close(site(x, every(weights)), wanted, **close)
    assert site.lora_A is not None
    assert site.lora_B is not None
    for given_grad, wanted_grad in (
        (x.grad, wanted_x.grad),
        (weights.grad, wanted_weights.grad),
        (site.lora_A.grad, A[-1].grad),
        (site.lora_B.grad, B[-1].grad),
    ):
        assert wanted_grad is not None
        scale = max(1.0, float(wanted_grad.abs().max()))
        torch.testing.assert_close(given_grad, wanted_grad, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("blocks", [1, 3, 15])
@pytest.mark.parametrize(("n_in", "n_out"), [(16, 16), (16, 6), (5, 12)])
@pytest.mark.parametrize("beams", [1, 3])
def test_forward_and_every_gradient_equal_the_sum_over_blocks(n_in: int, n_out: int, blocks: int, beams: int) -> None:
    check_against_naive(n_in, n_out, r=4, blocks=blocks, batch=3, beams=beams, length=7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_any_shape_equals_the_sum_over_blocks(  # noqa: PLR0917
    n_in: int, n_out: int, r: int, blocks: int, batch: int, beams: int, length: int
) -> None:
    check_against_naive(n_in, n_out, r, blocks, batch, beams, length)


def test_by_hand() -> None:
    # s = 2; h = A x = [1·3, 10·3]; y = 0.25·2·5·3 + 0.75·2·7·30
    site = LoRASite(1, 1, LoRAConfig(r=1, lora_alpha=2))
    site.append_frozen({"lora_A.weight": torch.tensor([[1.0]]), "lora_B.weight": torch.tensor([[5.0]])})
    site.append_frozen({"lora_A.weight": torch.tensor([[10.0]]), "lora_B.weight": torch.tensor([[7.0]])})
    out = site(torch.tensor([[[3.0]]]), every(torch.tensor([[0.25, 0.75]])))
    assert out.item() == pytest.approx(0.25 * 2 * 5 * 3 + 0.75 * 2 * 7 * 30)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.data())
def test_blocks_that_are_not_used_are_not_computed(blocks: int, data: st.DataObject) -> None:
    used = [*sorted(data.draw(st.sets(st.integers(0, blocks - 2)))), blocks - 1]
    site, A, B = filled_site(5, 7, 2, blocks, 3.0)
    x, weights = torch.randn(2, 3, 5), torch.zeros(2, blocks)
    weights[:, used] = torch.rand(2, len(used))
    wanted = naive(x, weights, A, B, 1.5)
    for other in set(range(blocks)) - set(used):
        site.frozen_A[2 * other : 2 * other + 2] = math.nan
        site.frozen_B[:, 2 * other : 2 * other + 2] = math.nan
    torch.testing.assert_close(site(x, Call(weights, torch.tensor(used))), wanted, rtol=1e-4, atol=1e-5)


def test_a_new_block_starts_as_lora_does() -> None:
    torch.manual_seed(0)
    site = LoRASite(100, 50, LoRAConfig(r=64))
    site.add()
    assert site.lora_A is not None
    assert site.lora_B is not None
    assert torch.count_nonzero(site.lora_B) == 0
    bound = math.sqrt(6 / ((1 + 5) * 100))  # Kaiming-uniform with a = √5 over 100 inputs
    assert bound * 0.98 < float(site.lora_A.detach().abs().max()) <= bound
    assert float(site.lora_A.detach().mean()) == pytest.approx(0, abs=bound / 20)


def test_dropout_acts_in_training_alone() -> None:
    site, _, _ = filled_site(8, 8, 2, 2, 2.0)
    site.dropout.p = 0.5
    x, weights = torch.randn(2, 3, 8), torch.full((2, 2), 0.5)
    torch.manual_seed(0)
    dropped = site(x, every(weights))
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    site.eval()
    torch.testing.assert_close(dropped, site(x * mask, every(weights)))
    assert not torch.allclose(dropped, site(x, every(weights)))


def test_freezing_moves_the_block_and_changes_nothing() -> None:
    blocks = LoRABlocks({"a": (4, 6), "b": (3, 3)}, LoRAConfig(r=2))
    x, weights = torch.randn(2, 5, 4), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    for _ in range(2):
        blocks.add()
        blocks.load_current({name: torch.randn_like(value) for name, value in blocks.current_state().items()})
        mixed = weights[:, : blocks.frozen_blocks + 1]
        before = blocks.sites[0](x, every(mixed))
        blocks.freeze()
        assert torch.equal(before, blocks.sites[0](x, every(mixed)))
    assert blocks.frozen_blocks == 2
    assert not list(blocks.parameters())
    with pytest.raises(ValueError, match="no block is being learnt"):
        blocks.current_state()


def test_a_block_of_other_sites_or_rank_is_refused_and_nothing_is_kept() -> None:
    blocks = LoRABlocks({"a": (4, 6), "b": (3, 3)}, LoRAConfig(r=2))
    for other in (
        LoRABlocks({"a": (4, 6)}, LoRAConfig(r=2)),
        LoRABlocks({"a": (4, 6), "b": (3, 3)}, LoRAConfig(r=3)),
        LoRABlocks({"a": (4, 6), "b": (3, 4)}, LoRAConfig(r=2)),
    ):
        other.add()
        with pytest.raises(SnapshotError, match=r"does not fit.*pet settings"):
            blocks.append_frozen(other.current_state())
    assert blocks.frozen_blocks == 0
    assert all(site.frozen_A.shape[0] == 0 for site in blocks.sites)


def test_targets_match_last_names_and_dotted_suffixes_as_in_peft() -> None:
    backbone = tiny_backbone("t5")
    assert len(find_sites(backbone, ("q", "v"))) == 2 * (2 + 2 + 2)
    assert list(find_sites(backbone, ("block.0.layer.0.SelfAttention.q",))) == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
    ]
    assert not [name for name in find_sites(backbone, ("o",)) if not name.endswith(".o")]
    with pytest.raises(BackboneError, match=r"q_proj match no linear of T5For.*named: k, lm_head, o, q, v, wi, wo"):
        find_sites(backbone, ("q", "q_proj"))
