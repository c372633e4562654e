# ruff: noqa: N803, N815 - A and B are the matrices of the LoRA paper and of PEFT's names
"""A pool of LoRA blocks, stacked: however many blocks there are, a linear costs two more matmuls.

``y = W x + Σ_i a_i · s · B_i A_i x`` (SAPT section 3.2, s = lora_alpha / r) is computed as
``h = A x`` with all A stacked to (T·R, in), ``h ·= s · a`` and ``y += B h`` with B (out, T·R).
Blocks that no input of the batch uses are left out of the stack, once a call. The block that is being learnt
stays out of it too: stacking it would copy all blocks in every step, and make a gradient of them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_core.errors import BackboneError
from sapt_core.pool.blocks.base import PETBlocks
from sapt_core.pool.calls import Call, running
from sapt_core.settings import LoRAConfig

PEFT_PREFIX = "base_model.model."


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether LoRA can be added to a module: a linear, or GPT-2's kind, whose weight lies the other way round."""
    return isinstance(module, nn.Linear | Conv1D)


def last_names(names: Iterable[str], *, parts: int = 1) -> list[str]:
    """The last parts of modules' names, each once and in order; parts that are numbers do not count."""
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def find_sites(backbone: nn.Module, targets: tuple[str, ...], field: str = "pet") -> dict[str, nn.Linear | Conv1D]:
    """The linears of ``backbone`` that ``targets`` name, in module order.

    A target matches as in PEFT: the last part of a module's name or a dotted suffix of it.

    Raises:
        BackboneError: a target of the config's ``field`` matches no linear.
    """
    linears = {name: module for name, module in backbone.named_modules() if is_linear(module)}
    matches = {target: [name for name in linears if _names(target, name)] for target in targets}
    missing = [target for target, names in matches.items() if not names]
    if missing:
        fused = last_names(fused_experts(backbone))
        aside = (
            f"; its experts ({', '.join(fused)}) are one tensor a layer and no linears: no block reaches them, "
            "pet.type=full does"
        )
        raise BackboneError(
            f"{field}.target_modules: {', '.join(missing)} match no linear of {type(backbone).__name__}; "
            f"its linears are named: {', '.join(last_names(linears)) or 'none'}{aside if fused else ''}"
        )
    chosen = {name for names in matches.values() for name in names}
    return {name: module for name, module in linears.items() if name in chosen}


@dataclass(frozen=True, kw_only=True)
class LoRACall(Call):
    """A call with what all sites need of it, made once.

    Attributes:
        gates: s · a of the blocks in use, R times each (B, 1, U·R).
        rows: of the stack of finished blocks, those in use (F·R,); None: all.
        chosen: what a site took of that stack, A (F·R, in) and B (out, F·R) in the format it computes in.
    """

    gates: Tensor
    rows: Tensor | None
    chosen: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


def fused_experts(backbone: nn.Module, targets: tuple[str, ...] | None = None) -> list[str]:
    """Names of the parameters that hold the weights of all experts of a layer (E, out, in), of those in ``targets``."""
    return [
        f"{name}.{own}"
        for name, module in backbone.named_modules()
        if "expert" in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and (targets is None or any(_names(target, f"{name}.{own}") for target in targets))
    ]


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _sizes(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """What a linear reads and what it gives."""
    size_out, size_in = linear.weight.shape if isinstance(linear, nn.Linear) else reversed(linear.weight.shape)
    return size_in, size_out


class LoRASite(nn.Module):
    """All blocks' low-rank updates of one linear: frozen ones stacked in buffers, the current one a parameter."""

    frozen_A: Tensor
    frozen_B: Tensor
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig) -> None:
        super().__init__()
        self.r = config.r
        self.scaling = config.lora_alpha / config.r
        self.dropout = nn.Dropout(config.lora_dropout)
        self.detach_frozen = config.detach_frozen
        self.register_buffer("frozen_A", torch.empty(0, in_features))
        self.register_buffer("frozen_B", torch.empty(out_features, 0))
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def add(self) -> None:
        """Start a new current block: A Kaiming-uniform(√5), B zero, so that it changes nothing yet."""
        lora_A = torch.empty(self.r, self.frozen_A.shape[1], device=self.frozen_A.device)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(torch.zeros(self.frozen_B.shape[0], self.r, device=self.frozen_B.device))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one block's tensors, by their names in PEFT."""
        return {
            "lora_A.weight": (self.r, self.frozen_A.shape[1]),
            "lora_B.weight": (self.frozen_B.shape[0], self.r),
        }

    @property
    def current(self) -> dict[str, nn.Parameter]:
        """The tensors of the block being learnt; none if there is no such block."""
        if self.lora_A is None or self.lora_B is None:
            return {}
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def append_frozen(self, blocks: Sequence[Mapping[str, Tensor]]) -> None:
        """Put finished blocks behind the frozen ones."""
        # All in one go: block by block, all that are there would be copied for each.
        self.frozen_A = torch.cat([self.frozen_A, *(each["lora_A.weight"].to(self.frozen_A) for each in blocks)])
        self.frozen_B = torch.cat([self.frozen_B, *(each["lora_B.weight"].to(self.frozen_B) for each in blocks)], dim=1)

    def drop(self) -> None:
        """Have no block that is being learnt."""
        self.lora_A = self.lora_B = None

    def forward(self, x: Tensor, call: LoRACall) -> Tensor:
        """The pool's update for ``x``.

        Args:
            x: input of the linear (B·k, S, in), or the same flat (B·k·S, in), as some classes have it; k is the number
                of beams or returned sequences.
            call: that it belongs to.

        Returns:
            Update, as ``x`` but for its last dimension (out).
        """
        x, gates = self.dropout(x), call.gates
        if self.lora_A is None or self.lora_B is None:
            return _update(x, *self.finished(x, call), gates)
        new = _update(x, self.lora_A, self.lora_B, gates[..., -self.r :])
        if gates.shape[-1] == self.r:
            return new
        return new + _update(self.below(x), *self.finished(x, call), gates[..., : -self.r])

    def below(self, x: Tensor) -> Tensor:
        """``x`` as finished blocks see it beside one that is being learnt."""
        return x.detach() if self.detach_frozen else x

    def finished(self, x: Tensor, call: LoRACall) -> tuple[Tensor, Tensor]:
        """A (F·R, in) and B (out, F·R) of the finished blocks in use, chosen and cast for ``x`` once a call."""
        if self not in call.chosen:
            A, B = self.frozen_A, self.frozen_B
            if call.rows is not None:
                A, B = A[call.rows], B[:, call.rows]
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            call.chosen[self] = A.to(dtype), B.to(dtype)
        return call.chosen[self]


