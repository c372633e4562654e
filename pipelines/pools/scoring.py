"""Scores of versions on the sealed test rows that one of them carries."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sapt_core.errors import ConfigError, SnapshotError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from cluster.stages import Executor, Stage
    from cluster.store import ArtifactStore
    from cluster.store.lookups import Lookups
    from pipelines.sequence.gate import Gate, Row
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.settings import PlacesConfig, StoreConfig
    from sapt_core.versions.manifest import Manifest

# What may be said of how versions are scored; all else is as the candidate was learnt.
GIVEN = ("evaluation", "cluster")
# What a command line may say.
SECTIONS = ("store", "tracking", "registry", *GIVEN)


def set_apart(arguments: argparse.Namespace) -> list[str]:
    """Overrides of how versions are scored, taken out of those that say where things are.

    Raises:
        ConfigError: fields that the version decides: other scores would be compared than those it has.
    """
    wrong = [each for each in arguments.overrides if each.partition("=")[0].partition(".")[0] not in SECTIONS]
    if wrong:
        faults = [f"{each.partition('=')[0]}: versions are scored as they were learnt; leave it out" for each in wrong]
        raise ConfigError(f"Versions are scored with fields of {', '.join(SECTIONS)} alone:", faults)
    said = [each for each in arguments.overrides if each.partition(".")[0] in GIVEN]
    arguments.overrides = [each for each in arguments.overrides if each not in said]
    return said


def scoring_config(
    candidate: Manifest, kept: StoreConfig, places: PlacesConfig, path: Path | None, said: Sequence[str]
) -> ExperimentConfig:
    """How the version was learnt, with answers searched for and on the cluster as given.

    Args:
        candidate: the version.
        kept: the store that has its blobs.
        places: of the command line.
        path: a config, of which the sections ``GIVEN`` count; None for none.
        said: fields of these sections on the command line.

    Raises:
        SnapshotError: the version does not say how it was learnt.
    """
    from omegaconf import DictConfig, OmegaConf

    from pipelines.sequence.base import refit_command
    from pipelines.sequence.extension import Places, own_settings
    from sapt_core.config.experiment import ExperimentConfig, read_mapping, validated
    from sapt_core.config.overrides import parsed

    if candidate.recipe is None:
        raise SnapshotError(
            f"The version (schema {candidate.schema_version}) carries no sealed test rows, on which it could be held "
            "against the champion: an earlier release published it, or its newest block was imported without data. "
            f"Give them back once, from data: {refit_command(candidate.names)}"
        )
    here = Places(kept.model_dump(mode="json"), places.tracking.model_dump(mode="json"))
    own = own_settings(candidate, candidate.recipe, [task.name for task in candidate.tasks], ".", here)
    given = [] if path is None else [read_mapping(path)]
    layers = [DictConfig(OmegaConf.masked_copy(layer, list(GIVEN))) for layer in given]
    sealed = OmegaConf.create({"evaluation": {"split": "test"}})
    return validated(
        ExperimentConfig, [OmegaConf.create(own), *layers, *parsed(said, ExperimentConfig), sealed], "What is scored"
    )


def scored(gate: Gate, store: ArtifactStore, config: ExperimentConfig, arguments: argparse.Namespace) -> list[Row]:
    """Run what is not in the store yet, with the options of ``cli.add_inline``."""
    from cluster.stages import run_graph
    from cluster.store.lookups import Lookups

    known = Lookups(store)
    with ExitStack() as stack:
        return gate.rows(run_graph(gate.stages, known, executor_of(gate.stages, known, config, arguments, stack)))


def executor_of(
    stages: Sequence[Stage], known: Lookups, config: ExperimentConfig, arguments: argparse.Namespace, stack: ExitStack
) -> Executor[Any]:
    """What runs stages with the options of ``cli.add_inline`` until ``stack`` is closed; Ray where it is needed."""
    from cluster.stages import InlineExecutor, plan
    from pipelines.running.sequence import inline_executor, ray_executor

    if arguments.inline:
        return inline_executor(arguments, config.store, known.store, stack)
    left = [stage for stage, state in plan(stages, known).items() if state != "done" and stage.kind != "carried"]
    return ray_executor(config, stack) if left else InlineExecutor(known.store)


def score_table(rows: Sequence[Row], model: str, one: str, other: str) -> Table:
    """What came of it, for people: scores of version ``one`` of a model, held against the ``other``."""
    from pipelines.console.tables import text_table

    def shown(score: float | None, form: str = ".2f") -> str:
        return "" if score is None else f"{score:{form}}"

    body = []
    for row in rows:
        left_out = "no sealed test rows" if row.learnt else "forgotten" if row.forgotten else "not learnt"
        remark = "" if row.candidate is not None else left_out
        figures = [shown(row.champion), shown(row.candidate), shown(row.change, "+.2f"), shown(row.bare)]
        body.append([row.task, *figures, remark])
    return text_table(
        f"{model}: scores on the test rows of {one}", ["task", other, one, "change", "backbone", ""], body
    )
