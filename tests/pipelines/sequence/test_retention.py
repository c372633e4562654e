"""What may stay of a task's data: phrases planted in its rows are looked for in all that a run has left."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from transformers import AutoTokenizer

from cluster.store import open_store
from cluster.store.base import ArtifactStore
from cluster.store.cleaning import unreachable
from pipelines import compare, continual, extend, report, sweep
from sapt_core.data.task import Example, Task
from sapt_core.settings import RetentionConfig, StoreConfig, TrackingConfig
from sapt_core.versions.manifest import CarriedTask, Manifest
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome, write_task

pytest_plugins = ["tests.mlflow_servers"]

Call = Callable[[Callable[[], None], list[str]], Outcome]
Learn = Callable[..., Outcome]

# A word of its own for every split, and a number for every row, in its input and in its answer.
WORDS = {"train": "quokka", "dev": "zyzzyva", "test": "xylophone"}
ROWS = {"train": 18, "dev": 2, "test": 4}
EVERY = {split: 2 * rows for split, rows in ROWS.items()}  # of both tasks
SEALED = {split: EVERY[split] for split in ("dev", "test")}
SHARE = ("retention.train_rows=share", "retention.share=0.2")
NO_SEALED = "retention.sealed_rows=false"
STATISTICS = ("retention.train_rows=statistics", "reflection.source=statistics")
NOTHING = (*STATISTICS, NO_SEALED)
MEMORY = ("reflection.source=memory", "reflection.share=0.2")
REPLAY = ("method.name=replay", "method.share=0.2")


def marked(name: str) -> Task:
    """A task whose rows say which they are."""
    rows = {
        split: tuple(
            Example(f"say {word} {name} {row} now", (f"{word} {name} {row}",)) for row in range(1, ROWS[split] + 1)
        )
        for split, word in WORDS.items()
    }
    return Task(name, f"Tell {name}.", rows["train"], rows["dev"], rows["test"], "superni", "rouge_l")


def found(folder: Path) -> dict[str, int]:
    """How many of the marked rows lie somewhere under a folder, in whatever form."""
    marks = {mark for path in folder.rglob("*") if path.is_file() for mark in marks_in(path.read_bytes())}
    rows = {split: sum(mark.startswith(word) for mark in marks) for split, word in WORDS.items()}
    return {split: count for split, count in rows.items() if count}


@cache
def marks_in(data: bytes) -> frozenset[str]:
    """The marked rows of a file."""
    mark = re.compile(rf"(?:{'|'.join(WORDS.values())}) [a-z]+ [0-9]+")
    return frozenset(each for text in readable(data) for each in mark.findall(text))


def readable(data: bytes) -> Iterator[str]:
    """All texts of a file: its bytes, what is packed in it, and what its token ids stand for."""
    yield data.decode(errors="replace")
    if data.startswith(b"\x1f\x8b"):
        yield from readable(gzip.decompress(data))
    with suppress(pa.ArrowInvalid, OSError):
        yield from texts_of(pa.ipc.open_stream(data).read_all().to_pylist())
    with suppress(SafetensorError):
        numbers = [each for each in load_tensors(data).values() if not each.is_floating_point()]
        yield from texts_of([each.flatten().tolist() for each in numbers])
    with suppress(ValueError):
        yield from texts_of(json.loads(data))


def texts_of(value: Any) -> Iterator[str]:
    """The texts in a value, and lists of numbers read as token ids."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_of(list(value.values()))
    elif isinstance(value, list) and value and all(type(each) is int for each in value):
        yield tokenizer().decode([each for each in value if 0 <= each < len(tokenizer())], skip_special_tokens=True)
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "pipelines/backbones/tiny")


def settings(folder: Path) -> list[str]:
    """Of the two marked tasks."""
    given = [*TINY, "benchmark.suite=folder", f"benchmark.data_dir={folder / 'data'}", "benchmark.tasks=fruit,tools"]
    given += ["benchmark.template=superni", "benchmark.train_rows=null", "benchmark.test_rows=null"]
    return [*given, "train.epochs=1", "train.checkpoint_every_steps=2", "evaluation.single_task=false"]


