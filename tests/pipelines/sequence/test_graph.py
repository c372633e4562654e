"""Which stages a sequence has, and which config fields reach which of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.stages import Stage
from pipelines.sequence.bodies import numbered
from pipelines.sequence.experiment import Experiment, load_experiment
from pipelines.sequence.graph import SequenceGraph, build_graph
from pipelines.sequence.making import VERSIONS
from sapt_core.data.task import Task
from sapt_core.io.hashing import canonical_hash
from sapt_core.methods.base import find_method
from tests.pipelines.commands import QUICKSTART, TINY

THREE = "benchmark.tasks=animal,basket,ticket"


def experiment(*overrides: str) -> Experiment:
    return load_experiment(Path(QUICKSTART), [*TINY, THREE, *overrides])


def identity(stage: Stage) -> str:
    """The stage's key, with the identities of its inputs in place of what they will give, of quiet ones nothing."""
    inputs = {name: identity(source) for name, source in stage.inputs.items() if name not in stage.quiet}
    return canonical_hash([stage.kind, stage.version, dict(stage.reads), inputs])


def identities(graph: SequenceGraph) -> dict[str, list[str]]:
    groups: dict[str, tuple[Stage, ...]] = {
        "prepare": graph.prepare,
        "kept": graph.kept[: len(graph.train) - 1],
        "train": graph.train,
        "evaluate": tuple(stage for row in graph.evaluate for stage in row),
        "single": tuple(stage.inputs["version"] for stage in graph.single),
        "single score": graph.single,
        "attend": graph.attend,
        "quality": graph.quality,
    }
    return {group: [identity(stage) for stage in stages] for group, stages in groups.items()}


@pytest.fixture(scope="module")
def base() -> dict[str, list[str]]:
    return identities(experiment().graph)


