"""An experiment that is known to be runnable: config, tasks and backbone, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from cluster.stages import StageRecord, find_record
from cluster.store import ArtifactStore, open_store
from cluster.store.lookups import Lookups
from pipelines.console.checkout import git_commit
from pipelines.sequence.base import Base, read_base
from pipelines.sequence.graph import SequenceGraph, build_graph
from sapt_core.backbones.loading import store_backbone
from sapt_core.backbones.reference import BackboneRef, identify, weight_bytes
from sapt_core.config.experiment import ExperimentConfig, load_config
from sapt_core.config.preflight import check_backbone, check_metrics, settle_precision, with_precision
from sapt_core.config.unused import keys_of, unused, warn_of_unused
from sapt_core.data import load_inputs, load_sequence
from sapt_core.data.task import KnownTask, Task
from sapt_core.errors import ConfigError, FaultsError, SaptError
from sapt_core.io.hashing import canonical_hash
from sapt_core.settings import BackboneConfig, BenchmarkConfig
from sapt_core.versions.manifest import Manifest

# Versions of stages that keys did not hold yet: left out, so that the records of that time stay valid.
UNKEYED = {"pseudo_samples": 3, "train seekr": 2}


DESCRIPTION = "experiment"  # kind of the record that tells what an experiment was made of


@dataclass(frozen=True)
class Experiment:
    """What a run needs to know. ``key`` names it: the same science has the same key anywhere.

    Attributes:
        config: as validated, with a number format in the place of ``train.precision`` auto.
        tasks: those that are learnt, oldest first; one that ``base`` knows is learnt again.
        base: the version that is gone on from, with the tasks that come before; None for a sequence from its start.
        unseen: those that are scored and never learnt.
        backbone: by content.
        graph: the stages.
        samples: inputs that reflection is given, by task.
        commit: of the code, as the experiment was put together; the checkout may move on while it runs.
        anew: whether what is learnt again begins with a new block.
    """

    config: ExperimentConfig
    tasks: tuple[Task, ...]
    unseen: tuple[Task, ...]
    backbone: BackboneRef
    graph: SequenceGraph
    samples: Mapping[str, bytes]
    commit: str
    base: Base | None = None
    anew: bool = False

    @property
    def again(self) -> tuple[Task, ...]:
        """Those of the tasks that are learnt again."""
        known = set() if self.base is None else {task.name for task in self.base.tasks}
        return tuple(task for task in self.tasks if task.name in known)

    @property
    def every_task(self) -> tuple[Task | KnownTask, ...]:
        """The tasks of the pool once all are learnt, oldest first; of one that is learnt again what it was before."""
        before = () if self.base is None else self.base.tasks
        return (*before, *(task for task in self.tasks if task not in self.again))

    @property
    def key(self) -> str:
        """sha256 over config, data and backbone, and over what stages and method have learnt to do otherwise."""
        given = [hashlib.sha256(data).hexdigest() for data in self.samples.values()]
        unseen = [[task.digest for task in self.unseen]] if self.unseen else []
        versions = {stage.kind: stage.version for stage in self.graph.stages if stage.kind != "carried"}
        versions[f"train {self.config.method.name}"] = versions.pop("train")
        raised = {kind: version for kind, version in versions.items() if version != UNKEYED.get(kind, 1)}
        before = [] if self.base is None else [self.base.manifest.digest, *(["anew"] if self.anew else [])]
        what = [self.config.digest(), self.data_digest, self.backbone.digest, *given, *unseen, *before]
        if self.backbone.joined:  # a backbone's digest is of earlier releases' too, which tokenised in two parts
            raised["joined"] = 1
        return canonical_hash([*what, raised] if raised else what)

    @property
    def data_digest(self) -> str:
        """sha256 over the text of all tasks of the sequence."""
        return canonical_hash([task.digest for task in (*self.every_task, *self.again)])

    def upload(self, known: Lookups, *, all_done: bool = False) -> None:
        """Put what the stages start from into the store: the tasks' text, given samples and the backbone's files.

        Args:
            known: what is known of the store.
            all_done: nothing is left to run, so that texts which were erased are not needed again.
        """
        store, (description, is_there) = known.store, self.description(known.store)
        if self.base is None:  # whose backbone is in the store
            store_backbone(self.config.backbone, self.backbone, store)
        if description.erased and all_done:
            return
        given = [task.to_json() for task in (*self.tasks, *self.unseen)], self.samples.values()
        texts = {hashlib.sha256(data).hexdigest(): data for data in chain(*given)}
        whole = is_there and not description.erased
        # What the description names is kept. Until it is there, putting the texts again makes them young.
        for digest in known.missing(texts) if whole else texts:
            store.put(texts[digest])
        if not whole:
            record = description.model_copy(update={"erased": ()}).model_dump(mode="json")
            (store.replace_record if is_there else store.commit_record)(description.key, record)

    def description(self, store: ArtifactStore) -> tuple[StageRecord, bool]:
        """What else the experiment is made of, kept under its config, so that ``find_experiment`` needs no folder.

        Returns:
            The record, and whether the store has it.
        """
        values: dict[str, Any] = {
            "backbone": self.backbone.model_dump(mode="json"),
            "precision": self.config.train.precision,
            "samples": list(self.samples),
            "tasks": len(self.tasks),
            "unseen": len(self.unseen),
            **({} if self.base is None else {"base": self.base.manifest.digest}),
            **({"anew": True} if self.anew else {}),
        }
        texts = [hashlib.sha256(data).hexdigest() for data in self.samples.values()]
        digests = [task.digest for task in (*self.tasks, *self.unseen)]
        outputs = {f"{index:03d}": digest for index, digest in enumerate([*digests, *texts])}
        for key in _described_under(self.config):
            there = find_record(store, key)
            if there is None:
                break
            if (there.values, there.outputs) == (values, outputs):
                return there, True
        new = StageRecord(
            kind=DESCRIPTION,
            name=DESCRIPTION,
            key=key,
            inputs={},
            outputs=outputs,
            values=values,
            metrics={},
            seconds=0.0,
            finished_at=datetime.now(UTC),
            world_size=1,
        )
        return new, False


def load_experiment(path: Path, overrides: Sequence[str]) -> Experiment:
    """Read and check an experiment without starting or writing anything.

    Raises:
        ConfigError: with all faults of the config.
        SaptError: with all faults of the task files and of the backbone.
    """
    config = load_config(path, overrides)
    warn_of_unused(unused(config), keys_of(overrides))
    return assemble(config, str(path))


def find_experiment(path: Path, overrides: Sequence[str]) -> Experiment:
    """An experiment that has run: of its folders, or, where they are gone, as the store remembers it.

    Raises:
        ConfigError: with all faults of the config.
        SaptError: it can be had from neither, with all faults of the task files and of the backbone.
    """
    try:
        return load_experiment(path, overrides)
    except ConfigError:
        raise
    except SaptError as error:
        config = load_config(path, overrides)
        found = _remembered(config, open_store(config.store))
        if found is None:
            raise error from None
        return found


def _remembered(config: ExperimentConfig, store: ArtifactStore) -> Experiment | None:
    """The newest experiment that was run with this config, from the store alone."""
    newest = None
    for key in _described_under(config):
        there = find_record(store, key)
        if there is None:
            break
        newest = there
    if newest is None:
        return None
    if newest.erased:
        raise ConfigError(
            "The tasks can be read nowhere:",
            [f"{store.uri} keeps no rows of them any more, as retention says: put them back where benchmark says"],
        )
    values: dict[str, Any] = newest.values
    digests = [newest.outputs[name] for name in sorted(newest.outputs)]
    learnt, scored = values["tasks"], values["unseen"]
    every = [Task.from_json(store.get(digest)) for digest in digests[: learnt + scored]]
    samples = dict(zip(values["samples"], digests[learnt + scored :], strict=True))
    tasks, unseen = tuple(every[:learnt]), tuple(every[learnt:])
    ref = BackboneRef(**values["backbone"])
    if config.train.precision == "auto":
        config = with_precision(config, values["precision"])
    given = {name: store.get(digest) for name, digest in samples.items()}
    version = values.get("base")
    base = None if version is None else read_base(Manifest.from_bytes(store.get(version)), store)
    memory = weight_bytes(config.backbone)
    anew = bool(values.get("anew"))
    graph = build_graph(config, tasks, unseen, ref, samples=samples, base=base, memory=memory, anew=anew)
    return Experiment(config, tasks, unseen, ref, graph, given, git_commit(), base, anew)


def _described_under(config: ExperimentConfig) -> Iterator[str]:
    """Keys of what a config was run with, oldest first: its folders may have held something else later on."""
    unread: Any = dict.fromkeys(("cluster", "diagnostics", "registry", "retention", "store", "tracking"), True) | {
        "train": {"precision"}
    }
    fields = config.hashed(unread)
    return (canonical_hash([DESCRIPTION, number, fields]) for number in count())


def assemble(
    config: ExperimentConfig,
    name: str,
    *,
    load: Callable[[BenchmarkConfig], tuple[Task, ...]] = load_sequence,
    identified: Callable[[BackboneConfig], BackboneRef] = identify,
    folder: Path | None = None,
    base: Base | None = None,
    anew: bool = False,
) -> Experiment:
    """Check a configured experiment without starting or writing anything.

    Args:
        config: the experiment.
        name: what messages call it.
        load, identified: for those who assemble many experiments on the same data and backbone.
        folder: where the backbone's files lie on this machine, if not where the config says.
        base: the version that is gone on from.
        anew: whether what is learnt again begins with a new block.

    Raises:
        SaptError: with all faults of the task files and of the backbone.
    """
    faults: list[SaptError] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except SaptError as error:
            faults.append(error)
            return None

    tasks = attempt(lambda: load(config.benchmark))
    attempt(lambda: check_metrics(tasks or ()))
    learnt = len(tasks or ()) - len(config.benchmark.unseen)
    samples = attempt(lambda: _given_samples(config, (tasks or ())[:learnt]))
    ref = attempt(lambda: identified(config.backbone))
    if ref is not None:
        there = {} if folder is None else {"path": str(folder), "revision": None, "gguf_file": None}
        here = config.model_copy(update={"backbone": config.backbone.model_copy(update=there)})
        attempt(lambda: check_backbone(here, tasks or ()))
        settled = attempt(lambda: settle_precision(here, ref))
        config = config if settled is None else with_precision(config, settled.train.precision)
    if len(faults) > 1:
        raise FaultsError(f"{name} cannot be run:", [str(fault).replace("\n", "\n  ") for fault in faults])
    if faults:
        raise faults[0]
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in samples.items()}
    tasks, unseen = tasks[:learnt], tasks[learnt:]
    memory = weight_bytes(here.backbone)
    graph = build_graph(config, tasks, unseen, ref, samples=digests, base=base, memory=memory, anew=anew)
    return Experiment(config, tasks, unseen, ref, graph, samples, git_commit(), base, anew)


def _given_samples(config: ExperimentConfig, tasks: Sequence[Task]) -> dict[str, bytes]:
    """The inputs that reflection source ``given`` has of the tasks, as the store keeps them."""
    if config.reflection.data_dir is None or not config.method.shared_attention:
        return {}
    # The newest is reflected on by tasks that are still to come, and need not be there yet.
    there = [task.name for task in tasks[-1:] if (config.reflection.data_dir / task.name).is_dir()]
    inputs = load_inputs(config.reflection.data_dir, [*(task.name for task in tasks[:-1]), *there])
    return {name: json.dumps(texts).encode() for name, texts in inputs.items()}
