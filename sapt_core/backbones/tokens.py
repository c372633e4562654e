"""A backbone's tokenizer, and the ids that it and the model must share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.errors import BackboneError


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; it pads with its end token if it has no padding.

    Raises:
        BackboneError: it cannot be loaded, or has no padding and no end token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers has no kind of its own: what it cannot read is an Exception and no more
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
            raise
        pieces = sorted(path.name for path in folder.glob("*.model"))
        if pieces and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
            raise BackboneError(
                f"the tokenizer of {name} is a SentencePiece file alone ({pieces[0]}): install sentencepiece "
                "(pip install sentencepiece), or save the tokenizer with its tokenizer.json where that is installed"
            ) from error
        raise BackboneError(f"the tokenizer of {name} cannot be loaded: {reason(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BackboneError(f"the tokenizer of {name} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a model that lacks a row for an id that it would be given, or cannot tell where its decoder starts.

    Args:
        model: with or without weights.
        tokenizer: of the same folder.
        name: what messages call the backbone.

    Raises:
        BackboneError: with all such ids, or the fields of config.json that are missing.
    """
    faults = []
    layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    rows = min(layer.weight.shape[0] for layer in layers if layer is not None)
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if beyond:
        roles = {tokenizer.pad_token: "padding", tokenizer.eos_token: "end of text"}
        first = sorted(beyond.items(), key=lambda pair: (pair[0] not in roles, pair[1]))[:3]
        shown = ", ".join(f"{token!r}{f' ({roles[token]})' if token in roles else ''} has {i}" for token, i in first)
        faults.append(
            f"{len(beyond)} tokens of the tokenizer have ids behind the model's {rows} embeddings: {shown}; call "
            "resize_token_embeddings(len(tokenizer)) on the model and save it, or take the tokens out of the tokenizer"
        )
    own = {"config.json": model.config, "generation_config.json": model.generation_config}
    for file, values in own.items():
        for field in ("pad_token_id", "decoder_start_token_id"):
            index = getattr(values, field, None)
            if model.config.is_encoder_decoder and index is not None and not 0 <= index < rows:
                faults.append(f"{field} in {file} is {index}, and the model has {rows} embeddings")
    if model.config.is_encoder_decoder and tokenizer.eos_token_id is not None and not faults:
        faults += _decoder_faults(model, int(tokenizer.eos_token_id))
    if faults:
        raise BackboneError(f"backbone {name}: {'; '.join(faults)}")


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder reads in training (B, L) of labels (B, L): the class itself is asked.

    Classes that do not say, such as M2M100's and Blenderbot's, shift the labels and put the configured start in front.

    Raises:
        ValueError: the configuration has no start or no padding.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        asked: Tensor = model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        return asked
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or pad is None:
        raise ValueError("the configuration has no decoder_start_token_id or no pad_token_id")
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted < 0, pad)


def decoder_start(model: PreTrainedModel, label: int) -> int:
    """The id that an encoder-decoder's decoder reads first in training, of an answer that is ``label`` alone."""
    return int(decoder_inputs(model, torch.tensor([[label, -100]]))[0, 0])


def answer_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How answers start and end, and nothing else of a checkpoint's own taste, which must not leak into scores.

    Answers are taught with the tokenizer's end token and from the decoder's start in training. So generation starts
    from the same, and stops at that end as well as at the model's own, such as the end of a chat's turn.
    """
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if end is not None))
    start = own.decoder_start_token_id
    if model.config.is_encoder_decoder and tokenizer.eos_token_id is not None:
        start = decoder_start(model, int(tokenizer.eos_token_id))
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=own.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=start,
    )


def _decoder_faults(model: PreTrainedModel, label: int) -> list[str]:
    """Why no answer can be put in front of the decoder: the class itself is asked, as not all read the same fields."""
    try:
        decoder_start(model, label)
    except UNREADABLE as error:
        fields: dict[str, Any] = {field: getattr(model.config, field, None) for field in _DECODER_FIELDS}
        missing = [field for field, value in fields.items() if value is None]
        return [f"config.json lacks {' and '.join(missing)}: set it" if missing else reason(error)]
    return []


_DECODER_FIELDS = ("decoder_start_token_id", "pad_token_id")
