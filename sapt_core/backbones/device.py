"""Device and number format, asked of torch and never assumed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Literal

import torch

from sapt_core.errors import BackboneError

Precision = Literal["auto", "float32", "bfloat16"]
MIB = 2**20


def computes_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices natively, so that autocast gains time."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def default_device() -> torch.device:
    """The GPU this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def computed_in(device: torch.device, precision: Precision) -> Literal["float32", "bfloat16"]:
    """What ``precision`` comes to on ``device``: ``auto`` is bfloat16 where that is native."""
    if precision == "auto":
        return "bfloat16" if computes_bfloat16(device) else "float32"
    return precision


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to bfloat16 where ``precision`` comes to that."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computed_in(device, precision) == "bfloat16")


def resolved_precision(precision: Precision, weights: torch.dtype, gpus: float) -> Precision:
    """What ``auto`` means, once for all nodes: decided where a run is put together, and part of the stages' keys.

    Args:
        precision: as configured.
        weights: number format of the frozen weights; without autocast, matmuls are in it.
        gpus: what a worker is given. A machine that has none and starts workers that have takes them to compute in
            bfloat16, as all of the last years do.

    Raises:
        BackboneError: float32 is asked for, and the weights are of a half format.
    """
    half = weights in {torch.bfloat16, torch.float16}
    if precision == "float32" and half:
        raise BackboneError(
            "train.precision=float32 computes in float32, and the backbone's weights are "
            f"{str(weights).partition('.')[2]}: set backbone.dtype=float32 too, or train.precision=bfloat16"
        )
    if precision != "auto":
        return precision
    device = default_device()
    native = computes_bfloat16(device) or (gpus > 0 and device.type == "cpu")
    return "bfloat16" if half or native else "float32"


@cache
def keep_freed_memory(device: str) -> None:
    """Let this process keep small blocks that it frees, if it computes on a CPU, on Linux with glibc; else do nothing.

    A training step there frees and takes hundreds of tensors of megabytes. glibc's thresholds start at 128 KiB and
    grow with the largest block freed so far, so a small model's step hands its memory back to the kernel each time and
    faults it in anew, page by page. Set here, they grow no more:

    - Blocks of up to 32 MiB come from the heap, as they do with glibc once a large model has freed one. Larger ones
      are mapped: a hole in the heap does not fit the next batch's logits if they are a little longer, or if a small
      block was put into it meanwhile, and what lies in holes is never given back. Mapped, they cost what they hold.
    - Free memory at the heap's end is kept up to 512 MiB: a small model's whole step.
    """
    if device != "cpu" or not sys.platform.startswith("linux"):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 512 * MIB)
