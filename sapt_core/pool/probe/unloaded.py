"""What a model's layers are given, seen in a forward of it without weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sapt_core.backbones.faults import UNREADABLE
from sapt_core.backbones.traits import takes_embeddings
from sapt_core.errors import BackboneError
from sapt_core.pool.blocks.lora import is_linear, last_names

# Sizes that tell each other apart: texts, tokens of each and of its answer, rows that a router takes.
_TEXTS, _TOKENS, _ANSWER, _ROUTED = 2, 7, 5, 3

# What a class may do with tensors that hold nothing.
_UNRUN = (*UNREADABLE, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True)
class Seen:
    """What the linears of a model were given.

    Attributes:
        inputs: shapes of each one's inputs, by its module's name; no linear that was not called.
        others: linears that give something else than what a linear gives, as some routers of experts do.
        routed: whether numbers decide what is called, which a forward without weights can only guess.
    """

    inputs: Mapping[str, frozenset[tuple[int, ...]]]
    others: frozenset[str]
    routed: bool

    def by_text(self, name: str) -> bool:
        """Whether all rows that a linear is given are of one text after the other."""
        texts = {(_TEXTS * _TOKENS,), (_TEXTS * _ANSWER,)}
        return all(shape[:1] == (_TEXTS,) or shape[:-1] in texts for shape in self.inputs[name])


def check_sites(model: PreTrainedModel, sites: Collection[str], field: str) -> None:
    """Refuse linears that LoRA would learn nothing at, or could not tell one text from another.

    Args:
        model: without weights.
        sites: names of its linears.
        field: of the config, that named them.

    Raises:
        BackboneError: with the names, and those of other linears. Not where the class does not run without weights.
    """
    seen = look(model)
    if seen is None:
        return
    uncalled = [] if seen.routed else [name for name in sites if name not in seen.inputs]
    others = [name for name in sites if name in seen.others]
    mixed = [name for name in sites if name in seen.inputs and name not in seen.others and not seen.by_text(name)]
    what = {
        "never called, so nothing would be learnt there": uncalled,
        "given rows of several texts without their order, so no text's own mixture of blocks reaches them": mixed,
        "routers of experts that give no tensor, to which nothing can be added": others,
    }
    faults = [f"{len(names)} of {len(sites)} are {why} ({_shown(names)})" for why, names in what.items() if names]
    if faults:
        fit = [name for name in seen.inputs if seen.by_text(name) and name not in seen.others]
        raise BackboneError(
            f"{field}.target_modules: of the linears that they name in {type(model).__name__}, {' and '.join(faults)}; "
            f"name others, if need be by more than the last part: {', '.join(last_names(fit, parts=2))}"
        )


def check_embeddings(model: PreTrainedModel) -> None:
    """Refuse a class that does not train on and generate from embeddings, which soft prompts are.

    Raises:
        BackboneError: with its name.
    """
    if not takes_embeddings(model) or (look(model) is not None and look(model, embedded=True) is None):
        raise BackboneError(
            f"pet.type prompt: {type(model).__name__} does not generate from embeddings, as soft prompts need; "
            "use pet.type=lora, or another backbone"
        )


def look(model: PreTrainedModel, *, embedded: bool = False) -> Seen | None:
    """Run a model without weights on two texts; None if the class cannot run so.

    Args:
        model: on the meta device.
        embedded: whether it is given embeddings in the place of ids.
    """
    key = (type(model).__name__, model.config.to_json_string(), embedded)
    if key not in _looked:
        _looked[key] = _look(model, embedded)
    return _looked[key]


# Comparisons and sweeps check one backbone for every method and point.
_looked: dict[tuple[str, str, bool], Seen | None] = {}


def _look(model: PreTrainedModel, embedded: bool) -> Seen | None:
    inputs: dict[str, set[tuple[int, ...]]] = {}
    others: set[str] = set()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def noted(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            inputs.setdefault(name, set()).add(tuple(args[0].shape))
            if not isinstance(output, Tensor):
                others.add(name)

        return noted

    ids = torch.ones(_TEXTS, _TOKENS, dtype=torch.long, device="meta")
    given: dict[str, Tensor] = {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :_ANSWER]
    guesses = _Guesses()
    experts = model.get_experts_implementation()
    model.train(False)
    with ExitStack() as stack:
        if isinstance(experts, dict) and any(experts.values()):
            # Of all experts at once, and in any number format.
            model.set_experts_implementation("batched_mm")
            stack.callback(model.set_experts_implementation, experts)
        for name, module in model.named_modules():
            if is_linear(module):
                stack.callback(module.register_forward_hook(note(name)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(guesses)
        try:
            model(**given, use_cache=False)
        except _UNRUN:
            return None
    seen = {name: frozenset(shapes) for name, shapes in inputs.items()}
    return Seen(seen, frozenset(others), guesses.routed)


class _Guesses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what only numbers could tell: no condition holds, a number is 1, and some places are not zero."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item() if args[0].dtype is not torch.bool else False
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            self.routed = True
            return torch.empty(_ROUTED, args[0].ndim, dtype=torch.long, device="meta")
        return func(*args, **(kwargs or {}))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