@pytest.mark.parametrize("native", [False, True])
def test_the_number_format_is_settled_before_anything_is_keyed(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapt_core.backbones.device.computes_bfloat16", lambda _: native)
    settled = "bfloat16" if native else "float32"
    found = experiment("train.precision=auto")
    reads = [stage.reads for stage in found.graph.stages]
    formats = {read["precision"] for read in reads if "precision" in read}
    formats |= {read["train"]["precision"] for read in reads if "train" in read}
    assert formats == {found.config.train.precision} == {settled}
    given = f"train.precision={settled}"
    assert found.key == experiment(given).key
    # GPUs compute in bfloat16, so with auto they give other numbers, and with a format that is given the same.
    assert experiment("cluster.gpus_per_worker=1").config.train.precision == "bfloat16"
    assert identities(experiment(given, "cluster.gpus_per_worker=1").graph) == identities(found.graph)


def test_every_stage_is_there_once_and_reads_what_it_needs() -> None:
    graph = experiment().graph
    names = [stage.name for stage in graph.stages]
    assert len(names) == len(set(names)) == 3 + 3 + 2 + 6 + 3 + 3 + 2 + 1 + 1
    assert graph.tasks == ("animal", "basket", "ticket")
    assert [stage.name for stage in graph.train] == ["train[00 animal]", "train[01 basket]", "train[02 ticket]"]
    first, second, third = graph.train
    probed = {"probe": graph.probe}
    assert graph.stages[0] is graph.probe  # before anything is trained
    assert first.inputs == {"task": graph.prepare[0], **probed}
    assert second.inputs == {"task": graph.prepare[1], "parent": first, "kept 00": graph.kept[0], **probed}
    assert third.inputs == {
        "task": graph.prepare[2],
        "parent": second,
        "kept 00": graph.kept[0],
        "kept 01": graph.kept[1],
        **probed,
    }
    assert [stage.inputs for stage in graph.kept] == [{"task": prepared, **probed} for prepared in graph.prepare]
    for i, row in enumerate(graph.evaluate):
        assert [stage.inputs for stage in row] == [
            {"version": graph.train[i], "task": graph.prepare[j]} for j in range(i + 1)
        ]
        assert {stage.uses["version"] for stage in row} == {frozenset({"manifest"})}  # which names all of a version
    for index, scored in enumerate(graph.single):
        assert scored.inputs["task"] is graph.prepare[index]
        assert scored.inputs["version"].inputs == {"task": graph.prepare[index], **probed}
    assert [stage.name for stage in graph.attend] == ["attend[v00]", "attend[v01]", "attend[v02]"]
    for i, stage in enumerate(graph.attend):
        tasks = {f"task {j:02d}": graph.prepare[j] for j in range(i + 1)}
        assert stage.inputs == {"version": graph.train[i], **tasks}
        assert stage.uses == {"version": {"manifest"}, **{name: {"dev.arrow"} for name in tasks}}
    for stage, prepared, samples in zip(graph.quality, graph.prepare, graph.kept, strict=False):
        assert stage.inputs == {"task": prepared, "kept": samples}


def test_a_task_is_hashed_once_however_often_its_digest_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    to_json = Task.to_json
    monkeypatch.setattr(Task, "to_json", lambda task: hashed.append(task.name) or to_json(task))  # type: ignore[func-returns-value]
    whole = experiment()
    assert whole.key == whole.key
    assert build_graph(whole.config, whole.tasks, whole.unseen, whole.backbone).tasks == whole.graph.tasks
    assert sorted(hashed) == sorted(["animal", "basket", "ticket"] * 2)  # with and without their test rows


def test_only_training_and_pseudo_samples_take_train_workers() -> None:
    graph = experiment("cluster.train_workers=3", "cluster.cpus_per_worker=2", "cluster.gpus_per_worker=1").graph
    for stage in (*graph.train, *graph.kept, *(scored.inputs["version"] for scored in graph.single)):
        assert (stage.workers, stage.cpus, stage.gpus) == (3, 2, 1)
    for stage in (*(s for row in graph.evaluate for s in row), *graph.single):
        assert (stage.workers, stage.cpus, stage.gpus) == (0, 2, 1)
    light = (*graph.prepare, *graph.attend, *graph.quality)
    assert {(stage.workers, stage.cpus, stage.gpus) for stage in light} == {(0, 2, 0)}


def changed(base: dict[str, list[str]], *overrides: str) -> dict[str, list[bool]]:
    now = identities(experiment(*overrides).graph)
    return {group: [a != b for a, b in zip(base[group], now[group], strict=True)] for group in base}


def expected(**groups: list[bool]) -> dict[str, list[bool]]:
    sizes = {"prepare": 3, "kept": 2, "train": 3, "evaluate": 6, "single": 3, "single score": 3}
    sizes |= {"attend": 3, "quality": 2}
    # What changes a version or pseudo-samples changes what is said of them.
    groups.setdefault("attend", groups.get("train", [False] * 3))
    groups.setdefault("quality", groups.get("kept", [False] * 2))
    return {group: groups.get(group.replace(" ", "_"), [False] * size) for group, size in sizes.items()}


AFTER_FIRST = {"train": [False, True, True], "evaluate": [False, *[True] * 5]}


def test_reflection_reaches_no_task_before_there_is_something_to_reflect_on(base: dict[str, list[str]]) -> None:
    assert changed(base, "reflection.weight=0.25") == expected(**AFTER_FIRST)
    assert changed(base, "reflection.batch_size=3") == expected(**AFTER_FIRST)


@pytest.mark.parametrize("source", ["memory", "statistics"])
def test_another_source_of_reflection_reaches_no_first_task(base: dict[str, list[str]], source: str) -> None:
    graph = experiment(f"reflection.source={source}", "cluster.train_workers=2").graph
    now = identities(graph)
    assert now.pop("quality") == []  # real inputs and statistics are not told from real inputs
    differing = {group: [a != b for a, b in zip(base[group], keys, strict=True)] for group, keys in now.items()}
    wanted = expected(kept=[True] * 2, **AFTER_FIRST)
    assert differing == {group: flags for group, flags in wanted.items() if group != "quality"}
    assert [stage.name for stage in graph.kept] == [
        f"{source}[{task}]" for task in ("00 animal", "01 basket", "02 ticket")
    ]
    assert {stage.workers for stage in graph.kept} == {0}


def test_what_another_source_reads_reaches_nothing(base: dict[str, list[str]]) -> None:
    assert changed(base, "reflection.share=0.5") == changed(base, "reflection.rank=3") == expected()
    statistics = identities(experiment("reflection.source=statistics").graph)
    assert identities(experiment("reflection.source=statistics", "generator.steps=9").graph) == statistics


def test_what_the_query_sees_is_no_matter_of_the_generator(base: dict[str, list[str]]) -> None:
    assert changed(base, "attention.query=input") == expected(train=[True] * 3, evaluate=[True] * 6)


def test_sapt_and_the_paper_share_all_but_training(base: dict[str, list[str]]) -> None:
    assert changed(base, "method.name=sapt_paper") == expected(train=[True] * 3, evaluate=[True] * 6)


def test_a_method_that_learns_otherwise_than_before_is_learnt_anew(
    base: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_method("sapt"), "version", 2)
    assert changed(base) == expected(train=[True] * 3, evaluate=[True] * 6)


def test_a_stage_that_computes_otherwise_than_before_is_another_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    before, sequential = experiment(), experiment("method.name=sequential")
    monkeypatch.setitem(VERSIONS, "pseudo_samples", VERSIONS["pseudo_samples"] + 1)
    assert experiment().key != before.key
    assert experiment("method.name=sequential").key == sequential.key
    monkeypatch.setattr(find_method("sequential"), "version", 2)
    assert experiment("method.name=sequential").key != sequential.key


def test_versions_of_stage_and_method_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        return experiment().graph.train[0].version

    first = version()
    monkeypatch.setattr(find_method("sapt"), "version", find_method("sapt").version + 1)
    second = version()
    monkeypatch.setitem(VERSIONS, "train", VERSIONS["train"] + 1)
    assert first < second < version()


def test_a_hundred_tasks_and_more_keep_their_order(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(103)]
    base = experiment()
    tasks = [replace(base.tasks[0], name=name) for name in names]
    graph = build_graph(base.config, tasks, (), base.backbone)
    kept = numbered(graph.train[-1].inputs, "kept")
    assert [stage.name for stage in kept] == [f"pseudo_samples[{i:02d} t{i}]" for i in range(102)]
    seen = numbered(graph.attend[-1].inputs, "task")
    assert [stage.name for stage in seen] == [f"prepare[{i:02d} t{i}]" for i in range(103)]


def test_other_answers_retrain_what_keeps_the_best_on_dev_alone(
    base: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = identities(experiment("train.eval_every_epochs=1").graph)
    monkeypatch.setitem(VERSIONS, "evaluate", VERSIONS["evaluate"] + 1)
    assert identities(experiment("train.eval_every_epochs=1").graph)["train"] != scored["train"]
    assert identities(experiment().graph)["train"] == base["train"]


def test_where_the_target_comes_from_counts_from_the_first_task_on(base: dict[str, list[str]]) -> None:
    assert changed(base, "reflection.target_split=dev") == expected(train=[True] * 3, evaluate=[True] * 6)


def test_the_generator_reaches_no_first_task_and_no_task_alone(base: dict[str, list[str]]) -> None:
    assert changed(base, "generator.steps=3") == expected(kept=[True] * 2, **AFTER_FIRST)


def test_the_attention_does_not_reach_a_task_alone(base: dict[str, list[str]]) -> None:
    assert changed(base, "attention.temperature=0.7") == expected(train=[True] * 3, evaluate=[True] * 6)


@pytest.mark.parametrize("override", ["evaluation.batch_size=7", "evaluation.num_beams=2"])
def test_decoding_retrains_nothing(base: dict[str, list[str]], override: str) -> None:
    assert changed(base, override) == expected(evaluate=[True] * 6, single_score=[True] * 3)


def test_decoding_counts_in_training_where_dev_chooses_the_weights() -> None:
    base = identities(experiment("train.eval_every_epochs=1").graph)
    found = changed(base, "train.eval_every_epochs=1", "evaluation.num_beams=2")
    assert found == expected(train=[True] * 3, evaluate=[True] * 6, single=[True] * 3, single_score=[True] * 3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["store.uri=elsewhere"],
        ["store.uri=s3://bucket/prefix", "store.endpoint_url=http://127.0.0.1:9"],
        ["tracking.uri=http://127.0.0.1:9", "tracking.model=other", "tracking.experiment=other"],
        ["cluster.train_workers=4", "cluster.cpus_per_worker=2"],
        ["cluster.max_failures=9", "cluster.address=127.0.0.1:6379"],
        ["train.checkpoint_every_steps=1"],
        ["diagnostics.forgetting=1", "diagnostics.misalignment=2"],
    ],
)
def test_where_it_runs_changes_no_key(base: dict[str, list[str]], overrides: list[str]) -> None:
    assert changed(base, *overrides) == expected()
    assert experiment(*overrides).key == experiment().key


def test_a_seed_reaches_all_that_is_random_and_no_preparation(base: dict[str, list[str]]) -> None:
    found = changed(base, "seed=1")
    assert found["prepare"] == [False] * 3
    assert all(all(flags) for group, flags in found.items() if group != "prepare")
    assert experiment("seed=1").key != experiment().key


def test_sequential_shares_its_first_task_with_the_task_alone(base: dict[str, list[str]]) -> None:
    graph = experiment("method.name=sequential").graph
    keys = identities(graph)
    assert graph.kept == graph.quality == graph.attend == ()
    assert keys["train"][0] == keys["single"][0] == base["single"][0]
    assert keys["single"] == base["single"]
    assert graph.train[1].inputs == {
        "task": graph.prepare[1],
        "parent": graph.train[0],
        "probe": graph.probe,
    }


@pytest.mark.parametrize(
    "override",
    [
        "reflection.weight=0.1",
        "reflection.source=memory",
        "attention.temperature=0.7",
        "generator.steps=9",
        "pet.detach_frozen=true",
    ],
)
def test_what_only_sapt_reads_changes_nothing_of_sequential(override: str) -> None:
    plain = identities(experiment("method.name=sequential").graph)
    assert identities(experiment("method.name=sequential", override).graph) == plain


def test_without_reflection_there_are_no_pseudo_samples() -> None:
    assert experiment("reflection.source=none").graph.kept == ()
    graph = experiment("reflection.weight=0").graph
    assert graph.kept == graph.quality == ()
    assert len(graph.attend) == 3
    assert not any(name.startswith("kept") for stage in graph.train for name in stage.inputs)


def test_tasks_are_not_learnt_alone_unless_asked_for() -> None:
    graph = experiment("evaluation.single_task=false").graph
    assert graph.single == ()
    assert len(graph.stages) == 3 + 3 + 2 + 6 + 3 + 2 + 1 + 1


def test_a_backbone_is_probed_once_for_the_kinds_of_blocks_that_are_learnt_on_it() -> None:
    def reads(*overrides: str) -> dict[str, Any]:
        return dict(experiment(*overrides).graph.probe.reads)

    base = reads()
    assert base["blocks"] == [{"type": "lora", "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}]
    for same in ("pet.r=2", "train.epochs=1", "method.name=per_task", "reflection.weight=2", "generator.pet.r=1"):
        assert reads(same) == base, same
    other = experiment("generator.pet.target_modules=[q]").graph.probe
    assert other.reads["blocks"] == [*base["blocks"], {"type": "lora", "target_modules": ["q"]}]
    assert other.told["fields"] == ["pet", "generator.pet"]
    prompts = reads("pet={type: prompt}", "reflection.source=memory")
    assert prompts["blocks"] == [{"type": "prompt"}]
    assert reads("evaluation.num_beams=3") == {**base, "num_beams": 3}
    assert reads("train.gradient_checkpointing=true") == {**base, "gradient_checkpointing": True}


def test_a_task_more_changes_nothing_before_it(base: dict[str, list[str]]) -> None:
    two = identities(experiment("benchmark.tasks=animal,basket").graph)
    assert all(base[group][: len(keys)] == keys for group, keys in two.items())


def test_given_samples_count_by_content(tmp_path: Path) -> None:
    def at(folder: Path) -> Experiment:
        return experiment("reflection.source=given", f"reflection.data_dir={folder}")

    here = at(write_tasks(tmp_path / "here", "animal", "basket"))
    there = at(write_tasks(tmp_path / "there", "animal", "basket"))
    assert (identities(there.graph), there.key) == (identities(here.graph), here.key)
    assert [stage.kind for stage in here.graph.kept] == ["given", "given"]
    rows = {"Definition": "", "Instances": [{"input": "another", "output": ""}]}
    (tmp_path / "there/basket/train.json").write_text(json.dumps(rows))
    edited = at(tmp_path / "there")
    assert edited.key != here.key
    assert identities(edited.graph)["kept"][0] == identities(here.graph)["kept"][0]
    assert identities(edited.graph)["kept"][1] != identities(here.graph)["kept"][1]


def write_tasks(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"input": f"{split} {name} {number}", "output": [f"answer {number}"]} for number in range(6)]
            content: dict[str, Any] = {"Definition": [f"About {name}."], "Instances": rows}
            (folder / name / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_moving_data_and_backbone_changes_no_key(tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data", "a", "b")
    shutil.copytree(TINY[0].partition("=")[2], tmp_path / "tiny")
    shutil.copytree(data, tmp_path / "elsewhere" / "corpus")
    shutil.copytree(tmp_path / "tiny", tmp_path / "elsewhere" / "renamed")
    base = (
        "benchmark.suite=folder",
        "benchmark.tasks=a,b",
        "benchmark.template=superni",
        "benchmark.train_rows=null",
        "benchmark.test_rows=null",
    )

    def at(data_dir: Path, backbone: Path) -> Experiment:
        overrides = [*TINY, *base, f"benchmark.data_dir={data_dir}", f"backbone.path={backbone}"]
        return load_experiment(Path(QUICKSTART), overrides)

    here = at(data, tmp_path / "tiny")
    there = at(tmp_path / "elsewhere/corpus", tmp_path / "elsewhere/renamed")
    assert identities(here.graph) == identities(there.graph)
    assert here.key == there.key

    content = json.loads((data / "b/train.json").read_text())
    content["Instances"][0]["input"] += "!"
    (data / "b/train.json").write_text(json.dumps(content))
    edited = at(data, tmp_path / "tiny")
    assert edited.key != here.key
    differing = {
        group: [x != y for x, y in zip(identities(here.graph)[group], keys, strict=True)]
        for group, keys in identities(edited.graph).items()
    }
    assert differing["prepare"] == differing["train"] == differing["single"] == [False, True]
    assert differing["kept"] == [False]
