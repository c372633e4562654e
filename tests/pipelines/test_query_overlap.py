"""The benchmark of queries, against a naive count."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks import query_overlap
from pipelines import continual
from pipelines.sequence.experiment import load_experiment
from sapt_core.data.prepare import prepare_task
from sapt_core.pool.attention import vocabulary_moments
from sapt_core.training.reflection import GaussianQueries
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Finished, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
# Both tasks read the same reports: what stands after the definition hardly tells them apart.
ALIKE = (
    "benchmark.tasks=animal,place",
    "attention.query=input",
    "reflection.source=statistics",
    "evaluation.single_task=false",
)


def test_inputs_nearest_to_their_own_task(copied: Finished, call: Call, tmp_path: Path) -> None:
    given = ["--config", QUICKSTART, *TINY, *ALIKE, f"store.uri={copied.store}"]
    learnt = call(continual.main, [*given, "--inline"])
    assert learnt.code == 0, learnt.err
    ended = call(query_overlap.main, [*given, "--output", str(tmp_path / "new/overlap.json")])
    assert ended.code == 0, ended.err
    assert "of statistics" in ended.out
    result = json.loads((tmp_path / "new/overlap.json").read_text())
    (animal,) = result["tasks"]
    assert result["all"] == {name: animal[name] for name in ("dev", "kept")}
    assert (result["source"], result["query"], animal["task"]) == ("statistics", "input", "animal")
    assert animal["kept"]["inputs"] == query_overlap.DRAWS

    # Word by word: what stands after the definition, its largest values less those of random words, normalised.
    experiment = load_experiment(Path(QUICKSTART), [*TINY, *ALIKE])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pipelines/backbones/tiny")
    embedding = AutoModelForSeq2SeqLM.from_pretrained(ROOT / "pipelines/backbones/tiny").get_input_embeddings().weight
    centre, _ = vocabulary_moments(embedding.detach())

    def pooled(rows: list[dict[str, list[int]]]) -> list[torch.Tensor]:
        return [embedding.detach()[row["prompt_ids"][row["query_start"] :]].amax(dim=0) for row in rows]

    def queries(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for each in inputs:
            centred = each - centre
            found.append((centred - centred.mean()) / (centred.var(correction=0) + 1e-5).sqrt())
        return found

    benchmark = experiment.config.benchmark
    tasks = [
        prepare_task(
            task,
            tokenizer,
            max_source_tokens=benchmark.max_source_tokens,
            max_target_tokens=benchmark.max_target_tokens,
            is_encoder_decoder=True,
        )
        for task in experiment.tasks
    ]
    keys = [torch.stack(queries(pooled(list(task.train)))).mean(dim=0) for task in tasks]
    statistics = GaussianQueries.of(torch.stack(pooled(list(tasks[0].train))), experiment.config.reflection.rank)
    drawn = statistics.draw(query_overlap.DRAWS, torch.Generator().manual_seed(experiment.config.seed))
    for part, inputs in {"dev": pooled(list(tasks[0].dev)), "kept": list(drawn)}.items():
        told_apart, own_weight = 0, 0.0
        for query in queries(inputs):
            own, other = (torch.dot(query, key) / key.norm() for key in keys)
            told_apart += int(own > other)
            own_weight += 1 / (1 + math.exp(float(other - own) / experiment.config.attention.temperature))
        assert animal[part] == {
            "inputs": len(inputs),
            "told_apart": told_apart,
            "own_weight": pytest.approx(own_weight, abs=1e-2),
        }
    assert 0 < animal["kept"]["told_apart"] < query_overlap.DRAWS


def test_a_run_that_is_not_there(finished: Finished, call: Call) -> None:
    ended = call(query_overlap.main, ["--config", QUICKSTART, *TINY, f"store.uri={finished.store}", "seed=5"])
    assert ended.code == 2
    assert "run the same config first" in ended.err
