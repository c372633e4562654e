"""What code that uses a pool needs: load a version, answer, see the weights, learn one more task, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.data.prepare import prepare_task
from sapt_core.data.task import Example, LearntTask, Task, dev_rows, name_faults
from sapt_core.errors import DataError, SaptError
from sapt_core.io.blobs import BlobStore, NoCheckpoints
from sapt_core.training.trainer import step_seed
from sapt_core.versions.export import export_block, export_mixture
from sapt_core.versions.importing import import_adapter
from sapt_core.versions.learning import LearningSettings, Workplace, learn_task
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.predictor import Prediction, Predictor

DEV_FRACTION = 0.1


class Pool:
    """One version of a pool. It never changes: to learn a task makes the next version.

    Args:
        manifest: the version.
        store: holds its blobs and those of its backbone.
    """

    def __init__(self, manifest: Manifest, store: BlobStore) -> None:
        self.manifest = manifest
        self.store = store

    def __repr__(self) -> str:
        method, tasks = self.manifest.method.name, ", ".join(self.tasks)
        return f"<Pool {self.digest[:12]} of {method} on {self.manifest.backbone.path}: {tasks}>"

    @property
    def digest(self) -> str:
        """sha256 that names the version: ``load`` finds it by this."""
        return self.manifest.digest

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it has learnt, oldest first."""
        return tuple(task.name for task in self.manifest.tasks)

    @property
    def blocks(self) -> tuple[str, ...]:
        """What its blocks are called: by the tasks that made them, oldest first."""
        return self.manifest.block_names

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor.load(self.manifest.to_bytes(), self.store)

    def generate(self, texts: Sequence[str], task: str | None = None) -> list[Prediction]:
        """Answer texts.

        Args:
            texts: full prompts or, with ``task``, inputs.
            task: a learnt task, whose definition and template are put around each text.

        Returns:
            A prediction a text: its ``text``, and ``weights``, how much of every block it was made with.

        Raises:
            RequestError: with every fault: a text that is none, is blank or too long, a task that the version has not
                learnt, or none where its method needs one.
        """
        return self._predictor.predict(texts, None if task is None else [task] * len(texts))

    def weights(self, texts: Sequence[str], task: str | None = None) -> list[Mapping[str, float]]:
        """How much of every block each text is answered with; arguments and errors as of ``generate``."""
        return [prediction.weights for prediction in self.generate(texts, task)]

    def learn(
        self,
        task: Task,
        config: ExperimentConfig,
        kept: Mapping[str, Sequence[str]] | None = None,
        *,
        again: Literal["further", "anew"] | None = None,
    ) -> Pool:
        """Learn one more task, or one that is known from more rows of it, in this process.

        Args:
            task: its rows, see ``make_task`` and ``load_sequence``.
            config: how: its sections ``train``, ``reflection`` and ``evaluation``, its lengths in ``benchmark`` and its
                seed. ``method``, ``pet`` and ``attention`` must be those of this version; the backbone is this
                version's own, whatever ``config`` names.
            kept: inputs of earlier tasks to reflect on, by the tasks' names; tasks that are left out, all by default,
                are not reflected on, so that nothing holds their attention.
            again: whether a task that this version knows is learnt further, from where its block stands, or anew. Its
                definition, template, metric and lengths are those that it has; all other blocks stay as they are.

        Raises:
            SnapshotError: the version was learnt with another method, other blocks or another attention, or its method
                cannot learn a task again.
            SaptError: inputs are given of a task that it has not learnt, or of the one that is learnt again; the task
                was learnt before, without ``again``.
        """
        given = kept or {}
        others = [name for name in self.tasks if again is None or name != task.name]
        if unknown := sorted(set(given) - set(others)):
            raise SaptError(f"kept names {', '.join(unknown)}; what can be reflected on: {', '.join(others)}")
        if again is None and (faults := name_faults(task.name, self.tasks)):
            raise SaptError(f"{task.name}: {faults[0]}; again= learns it from more rows")
        inputs = [list(given.get(name, ())) for name in others] if given else []
        ref, parent = self.manifest.backbone, self.manifest
        return _learn(task, config, self.store, ref=ref, parent=parent, kept=inputs, again=again)

    def export(self, block: str | Mapping[str, float], folder: Path | str) -> None:
        """Write a block, or a mixture of blocks, as a plain PEFT adapter folder.

        Args:
            block: its name, one of ``blocks``, or weights by such names; blocks that are left out have none.
            folder: is made; must be empty or not there yet.

        Raises:
            SnapshotError: PEFT has no kind for it, the folder holds something, or the weights are no mixture.
            SaptError: there is no such block.
        """
        if not isinstance(block, str):
            export_mixture(self.manifest, block, self.store, Path(folder))
        elif block in self.blocks:
            export_block(self.manifest, self.blocks.index(block), self.store, Path(folder))
        else:
            raise SaptError(f"there is no block {block!r}; there are: {', '.join(self.blocks)}")

    def import_adapter(self, folder: Path | str, name: str, inputs: Sequence[str], definition: str = "") -> Pool:
        """Make a PEFT LoRA adapter the newest block, without training.

        Template, metric and lengths of its task are those of the newest one.

        Args:
            folder: as PEFT's ``save_pretrained`` wrote it.
            name: of the task that it was trained on.
            inputs: of that task; they say when the block is meant.
            definition: the instruction that is put before every input.

        Raises:
            FaultsError: with all that is against the adapter, the task and the pool.
        """
        task = self.manifest.tasks[-1].model_copy(update={"name": name, "definition": definition})
        return Pool(import_adapter(Path(folder), task, inputs, self.store, onto=self.manifest), self.store)


