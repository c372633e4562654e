"""What of the data of finished sequences must not stay in the store, and its removal.

The rows of a task lie in the blob of its text, in its tokens, in the counts of its answers and in what was answered to
them. Nothing else has any: what later tasks reflect on or rehearse is bounded before a sequence starts, and
checkpoints hold parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.stages import Stage, StageRecord
from cluster.store.cleaning import all_records, kept_outputs
from cluster.store.erasing import Erased, erase
from cluster.store.lookups import Lookups
from pipelines.sequence.bodies import LABELS, SEALED
from pipelines.sequence.experiment import DESCRIPTION, Experiment
from sapt_core.settings import RetentionConfig

SCORED = frozenset({"evaluate", "zero_shot"})


@dataclass(frozen=True)
class Removal:
    """What came of it.

    Attributes:
        erased: what was taken out of the store.
        claimed: names of tasks of which all stays, because a sequence that may keep them, or has not ended, names them.
        claims: keys of the records that say so.
    """

    erased: Erased
    claimed: tuple[str, ...]
    claims: tuple[str, ...]

    def told(self, uri: str) -> Iterator[str]:
        """Lines for people; none where nothing was to be done.

        Args:
            uri: of the store.
        """
        if self.erased.marked or self.erased.blobs:
            yield f"retention: {self.erased.blobs} blobs with rows, {self.erased.bytes:,} bytes, are gone from {uri}"
        if self.claimed:
            more = "" if len(self.claims) == 1 else f" and {len(self.claims) - 1} more"
            yield (
                f"warning: the rows of {', '.join(self.claimed)} stay in {uri}, where another sequence that has not "
                f"ended or may keep them needs them (records/{self.claims[0]}.json{more}). Once that has let go of "
                "them, submit this again. It does so when it is submitted with a retention of its own; if nobody needs "
                "it any more, delete that record"
            )
        if self.erased.kept:
            yield (
                f"warning: {len(self.erased.kept)} blobs with rows stay in {uri}, because a version that may carry "
                "them, or another sequence with the same rows, names them"
            )


def enforce(finished: Sequence[tuple[Experiment, Mapping[Stage, StageRecord]]], known: Lookups) -> Removal | None:
    """Remove what retention does not allow of sequences that have ended, and are published if they are to be.

    A task is left alone while a sequence in the store that is none of these names its text: it may be at work.

    Args:
        finished: each with the records of its stages.
        known: what is known of the store.

    Returns:
        None where all may stay.

    Raises:
        StoreError: the store cannot be read or written.
    """
    bound = [pair for pair in finished if not pair[0].config.retention.keeps_all]
    if not bound:
        return None
    store = known.store
    records = all_records(store)
    own = {experiment.description(store)[0].key: experiment for experiment, _ in bound}
    others = {
        key: set(kept_outputs(record).values())
        for key, record in records.items()
        if record.get("kind") == DESCRIPTION and key not in own
    }
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    claimed: dict[str, str] = {}
    claims: dict[str, None] = {}
    for key, experiment in own.items():
        for index, task in enumerate((*experiment.tasks, *experiment.unseen)):
            wanted[key].add(f"{index:03d}")
            if naming := [other for other, texts in others.items() if task.digest in texts]:
                claimed[task.digest] = task.name
                claims |= dict.fromkeys(naming)
    for experiment, learnt in bound:
        for stage, record in learnt.items():
            if names := with_rows(stage, record, experiment.config.retention):
                prepared = stage if stage.kind == "prepare" else stage.inputs["task"]
                if prepared.reads["task"] not in claimed:
                    wanted[record.key] |= names
    return Removal(erase(wanted, records, known), tuple(claimed.values()), tuple(claims))


def with_rows(stage: Stage, record: StageRecord, retention: RetentionConfig) -> frozenset[str]:
    """Outputs of a stage's record that hold rows which may not stay.

    What a version carries of tasks that it knew was allowed when it was learnt.
    """
    if stage.kind == "prepare":
        train = frozenset() if retention.train_rows == "all" else frozenset({"train.arrow"})
        rows = train if retention.sealed_rows else train | SEALED
        return (rows | {LABELS}) & record.outputs.keys() if rows else rows
    if stage.kind in SCORED and stage.inputs["task"].kind == "prepare" and not retention.sealed_rows:
        return frozenset({"predictions"})
    return frozenset()