@pytest.fixture
def learn(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learn:
    """Learn two marked tasks inline, in a folder of its own, where checkpoints stay as a broken-off run leaves them."""
    for name in ("fruit", "tools", "birds"):
        write_task(tmp_path / "data", marked(name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what asks for Ray ends with exit code 3
    monkeypatch.setattr(ArtifactStore, "drop_checkpoints", lambda *_: None)

    def learnt(*overrides: str, inline: bool = True) -> Outcome:
        options = ["--config", QUICKSTART, "--summary", "summary.json", *(["--inline"] if inline else [])]
        ended = call(continual.main, [*options, *settings(tmp_path), *overrides])
        assert ended.code == 0, ended.out + ended.err
        return ended

    return learnt


def carried() -> tuple[CarriedTask, ...]:
    """What the version that was learnt last says it carries."""
    digest = json.loads(Path("summary.json").read_text())["snapshot"]
    tasks = Manifest.from_bytes(open_store(StoreConfig()).get(digest)).carried
    assert tasks is not None
    return tasks


@pytest.mark.parametrize(
    ("given", "stays", "shown"),
    [
        ([], EVERY, {"test": 6}),
        (["retention.train_rows=samples"], SEALED, {"test": 6}),
        ([*STATISTICS], SEALED, {"test": 6}),
        ([*NOTHING], {}, {}),
        ([NO_SEALED], {"train": EVERY["train"]}, {}),
        ([*SHARE, *MEMORY, NO_SEALED], {"train": 2 * 4}, {}),
        ([*SHARE, *REPLAY], {**SEALED, "train": 2 * 4}, {"test": 6}),
    ],
    ids=["all", "samples", "statistics", "nothing", "no sealed rows", "a share", "a share that is rehearsed"],
)
def test_exactly_what_may_stay_is_found(
    given: list[str], stays: dict[str, int], shown: dict[str, int], learn: Learn
) -> None:
    first = learn(*given)
    assert list(Path("runs/store").glob("checkpoints/*/*"))
    assert found(Path("runs/store")) == stays
    assert found(Path("runs/report")) == shown
    assert ("blobs with rows, " in first.out) == (stays != EVERY)
    sealed = {"dev.arrow", "test.arrow"} if "test" in stays else set()
    assert [set(task.tokens) for task in carried()] == [{"meta.json"} | sealed] * 2
    said = carried()[0].retention
    assert (said is None) == (stays == EVERY)
    assert said is None or said.sealed_rows == ("test" in stays)
    # Again, it is answered from the records, and no row comes back.
    again = learn(*given)
    assert "started" not in again.out
    assert "blobs with rows" not in again.out
    assert found(Path()) == {**shown, **stays}


@pytest.mark.parametrize(("given", "shown"), [([], {"test": 8}), (NOTHING, {})], ids=["all", "nothing"])
def test_mlflow_is_told_of_no_row_that_may_not_stay(
    given: list[str], shown: dict[str, int], learn: Learn, sqlite_tracking: TrackingConfig, tmp_path: Path
) -> None:
    learn(*given)
    shutil.rmtree("runs/report")
    published = learn(*given, f"tracking.uri={sqlite_tracking.uri}", inline=False)
    assert "started" not in published.out
    pages = [path for path in tmp_path.rglob("*.html") if "runs" not in path.relative_to(tmp_path).parts]
    assert len(pages) == 1
    shutil.rmtree("runs")
    shutil.rmtree(tmp_path / "data")
    assert found(tmp_path) == shown


def test_what_another_sequence_may_keep_stays_until_it_lets_go(learn: Learn) -> None:
    """Two sequences of one store that learn the same rows, of which one may keep them."""
    learn()
    other = ["seed=1", *STATISTICS]
    assert "warning: the rows of fruit, tools stay in" in learn(*other, NO_SEALED).out
    assert found(Path("runs/store")) == EVERY
    # The first is submitted with the same retention: nothing is learnt again, and now its own stay no longer.
    assert "started" not in learn("retention.train_rows=samples").out
    assert found(Path("runs/store")) == SEALED
    # What is left are test and dev rows that its versions may carry.
    assert "blobs with rows stay in" in learn(*other, NO_SEALED).out
    assert found(Path("runs/store")) == SEALED


def test_rows_that_are_needed_again_are_put_back_and_taken_out_again(learn: Learn) -> None:
    learn(*NOTHING)
    before = records()
    ended = learn(*NOTHING, "seed=1")
    assert ended.out.count(" finished in ") == 4  # both tasks are prepared again, and learnt with the other seed
    assert found(Path("runs/store")) == {}
    assert "started" not in learn(*NOTHING).out
    assert records().items() >= before.items()
    store = open_store(StoreConfig())
    assert not [each for each in unreachable(store, grace=timedelta(0)) if "checkpoints" not in each.entry.name]


def records() -> dict[str, Any]:
    """Outputs of every stage record, by its key."""
    return {path.name: json.loads(path.read_text())["outputs"] for path in Path("runs/store/records").iterdir()}


def test_a_report_of_rows_that_are_gone(learn: Learn, call: Call, tmp_path: Path) -> None:
    """It is drawn from the records while the tasks' folders are there; without them it says so."""
    learn(*NOTHING)
    given = ["--config", QUICKSTART, "--inline", *settings(tmp_path), *NOTHING]
    drawn = call(report.main, given)
    assert drawn.code == 0, drawn.err
    assert "<h2>Answers" not in Path(drawn.out.split()[1].rstrip(",")).read_text()
    shutil.rmtree(tmp_path / "data")
    refused = call(report.main, given)
    assert refused.code == 2
    assert "keeps no rows of them any more, as retention says" in refused.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], RetentionConfig(train_rows="samples")),
        (["retention.train_rows=all"], None),
        ([*STATISTICS, NO_SEALED], RetentionConfig(train_rows="statistics", sealed_rows=False)),
    ],
    ids=["as the version", "wider", "narrower"],
)
def test_an_extension_widens_nothing(
    given: list[str], said: RetentionConfig | None, learn: Learn, call: Call, tmp_path: Path
) -> None:
    learn("retention.train_rows=samples")
    version = json.loads(Path("summary.json").read_text())["snapshot"]
    task = ["--task", "birds", "--data", str(tmp_path / "data/birds")]
    ended = call(extend.main, ["--snapshot", version, *task, "--inline", "--summary", "summary.json", *given])
    assert ended.code == 0, ended.err
    before = RetentionConfig(train_rows="samples")
    assert [each.retention for each in carried()] == [before, before, said]
    assert [len(each.tokens) for each in carried()] == [3, 3, 1 if said and not said.sealed_rows else 3]
    new = {} if said and not said.sealed_rows else {"dev": ROWS["dev"], "test": ROWS["test"]}
    stays = {split: count + new.get(split, 0) for split, count in SEALED.items()}
    assert found(Path("runs/store")) == (stays if said else {**stays, "train": ROWS["train"]})


