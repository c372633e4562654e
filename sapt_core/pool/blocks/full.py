"""Full fine-tuning as a block: a whole set of weights in the place of the backbone's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_core.pool.blocks.base import PETBlocks
from sapt_core.pool.calls import Call, holding


class FullBlocks(PETBlocks):
    """One block at most: the weights of the whole model, in float32.

    The backbone keeps its own; they are back in place when the block is taken off.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        with holding(backbone, self):  # not while another thread has a block in their place
            self._own = dict(backbone.named_parameters())  # a tied weight once
        self.frozen = nn.ParameterList()
        self.current = nn.ParameterList()

    @property
    def learning(self) -> bool:
        return len(self.current) > 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._own.items()}

    @contextmanager
    def _on(self, backbone: PreTrainedModel) -> Iterator[None]:
        """Put the block's weights into the backbone's modules, wherever each is used."""
        weights = self.current if self.learning else self.frozen
        places = {id(own): weight for own, weight in zip(self._own.values(), weights, strict=True)}
        replaced = [
            (module, name, own)
            for module in backbone.modules()
            for name, own in module.named_parameters(recurse=False)
            if id(own) in places
        ]
        if {id(own) for _, _, own in replaced} != places.keys():
            raise RuntimeError("the backbone's parameters are not those that the block was made for")
        try:
            for module, name, own in replaced:
                setattr(module, name, places[id(own)])
            yield
        finally:
            for module, name, own in replaced:
                setattr(module, name, own)

    def prompts(self, call: Call, pooled: Tensor) -> None:
        return None

    def add(self) -> None:
        """Start from the backbone's weights."""
        if self.frozen_blocks:
            raise ValueError("whole models are not mixed: there is one block at most")
        self.current = nn.ParameterList(value.detach().float().clone() for value in self._own.values())

    def current_state(self) -> dict[str, Tensor]:
        if not self.learning:
            raise ValueError("no block is being learnt")
        return {name: value.detach().clone() for name, value in zip(self._own, self.current, strict=True)}

    def _load_current(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in zip(self._own, self.current, strict=True):
                value.copy_(state[name])

    def _append_frozen(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        if self.frozen_blocks + len(states) > 1:
            raise ValueError("whole models are not mixed: there is one block at most")
        (state,) = states
        self.frozen = nn.ParameterList(nn.Parameter(state[name].clone(), requires_grad=False) for name in self._own)

    def _drop_current(self) -> None:
        self.current = nn.ParameterList()
