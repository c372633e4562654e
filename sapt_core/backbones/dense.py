"""A GGUF file as a plain model folder: dense weights, configuration and tokenizer, made once a machine.

On purpose no weight stays packed: blocks are added to plain linears, whose gradient flows, and a packed one has
neither. Where transformers finds kernels for packed weights it would keep them packed, so it is told not to.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from sapt_core.backbones.checkpoint import check_fetched, check_loaded
from sapt_core.backbones.faults import UNREADABLE, reason
from sapt_core.backbones.files import cache_folder, file_digest, remember
from sapt_core.backbones.rotary import llama3_scaling
from sapt_core.errors import BackboneError, ServiceError
from sapt_core.io.hashing import canonical_hash

log = logging.getLogger(__name__)

Format = Literal["auto", "float32", "bfloat16"]

# Raised whenever another folder is made of the same file.
VERSION = 1

_MAGIC = b"GGUF"

# What the reader says of a number that no release until now gave a kind.
_UNKNOWN_KIND = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")
_ARCHITECTURE = "general.architecture"
_TABLES = "rope_"  # what tensors are called that scale rotary positions

_RECORD = "made_of_gguf.json"

# Values, not blocks: of these a file's weights may be as they are.
_PLAIN = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}

# Sections of the metadata, which transformers lists among the architectures.
_NO_ARCHITECTURES = {"general", "tokenizer"}

# How llama.cpp cuts a text in front of byte-level merges, by ``tokenizer.ggml.pre``, where transformers does not know
# the name: it takes GPT-2's way for all of these, which leaves digits together and joins them with blanks before them.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}


def dense_folder(file: Path, digest: str, dtype: Format, name: str) -> Path:
    """The folder of the model in a GGUF file, made now if this machine has not made it yet.

    Args:
        file: the GGUF file; of what lies beside it nothing is read.
        digest: its sha256.
        dtype: number format of the dense weights; auto is bfloat16 for a file of bfloat16, float32 for all others.
        name: what messages call the backbone.

    Raises:
        BackboneError: it is damaged, of a kind that cannot be read, or would become another model.
        ServiceError: the cache cannot be written.
    """
    folder = dense_place(digest, dtype)
    if _is_whole(folder):
        return folder
    partial = folder.with_name(f".partial-{uuid4().hex}")
    try:
        shutil.rmtree(folder, ignore_errors=True)  # damaged since it was made
        partial.mkdir(parents=True)
        log.info("backbone %s: %s is made a dense model in %s, once", name, file.name, folder)
        write_dense(file, partial, dtype, name)
        made = {path.name: file_digest(path) for path in partial.iterdir()}
        (partial / _RECORD).write_text(json.dumps(made, indent=1), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first otherwise
                raise
    except (OSError, SafetensorError) as error:
        raise ServiceError(
            f"{folder.parent} cannot be used ({reason(error)}): set XDG_CACHE_HOME to a folder with free space, four "
            "bytes a weight, that this user can write to"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for each, sha in made.items():
        remember(folder / each, sha)
    return folder


def dense_place(digest: str, dtype: Format) -> Path:
    """Where this machine keeps what it made of a GGUF file; other releases of the readers may make another model."""
    readers = [version("transformers"), version("gguf"), VERSION]
    return cache_folder() / "dense" / canonical_hash([digest, dtype, readers])


def write_dense(file: Path, folder: Path, dtype: Format, name: str) -> PreTrainedModel:
    """Write a GGUF file's model and tokenizer as ``save_pretrained`` does.

    Args:
        file: the GGUF file.
        folder: is there, and empty.
        dtype: number format of the dense weights, as for ``dense_folder``.
        name: what messages call the backbone.

    Returns:
        The model, as it was written.

    Raises:
        BackboneError: as for ``dense_folder``.
    """
    reader = read_gguf(file, name)
    alone = folder / "source"
    alone.mkdir()
    # Alone: transformers would take a tokenizer_config.json that lies beside it.
    (alone / "model.gguf").symlink_to(file.resolve())
    of: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(alone, **of)
        if scaling := _scaling(reader):
            config.rope_parameters = {**config.rope_parameters, **scaling}
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        found: Any = kind.from_pretrained(
            alone,
            config=config,
            dtype=_format(reader) if dtype == "auto" else getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **of,
        )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(alone, **of)
    except Exception as error:  # tokenizers has no kind of its own: what it cannot read is an Exception and no more
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
            raise
        raise BackboneError(f"backbone {name}: {file.name} cannot be read: {reason(error)}") from error
    model: PreTrainedModel = found[0]
    loaded: Mapping[str, Any] = found[1]
    check_loaded(loaded, name)
    _check_read(reader, model, loaded, name)
    _set_splitting(tokenizer, reader, name)
    _set_ends(model, reader)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(alone)
    return model


def read_gguf(file: Path, name: str) -> GGUFReader:
    """What a GGUF file says of its model and tensors, if transformers can read such a model.

    Raises:
        BackboneError: it is none, damaged or of a kind that cannot be read, with the kinds that can.
    """
    check_fetched(file.parent, [file.name], name)
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise BackboneError(f"backbone {name}: {file.name} is no GGUF file")
    try:
        reader = GGUFReader(file)
    except (*UNREADABLE, IndexError, OverflowError, MemoryError) as error:
        if number := _UNKNOWN_KIND.search(str(error)):
            raise BackboneError(f"backbone {name}: {file.name}: {_unreadable([number[1]])}") from error
        raise BackboneError(
            f"backbone {name}: {file.name} is damaged or cut short ({reason(error)}); fetch it again"
        ) from error
    if faults := list(_faults(reader)):
        raise BackboneError(f"backbone {name}: {file.name}: {'; '.join(faults)}")
    return reader


def _faults(reader: GGUFReader) -> Iterable[str]:
    kind, parts = _value(reader, "general.type", "model"), int(_value(reader, "split.count", 1))
    if kind != "model":
        yield f"holds no whole model (general.type is {kind})"
    if parts > 1:
        yield f"is one of {parts} parts: join them (llama-gguf-split --merge) and give the whole"
    architecture = _value(reader, _ARCHITECTURE, None)
    names = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - _NO_ARCHITECTURES
    # transformers lists its own names, and llama.cpp writes some without the underscore, or with another sign for it.
    if _plain(str(architecture)) not in {_plain(each) for each in names}:
        yield f"architecture {architecture} cannot be read; these can: {', '.join(sorted(names))}"
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    if unknown := sorted(kind.name for kind in kinds if kind not in readable_kinds()):
        yield _unreadable(unknown)
    scaled = _value(reader, f"{architecture}.rope.scaling.type", "none")
    tables = ", ".join(tensor.name for tensor in reader.tensors if tensor.name.startswith(_TABLES))
    if (scaled != "none" and architecture not in {"gpt-oss", "gpt_oss"}) or (tables and not _scaling(reader)):
        by = f"a table ({tables})" if tables else f"rope.scaling.type {scaled}"
        yield f"its rotary positions are scaled by {by}, which transformers leaves out: give the model as safetensors"


def _scaling(reader: GGUFReader) -> Mapping[str, Any] | None:
    """What a table of rotary positions stands for, which transformers passes over; None if there is none known."""
    tables = [tensor for tensor in reader.tensors if tensor.name.startswith(_TABLES)]
    if [tensor.name for tensor in tables] != ["rope_freqs.weight"] or _value(reader, _ARCHITECTURE, None) != "llama":
        return None
    theta, width = (_value(reader, f"llama.rope.{key}", 0) for key in ("freq_base", "dimension_count"))
    return llama3_scaling(tables[0].data, float(theta), int(width)) if theta and width else None


def _unreadable(kinds: Iterable[str]) -> str:
    readable = ", ".join(sorted(kind.name for kind in readable_kinds()))
    return f"weights of kind {', '.join(kinds)} cannot be read; these can: {readable}"


@cache
def readable_kinds() -> frozenset[GGMLQuantizationType]:
    """The kinds of weights that can be made dense; asked of the reader, which knows more with each release."""

    def is_readable(kind: GGMLQuantizationType) -> bool:
        _, size = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return frozenset(filter(is_readable, GGMLQuantizationType))


def _value(reader: GGUFReader, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _format(reader: GGUFReader) -> torch.dtype:
    """Blocks hold scales of half a float's digits times small integers, which bfloat16 would round."""
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    return torch.bfloat16 if GGMLQuantizationType.BF16 in kinds and kinds <= _PLAIN else torch.float32


