"""A block as a plain PEFT adapter folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from sapt_core.backbones.reference import stored_model_config
from sapt_core.errors import SnapshotError
from sapt_core.io.blobs import BlobStore
from sapt_core.methods.base import Method
from sapt_core.settings import FullConfig, LoRAConfig, PromptConfig
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
    part = folder.with_name(f".{folder.name}.{uuid4().hex}")
    part.mkdir(parents=True)
    try:
        store.fetch_to(manifest.blocks[index], part / "adapter_model.safetensors")
        _peft_config(manifest, store).save_pretrained(str(part))
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
