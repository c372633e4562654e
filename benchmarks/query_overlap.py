"""How far queries alone tell tasks apart, and how well what reflection keeps of a task stands in for its inputs.

    python benchmarks/query_overlap.py --config pipelines/configs/superni_mini.yaml attention.query=input

Reads the rows and the kept inputs of a run from its store. Every task's key is the direction of its train rows' mean
query, as ``attention.key_init=task_mean`` starts it, and nothing is trained. An input is told apart if the key
nearest to it is its own task's.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from cluster.stages import done
from cluster.store import open_store
from cluster.store.lookups import Lookups
from pipelines.console import cli
from pipelines.console.tables import wide_console
from pipelines.sequence.bodies import kept_inputs, pooling_model, prepared_task
from pipelines.sequence.experiment import load_experiment
from sapt_core.backbones.loading import load_backbone
from sapt_core.data.encoding import PromptEncoder
from sapt_core.errors import SaptError
from sapt_core.judging.decoding import pooled_embeddings
from sapt_core.pool.attention import SharedAttention
from sapt_core.pool.blocks.base import embedding_matrix
from sapt_core.training.reflection import GaussianQueries

DRAWS = 200  # of a task's statistics


def main() -> None:
    """Look at every task of which reflection keeps something, and write down what was found."""
    parser = cli.parser(__doc__ or "", "python benchmarks/query_overlap.py --config pipelines/configs/quickstart.yaml")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_intermixed_args()
    cli.check_output(arguments.output)
    experiment = load_experiment(arguments.config, arguments.overrides)
    config, graph, store = experiment.config, experiment.graph, open_store(experiment.config.store)
    reflected_on = graph.kept[: len(graph.train) - 1]
    needed = (*graph.prepare, *reflected_on)
    records = done(needed, Lookups(store, [experiment.key]))
    if not reflected_on or not records.keys() >= {*needed}:
        raise SaptError(f"{store.uri} does not hold what reflection keeps of these tasks: run the same config first")

    model, tokenizer = load_backbone(experiment.backbone, store)
    pooling = pooling_model(model, config.attention)
    attention = SharedAttention(embedding_matrix(model).shape[1], config.attention)
    attention.start(embedding_matrix(model))
    tasks = [prepared_task(store, records[stage]) for stage in graph.prepare]
    with torch.no_grad():
        keys = torch.stack(
            [attention.task_key(pooled_embeddings(pooling, tokenizer, list(task.train))) for task in tasks]
        )

    @torch.no_grad()
    def own(pooled: Tensor, index: int) -> dict[str, float]:
        logits = attention(pooled, keys)
        weight = logits.softmax(dim=1)[:, index].sum()
        return {
            "inputs": len(pooled),
            "told_apart": int((logits.argmax(dim=1) == index).sum()),
            "own_weight": round(float(weight), 4),
        }

    encoder = PromptEncoder(
        tokenizer,
        max_source_tokens=config.benchmark.max_source_tokens,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    found: list[dict[str, Any]] = []
    for index, stage in enumerate(reflected_on):
        task, kept = tasks[index], kept_inputs(store, records[stage])
        if isinstance(kept, GaussianQueries):
            pooled = kept.draw(DRAWS, torch.Generator().manual_seed(config.seed))
        else:
            prompts = encoder.prompts(experiment.tasks[index].template, task.definition, kept)
            pooled = pooled_embeddings(pooling, tokenizer, [prompt.row for prompt in prompts])
        dev = pooled_embeddings(pooling, tokenizer, list(task.dev))
        found.append({"task": experiment.tasks[index].name, "dev": own(dev, index), "kept": own(pooled, index)})

    total: dict[str, Any] = {
        part: {name: round(sum(each[part][name] for each in found), 4) for name in found[0][part]}
        for part in ("dev", "kept")
    }
    shares = ("told apart", "own weight")
    table = Table("task", "dev rows", *shares, f"of {config.reflection.source}", *shares)
    for each in (*found, {"task": "all", **total}):
        cells = []
        for part in (each["dev"], each["kept"]):
            cells.append(str(part["inputs"]))
            for name in ("told_apart", "own_weight"):
                cells.append(f"{part[name] / part['inputs']:.2f}" if part["inputs"] else "–")
        table.add_row(each["task"], *cells)
    wide_console().print(table)
    result = {
        "backbone": Path(config.backbone.path).name,
        "centre": config.attention.centre,
        "temperature": config.attention.temperature,
        "source": config.reflection.source,
        "query": config.attention.query,
        "seed": config.seed,
        "tasks": found,
        "all": total,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if arguments.output:
        cli.write_output(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