def _check_read(reader: GGUFReader, model: PreTrainedModel, loaded: Mapping[str, Any], name: str) -> None:
    """Refuse a file with biases that the class has no place for; tell of other tensors that nothing read.

    The older of transformers' two readers passes over what it cannot name, without a word.
    """
    architecture = str(_value(reader, _ARCHITECTURE, ""))
    if architecture in GGUF_CONFIG_ARCHS:
        left = sorted(loaded["unexpected_keys"])
    else:
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)()  # type: ignore[no-untyped-call]
        read: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
        known = {each.removesuffix(".weight") for each in read}
        left = sorted(each.name for each in reader.tensors if each.name.removesuffix(".weight") not in known)
    left = [each for each in left if not each.startswith(_TABLES)]  # read, or refused
    if not left:
        return
    shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
    if any(each.endswith(".bias") for each in left):
        raise BackboneError(
            f"backbone {name}: {type(model).__name__}, as transformers makes it of the file, has no place for "
            f"{len(left)} of its {len(reader.tensors)} tensors ({shown}), so it would be another model: give it as "
            "safetensors"
        )
    log.warning("backbone %s: %d of %d tensors are not used (%s)", name, len(left), len(reader.tensors), shown)


def _set_splitting(tokenizer: PreTrainedTokenizerBase, reader: GGUFReader, name: str) -> None:
    """Cut texts in front of the merges as the model was taught, where transformers does not know how."""
    if _value(reader, "tokenizer.ggml.model", None) != "gpt2":
        return
    way = _value(reader, "tokenizer.ggml.pre", "default")
    if way in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif way not in _AS_GPT2 and way not in GGUF_PRE_TOKENIZER_SPLITS:
        log.warning(
            "backbone %s: how its tokenizer cuts texts (tokenizer.ggml.pre=%s) is not known here, and GPT-2's way is "
            "taken: tokens may be others than the model was taught with; the model's own tokenizer as a folder is safe",
            name,
            way,
        )


def _set_ends(model: PreTrainedModel, reader: GGUFReader) -> None:
    """Let answers end at the end of a turn too, which a file may give beside the end of text."""
    settings = model.generation_config
    ends = [settings.eos_token_id] if isinstance(settings.eos_token_id, int) else list(settings.eos_token_id or ())
    turn = _value(reader, "tokenizer.ggml.eot_token_id", None)
    if turn is not None and int(turn) not in ends:
        settings.eos_token_id = [*ends, int(turn)]


def _is_whole(folder: Path) -> bool:
    try:
        made = json.loads((folder / _RECORD).read_bytes())
        return all(file_digest(folder / each) == digest for each, digest in made.items())
    except (OSError, ValueError, AttributeError):
        return False
