"""What a backbone does with a few short rows, seen on its weights before anything is trained on it.

The rows go the very ways that training and answers go (``SaptModel.run`` and ``generate``), alone and beside others,
with a block that is not zero. A class whose forward is plain can still count padding as a part of a text, lose its
place between two tokens that it generates, or leave a linear without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.data.collate import IGNORED_LABEL, Batch, Together
from sapt_core.errors import BackboneError
from sapt_core.pool.blocks.lora import LoRABlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.settings import LoRAConfig, PETConfig

Found = TypeVar("Found")
Row = Mapping[str, list[int]]

# Lengths of prompts and answers (the end comes on top): one that is shorter, and two that are alike.
_LENGTHS = ((4, 1), (7, 3), (7, 3))

# What a class may do with rows that it was not made for.
UNRUN = (*UNREADABLE, LookupError, ArithmeticError, AssertionError)

_SEED = 0
_SIZE = 0.02  # of random numbers in the place of a new block's zeros: an update, and gradient for both of its factors


def probe(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pet: PETConfig,
    *,
    checkpointing: bool,
    field: str = "pet",
) -> Verdict:
    """Run a few rows through a backbone with a block on it, as training and answers do.

    Args:
        backbone: with weights, where it is to be looked at.
        tokenizer: of the backbone.
        pet: kind of block; of LoRA the linears count, not the rank.
        checkpointing: whether training computes activations again.
        field: of the config that the block is of.

    Raises:
        BackboneError: with all that does not hold and cannot be mended, each with its figure.
    """
    with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        return _Probe(backbone, tokenizer, pet, field).verdict(checkpointing=checkpointing)


class _Probe:
    """One probe at work."""

    def __init__(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pet: PETConfig, field: str
    ) -> None:
        self.field = field
        self.pet = pet
        self.model = SaptModel(backbone, new_pool(backbone, pet, None)).to(backbone.device)
        self.model.pool.add()
        if isinstance(pet, LoRAConfig):
            block = self.model.pool.blocks.current_state()
            started = {name: value if value.any() else _SIZE * torch.randn_like(value) for name, value in block.items()}
            self.model.pool.blocks.load_current(started)
        self.rows = _rows(tokenizer, self.model)
        self.collator = self.model.collator(int(tokenizer.pad_token_id))
        self.pad = int(tokenizer.pad_token_id)
        self.ends = tokenizer.eos_token_id is not None
        self.name = type(backbone).__name__
        half = next(each.dtype for each in backbone.parameters() if each.is_floating_point()) != torch.float32
        # Over what rounding comes to in the weights' format; a token in the wrong place moves logits by their spread.
        self.allowed = 0.25 if half else 5e-3
        self.figures: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.faults: list[str] = []

    def verdict(self, *, checkpointing: bool) -> Verdict:
        short, long, beside = self.rows
        with self.model.mode(training=False), torch.no_grad():
            alone = self._tried("trained on", lambda: [self._taught([row])[0] for row in self.rows])
            training: Together = "any"
            answering = self.model.sharing.answering
            if alone is not None:
                training = self._sharing(
                    "trained", partial(self._taught, [long, beside]), partial(self._taught, [short, long]), alone, "any"
                )
                self._tried("trained on", lambda: self._check_last_positions(long, alone[1]))
                answering = self._answering(alone) or answering
        if alone is not None:
            self._tried("trained on", lambda: self._check_gradients(training, checkpointing=checkpointing))
        if self.faults:
            raise BackboneError(f"{self.name} cannot be used as configured: {'; '.join(self.faults)}")
        return Verdict(
            self.name, training, answering, self.model.sharing.answering, self.figures, self.allowed, self.failed
        )

    def _tried(self, what: str, run: Callable[[], Found]) -> Found | None:
        """What a run gives, or None where the class cannot do it, which is a fault."""
        try:
            return run()
        except UNRUN as error:
            self.faults.append(f"it cannot be {what} with {self.field}.type={self.pet.type} ({reason(error)})")
            return None

    def _taught(self, rows: Sequence[Row]) -> list[Tensor]:
        """Logits (L, V) of each row's answer in one training batch."""
        batch = self._batch(rows)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        logits = self.model(batch)
        if logits.shape[:2] != batch.labels.shape:
            raise ValueError(f"logits of shape {tuple(logits.shape)} for labels of {tuple(batch.labels.shape)}")
        found = [self.model.answer_logits(*pair) for pair in zip(logits, batch.labels, strict=True)]
        if any(each.isnan().any() for each in found):
            raise ValueError("its logits are no numbers")
        return found

    def _batch(self, rows: Sequence[Row]) -> Batch:
        return self.collator(rows).to(self.model.backbone.device)

    def _sharing(
        self,
        what: str,
        alike: Callable[[], Sequence[Tensor]],
        mixed: Callable[[], Sequence[Tensor]],
        alone: Sequence[Tensor],
        most: Together,
    ) -> Together:
        """Which rows may share a batch, where ``most`` may be tried."""
        if not self._same(f"{what} beside a row of its length", alike, alone[1:]):
            return "alone"
        if most == "any" and not self._same(f"{what} beside a longer row", mixed, alone[:2]):
            return "alike"
        return most

    def _same(self, name: str, run: Callable[[], Sequence[Tensor]], wanted: Sequence[Tensor]) -> bool:
        """Whether a run gives, up to rounding, the logits that rows have alone; one that fails does not."""
        try:
            return self._figure(name, run(), wanted) <= self.allowed
        except UNRUN as error:
            self.failed[name] = reason(error)
            return False

    def _answering(self, taught: Sequence[Tensor]) -> Together | None:
        alone = self._tried("asked", lambda: [self._answered([row])[0] for row in self.rows])
        if alone is None:
            return None
        name = "asked against trained"
        if not self._same(name, lambda: alone, taught):
            far = f"by {self.figures[name]:.2g} of their spread" if name in self.figures else self.failed[name]
            self.faults.append(
                "generated token by token, a row's logits are not those that it is taught with "
                f"({far}; rounding is {self.allowed:g} at most)"
            )
            return None
        short, long, beside = self.rows
        return self._sharing(
            "asked",
            partial(self._answered, [long, beside]),
            partial(self._answered, [short, long]),
            alone,
            self.model.sharing.answering,
        )

    def _answered(self, rows: Sequence[Row]) -> list[Tensor]:
        """Logits (L, V) that each row's answer is chosen by, all rows in one batch, if every one says what is right."""
        answers = [row["answer_ids"] for row in rows]
        longest = max(map(len, answers))
        given = _Given(answers, self.pad)
        tokens, _ = self.model.generate(
            self.collator.prompts(rows).to(self.model.backbone.device),
            max_new_tokens=longest + self.ends,
            do_sample=False,
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([given]),
        )
        wanted = [answer + [self.pad] * (longest - len(answer)) for answer in answers]
        if tokens[:, :longest].tolist() != wanted:
            raise ValueError("generate() gives back other tokens than were chosen")
        if self.ends and tokens.shape[1] > longest:
            raise ValueError("generate() goes on behind the end of an answer")
        logits = torch.stack(given.seen, dim=1).float()
        if logits.isnan().any():
            raise ValueError("its logits are no numbers")
        return [each[: len(answer)] for each, answer in zip(logits, answers, strict=True)]

    def _check_last_positions(self, row: Row, wanted: Tensor) -> None:
        if self.model.is_encoder_decoder:
            return
        batch = self._batch([row])
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        before = batch.input_ids.shape[1] - batch.labels.shape[1]
        every = Batch(
            batch.input_ids,
            batch.attention_mask,
            batch.query_mask,
            F.pad(batch.labels, (before, 0), value=IGNORED_LABEL),
            batch.left_padded,
        )
        assert every.labels is not None  # noqa: S101 - just made
        given = self.model.answer_logits(self.model(every)[0], every.labels[0])
        found = self._figure("trained with logits of all positions", [given], [wanted])
        if found > self.allowed:
            self.faults.append(f"asked for the logits of the last positions alone, it gives others ({found:.2g})")

    def _figure(self, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """How far logits are off, as a share of their spread, of the row that is worst; kept under ``name``."""
        found = max(map(_difference, given, wanted))
        if not math.isfinite(found):
            raise ValueError("its logits are those of other tokens")
        self.figures[name] = max(found, self.figures.get(name, 0.0))
        return found

    def _check_gradients(self, training: Together, *, checkpointing: bool) -> None:
        """See that all that is to be learnt is reached, in training as it will run."""
        rows = self.rows[1:2] if training == "alone" else self.rows[1:]
        with self.model.mode(training=True):
            with _calls(self.model.backbone) as called:
                plain = self._gradients(rows)
            self._check_reached(plain, called)
            if checkpointing and not all(map(_is_zero, plain.values())):
                try:
                    with self.model.checkpointing():
                        again = self._gradients(rows)
                except UNRUN as error:
                    self.faults.append(f"train.gradient_checkpointing: {reason(error)}; set it to false")
                    return
                largest = max(float(each.abs().max()) for each in plain.values() if each is not None)
                found = max(
                    float((first - second).abs().max()) / largest
                    for first, second in zip(plain.values(), again.values(), strict=True)
                    if first is not None and second is not None
                )
                self.figures["gradient with checkpointing"] = found
                if found > self.allowed or [*map(_is_none, plain.values())] != [*map(_is_none, again.values())]:
                    self.faults.append(
                        f"train.gradient_checkpointing: the gradient that it gives differs by {found:.2g} from the "
                        "plain one; set it to false"
                    )

    def _gradients(self, rows: Sequence[Row]) -> dict[str, Tensor | None]:
        """Of every parameter of the block."""
        torch.manual_seed(_SEED)  # dropout
        batch = self._batch(rows)
        assert batch.labels is not None  # noqa: S101 - a training batch has labels
        loss = self.model.token_loss(self.model(batch), batch.labels)
        parameters = {name: each for name, each in self.model.pool.named_parameters() if each.requires_grad}
        if not loss.requires_grad:
            return dict.fromkeys(parameters)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    def _check_reached(self, gradients: Mapping[str, Tensor | None], called: set[str]) -> None:
        unfit = [name for name, each in gradients.items() if each is not None and not each.isfinite().all()]
        if unfit:
            self.faults.append(f"the gradient of {len(unfit)} of {len(gradients)} tensors of a block is no number")
        blocks = self.model.pool.blocks
        if not isinstance(blocks, LoRABlocks):
            if all(map(_is_zero, gradients.values())):
                self.faults.append("no gradient reaches the block, so nothing would be learnt")
            return
        places = {name: f"blocks.sites.{index}." for index, name in enumerate(blocks.names)}
        unreached = [
            name
            for name, prefix in places.items()
            # Experts that no row was sent to are not called, and neither is what they consist of.
            if (name in called or name.rpartition(".")[0] in called)
            and any(_is_zero(value) for own, value in gradients.items() if own.startswith(prefix))
        ]
        if unreached:
            self.faults.append(
                f"{self.field}.target_modules: no gradient reaches {len(unreached)} of {len(places)} linears "
                f"({', '.join(unreached[:3])}{', …' if unreached[3:] else ''}), so nothing would be learnt there; "
                "name others"
            )


class _Given(LogitsProcessor):
    """Notes what every token is chosen by, and chooses it: the next one of each row's answer."""

    def __init__(self, answers: Sequence[Sequence[int]], pad: int) -> None:
        self.answers, self.pad = answers, pad
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = len(self.seen)
        self.seen.append(scores.clone())
        chosen = [answer[step] if step < len(answer) else self.pad for answer in self.answers]
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(chosen)), torch.tensor(chosen)] = 0
        return only  # type: ignore[return-value]  # torch types no float tensors apart


