"""Versions that were never learnt: random blocks and keys on a random backbone, in a store."""

from __future__ import annotations

from pathlib import Path

import torch

from sapt_core.backbones.loading import store_backbone
from sapt_core.backbones.reference import identify
from sapt_core.data.task import LearntTask
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, BackboneConfig, GeneratorConfig, PETConfig, TrainConfig
from sapt_core.versions.loading import store_block, store_router
from sapt_core.versions.manifest import Manifest, Recipe
from tests.core.tiny import DictStore, lora, tiny_backbone, tiny_tokenizer

ATTENTION = AttentionConfig(bottleneck=5, temperature=0.2)
RECIPE = Recipe(
    seed=0,
    max_source_tokens=8,
    max_target_tokens=8,
    dev_fraction=0.1,
    split_seed=0,
    reflection={},
    generator=GeneratorConfig(),
    train=TrainConfig(),
)


def learnt(name: str, **changes: object) -> LearntTask:
    values = {
        "definition": "w30 w31",
        "template": "superni",
        "metric": "rouge_l",
        "max_source_tokens": 64,
        "max_target_tokens": 6,
    }
    return LearntTask(**{"name": name, **values, **changes})


TASKS = (learnt("qa_hard"), learnt("qa", definition="w32", max_source_tokens=40), learnt("task7_sum", template="none"))


def version(
    store: DictStore,
    folder: Path,
    name: str = "t5",
    *,
    blocks: int = 3,
    attention: AttentionConfig | None = ATTENTION,
    pet: PETConfig | None = None,
    seed: int = 3,
) -> Manifest:
    """A version of ``blocks`` tasks, or without attention of one block; of equal folders the backbone is the same."""
    backbone, pet = tiny_backbone(name), pet or lora(name)
    if not folder.exists():
        backbone.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    config = BackboneConfig(path=str(folder))
    ref = identify(config)
    store_backbone(config, ref, store)
    pool = new_pool(backbone, pet, attention)
    digests = []
    torch.manual_seed(seed)
    for _ in range(1 if attention is None else blocks):
        pool.add()
        state = {key: torch.randn_like(value) * 0.4 for key, value in pool.blocks.current_state().items()}
        pool.blocks.load_current(state)
        digests.append(store_block(pool, store))
        pool.freeze()
    sizes = [1] * blocks if attention is None else range(1, blocks + 1)
    return Manifest(
        method={"name": "sequential" if attention is None else "sapt"},
        backbone=ref,
        pet=pet,
        attention=attention,
        tasks=TASKS[:blocks],
        blocks=tuple(digests),
        router=store_router(pool, store),
        targets=tuple((1 / size,) * size for size in sizes),
        parent=None,
    )
