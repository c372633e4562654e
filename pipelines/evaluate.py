"""Score any version of a pool on any tasks, learnt or not, in this process.

python pipelines/evaluate.py --config pipelines/configs/quickstart.yaml --version 3 benchmark.tasks=animal,loan
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import cli, places
from pipelines.console.commands import pasted

if TYPE_CHECKING:
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.data.task import Task
    from sapt_core.io.blobs import BlobStore
    from sapt_core.versions.manifest import Manifest

BLOCKS_SHOWN = 3


def main() -> None:
    """Parse the command line, score and print."""
    parser = cli.parser(__doc__ or "", pasted("evaluate", "--config", "quickstart", "--version", "latest"))
    cli.add_print_config(parser)
    cli.add_version(parser)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = cli.parse(parser)
    places.check_lasting({"--summary": arguments.summary})

    from pipelines.console.versions import open_version
    from pipelines.sequence.experiment import load_experiment
    from sapt_core.versions.manifest import require_backbone

    cli.check_output(arguments.summary)
    experiment = load_experiment(arguments.config, arguments.overrides)
    manifest, store = open_version(arguments, experiment.config)
    require_backbone(manifest, experiment.backbone)
    figures = evaluate(manifest, store, (*experiment.tasks, *experiment.unseen), experiment.config)
    _show(figures)
    if arguments.summary is not None:
        cli.write_output(arguments.summary, json.dumps(figures, indent=1, allow_nan=False))


def evaluate(manifest: Manifest, store: BlobStore, tasks: Sequence[Task], config: ExperimentConfig) -> dict[str, Any]:
    """Scores (0 to 100) and mean mixture weights of a version on the rows of ``tasks`` that are scored.

    Every score has its confidence interval (95 %), and metrics beside the leading one stand under ``others``.

    Args:
        manifest: the version.
        store: holds its blobs and those of its backbone.
        tasks: as text; those that the version has not learnt are scored all the same.
        config: lengths, decoding and precision.
    """
    from pipelines.sequence.bodies import score_version
    from sapt_core.backbones.loading import load_backbone
    from sapt_core.data.prepare import prepare_task

    model, tokenizer = load_backbone(manifest.backbone, store)
    learnt = [task.name for task in manifest.tasks]
    rows = []
    for task in tasks:
        prepared = prepare_task(
            task,
            tokenizer,
            max_source_tokens=config.benchmark.max_source_tokens,
            max_target_tokens=config.benchmark.max_target_tokens,
            is_encoder_decoder=bool(model.config.is_encoder_decoder),
            joined=manifest.backbone.joined,
        )
        found, weights, predictions = score_version(
            manifest,
            prepared,
            store,
            config.evaluation,
            precision=config.train.precision,
            max_target_tokens=config.benchmark.max_target_tokens,
        )
        rows.append(
            {
                "task": task.name,
                "learnt": task.name in learnt,
                "rows": len(predictions),
                "metric": task.metric,
                "score": found[task.metric].score,
                "interval": [found[task.metric].low, found[task.metric].high],
                "others": {name: found[name]._asdict() for name in task.other_metrics},
                "weights": dict(zip(manifest.blocks_for(task.name), weights.mean(dim=0).tolist(), strict=True)),
            }
        )
    return {"snapshot": manifest.digest, "method": manifest.method.name, "learnt": learnt, "tasks": rows}


def _show(figures: dict[str, Any]) -> None:
    from rich.table import Table

    from pipelines.console.tables import interval, wide_console

    title = f"Version {figures['snapshot'][:12]} of {figures['method']}, {len(figures['learnt'])} tasks learnt"
    table = Table(title=title, title_justify="left")
    for column in ("task", "learnt", "rows", "metric", "score", "95 %", "mean weight of blocks"):
        table.add_column(column, justify="right" if column in {"rows", "score", "95 %"} else "left")
    for row in figures["tasks"]:
        heaviest = sorted(row["weights"].items(), key=lambda item: -item[1])[:BLOCKS_SHOWN]
        table.add_row(
            row["task"],
            "yes" if row["learnt"] else "unseen",
            str(row["rows"]),
            row["metric"],
            f"{row['score']:.1f}",
            interval(row["interval"]),
            ", ".join(f"{block} {weight:.0%}" for block, weight in heaviest),
        )
        for name, other in row["others"].items():
            table.add_row("", "", "", name, f"{other['score']:.1f}", interval((other["low"], other["high"])), "")
    wide_console().print(table)


if __name__ == "__main__":
    cli.run(main)