def _rows(tokenizer: PreTrainedTokenizerBase, model: SaptModel) -> list[dict[str, list[int]]]:
    """Prompts and answers of tokens from all over the vocabulary."""
    known = min(len(tokenizer), *(layer.weight.shape[0] for layer in _vocabularies(model.backbone)))
    special = set(tokenizer.all_special_ids)
    usable = [index for index in range(known) if index not in special]
    draw = torch.Generator().manual_seed(_SEED)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def text(length: int) -> list[int]:
        return [usable[int(at)] for at in torch.randint(len(usable), (length,), generator=draw)]

    return [{"prompt_ids": text(prompt), "answer_ids": [*text(answer), *end]} for prompt, answer in _LENGTHS]


def _vocabularies(backbone: PreTrainedModel) -> list[Any]:
    layers: tuple[Any, ...] = (backbone.get_input_embeddings(), backbone.get_output_embeddings())  # type: ignore[no-untyped-call]
    return [layer for layer in layers if layer is not None]


def _difference(given: Tensor, wanted: Tensor) -> float:
    """Root of the mean square by which logits are off, as a share of their standard deviation."""
    if given.shape != wanted.shape:
        return torch.inf
    both = wanted.isfinite() & given.isfinite()
    if not torch.equal(given[~both], wanted[~both]):  # a token that may not be said is as far off in both
        return torch.inf
    spread = wanted[both].std().clamp(min=torch.finfo(torch.float32).tiny)
    return float((given[both] - wanted[both]).square().mean().sqrt() / spread)


@contextmanager
def _calls(backbone: PreTrainedModel) -> Iterator[set[str]]:
    """Names of the modules that are called meanwhile."""
    called: set[str] = set()
    with ExitStack() as hooks:
        for name, module in backbone.named_modules():

            def note(_module: nn.Module, _args: tuple[Any, ...], name: str = name) -> None:
                called.add(name)

            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield called


def _is_none(value: object) -> bool:
    return value is None


def _is_zero(value: Tensor | None) -> bool:
    return value is None or not value.any()
