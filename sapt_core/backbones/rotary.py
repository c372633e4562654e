"""Rotary positions that a GGUF file scales by a table, as the configuration that transformers makes the table from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of Llama 3.1, 3.2 and 3.3, which differ in the factor alone; the table does not say these.
LOW, HIGH, POSITIONS = 1.0, 4.0, 8192


def llama3_scaling(table: NDArray[Any], theta: float, width: int) -> dict[str, Any] | None:
    """The fields of ``rope_parameters`` that a table of divisors stands for.

    Llama 3.1 (Meta, 2024) leaves short wavelengths as they are, stretches long ones by a factor, and goes over from the
    one to the other in between.

    Args:
        table: what each frequency is divided by (width / 2), the fastest first.
        theta: base of the frequencies.
        width: of a head's rotated part.

    Returns:
        None if it is not such a table.
    """
    factor = float(table.max())
    turns = POSITIONS / (2 * math.pi * theta ** (np.arange(0, width, 2) / width))
    kept = np.clip((turns - LOW) / (HIGH - LOW), 0, 1)
    if table.shape != kept.shape or not np.allclose(table, 1 / ((1 - kept) / factor + kept), rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": POSITIONS,
    }
