"""Which stages load a backbone's weights and a version's blocks, and how long these are held."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from cluster.stages import InlineExecutor, Stage, StageEvent, run_graph
from cluster.store.local import LocalStore
from cluster.store.lookups import Lookups
from pipelines.sequence.experiment import load_experiment
from pipelines.sequence.making import VERSIONS
from sapt_core.backbones import loading
from sapt_core.pool.model import SaptModel
from sapt_core.training.trainer import train
from sapt_core.versions import learning, manifest
from tests.pipelines.commands import QUICKSTART, TINY

LOADS = {
    "probe": True,
    "prepare": False,
    "pseudo_samples": True,
    "given": False,
    "memory": False,
    "statistics": False,
    "joined": False,
    "train": True,
    "complete": False,
    "carried": False,
    "evaluate": True,
    "attend": False,
    "quality": False,
    "zero_shot": True,
    "cost": True,
}


def test_only_stages_that_run_a_model_load_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOADS.keys() == VERSIONS.keys()
    real, loads, at_work = PreTrainedModel.from_pretrained.__func__, Counter[str](), list[Stage]()

    def counted(cls: type, *given: Any, **named: Any) -> Any:
        loads[at_work[-1].kind] += 1
        return real(cls, *given, **named)

    def follow(event: StageEvent) -> None:
        if event.kind == "started":
            at_work.append(event.stage)
            loading._load_cached.cache_clear()

    store = LocalStore(tmp_path / "store")
    short = ("train.epochs=1", "benchmark.train_rows=8", "benchmark.test_rows=4", "evaluation.single_task=false")
    for source in ("generated", "statistics", "memory"):
        experiment = load_experiment(Path(QUICKSTART), [*TINY, *short, f"reflection.source={source}"])
        experiment.upload(Lookups(store))
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
            run_graph(experiment.graph.published, Lookups(store), InlineExecutor(store), follow)
    ran = {stage.kind for stage in at_work}
    assert ran >= LOADS.keys() - {"given", "joined", "zero_shot", "carried"}
    assert {kind: loads[kind] > 0 for kind in ran} == {kind: LOADS[kind] for kind in ran}


@pytest.mark.parametrize("method", ["sapt", "per_task"])
def test_a_version_is_read_once_for_all_tasks_and_gone_when_the_next_is_learnt(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six tasks, one block a cell of the lower triangle: where all blocks answer, and where one does."""
    short = ["train.epochs=1", "benchmark.train_rows=4", "benchmark.test_rows=2", "evaluation.single_task=false"]
    short += ["benchmark.tasks=animal,ticket,place,basket,review,stock", f"method.name={method}"]
    if method == "sapt":
        short.append("reflection.source=memory")
    experiment = load_experiment(Path(QUICKSTART), [*TINY, *short])
    store, read, at_work = LocalStore(tmp_path / "store"), Counter[str](), list[Stage]()
    scored: list[weakref.ref[SaptModel]] = []
    held: list[int] = []
    get, made, learn = LocalStore.get, loading.Last.__call__, train

    def reading(self: LocalStore, digest: str) -> bytes:
        read[digest] += at_work[-1].kind == "evaluate"
        return get(self, digest)

    def making(self: Any, *given: Any) -> Any:
        found = made(self, *given)
        if isinstance(found[0], SaptModel):
            scored.append(weakref.ref(found[0]))
        return found

    def learning_with_room(*given: Any, **named: Any) -> Any:
        held.append(sum(each() is not None for each in scored))
        return learn(*given, **named)

    monkeypatch.setattr(LocalStore, "get", reading)
    monkeypatch.setattr(loading.Last, "__call__", making)
    monkeypatch.setattr(learning, "train", learning_with_room)
    gc.collect()
    experiment.upload(Lookups(store))
    records = run_graph(
        experiment.graph.stages,
        Lookups(store),
        InlineExecutor(store),
        lambda event: at_work.append(event.stage) if event.kind == "started" else None,
    )
    last = manifest.Manifest.from_bytes(get(store, records[experiment.graph.train[-1]].outputs["manifest"]))
    assert len(scored) == sum(read[block] for block in last.blocks) == 21
    assert held == [0] * 6
