"""What a registered version says of itself in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.tracking.registry import NUMBER
from pipelines.console.tables import markdown_table
from sapt_core.versions.manifest import Manifest

LONGEST = 4000
"""Characters of a description; MLflow's databases take 5000, and a link to the run follows."""


def describe(manifest: Manifest, model: str, metrics: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Markdown: what it is, its tasks in order with their scores, and what to type.

    Args:
        manifest: the version.
        model: name of the registered model.
        metrics: its figures, with ``score/TASK`` of every task.
        before: those of the version that it goes on from; empty if it goes on from none.
    """
    tasks = [task.name for task in manifest.tasks]
    again = "" if manifest.again is None else f", {manifest.again} learnt again"
    head = (
        f"{manifest.method.name} after {len(tasks)} task{'s' if len(tasks) > 1 else ''}{again}: "
        f"AP {metrics['ap']:.2f}, F.Ra {metrics['f_ra']:.2f}. Backbone {manifest.backbone.path}."
    )
    rows = []
    for name in tasks:
        score, earlier = metrics[f"score/{name}"], before.get(f"score/{name}")
        change = "new" if earlier is None else f"{score - earlier:+.2f}"
        rows.append([name, f"{score:.2f}", change])
    reference = f"models:/{model}/{NUMBER}"
    commands = "\n".join(
        [
            f'- load: `mlflow.pyfunc.load_model("{reference}")`',
            f"- serve: `mlflow models serve --model-uri {reference} --env-manager local`",
            f"- promote: `sapt pool promote {NUMBER} tracking.model={model}`",
        ]
    )
    while True:
        left = len(tasks) - len(rows)
        more = f"\n\n{left} more tasks: their scores are among the metrics." if left else ""
        table = markdown_table(["task", "score", "change"], rows) + more
        text = f"{head}\n\n{table}\n\n{commands}\n\n"
        if len(text) <= LONGEST or not rows:
            return text
        rows.pop()
