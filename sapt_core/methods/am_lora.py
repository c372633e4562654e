"""AM-LoRA (arXiv 2409.19611): in every adapted linear, attention over the features of all tasks' LoRAs.

There is no published code, and the text leaves much open; what was chosen and why is in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.pool.blocks.lora import LoRABlocks, LoRACall, LoRASite
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.settings import LoRAConfig, PETConfig
from sapt_core.training.objective import Objective


class AMLoRA(Method):
    """A LoRA and a selector a task; the newest of both are trained, nothing of earlier tasks is kept.

    ``h = W x + Σ_i g_i ΔW_i x`` with ``ΔW_i = s B_i A_i`` and gates g of the scores
    ``z_i = LeakyReLU(w_i · ΔW_i x + b_i)``, for every token. ``softmax`` gates share one unit with a zero LoRA,
    whose score is 0; ``sigmoid`` gates are each their own.
    """

    name: Literal["am_lora"] = "am_lora"

    summary: ClassVar[str] = "attention over the LoRAs' own features in every layer (AM-LoRA, arXiv 2409.19611)"
    pool: ClassVar[Literal["block per task"]] = "block per task"
    pet_types: ClassVar[tuple[str, ...]] = ("lora",)

    gates: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="How scores become gates: over all LoRAs and a zero one, or each on its own."
    )
    sparsity: float = Field(
        0.01, ge=0, description="Weight of the L1 norm of the real LoRAs' gates; under softmax, 1 less the zero one's."
    )

    def blocks(self, backbone: PreTrainedModel, pet: PETConfig) -> GatedBlocks:
        """Blocks with a selector each."""
        assert isinstance(pet, LoRAConfig)  # noqa: S101 - pet_types
        made = GatedBlocks.for_backbone(backbone, pet)
        made.choose(self.gates)
        return made

    def begin(self, lesson: Lesson) -> Plan:
        """Train the new LoRA and its selector under the sparsity penalty."""
        if not self.sparsity:
            return Plan(lesson.rows)
        return Plan(lesson.rows, Objective(penalties=(Sparsity(self.sparsity),)))


@dataclass(frozen=True)
class _Stack:
    """Some of a linear's blocks at one input.

    Attributes:
        hidden: what their A make of it (B·k, S, T, R), times s.
        B: theirs (out, T·R).
        scores: theirs (B·k, S, T), before LeakyReLU.
    """

    hidden: Tensor
    B: Tensor
    scores: Tensor

    def update(self, gates: Tensor) -> Tensor:
        """Their part of the update (B·k, S, out), with gates (B·k, S, T)."""
        gated = (self.hidden * gates.unsqueeze(-1).to(self.hidden.dtype)).flatten(-2)
        return F.linear(gated, self.B.to(gated.dtype))


class GatedSite(LoRASite):
    """One linear's blocks, each with a selector: weight (out) and bias of its score.

    ``w_i · (B_i h_i) = (B_iᵀ w_i) · h_i``: a score is read off h, and no (S, T, out) tensor is made.

    Attributes:
        frozen_readers: ``B_iᵀ w_i`` of the finished blocks (F, R).
        frozen_bias: their scores' biases (F,).
    """

    frozen_readers: Tensor
    frozen_bias: Tensor
    selector_weight: nn.Parameter | None
    selector_bias: nn.Parameter | None
    gates: str = "softmax"

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig) -> None:
        super().__init__(in_features, out_features, config)
        self.register_buffer("frozen_readers", torch.empty(0, config.r))
        self.register_buffer("frozen_bias", torch.empty(0))
        self.register_parameter("selector_weight", None)
        self.register_parameter("selector_bias", None)

    def add(self) -> None:
        """Start a block that changes nothing yet, whose score is 0 wherever it does not."""
        super().add()
        width, device = self.frozen_B.shape[0], self.frozen_B.device
        self.selector_weight = nn.Parameter(torch.randn(width, device=device) / width**0.5)
        self.selector_bias = nn.Parameter(torch.zeros(1, device=device))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes, "selector.weight": (self.frozen_B.shape[0],), "selector.bias": (1,)}

    @property
    def current(self) -> dict[str, nn.Parameter]:
        if self.selector_weight is None or self.selector_bias is None:
            return {}
        return {**super().current, "selector.weight": self.selector_weight, "selector.bias": self.selector_bias}

    def append_frozen(self, blocks: Sequence[Mapping[str, Tensor]]) -> None:
        super().append_frozen(blocks)
        readers = [_reader(each["lora_B.weight"], each["selector.weight"]).unsqueeze(0) for each in blocks]
        self.frozen_readers = torch.cat([self.frozen_readers, *(each.to(self.frozen_readers) for each in readers)])
        self.frozen_bias = torch.cat(
            [self.frozen_bias, *(each["selector.bias"].to(self.frozen_bias) for each in blocks)]
        )

    def drop(self) -> None:
        super().drop()
        self.selector_weight = self.selector_bias = None

    def forward(self, x: Tensor, call: LoRACall) -> Tensor:
        """The gated update for inputs as of ``LoRASite.forward``; the pool's weights, all 1, play no part.

        Notes the gates of each row (B, T), mean over its positions and beams, in the first pass of the call.
        """
        x = self.dropout(x)
        stacks = []
        if len(self.frozen_bias):
            seen = x if self.lora_A is None else self.below(x)
            stacks.append(self._stack(seen, *self.finished(x, call), self.frozen_readers, self.frozen_bias))
        if self.lora_A is not None and self.lora_B is not None:
            assert self.selector_weight is not None  # noqa: S101 - made and dropped with the block
            assert self.selector_bias is not None  # noqa: S101
            reader = _reader(self.lora_B, self.selector_weight).unsqueeze(0)
            stacks.append(self._stack(x, self.lora_A, self.lora_B, reader, self.selector_bias))
        gates = self._gates(F.leaky_relu(torch.cat([stack.scores for stack in stacks], dim=-1), 0.2))
        if self not in call.noted:
            call.noted[self] = gates.reshape(call.weights.shape[0], -1, gates.shape[-1]).mean(dim=1)
        shares = torch.split(gates, [stack.scores.shape[-1] for stack in stacks], dim=-1)
        update, *others = [stack.update(share) for stack, share in zip(stacks, shares, strict=True)]
        return sum(others, update)

    def _stack(self, x: Tensor, A: Tensor, B: Tensor, readers: Tensor, bias: Tensor) -> _Stack:  # noqa: N803
        hidden = self.scaling * F.linear(x, A.to(x.dtype))
        hidden = hidden.reshape(*hidden.shape[:-1], -1, self.r)
        scores = torch.einsum("...tr,tr->...t", hidden, readers.to(hidden.dtype)).float() + bias
        return _Stack(hidden, B, scores)

    def _gates(self, scores: Tensor) -> Tensor:
        """Gates (..., T) of scores (..., T)."""
        if self.gates == "sigmoid":
            return torch.sigmoid(scores)
        return torch.softmax(F.pad(scores, (1, 0)), dim=-1)[..., 1:]


def _reader(B: Tensor, weight: Tensor) -> Tensor:  # noqa: N803
    """``Bᵀ w`` (R) of one block, in float32 as they are kept."""
    with torch.autocast(B.device.type, enabled=False):
        return weight @ B


class GatedBlocks(LoRABlocks):
    """Blocks whose mixture is chosen anew in every adapted linear."""

    site = GatedSite

    def choose(self, gates: Literal["softmax", "sigmoid"]) -> None:
        """Set how scores become gates."""
        for site in self._gated():
            site.gates = gates

    def mixed(self, call: Call) -> Tensor:
        """Gates of the LoRAs (B, T), mean over sites and positions, as the prompt was read; no row adds up to 1."""
        return torch.stack([call.noted[site] for site in self._gated() if site in call.noted]).mean(dim=0)

    def _gated(self) -> list[GatedSite]:
        return [site for site in self.sites if isinstance(site, GatedSite)]


@dataclass(frozen=True)
class Sparsity:
    """``mean ‖g‖₁`` over positions and sites, without the zero LoRA's; a ``sapt_core.training.objective.Penalty``."""

    weight: float
    name = "sparsity"

    def per_row(self, model: SaptModel, call: Call) -> Tensor:
        return model.pool.blocks.mixed(call).sum(dim=-1)
