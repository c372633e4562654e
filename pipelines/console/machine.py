"""The machine that figures were made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from sapt_core.backbones.device import computed_in, default_device
from sapt_core.settings import TrainConfig


class Machine(BaseModel):
    """What the comparison was run from: of a cluster, the driver's node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    gpu: str | None
    dtype: str


def machine_of(config: TrainConfig) -> Machine:
    """The machine that this process runs on, and the numbers it trains in."""
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        dtype=computed_in(default_device(), config.precision),
    )


def _cpu() -> str:
    """The processor's model; the standard library knows its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
