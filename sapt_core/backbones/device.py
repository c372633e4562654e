"""Device and number format, asked of torch and never assumed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


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


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to bfloat16 where ``precision`` asks for it or, with ``auto``, where it is native."""
    enabled = precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@cache
def keep_freed_memory(device: str) -> None:
    """Let this process keep what it frees, if it computes on a CPU, on Linux with glibc; else nothing happens.

    A training step there frees and takes hundreds of tensors of megabytes. glibc may hand each back to the
    kernel and fault it in anew, page by page, which took a third of the time in Ray's workers.
    """
    if device != "cpu" or not sys.platform.startswith("linux"):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