def load(digest: str, store: BlobStore) -> Pool:
    """A version by the sha256 of its manifest.

    Raises:
        StoreError: the store has no such blob, or it is damaged.
        SnapshotError: it is no version of a pool, or was written by a newer release.
    """
    return Pool(Manifest.from_bytes(store.get(digest)), store)


def learn_first(task: Task, config: ExperimentConfig, store: BlobStore) -> Pool:
    """Begin a sequence: learn its first task, in this process.

    Args:
        task: its rows.
        config: backbone, method, block, attention and training.
        store: receives the backbone and the version.

    Raises:
        BackboneError: the backbone cannot be loaded or is no language model.
    """
    ref = identify(config.backbone)
    store_backbone(config.backbone, ref, store)
    return _learn(task, config, store, ref=ref, parent=None, kept=())


def make_task(
    name: str,
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]] = (),
    *,
    definition: str = "",
    metric: str = "exact_match",
) -> Task:
    """A task from rows; a tenth of the train rows is split off as dev.

    Args:
        name: unique in a sequence.
        train, test: inputs with their answers.
        definition: the instruction that is put before every input.
        metric: ``exact_match`` or ``rouge_l``.

    Raises:
        DataError: fewer than two train rows.
    """
    if len(train) < 2:
        raise DataError(
            "The task cannot be learnt:", [f"{name}: {len(train)} train rows; one for dev and one to learn"]
        )
    rows, tested = ([Example(text, (answer,)) for text, answer in given] for given in (train, test))
    dev = dev_rows(len(rows), DEV_FRACTION, seed=0)
    kept = tuple(row for index, row in enumerate(rows) if index not in dev)
    return Task(name, definition, kept, tuple(rows[index] for index in sorted(dev)), tuple(tested), "superni", metric)


def _learn(
    task: Task,
    config: ExperimentConfig,
    store: BlobStore,
    *,
    ref: BackboneRef,
    parent: Manifest | None,
    kept: Sequence[Sequence[str]],
    again: Literal["further", "anew"] | None = None,
) -> Pool:
    backbone, tokenizer = load_backbone(ref, store)
    learnt = None
    if parent is not None and again is not None:
        learnt = next((each for each in parent.tasks if each.name == task.name), None)
    if learnt is None:
        learnt = LearntTask(
            name=task.name,
            definition=task.definition,
            template=task.template,
            metric=task.metric,
            max_source_tokens=config.benchmark.max_source_tokens,
            max_target_tokens=config.benchmark.max_target_tokens,
        )
    else:
        task = replace(task, definition=learnt.definition, template=learnt.template, metric=learnt.metric)
    prepared = prepare_task(
        task,
        tokenizer,
        is_encoder_decoder=bool(backbone.config.is_encoder_decoder),
        max_source_tokens=learnt.max_source_tokens,
        max_target_tokens=learnt.max_target_tokens,
    )
    manifest, _ = learn_task(
        Workplace(backbone, tokenizer, ref, store, NoCheckpoints()),
        LearningSettings(
            method=config.method,
            pet=config.pet,
            attention=config.attention,
            reflection=config.reflection,
            train=config.train,
            evaluation=config.evaluation,
            seed=step_seed(config.seed, task.name),
        ),
        prepared,
        learnt,
        parent=parent,
        kept=kept,
        again=again,
    )
    return Pool(manifest, store)