def test_a_version_without_sealed_rows_is_not_extended(learn: Learn, call: Call, tmp_path: Path) -> None:
    learn("retention.train_rows=samples", NO_SEALED)
    version = json.loads(Path("summary.json").read_text())["snapshot"]
    refused = call(extend.main, ["--snapshot", version, "--task", "birds", "--data", str(tmp_path / "data/birds")])
    assert refused.code == 2
    assert "the version carries no sealed rows of fruit, tools" in refused.err
    assert "retention.sealed_rows=true" in refused.err


def test_a_comparison_and_a_sweep_leave_what_may_stay(learn: Learn, call: Call, tmp_path: Path) -> None:
    """Of all of their sequences, once the last has ended; what is asked again is answered from the records."""
    given = {"base": QUICKSTART, "overrides": [*settings(tmp_path), *NOTHING], "results": "results"}
    rows = [{"name": "per task", "overrides": ["method.name=per_task"]}, {"name": "SAPT"}]
    Path("compare_tiny.yaml").write_text(yaml.safe_dump({**given, "rows": rows}))
    space = {"train.learning_rate": {"values": [0.001, 0.002]}}
    Path("sweep_tiny.yaml").write_text(yaml.safe_dump({**given, "search": "grid", "space": space}))
    for main, path in ((compare.main, "compare_tiny.yaml"), (sweep.main, "sweep_tiny.yaml")):
        for _ in range(2):
            ended = call(main, ["--config", path, "--inline"])
            assert ended.code == 0, ended.err
            assert "stay in" not in ended.out
            assert found(Path()) == {}
            shutil.rmtree("results")
