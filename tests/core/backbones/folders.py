"""Model folders on disk, whole or spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sapt_core.config.experiment import ExperimentConfig
from sapt_core.settings import BackboneConfig
from tests.core.tiny import targets, tiny_backbone, tiny_tokenizer

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def saved(folder: Path, name: str = "t5", *, tokenizer: bool = True) -> Path:
    tiny_backbone(name).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def config(path: Path | str, **changes: str) -> BackboneConfig:
    return BackboneConfig(path=str(path), **changes)


def experiment(folder: Path, name: str = "t5", **train: object) -> ExperimentConfig:
    pet = {"target_modules": list(targets(name))}
    return ExperimentConfig(
        backbone={"path": str(folder)},
        benchmark={"suite": "synthetic", "max_source_tokens": 64, "max_target_tokens": 10},
        pet=pet,
        generator={"pet": pet, "max_tokens": 80},
        train=train,
    )


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The folder with its weights changed."""
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return folder
