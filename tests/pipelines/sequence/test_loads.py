"""Which stages load a backbone's weights."""

from __future__ import annotations

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
from tests.pipelines.commands import QUICKSTART, TINY

LOADS = {
    "prepare": False,
    "pseudo_samples": True,
    "given": False,
    "memory": False,
    "statistics": False,
    "train": True,
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
            run_graph(experiment.graph.stages, Lookups(store), InlineExecutor(store), follow)
    ran = {stage.kind for stage in at_work}
    assert ran >= LOADS.keys() - {"given", "zero_shot"}
    assert {kind: loads[kind] > 0 for kind in ran} == {kind: LOADS[kind] for kind in ran}
