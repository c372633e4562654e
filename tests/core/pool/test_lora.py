# ruff: noqa: N803 - A and B are the matrices of the LoRA paper
"""The stacked pool against ``y = W x + Σ_i a_i s B_i A_i x``, written as the sum it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sapt_core.errors import BackboneError, SnapshotError
from sapt_core.pool.blocks.lora import LoRABlocks, LoRASite, find_sites
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


def at_site(blocks: LoRABlocks, x: Tensor, weights: Tensor, used: Tensor | None = None) -> Tensor:
    """The update of the first site in a call of its own, which uses every block unless told."""
    call = blocks.new_call(weights, torch.arange(weights.shape[1]) if used is None else used)
    update: Tensor = blocks.sites[0](x, call)
    return update


def state(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A block of the one site "a"."""
    return {"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": B}


def filled(
    n_in: int, n_out: int, r: int, blocks: int, alpha: float
) -> tuple[LoRABlocks, LoRASite, list[Tensor], list[Tensor]]:
    made = LoRABlocks({"a": (n_in, n_out)}, LoRAConfig(r=r, lora_alpha=alpha))
    A = [torch.randn(r, n_in) for _ in range(blocks)]
    B = [torch.randn(n_out, r) for _ in range(blocks)]
    made.append_frozen(*map(state, A[:-1], B[:-1]))
    made.add()
    made.load_current(state(A[-1], B[-1]))
    ((_, site),) = made.named_sites()
    return made, site, A, B


def check_against_naive(  # noqa: PLR0917
    n_in: int, n_out: int, r: int, blocks: int, batch: int, beams: int, length: int
) -> None:
    torch.manual_seed(n_in * 1000 + n_out * 100 + blocks)
    alpha = 1.5 * r
    made, site, A, B = filled(n_in, n_out, r, blocks, alpha)
    x = torch.randn(batch * beams, length, n_in, requires_grad=True)
    weights = torch.randn(batch, blocks).softmax(dim=-1).requires_grad_()
    at_site(made, x, weights).backward(upstream := torch.randn(batch * beams, length, n_out))

    wanted_x = x.detach().clone().requires_grad_()
    wanted_weights = weights.detach().clone().requires_grad_()
    A[-1].requires_grad_()
    B[-1].requires_grad_()
    wanted = naive(wanted_x, wanted_weights, A, B, alpha / r)
    wanted.backward(upstream)

    close = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, float(wanted.detach().abs().max()))}
    torch.testing.assert_close(at_site(made, x, weights), wanted, **close)
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
    blocks = LoRABlocks({"a": (1, 1)}, LoRAConfig(r=1, lora_alpha=2))
    blocks.append_frozen(state(torch.tensor([[1.0]]), torch.tensor([[5.0]])))
    blocks.append_frozen(state(torch.tensor([[10.0]]), torch.tensor([[7.0]])))
    out = at_site(blocks, torch.tensor([[[3.0]]]), torch.tensor([[0.25, 0.75]]))
    assert out.item() == pytest.approx(0.25 * 2 * 5 * 3 + 0.75 * 2 * 7 * 30)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.data())
def test_blocks_that_are_not_used_are_not_computed(blocks: int, data: st.DataObject) -> None:
    used = [*sorted(data.draw(st.sets(st.integers(0, blocks - 2)))), blocks - 1]
    made, site, A, B = filled(5, 7, 2, blocks, 3.0)
    x, weights = torch.randn(2, 3, 5), torch.zeros(2, blocks)
    weights[:, used] = torch.rand(2, len(used))
    wanted = naive(x, weights, A, B, 1.5)
    for other in set(range(blocks)) - set(used):
        site.frozen_A[2 * other : 2 * other + 2] = math.nan
        site.frozen_B[:, 2 * other : 2 * other + 2] = math.nan
    torch.testing.assert_close(at_site(made, x, weights, torch.tensor(used)), wanted, rtol=1e-4, atol=1e-5)


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
    made, site, _, _ = filled(8, 8, 2, 2, 2.0)
    site.dropout.p = 0.5
    x, weights = torch.randn(2, 3, 8), torch.full((2, 2), 0.5)
    torch.manual_seed(0)
    dropped = at_site(made, x, weights)
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    site.eval()
    torch.testing.assert_close(dropped, at_site(made, x * mask, weights))
    assert not torch.allclose(dropped, at_site(made, x, weights))


