"""What a model folder's weight files hold, read from their headers, and whether it is the model they are for."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from sapt_core.backbones.faults import UNREADABLE, is_lfs_pointer, reason
from sapt_core.errors import BackboneError

log = logging.getLogger(__name__)

_NAMES_SHOWN = 3


def check_fetched(folder: Path, names: Collection[str], name: str) -> None:
    """Refuse a folder that git left pointers in, in the place of files.

    Raises:
        BackboneError: naming them.
    """
    pointers = sorted(file for file in names if is_lfs_pointer(folder / file))
    if pointers:
        raise BackboneError(
            f"backbone {name}: Git LFS pointers stand in the place of {', '.join(pointers)}; "
            "run git lfs pull in that folder"
        )


def read_headers(folder: Path, config: PretrainedConfig, name: str) -> dict[str, Tensor]:
    """Every tensor of the weight files that transformers will load, with its shape and number format and no content.

    Raises:
        BackboneError: a file is missing, cut short or no safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, config, name):
        try:
            tensors |= load_state_dict(path, map_location="meta")
        except FileNotFoundError as error:
            raise BackboneError(
                f"backbone {name}: {path.name}, which model.safetensors.index.json names, is missing"
            ) from error
        except UNREADABLE as error:
            raise BackboneError(
                f"backbone {name}: {path.name} is damaged or cut short ({reason(error)}); fetch it again"
            ) from error
    return tensors


def own_dtype(folder: Path, config: PretrainedConfig, name: str) -> torch.dtype:
    """The number format that transformers takes for the checkpoint's own: its configuration's, else its tensors'.

    Raises:
        BackboneError: the weight files cannot be read.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    formats = (tensor.dtype for tensor in read_headers(folder, config, name).values())
    return next((dtype for dtype in formats if dtype.is_floating_point), torch.float32)


def check_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weight files whose names or shapes are not the model's: what is missing would be random.

    transformers itself says what it would load, renamed, fused and tied as it does, on tensors without content.

    Args:
        model: without weights, from the checkpoint's configuration.
        tensors: as ``read_headers`` gives them.
        name: what messages call the backbone.

    Raises:
        BackboneError: with counts and the first names, or the kind of quantisation.
    """
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised.quant_method
        raise BackboneError(
            f"backbone {name} is quantised ({kind}), and blocks are added to plain weights alone: give the model that "
            "it was made from, or save its weights dequantised; backbone.dtype=bfloat16 takes two bytes a weight"
        )
    try:
        found: Any = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(tensors),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise BackboneError(
            f"backbone {name}: its weight files do not fit its configuration ({reason(error)})"
        ) from error
    _, loaded = found
    check_loaded(loaded, name)
    unused = sorted(loaded["unexpected_keys"])
    if unused:
        log.warning(
            "backbone %s: %d of %d tensors in its weight files are not used (%s)",
            name,
            len(unused),
            len(tensors),
            _first(unused),
        )


def check_loaded(loaded: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose weights did not come from its files.

    Args:
        loaded: transformers' loading info.
        name: what messages call the backbone.

    Raises:
        BackboneError: with counts and the first names.
    """
    missing, unused = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    shapes = [f"{key} {tuple(there)}, not {tuple(wanted)}" for key, there, wanted in sorted(loaded["mismatched_keys"])]
    faults = [f"{len(missing)} tensors of the model are missing ({_first(missing)})"] if missing else []
    faults += [f"{len(shapes)} have another shape ({_first(shapes)})"] if shapes else []
    if not faults:
        return
    faults += [f"{len(unused)} there belong to nothing ({_first(unused)})"] if unused else []
    raise BackboneError(
        f"backbone {name}: the weight files do not hold the model that config.json describes, so its weights would be "
        f"random: {'; '.join(faults)}. Save the model itself by save_pretrained, without a wrapper around it, or give "
        "the config.json that belongs to these files"
    )


def weight_files(folder: Path, config: PretrainedConfig, name: str) -> list[Path]:
    """The files that transformers loads: one, or all that the index names."""
    single = getattr(config, "transformers_weights", None) or "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if (folder / single).is_file():
        return [folder / single]
    if not index.is_file():
        raise BackboneError(
            f"backbone {name}: neither {single} nor {index.name} there, the names that save_pretrained gives"
        )
    try:
        content = json.loads(index.read_bytes())
        shards = set(content["weight_map"].values())
    except UNREADABLE as error:
        raise BackboneError(f"backbone {name}: {index.name} is damaged ({reason(error)}); fetch it again") from error
    if "metadata" not in content:
        raise BackboneError(
            f'backbone {name}: {index.name} has no metadata, which transformers reads: add "metadata": {{}}'
        )
    outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise BackboneError(f"backbone {name}: {index.name} names {outside[0]!r}, which is no file of the folder")
    return [folder / shard for shard in sorted(shards)]


def _first(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return f"{shown}, …" if len(names) > _NAMES_SHOWN else shown
