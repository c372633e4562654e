"""What one more task costs a pool of many, against the same task as the second of two: training and publishing.

    python benchmarks/extending.py --blocks 1 50

Tasks of a few words on a random model of T5-small's width with few layers, learnt in one sequence; then the versions of
so many blocks are extended by one and the same task, in turn, and what comes of it is registered. Nothing is scored. Of
each: processor time, bytes read from the store beside the backbone (and how many the version has), bytes written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from cluster.stages import InlineExecutor, run_graph
from cluster.store.local import LocalStore
from cluster.store.lookups import Lookups
from cluster.tracking.lines import Lineage
from cluster.tracking.registry import PoolRegistry
from cluster.tracking.runs import Tracker
from pipelines.console.machine import machine_of
from pipelines.sequence.experiment import load_experiment
from pipelines.sequence.extension import Places, extend
from sapt_core.settings import StoreConfig, TrackingConfig, TrainConfig
from sapt_core.task_settings import TaskConfig
from sapt_core.versions.contents import blobs_of
from sapt_core.versions.manifest import Manifest

ROOT = Path(__file__).parents[1]
WIDTH, LAYERS, ROWS, MORE_ROWS = 512, 3, 16, 160


class CountedStore(LocalStore):
    """A store in a folder that counts the bytes which pass through it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read = self.written = 0

    def _read(self, name: str) -> bytes | None:
        data = super()._read(name)
        self.read += len(data or b"")
        return data

    def _chunks(self, name: str) -> Iterator[bytes] | None:
        chunks = super()._chunks(name)
        return None if chunks is None else self._counted(chunks)

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.read += len(chunk)
            yield chunk

    def _write(self, name: str, data: bytes) -> None:
        super()._write(name, data)
        self.written += len(data)

    def _write_file(self, name: str, path: Path) -> None:
        super()._write_file(name, path)
        self.written += path.stat().st_size

    def _create(self, name: str, data: bytes) -> bool:
        self.written += len(data)
        return super()._create(name, data)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seen = measure(Path(folder), arguments.blocks, arguments.rounds)
    first = seen[arguments.blocks[0]]
    table = Table("blocks", "CPU, s", "to first", "read, MB", "version, MB", "written, MB", "to first")
    for count, each in seen.items():
        table.add_row(
            str(count),
            f"{each['seconds']:.2f}",
            f"{each['seconds'] / first['seconds']:.2f}",
            *(f"{each[name] / 1e6:.2f}" for name in ("read", "version", "written")),
            f"{each['written'] / first['written']:.3f}",
        )
    Console().print(table)
    if arguments.output:
        result = {
            "by_blocks": seen,
            "rounds": arguments.rounds,
            "machine": machine_of(TrainConfig()).model_dump(),
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, counts: Sequence[int], rounds: int) -> dict[int, dict[str, float]]:
    """Medians of the rounds for a version of each number of blocks."""
    made = learnt(folder, max(counts))
    seen: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for number in range(rounds + 1):
        for count in counts:
            found = extended(folder, made[count - 1], seed=100 + number, alone=f"{count}-{number}")
            if number:  # the first of each warms up
                seen[count].append(found)
    return {
        count: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for count, found in seen.items()
    }


def learnt(folder: Path, count: int) -> list[str]:
    """Digests of the versions of a sequence, complete, not scored."""
    save_backbone(folder / "backbone")
    names = [f"task{index:03d}" for index in range(count)]
    for index, name in enumerate([*names, "more"]):
        write_rows(folder / "data" / name, index, MORE_ROWS if name == "more" else ROWS)
    settings = [
        f"backbone.path={folder}/backbone",
        "benchmark.suite=folder",
        f"benchmark.data_dir={folder}/data",
        f"benchmark.tasks={json.dumps(names)}",
        "benchmark.template=superni",
        "benchmark.metric=exact_match",
        "benchmark.train_rows=null",
        "benchmark.test_rows=null",
        "pet.target_modules=q,v",
        "reflection.source=statistics",
        "attention.temperature=1",
        "evaluation.single_task=false",
        "train.epochs=1",
        "train.batch_size=8",
        f"store.uri={folder}/store",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    experiment = load_experiment(ROOT / "pipelines/configs/quickstart.yaml", settings)
    store = LocalStore(folder / "store")
    known = Lookups(store)
    experiment.upload(known)
    done = run_graph(experiment.graph.complete, known, InlineExecutor(store))
    return [done[stage].outputs["manifest"] for stage in experiment.graph.complete]


def extended(folder: Path, digest: str, *, seed: int, alone: str) -> dict[str, float]:
    """What it costs to learn one more task on a version, and to register what comes of it."""
    store = CountedStore(folder / "store")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="extending", model=f"pool-{alone}")
    places = Places({"uri": store.uri}, tracking.model_dump(mode="json"))
    tracker = Tracker(tracking)
    began = time.process_time()
    manifest = Manifest.from_bytes(store.get(digest))
    addition = TaskConfig(name="more", path=str(folder / "data/more"))
    experiment = extend(manifest, store, [addition], places=places, overrides=[f"seed={seed}"])
    known = Lookups(store)
    experiment.upload(known)
    stage = experiment.graph.complete[-1]
    after = run_graph([stage], known, InlineExecutor(store))[stage].outputs["manifest"]
    run = tracker.start_sequence("extending", key=after, params={}, tags={})
    PoolRegistry(tracking).publish(
        store.get(after),
        StoreConfig(uri=store.uri),
        lineage=Lineage("more", (after,)),
        digest=after,
        index=1,
        run_id=run,
        description="",
        tags={},
        metrics={},
    )
    seconds = time.process_time() - began
    uncounted = LocalStore(folder / "store")
    version = sum(len(uncounted.get(each)) for each in {digest, *blobs_of(manifest, backbone=False)})
    return {"seconds": seconds, "read": store.read, "version": version, "written": store.written}


def save_backbone(folder: Path) -> None:
    """A random model with the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pipelines/backbones/tiny")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": WIDTH, "d_kv": 64, "d_ff": 2048, "num_layers": LAYERS, "num_heads": 8}
    config = T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def write_rows(folder: Path, index: int, count: int) -> None:
    """A task in the layout of CL_Benchmark, whose answer depends on a word of the input."""
    folder.mkdir(parents=True)
    answers = ("red", "blue")
    for split, rows in (("train", count), ("test", 4)):
        instances = [
            {"input": f"number {row} of {index} is a {answers[row % 2]} {split} thing", "output": answers[row % 2]}
            for row in range(rows)
        ]
        content = {"Definition": f"Tell the colour, by rule {index}.", "Instances": instances}
        (folder / f"{split}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
