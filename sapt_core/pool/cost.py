"""What a version costs: parameters that a task trains, bytes that are kept, and the forward against the backbone's."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sapt_core.data.collate import ALL_SHARE, Batch, Sharing
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.pool.blocks.lora import LoRABlocks
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import PETPool
from sapt_core.settings import LoRAConfig


def bare_model(backbone: PreTrainedModel, sharing: Sharing = ALL_SHARE) -> SaptModel:
    """The backbone with a pool of no blocks; ``sharing`` as of ``SaptModel``."""
    pool = PETPool(LoRABlocks({}, LoRAConfig()), embedding_matrix(backbone).shape[1], None)
    return SaptModel(backbone, pool, sharing)


@torch.no_grad()
def forward_cost(model: SaptModel, batch: Batch) -> float:
    """Floating-point operations of a forward with the pool, as a multiple of those without.

    Counted, not timed, so that the figure is the same on every machine. Blocks that no row of the batch uses
    cost nothing.

    Args:
        model: a version on its backbone.
        batch: rows with labels.
    """
    counts = []
    for each in (model, bare_model(model.backbone)):
        with each.mode(training=False), FlopCounterMode(display=False) as counter:
            each(batch)
        counts.append(counter.get_total_flops())
    return float(counts[0] / counts[1])
