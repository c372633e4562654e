"""What a pool asks of its blocks, whatever kind they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_core.errors import SnapshotError
from sapt_core.pool.calls import Call, holding, reading


def embedding_matrix(backbone: PreTrainedModel) -> Tensor:
    """The frozen token embeddings (V, D)."""
    with reading(backbone):
        matrix = backbone.get_input_embeddings().weight
    assert isinstance(matrix, Tensor)  # noqa: S101 - of a language model they are a matrix
    return matrix


class PETBlocks(nn.Module, ABC):
    """The blocks of a pool: T of them, oldest first, of which at most the last is being learnt.

    A block's tensors are named as in PEFT's ``adapter_model.safetensors``.

    Attributes:
        frozen_blocks: how many are finished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_blocks = 0

    @property
    def count(self) -> int:
        """How many blocks there are (T)."""
        return self.frozen_blocks + self.learning

    @property
    @abstractmethod
    def learning(self) -> bool:
        """Whether a block is being learnt."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one block's tensors."""

    @contextmanager
    def on(self, backbone: PreTrainedModel) -> Iterator[None]:
        """Have the backbone alone with the blocks on it, and leave it bare; inside of itself nothing more happens."""
        with holding(backbone, self) as already:
            if already:
                yield
            else:
                with self._on(backbone):
                    yield

    @abstractmethod
    def _on(self, backbone: PreTrainedModel) -> AbstractContextManager[None]:
        """Put the blocks on the bare backbone for a while; they find what to do in ``running()``."""

    @abstractmethod
    def prompts(self, call: Call, pooled: Tensor) -> Tensor | None:
        """Embeddings (B, l, D) to put in front of the input's; None if there are none.

        Asked once in every call, before its first layer.

        Args:
            call: whose weights the blocks have.
            pooled: embeddings (B, D) of the inputs.
        """

    def new_call(self, weights: Tensor, used: Tensor) -> Call:
        """A call with a mixture (B, T) and the blocks (U,) in use, for the blocks to add what all layers need of it."""
        return Call(weights, used)

    def mixed(self, call: Call) -> Tensor:
        """What the blocks took part with in a call that is over (B, T): its weights, unless they choose themselves."""
        return call.weights

    @abstractmethod
    def add(self) -> None:
        """Start the block of a new task."""

    @abstractmethod
    def current_state(self) -> dict[str, Tensor]:
        """A copy of the tensors of the block that is being learnt."""

    @abstractmethod
    def _load_current(self, state: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _append_frozen(self, states: Sequence[Mapping[str, Tensor]]) -> None: ...

    @abstractmethod
    def _drop_current(self) -> None: ...

    def load_current(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the current block, for going on with its training.

        Raises:
            SnapshotError: the tensors are not those of a block of this kind and size.
        """
        self._check(state)
        self._load_current(state)

    def append_frozen(self, *states: Mapping[str, Tensor]) -> None:
        """Append stored blocks behind the frozen ones, all or none.

        Raises:
            SnapshotError: the tensors are not those of a block of this kind and size.
        """
        for state in states:
            self._check(state)
        self._append_frozen(states)
        self.frozen_blocks += len(states)

    def freeze(self) -> None:
        """Make the current block one of the frozen ones."""
        self.append_frozen(self.current_state())
        self._drop_current()

    def _check(self, state: Mapping[str, Tensor]) -> None:
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected = self.shapes
        if given != expected:
            differing = sorted(set(given.items()) ^ set(expected.items()))
            raise SnapshotError(
                f"A stored block does not fit this backbone and pet section: {len(differing)} tensors differ, "
                f"first {differing[0][0]}; use the pet settings that the pool was learnt with"
            )
