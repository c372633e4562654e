"""Batched decoding of prompts, with the attention weights that each answer was made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sapt_core.backbones.device import Precision, autocast
from sapt_core.data.collate import Together
from sapt_core.data.prepare import PreparedTask
from sapt_core.data.rendering import ends_of
from sapt_core.errors import BackboneError
from sapt_core.judging.choices import Choices, task_choices
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.pool.model import SaptModel
from sapt_core.settings import EvaluationConfig


def answer(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    max_new_tokens: int,
    precision: Precision,
    choices: Sequence[Choices] = (),
    ends: Sequence[int] = (),
) -> tuple[list[str], Tensor]:
    """Decode an answer for every prompt, without sampling.

    Args:
        model: backbone with its pool; no block needs to be frozen.
        tokenizer: of the backbone.
        rows: with ``prompt_ids`` and, where the query leaves the definition out, ``query_start``.
        config: batch size and beams.
        max_new_tokens: longest answer.
        precision: of the matmuls.
        choices: for each row the only answers that it may get, however long they are; none: it may get any.
        ends: ids that end an answer beside those of the backbone, such as the end of a chat's turn.

    Returns:
        Answers in the order of ``rows`` and the mixture weights (N, T) they were made with.

    Raises:
        BackboneError: as ``require_beams``.
    """
    require_beams(config, model.sharing.answering)
    collator = model.collator(tokenizer.pad_token_id)
    device = next(model.backbone.parameters()).device
    lengths = [len(row["prompt_ids"]) for row in rows]
    groups = _groups(lengths, model.sharing.answering)
    batches = [group[i : i + config.batch_size] for group in groups for i in range(0, len(group), config.batch_size)]
    options = {"eos_token_id": _with(model.backbone.generation_config, ends)} if ends else {}
    texts = [""] * len(rows)
    weights: list[Tensor] = [torch.empty(0)] * len(rows)
    with model.mode(training=False):
        for indices in batches:
            batch = collator.prompts([rows[index] for index in indices]).to(device)
            given = [choices[index] for index in indices] if choices else []
            with autocast(device, precision):
                generated, mixture = model.generate(
                    batch,
                    allowed=_following(given, tokenizer.pad_token_id) if given else None,
                    max_new_tokens=max((each.longest for each in given), default=max_new_tokens),
                    num_beams=config.num_beams,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    **options,
                )
            answers = tokenizer.batch_decode(generated, skip_special_tokens=True)
            for place, (ids, each) in enumerate(zip(generated.tolist(), given, strict=False)):
                answers[place] = each.read(ids) or answers[place]  # as it was written: what is decoded may differ
            for index, text, row in zip(indices, answers, mixture.cpu(), strict=True):
                texts[index] = text.strip()
                weights[index] = row
    return texts, torch.stack(weights)


def answer_task(
    model: SaptModel,
    tokenizer: PreTrainedTokenizerBase,
    task: PreparedTask,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    joined: bool,
    max_target_tokens: int,
    precision: Precision,
) -> tuple[list[str], Tensor]:
    """``answer`` to rows of a prepared task: none but its labels, if it has any, and up to the end that it is taught.

    Args:
        model, tokenizer, config, precision: as of ``answer``.
        task: that the rows are of.
        rows: of one of its splits.
        joined: whether prompt and answer are ids of one text.
        max_target_tokens: longest answer.
    """
    return answer(
        model,
        tokenizer,
        rows,
        config,
        max_new_tokens=max_target_tokens,
        precision=precision,
        choices=task_choices(task, rows, tokenizer, model, joined=joined, max_target_tokens=max_target_tokens),
        ends=ends_of(task.template, tokenizer),
    )


def _with(config: GenerationConfig, ends: Sequence[int]) -> list[int]:
    """The ids that end an answer of the backbone, and more."""
    own = config.eos_token_id
    return list(dict.fromkeys([*(own if isinstance(own, list) else [] if own is None else [own]), *ends]))


def require_beams(config: EvaluationConfig, together: Together) -> None:
    """Refuse several beams where no two rows may share a batch, since beams are such rows.

    Raises:
        BackboneError: there are several.
    """
    if together == "alone" and config.num_beams > 1:
        raise BackboneError(
            f"evaluation.num_beams={config.num_beams}: on this backbone the rows of a batch change each other's "
            "answers, and so do beams: set it to 1"
        )


def _groups(lengths: Sequence[int], together: Together) -> list[list[int]]:
    """Rows that may share batches, by index: those of like length come together, to save padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if together == "any":
        return [order]
    if together == "alike":
        return [list(alike) for _, alike in groupby(order, key=lengths.__getitem__)]
    return [[index] for index in order]


def _following(choices: Sequence[Choices], pad: int) -> Callable[[int, list[int]], list[int]]:
    """What ``SaptModel.generate`` asks for. A row whose label has ended, or a beam that is none, has padding alone."""
    return lambda row, tokens: choices[row].after(tokens) or [pad]


def pooled_embeddings(
    model: SaptModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], batch_size: int = 64
) -> Tensor:
    """Pooled embeddings (N, D) of the prompts of ``rows``: all that the attention ever sees of them."""
    collator = model.collator(tokenizer.pad_token_id)
    device = embedding_matrix(model.backbone).device
    batches = [collator.prompts(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    nothing = torch.empty(0, embedding_matrix(model.backbone).shape[1])
    return torch.cat([nothing, *(model.pooled(batch.to(device)).cpu() for batch in batches)])
