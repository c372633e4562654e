"""A PEFT LoRA folder as the tensors of a block: converted exactly, or refused with all that is against it.

What an adapter adapts, with which rank and scaling, PEFT itself is asked: the adapter's settings are put on a model
without weights. So patterns, layers that are left out and rsLoRA mean here what they mean there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.errors import FaultsError
from sapt_core.pool.blocks.lora import PEFT_PREFIX, LoRABlocks, last_names
from sapt_core.settings import LoRAConfig

TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
TITLE = "The adapter cannot become a block:"

_SHOWN = 3
# Where A and B start. All others (PiSSA, OLoRA, LoftQ, ...) change the weights of the backbone too.
_STARTS = {True, False, None, "gaussian", "orthogonal", "eva"}
# Names, and what counts while an adapter is trained alone.
_ASIDE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_CURES = {
    "use_dora": "DoRA scales the whole weight by columns, which no sum of blocks does; train it without",
    "bias": "only bias=none has no other weights; train it so",
    "modules_to_save": "a block holds no whole modules; train it without",
    "target_parameters": "a block reaches linears alone; train it with target_modules",
    "trainable_token_indices": "a block holds no embeddings; train it without",
}


class _Settings(BaseModel):
    """What of ``adapter_config.json`` decides how an adapter computes; all else is ``model_extra``."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    init_lora_weights: Any = True

    def faults(self) -> list[str]:
        """What of the settings no block has."""
        if self.peft_type != "LORA":
            return [f"peft_type {self.peft_type}: the pool's blocks are LoRA; give an adapter of peft_type LORA"]
        found = []
        start = self.init_lora_weights
        if not isinstance(start, bool | str | None) or start not in _STARTS:
            found.append(
                f"init_lora_weights {start}: its backbone's weights were changed when it began; save it with "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        for name, value in sorted((self.model_extra or {}).items()):
            if name not in _ASIDE and value not in (None, False, "none", [], {}):
                found.append(f"{name} {_short(value)}: {_CURES.get(name, 'no block has that; train it without')}")
        return found


@dataclass(frozen=True)
class _Site:
    """One linear that an adapter adapts, as PEFT computes it."""

    shapes: Mapping[str, tuple[int, ...]]
    r: int
    scaling: float


def read_adapter(folder: Path, backbone: PreTrainedModel, bare: PreTrainedModel, pet: LoRAConfig) -> dict[str, Tensor]:
    """The tensors of a block that computes, with weight 1, what PEFT does with the adapter.

    A smaller rank is filled up with zeros, another scaling goes into B, linears that it leaves out get zeros.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; nothing else of it is read.
        backbone: that the pool is on; its linears are looked at, not their weights.
        bare: the same model without weights, which PEFT puts the adapter's settings on.
        pet: the pool's blocks.

    Returns:
        A (r, in) and B (out, r) of every linear of the pool, in float32, under their names in PEFT.

    Raises:
        FaultsError: with every fault of the folder.
    """
    faults: list[str] = []
    settings, tensors = _settings(folder, faults), _tensors(folder, faults)
    sites = None if settings is None else _sites(settings, bare, faults)
    if sites is None or tensors is None:
        raise FaultsError(TITLE, faults)
    blocks = LoRABlocks.for_backbone(backbone, pet)
    outside = [name for name in sites if name not in blocks.names]
    if outside:
        faults.append(
            f"it adapts {_listed(last_names(outside))}, and the pool's blocks {', '.join(pet.target_modules)} alone: "
            "give one of these, or a pool whose pet.target_modules has them all"
        )
    high = {name: site.r for name, site in sites.items() if name in blocks.names and site.r > pet.r}
    if high:
        faults.append(
            f"its rank is {max(high.values())} in {_listed(list(high))}, and the pool's blocks have {pet.r}: "
            "give one of at most that rank, or a pool of a higher pet.r"
        )
    faults += _tensor_faults(sites, tensors)
    if faults:
        raise FaultsError(TITLE, faults)
    state = {name: torch.zeros(shape) for name, shape in blocks.shapes.items()}
    for name, site in sites.items():
        a, b = (f"{PEFT_PREFIX}{name}.lora_{which}.weight" for which in "AB")
        state[a][: site.r] = tensors[a].float()
        # In float64: the pool's own scaling, which is divided out, is multiplied with again.
        ratio = site.scaling / blocks.scaling
        state[b][:, : site.r] = (tensors[b].double() * ratio).float()
    if lost := [name for name, value in state.items() if not value.isfinite().all()]:
        raise FaultsError(TITLE, [f"{_listed(lost)}: in the pool's scaling they are too large for float32"])
    return state


def _settings(folder: Path, faults: list[str]) -> _Settings | None:
    path = folder / SETTINGS
    if not path.is_file():
        faults.append(f"{path}: no such file; give a folder that PEFT's save_pretrained wrote")
        return None
    try:
        settings = _Settings.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults += [f"{SETTINGS}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return None
    except (OSError, ValueError) as error:
        faults.append(f"{SETTINGS} cannot be read: {error}")
        return None
    found = settings.faults()
    faults += found
    return None if settings.peft_type != "LORA" else settings


def _tensors(folder: Path, faults: list[str]) -> dict[str, Tensor] | None:
    path = folder / TENSORS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        cure = "adapter_model.bin is pickled and is not read; save it with safe_serialization=True"
        faults.append(f"{path}: no such file{f'; {cure}' if pickled else ''}")
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        faults.append(f"{TENSORS} is no safetensors file: {error}")
        return None


def _sites(settings: _Settings, bare: PreTrainedModel, faults: list[str]) -> dict[str, _Site] | None:
    """What PEFT adapts with these settings, by the linear's name; None if it can adapt nothing."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  seconds, and for adapters alone
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    given = settings.model_dump(exclude={"peft_type", "init_lora_weights", *(settings.model_extra or {})})
    given |= {name: given[name] or {} for name in ("rank_pattern", "alpha_pattern")}
    try:
        inject_adapter_in_model(LoraConfig(**given, init_lora_weights=False), bare, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        faults.append(f"{SETTINGS} does not go with {type(bare).__name__}: {' '.join(str(error).split())}")
        return None
    found = {}
    for name, module in bare.named_modules():
        if isinstance(module, LoraLayer):
            held = {"lora_A.weight": module.lora_A, "lora_B.weight": module.lora_B}
            shapes = {suffix: tuple(each.state_dict()["default.weight"].shape) for suffix, each in held.items() if each}
            found[name] = _Site(shapes, module.r["default"], module.scaling["default"])
    return found


def _tensor_faults(sites: Mapping[str, _Site], tensors: Mapping[str, Tensor]) -> list[str]:
    expected = {
        f"{PEFT_PREFIX}{name}.{suffix}": shape for name, site in sites.items() for suffix, shape in site.shapes.items()
    }
    faults = []
    if missing := sorted(expected.keys() - tensors.keys()):
        faults.append(f"{len(missing)} of {len(expected)} tensors are missing: {_listed(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        faults.append(f"{len(unknown)} tensors are none that its settings name on this backbone: {_listed(unknown)}")
    for name in sorted(expected.keys() & tensors.keys()):
        given, wanted = tuple(tensors[name].shape), expected[name]
        if given != wanted:
            faults.append(f"{name} is {_size(given)} and on this backbone, in this rank, it would be {_size(wanted)}")
        elif not tensors[name].is_floating_point():
            faults.append(f"{name} holds {str(tensors[name].dtype).removeprefix('torch.')}, no floating-point numbers")
        elif not tensors[name].float().isfinite().all():
            faults.append(f"{name} holds numbers that are not finite")
    return faults


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
