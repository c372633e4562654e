"""Sequences of tiny tasks, learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sapt_core.data.collate import ALL_SHARE
from sapt_core.methods.base import Kept, Lesson, find_method
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, EvaluationConfig, PETConfig, ReflectionConfig, TrainConfig
from sapt_core.versions.learning import LearningSettings, Workplace, learn_task
from sapt_core.versions.manifest import Manifest
from tests.core.tiny import (
    T5_NAMES,
    DictStore,
    KeptCheckpoints,
    fill,
    learnt_task,
    lora,
    tiny_backbone,
    tiny_ref,
    tiny_task,
    tiny_tokenizer,
)

TRAIN = {"learning_rate": 0.02, "epochs": 1, "batch_size": 4, "precision": "float32"}


def learn(
    store: DictStore,
    number: int,
    parent: Manifest | None,
    *,
    name: str = "t5",
    kept: Sequence[Kept] | None = None,
    method: str | dict[str, Any] = "sapt",
    attention: AttentionConfig | None = None,
    train: dict[str, Any] | None = None,
    again: Literal["further", "anew"] | None = None,
    **changes: Any,
) -> tuple[Manifest, list[dict[str, float]]]:
    options = {"name": method} if isinstance(method, str) else method
    task = tiny_task(number, is_encoder_decoder=name in T5_NAMES)
    if kept is None:
        others = [index for index in range(len(parent.tasks) if parent else 0) if again is None or index != number]
        kept = [[f"w{index} w7", "w9", f"w{index}"] for index in others]
    place = {"ref": tiny_ref(), "store": store, "checkpoints": KeptCheckpoints(), "on_step": None, "sharing": ALL_SHARE}
    settings = {
        "method": find_method(options["name"]).model_validate(options),
        "pet": lora(name),
        "attention": attention or AttentionConfig(bottleneck=5, temperature=0.2),
        "reflection": ReflectionConfig(batch_size=2),
        "train": TrainConfig(**{**TRAIN, **(train or {})}),
        "evaluation": EvaluationConfig(batch_size=3),
        "seed": 11,
    }
    assert set(changes) <= {*place, *settings}
    place |= {field: value for field, value in changes.items() if field in place}
    settings |= {field: value for field, value in changes.items() if field in settings}
    return learn_task(
        Workplace(tiny_backbone(name), tiny_tokenizer(), **place),
        LearningSettings(**settings),
        task,
        learnt_task(task),
        parent=parent,
        kept=kept,
        again=again,
    )


def sequence(store: DictStore, **changes: Any) -> list[Manifest]:
    versions: list[Manifest] = []
    for number in range(3):
        versions.append(learn(store, number, versions[-1] if versions else None, **changes)[0])
    return versions


def lesson(manifest: Manifest | None, number: int, store: DictStore, *, pet: PETConfig | None = None) -> Lesson:
    """The lesson of task ``number`` on top of a version, with a new block that is not trained yet."""
    backbone = tiny_backbone("t5")
    task = tiny_task(number)
    pool = fill(new_pool(backbone, pet or lora("t5"), None), 1)
    return Lesson(
        model=SaptModel(backbone, pool),
        tokenizer=tiny_tokenizer(),
        task=task,
        learnt=learnt_task(task),
        earlier=manifest.tasks if manifest else (),
        targets=manifest.targets if manifest else (),
        saved=manifest.state if manifest else {},
        routers=tuple,
        kept=(),
        attention=None,
        reflection=ReflectionConfig(),
        train=TrainConfig(**TRAIN),
        seed=5,
        store=store,
    )
