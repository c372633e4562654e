"""A block, or a mixture of blocks, as a plain PEFT adapter folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor

from sapt_core.backbones.loading import load_embeddings
from sapt_core.backbones.reference import stored_model_config
from sapt_core.data.encoding import PromptEncoder
from sapt_core.errors import SnapshotError
from sapt_core.io.blobs import BlobStore
from sapt_core.judging.decoding import pooled_embeddings
from sapt_core.methods.base import Method
from sapt_core.pool.model import SaptModel
from sapt_core.settings import FullConfig, LoRAConfig, PromptConfig
from sapt_core.versions.adapters import TENSORS
from sapt_core.versions.loading import load_blob, load_blocks
from sapt_core.versions.manifest import Manifest


def export_block(manifest: Manifest, index: int, store: BlobStore, folder: Path) -> None:
    """Write one block as a plain PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``.

    PEFT applies it with weight 1, as the pool does an input that attends to nothing else. The folder appears whole or
    not at all.

    Args:
        manifest: the version.
        index: of the block, oldest first from 0.
        store: holds its blobs.
        folder: is made; must be empty or not there yet.

    Raises:
        SnapshotError: no such block or no block that PEFT has a kind for, or the folder holds something.
        StoreError: the block's blob is missing or damaged.
    """
    faults = export_faults(manifest, folder)
    if not 0 <= index < len(manifest.blocks):
        faults.append(f"There is no block {index}; the version has blocks 0 to {len(manifest.blocks) - 1}")
    if faults:
        raise SnapshotError(". ".join(faults))
    with _whole_folder(folder) as part:
        store.fetch_to(manifest.blocks[index], part / TENSORS)
        _peft_config(manifest, store).save_pretrained(str(part))


def export_mixture(manifest: Manifest, weights: Mapping[str, float], store: BlobStore, folder: Path) -> None:
    """Write the pool with fixed weights as one plain PEFT adapter: what it computes for an input with this mixture.

    Low-rank blocks become one of the sum of their ranks, ``Σ_i a_i s B_i A_i = [a_i s B_i]_i [A_i]_i``, so nothing is
    lost; soft prompts are added up. The folder appears whole or not at all.

    Args:
        manifest: the version.
        weights: by the blocks' names (``Manifest.block_names``); blocks that are left out have none.
        store: holds its blobs.
        folder: is made; must be empty or not there yet.

    Raises:
        SnapshotError: no such mixture or no block that PEFT has a kind for, or the folder holds something.
        StoreError: a blob is missing or damaged.
    """
    if faults := [*export_faults(manifest, folder), *mixture_faults(manifest, weights)]:
        raise SnapshotError(". ".join(faults))
    names = manifest.block_names
    shares = [weights[name] for name in names if weights.get(name)]
    blocks = [load_blob(manifest.blocks[place], store) for place, name in enumerate(names) if weights.get(name)]
    pet = manifest.pet
    if isinstance(pet, LoRAConfig):
        mixed = _side_by_side(blocks, [share * pet.lora_alpha / pet.r for share in shares])
        rank = pet.r * len(blocks)
        pet = pet.model_copy(update={"r": rank, "lora_alpha": rank})  # all scaling is in B
    else:
        mixed = {
            name: torch.tensordot(torch.tensor(shares), torch.stack([block[name] for block in blocks]), dims=1)
            for name in blocks[0]
        }
    with _whole_folder(folder) as part:
        save_file(mixed, part / TENSORS)
        _peft_config(manifest.model_copy(update={"pet": pet}), store).save_pretrained(str(part))


def mixture_of(manifest: Manifest, prompt: str, store: BlobStore) -> dict[str, float]:
    """The weights that a full prompt is answered with, by the blocks' names.

    Raises:
        SnapshotError: the method has no shared attention, which would choose them.
        StoreError: a blob is missing or damaged.
        BackboneError: the backbone cannot be loaded.
    """
    if manifest.attention is None:
        raise SnapshotError(f"Method {manifest.method.name} has no attention that chooses weights; give them")
    backbone, tokenizer = load_embeddings(manifest.backbone, store)
    pool = load_blocks(manifest, store, backbone, ())
    encoder = PromptEncoder(
        tokenizer,
        max_source_tokens=max(task.max_source_tokens for task in manifest.tasks),
        is_encoder_decoder=bool(backbone.config.is_encoder_decoder),
        joined=manifest.backbone.joined,
    )
    rows = [encoded.row for encoded in encoder.prompts("none", "", [prompt])]
    with torch.no_grad():
        (weights,) = pool.select(pooled_embeddings(SaptModel(backbone, pool), tokenizer, rows)).tolist()
    return dict(zip(manifest.block_names, weights, strict=True))


def mixture_faults(manifest: Manifest, weights: Mapping[str, float]) -> list[str]:
    """What is against a mixture of a version's blocks."""
    faults = []
    if unknown := sorted(weights.keys() - set(manifest.block_names)):
        faults.append(f"There is no block {', '.join(unknown)}; there are: {', '.join(manifest.block_names)}")
    faults += [f"The weight of {name} is no finite number" for name, share in weights.items() if not isfinite(share)]
    if not any(weights.values()):
        faults.append("No block has a weight: the mixture is the bare backbone")
    return faults


def export_faults(manifest: Manifest, folder: Path) -> list[str]:
    """What is against exporting any block of a version into a folder."""
    faults = []
    if isinstance(manifest.pet, FullConfig):
        faults.append("The version is a whole set of weights (pet.type=full), which is no PEFT adapter")
    elif type(manifest.method).blocks is not Method.blocks:
        faults.append(f"The blocks of method {manifest.method.name} are of its own kind, which PEFT has not")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        faults.append(f"{folder} is not an empty folder; give one that is empty or not there yet")
    return faults


def _side_by_side(blocks: Sequence[Mapping[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """LoRA blocks as one: A (Σr, in) one below the other, B (out, Σr) side by side and times its factor each."""
    mixed = {}
    for name in blocks[0]:
        parts = [block[name] for block in blocks]
        if "lora_B" in name:
            scaled = [(part.double() * factor).float() for part, factor in zip(parts, factors, strict=True)]
            mixed[name] = torch.cat(scaled, dim=1)
        else:
            mixed[name] = torch.cat(parts)
    return mixed


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of an empty one or of none; nothing is left of a failure."""
    part = folder.with_name(f".{folder.name}.{uuid4().hex}")
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _peft_config(manifest: Manifest, store: BlobStore) -> Any:
    from peft import LoraConfig, PromptTuningConfig, TaskType  # noqa: PLC0415  seconds, and for exports alone

    pet = manifest.pet
    common: dict[str, Any] = {
        "base_model_name_or_path": manifest.backbone.path,
        "revision": manifest.backbone.revision,
        "inference_mode": True,
    }
    if isinstance(pet, LoRAConfig):
        return LoraConfig(
            r=pet.r,
            lora_alpha=pet.lora_alpha,  # type: ignore[arg-type]  # a fraction does as well
            lora_dropout=pet.lora_dropout,
            target_modules=list(pet.target_modules),
            **common,
        )
    assert isinstance(pet, PromptConfig)  # noqa: S101 - export_block takes no other kind
    encoder_decoder = stored_model_config(manifest.backbone, store).is_encoder_decoder
    return PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM,
        num_virtual_tokens=pet.length,
        # PEFT's default for an encoder-decoder puts a second prompt in front of the decoder.
        num_transformer_submodules=1,
        **common,
    )
