"""Real rows of earlier tasks, for the methods that rehearse them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from sapt_core.training.objective import Row

COLUMNS = ("prompt_ids", "answer_ids", "query_start")


def choose(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A random ``share`` of the rows, at least one, in their order."""
    wanted = max(1, round(share * len(rows)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[index] for index in sorted(order[:wanted])]


def pack(rows: Sequence[Row]) -> bytes:
    """Rows as bytes: their token ids, and nothing that is for people."""
    return json.dumps([{name: row[name] for name in COLUMNS} for row in rows]).encode()


def unpack(data: bytes) -> list[Row]:
    """Rows as ``pack`` wrote them."""
    rows: list[Row] = json.loads(data)
    return rows