def test_freezing_moves_the_block_and_changes_nothing() -> None:
    blocks = LoRABlocks({"a": (4, 6), "b": (3, 3)}, LoRAConfig(r=2))
    x, weights = torch.randn(2, 5, 4), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    for _ in range(2):
        blocks.add()
        blocks.load_current({name: torch.randn_like(value) for name, value in blocks.current_state().items()})
        mixed = weights[:, : blocks.frozen_blocks + 1]
        before = at_site(blocks, x, mixed)
        blocks.freeze()
        torch.testing.assert_close(at_site(blocks, x, mixed), before)
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


class Counted(TorchDispatchMode):
    """Names of the operations that touch numbers; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name != "_unsafe_view":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def blocks_of(count: int, *, sites: int = 1, learning: bool = False) -> LoRABlocks:
    names = [f"site{index}" for index in range(sites)]
    made = LoRABlocks(dict.fromkeys(names, (16, 16)), LoRAConfig(r=4))
    torch.manual_seed(0)
    states = [{name: torch.randn(shape) for name, shape in made.shapes.items()} for _ in range(count)]
    made.append_frozen(*states[: count - learning])
    if learning:
        made.add()
        made.load_current(states[-1])
    return made


@pytest.mark.parametrize("used", [[0], [3, 11], list(range(15))])
def test_a_site_runs_three_operations_however_many_blocks_there_are_and_are_used(used: list[int]) -> None:
    """And the linear's own output plus the update. What is used is chosen in the first pass, for all later ones."""
    blocks = blocks_of(15)
    x, weights = torch.randn(3, 1, 16), torch.zeros(3, 15)
    weights[:, used] = 1 / len(used)
    call = blocks.new_call(weights, torch.tensor(used))
    first = blocks.sites[0](x, call)
    with Counted() as counted:
        later = blocks.sites[0](x, call)
    assert sorted(counted.names) == ["mm", "mm", "mul"]
    assert torch.equal(first, later)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_cost_no_operation_more(beams: int) -> None:
    blocks = blocks_of(15)
    call = blocks.new_call(torch.full((2, 15), 1 / 15), torch.arange(15))
    x = torch.randn(2 * beams, 1, 16)
    with Counted() as counted:
        blocks.sites[0](x, call)
    assert sorted(counted.names) == ["mm", "mm", "mul"]


def test_a_training_step_stacks_nothing_and_makes_a_gradient_of_the_new_block_alone() -> None:
    """Operations do not grow with the blocks, and none but the two matmuls of finished blocks is as large as they."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and not function.is_view:
                found.append((function.overloadpacket.__name__, made.numel()))
            return made

    runs = []
    for count in (2, 40):
        blocks = blocks_of(count, learning=True)
        weights = torch.full((1, count), 1 / count, requires_grad=True)
        x = torch.randn(1, 2, 16, requires_grad=True)
        found: list[tuple[str, int]] = []
        call = blocks.new_call(weights, torch.arange(count))
        with Sizes():
            blocks.sites[0](x, call).sum().backward()
        runs.append(found)
    few, many = runs
    assert [name for name, _ in few] == [name for name, _ in many]
    assert "cat" not in {name for name, _ in many}
    stack = 39 * 4 * 16  # numbers of the finished blocks' A
    assert max(size for _, size in many) < stack / 2


def test_many_blocks_are_loaded_with_one_copy_a_matrix() -> None:
    made = blocks_of(1, sites=3)
    states = [{name: torch.full(shape, float(index)) for name, shape in made.shapes.items()} for index in range(100)]
    with Counted() as counted:
        made.append_frozen(*states)
    assert counted.names.count("cat") == 2 * 3
    assert made.frozen_blocks == 101
    for _, site in made.named_sites():
        assert site.frozen_A[4:].reshape(100, -1).mean(dim=1).tolist() == list(range(100))
        assert site.frozen_B[:, 4:].T.reshape(100, -1).mean(dim=1).tolist() == list(range(100))


def test_of_several_blocks_one_that_does_not_fit_is_enough_to_keep_none() -> None:
    made = blocks_of(2)
    good = {name: torch.ones(shape) for name, shape in made.shapes.items()}
    with pytest.raises(SnapshotError, match="does not fit"):
        made.append_frozen(good, {name: value[:1] for name, value in good.items()})
    assert made.frozen_blocks == 2
    assert made.sites[0].frozen_A.shape == (8, 16)