def _update(x: Tensor, A: Tensor, B: Tensor, gates: Tensor) -> Tensor:
    """``B (g · A x)`` of stacked blocks with gates (B, 1, U·R), for rows that follow each other in ``x`` (…, in)."""
    hidden = F.linear(x, A.to(x.dtype))
    gated = hidden.reshape(len(gates), -1, hidden.shape[-1]) * gates.to(hidden.dtype)
    return F.linear(gated.reshape(hidden.shape), B.to(gated.dtype))


class LoRABlocks(PETBlocks):
    """The blocks of a pool over all sites of a backbone."""

    site: type[LoRASite] = LoRASite

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: LoRAConfig) -> None:
        """
        Args:
            shapes: (in_features, out_features) of every adapted linear by its module name.
            config: rank, scaling, dropout.
        """
        super().__init__()
        self.names = tuple(shapes)
        self.r = config.r
        self.scaling = config.lora_alpha / config.r
        self.sites = nn.ModuleList(self.site(*shapes[name], config) for name in self.names)

    @classmethod
    def for_backbone(cls, backbone: nn.Module, config: LoRAConfig) -> Self:
        """Blocks for every linear that ``config.target_modules`` names."""
        sites = find_sites(backbone, config.target_modules)
        return cls({name: _sizes(linear) for name, linear in sites.items()}, config)

    @property
    def learning(self) -> bool:
        return any(site.current for _, site in self.named_sites())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{PEFT_PREFIX}{name}.{suffix}": shape
            for name, site in self.named_sites()
            for suffix, shape in site.shapes.items()
        }

    @contextmanager
    def _on(self, backbone: PreTrainedModel) -> Iterator[None]:
        """Add the pool's update to the output of every adapted linear, by forward hooks.

        The backbone's modules, code and state dict stay as they are.
        """
        with ExitStack() as hooks:
            for name, site in self.named_sites():

                def add_update(
                    _module: nn.Module, args: tuple[Tensor, ...], output: Tensor, site: LoRASite = site
                ) -> Tensor:
                    update: Tensor = site(args[0], running())
                    return output + update.to(output.dtype)

                hooks.callback(backbone.get_submodule(name).register_forward_hook(add_update).remove)
            yield

    def new_call(self, weights: Tensor, used: Tensor) -> LoRACall:
        finished = used[:-1] if self.learning else used
        rows = None
        if len(finished) < self.frozen_blocks:
            rows = (finished.unsqueeze(1) * self.r + torch.arange(self.r, device=used.device)).flatten()
        mixture = weights if len(used) == weights.shape[1] else weights[:, used]
        gates = (mixture * self.scaling).repeat_interleave(self.r, dim=1)
        return LoRACall(weights, used, gates=gates.unsqueeze(1), rows=rows)

    def prompts(self, call: Call, pooled: Tensor) -> None:
        return None

    def add(self) -> None:
        """Start the block of a new task at every site."""
        for _, site in self.named_sites():
            site.add()

    def current_state(self) -> dict[str, Tensor]:
        """The current block's tensors under PEFT's names, A (R, in) and B (out, R) a site."""
        return {name: value.detach().clone() for name, value in self._current().items()}

    def _load_current(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._current().items():
                value.copy_(state[name])

    def _append_frozen(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        for name, site in self.named_sites():
            suffixes = site.shapes
            site.append_frozen(
                [{suffix: state[f"{PEFT_PREFIX}{name}.{suffix}"] for suffix in suffixes} for state in states]
            )

    def _drop_current(self) -> None:
        for _, site in self.named_sites():
            site.drop()

    def _current(self) -> dict[str, nn.Parameter]:
        if self.names and not self.learning:
            raise ValueError("no block is being learnt")
        return {
            f"{PEFT_PREFIX}{name}.{suffix}": value
            for name, site in self.named_sites()
            for suffix, value in site.current.items()
        }

    def named_sites(self) -> Iterator[tuple[str, LoRASite]]:
        """Every adapted linear by its module name."""
        for name, site in zip(self.names, self.sites, strict=True):
            assert isinstance(site, LoRASite)  # noqa: S101 - narrows ModuleList's element type
            yield name, site
