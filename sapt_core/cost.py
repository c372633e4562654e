"""What a version costs: parameters that a task trains, bytes that are kept, and the forward against the backbone's."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sapt_core.blobs import BlobStore
from sapt_core.blocks.base import embedding_matrix
from sapt_core.blocks.lora import LoRABlocks
from sapt_core.collate import Batch
from sapt_core.model import SaptModel
from sapt_core.pool import PETPool
from sapt_core.settings import LoRAConfig
from sapt_core.snapshot import Manifest, load_blob, load_router


def bare_model(backbone: PreTrainedModel) -> SaptModel:
    """The backbone with a pool of no blocks."""
    return SaptModel(backbone, PETPool(LoRABlocks({}, LoRAConfig()), embedding_matrix(backbone).shape[1], None))


@torch.no_grad()
def forward_cost(model: SaptModel, batch: Batch) -> float:
    """Floating-point operations of a forward with the pool, as a multiple of those without.

    Counted, not timed, so that the figure is the same on every machine. Blocks that no row of the batch uses
    cost nothing.

    Args:
        model: a version on its backbone; is taken off it.
        batch: rows with labels.
    """
    counts = []
    for each in (model, bare_model(model.backbone)):
        with FlopCounterMode(display=False) as counter:
            each.eval()(batch)
        each.detach()
        counts.append(counter.get_total_flops())
    return float(counts[0] / counts[1])


def trained_parameters(manifest: Manifest, store: BlobStore) -> int:
    """How many numbers were trained for the newest task: its block and, with shared attention, router and key."""
    block = sum(value.numel() for value in load_blob(manifest.blocks[-1], store).values())
    if manifest.attention is None:
        return block
    attention, keys = load_router(manifest, store)
    return block + keys.shape[1] + sum(value.numel() for value in attention.parameters())


def stored_bytes(manifest: Manifest, store: BlobStore) -> int:
    """Size of all that the version is made of and that its method needs to go on, without the backbone."""
    digests = {*manifest.blocks, *manifest.state.values(), *([manifest.router] if manifest.router else [])}
    return sum(store.size(digest) for digest in digests) + len(manifest.to_bytes())
