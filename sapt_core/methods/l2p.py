"""L2P (arXiv 2112.08654): a pool of prompts that all tasks share, of which every input picks a few by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from sapt_core.methods.base import Lesson, Method, Plan
from sapt_core.pool.attention import vocabulary_moments
from sapt_core.pool.blocks.base import PETBlocks, embedding_matrix
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.settings import PETConfig, PromptConfig
from sapt_core.training.objective import Objective


class L2P(Method):
    """Prompts and keys are all trained on from task to task; picked keys are pulled to the queries."""

    name: Literal["l2p"] = "l2p"

    summary: ClassVar[str] = "a shared pool of prompts, picked by keys for every input (L2P, arXiv 2112.08654)"
    pet_types: ClassVar[tuple[str, ...]] = ("prompt",)

    pool_size: int = Field(10, ge=1, description="M: prompts there are, each of pet.length tokens.")
    top_n: int = Field(5, ge=1, description="N: prompts an input picks.")
    pull: float = Field(0.5, ge=0, description="λ: weight of the distance of picked keys from the query.")

    @model_validator(mode="after")
    def _enough(self) -> L2P:
        if self.top_n > self.pool_size:
            raise ValueError(f"top_n={self.top_n} prompts cannot be picked from pool_size={self.pool_size}")
        return self

    def soft_tokens(self, length: int, tasks: int) -> int:
        return length * self.top_n

    def blocks(self, backbone: PreTrainedModel, pet: PETConfig) -> KeyedPrompts:
        assert isinstance(pet, PromptConfig)  # noqa: S101 - pet_types
        return KeyedPrompts(lambda: embedding_matrix(backbone), pet.length, self.pool_size, self.top_n)

    def begin(self, lesson: Lesson) -> Plan:
        """Train prompts and keys under the pull of the keys."""
        return Plan(lesson.rows, Objective(penalties=(Pull(self.pull),)) if self.pull else Objective())


_centres: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _centre(vocabulary: Tensor) -> Tensor:
    """What random tokens of the frozen embeddings pool to (D), computed once for as long as these are loaded."""
    if vocabulary not in _centres:
        _centres[vocabulary] = vocabulary_moments(vocabulary.detach())[0]
    found: Tensor = _centres[vocabulary]
    return found


class KeyedPrompts(PETBlocks):
    """One block: M prompts (M, l, D) with a key each (M, D).

    The query is the frozen max-pooled embedding of the input, less what random tokens pool to.
    """

    centre: Tensor
    tensors: nn.ParameterDict

    def __init__(self, vocabulary: Callable[[], Tensor], length: int, size: int, picked: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.length, self.size, self.picked = length, size, picked
        self._learning = False
        self.tensors = nn.ParameterDict()
        self.register_buffer("centre", _centre(vocabulary()).clone())

    @property
    def learning(self) -> bool:
        return self._learning

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = len(self.centre)
        return {"prompt_embeddings": (self.size, self.length, width), "prompt_keys": (self.size, width)}

    def _on(self, backbone: PreTrainedModel) -> AbstractContextManager[None]:
        return nullcontext()

    def prompts(self, call: Call, pooled: Tensor) -> Tensor:
        """The picked prompts (B, N·l, D), the nearest key's first.

        Notes the cosine distance (B) of the picked keys from each query, mean over the picked.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            query = F.normalize(pooled.float() - self.centre, dim=-1)
            near = (query @ F.normalize(self.tensors["prompt_keys"], dim=-1).T).topk(self.picked, dim=-1)
            call.noted[self] = (1 - near.values).mean(dim=-1)
            picked: Tensor = self.tensors["prompt_embeddings"][near.indices]
            return picked.flatten(1, 2)

    def add(self) -> None:
        """Start the pool: prompts at random rows of the vocabulary, keys at random."""
        if self.frozen_blocks:
            raise ValueError("all tasks share one pool of prompts")
        vocabulary, device = self._vocabulary(), self.centre.device
        rows = torch.randint(len(vocabulary), (self.size, self.length)).to(vocabulary.device)
        prompts = vocabulary[rows].detach().float().to(device)
        keys = torch.randn(self.size, len(self.centre)).to(device)
        self.tensors = nn.ParameterDict({"prompt_embeddings": prompts, "prompt_keys": keys})
        self._learning = True

    def current_state(self) -> dict[str, Tensor]:
        if not self._learning:
            raise ValueError("no block is being learnt")
        return {name: value.detach().clone() for name, value in self.tensors.items()}

    def _load_current(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.tensors.items():
                value.copy_(state[name])

    def _append_frozen(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        if self.frozen_blocks + len(states) > 1:
            raise ValueError("all tasks share one pool of prompts")
        (state,) = states
        kept = {name: value.to(self.centre.device) for name, value in state.items()}
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in kept.items()}
        )

    def _drop_current(self) -> None:
        self._learning = False


@dataclass(frozen=True)
class Pull:
    """``mean_{picked} (1 − cos(q, k))``; a ``sapt_core.training.objective.Penalty``."""

    weight: float
    name = "pull"

    def per_row(self, model: SaptModel, call: Call) -> Tensor:
        return call.noted[model.pool.blocks]
