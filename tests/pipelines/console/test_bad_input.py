"""What people get wrong: one message with every fault, an exit code, no trace, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from pipelines import continual
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome

BACKBONE = ROOT / "pipelines/backbones/tiny"
FOLDERS = (
    "benchmark.suite=folder",
    "benchmark.data_dir=data",
    "benchmark.tasks=a,b",
    "benchmark.template=superni",
)

Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Callable[[], None], list[str]], Outcome]
) -> Refuse:
    """Run with overrides in ``tmp_path``, expect to be refused without a trace of it; returns the message."""
    monkeypatch.chdir(tmp_path)

    def refused(*overrides: str, config: str = QUICKSTART, code: int = 2, dry: bool = False) -> str:
        before = sorted(tmp_path.rglob("*"))
        mode = "--dry-run" if dry else "--inline"
        outcome = call(
            continual.main, ["--config", config, mode, "--summary", "new/s.json", *TINY, "store.uri=store", *overrides]
        )
        assert outcome.code == code, outcome.err
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        assert outcome.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.err

    return refused


def faults(message: str) -> list[str]:
    return [line.removeprefix("  - ") for line in message.splitlines() if line.startswith("  - ")]


def task(name: str, **content: Any) -> None:
    folder = Path("data", name)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"input": f"text {number}", "output": [f"answer {number}"]} for number in range(6)]
    whole = json.dumps({"Definition": ["Do."], "Instances": rows})
    (folder / "train.json").write_text(whole)
    (folder / "test.json").write_text(whole)
    for split, value in content.items():
        (folder / f"{split}.json").write_text(value if isinstance(value, str) else json.dumps(value))


# The experiment file and its overrides


def test_all_faults_of_a_config_at_once(refuse: Refuse) -> None:
    message = refuse(
        "train.epoch=3", "train.batch_size=many", "attention.temperature=0", "pett.r=8", "benchmark.suite=glue"
    )
    found = {fault.partition(":")[0]: fault for fault in faults(message)}
    assert set(found) == {"train.epoch", "train.batch_size", "attention.temperature", "pett", "benchmark.suite"}
    assert "did you mean epochs?" in found["train.epoch"]
    assert "did you mean pet?" in found["pett"]
    assert "'many'" in found["train.batch_size"]
    assert "greater than 0" in found["attention.temperature"]
    assert "'synthetic'" in found["benchmark.suite"]


def test_a_number_that_is_none(refuse: Refuse) -> None:
    found = faults(
        refuse("train.learning_rate=.inf", "train.epochs=.inf", "reflection.weight=.nan", "pet.lora_alpha=.inf")
    )
    assert len(found) == 4
    assert all("finite number" in fault for fault in found)


def test_overrides_without_a_value(refuse: Refuse) -> None:
    message = refuse("train.epochs", "=3", "seed=[1")
    assert [fault.partition(":")[0] for fault in faults(message)] == ["'train.epochs'", "'=3'", "seed"]


def test_a_section_is_no_value(refuse: Refuse) -> None:
    assert "train: is a section" in refuse("train=3")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        ("benchmark: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "must hold a YAML mapping"),
        ("just words", "just words: no such field"),
        ("", "benchmark: suite folder needs data_dir"),
        ("seed: ${oc.env:NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_config_that_is_none(refuse: Refuse, content: str | None, part: str) -> None:
    if content is not None:
        Path("mine.yaml").write_text(content)
    message = refuse(config="mine.yaml")
    assert part in message
    assert "mine.yaml" in message


def test_a_folder_is_no_config(refuse: Refuse) -> None:
    Path("folder.yaml").mkdir()
    assert "folder.yaml" in refuse(config="folder.yaml")


def test_a_summary_that_cannot_be_written_is_refused_before_the_work(refuse: Refuse) -> None:
    Path("there").mkdir()
    Path("file").touch()
    assert "there cannot be written" in refuse("--summary", "there")
    assert "file/s.json cannot be written" in refuse("--summary", "file/s.json")


def test_a_store_that_cannot_be_written(refuse: Refuse) -> None:
    Path("file").touch()
    # The plan is not shown before the store has been tried.
    assert "store.uri must be a folder" in refuse("store.uri=file/store", code=3)


# Tasks


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"train": '{"Definition": ["Do."], "Instances": [{"inp'}, "a/train.json: line 1 column"),
        ({"train": {"Definition": ["Do."]}}, "a/train.json: Instances is missing"),
        ({"test": {"Definition": ["Do."], "Instances": []}}, "a/test.json: Instances is empty"),
        ({"train": [1, 2]}, "a/train.json: row 0: is a number"),
        ({"test": {"Definition": ["Do."], "Instances": [{"input": 3, "output": "x"}]}}, "row 0: input is a number"),
        ({"test": {"Definition": ["Do."], "Instances": [{"input": "x", "output": []}]}}, "no row is usable"),
        ({"train": {"Definition": ["Do."], "Instances": [{"input": "x", "output": "y"}]}}, "one usable row"),
    ],
)
def test_task_files(refuse: Refuse, content: dict[str, Any], part: str) -> None:
    task("a", **content)
    task("b")
    assert part in refuse(*FOLDERS)


def test_every_fault_of_every_task_at_once(refuse: Refuse) -> None:
    task("a", train="{", test={"Definition": ["Do."], "Instances": [{"input": None, "output": []}]})
    Path("data/b").mkdir()
    found = faults(refuse(*FOLDERS, "benchmark.tasks=a,b,c"))
    assert [fault.partition(":")[0] for fault in found] == [
        "c",
        "a/train.json",
        "a/test.json",
        "b/train.json",
    ]


def test_no_data_folder_and_no_such_task(refuse: Refuse) -> None:
    assert "data is not a folder" in refuse(*FOLDERS)
    assert "did you mean animal?" in refuse("benchmark.tasks=animl,basket")
    assert "named twice: animal" in refuse("benchmark.tasks=animal,animal")


def test_prompts_that_do_not_fit(refuse: Refuse) -> None:
    message = refuse("benchmark.max_source_tokens=8")
    assert "animal" in message
    assert "basket" in message
    assert "benchmark.max_source_tokens is 8" in message


@pytest.mark.parametrize("dry", [True, False])
def test_right_answers_that_would_score_nothing(refuse: Refuse, dry: bool) -> None:
    rows = {"Definition": ["Do."], "Instances": [{"input": f"text {number}", "output": "很好"} for number in range(6)]}
    for name in "ab":
        task(name, train=rows, test=rows)
    found = faults(refuse(*FOLDERS, "benchmark.metric=rouge_l", dry=dry))
    assert [fault.partition(":")[0] for fault in found] == ["a", "b"]
    assert "6 hold nothing that metric rouge_l sees" in found[0]
    (found, _) = faults(refuse(*FOLDERS, "benchmark.metric=rouge_l_unicode", dry=dry))
    assert "6 cannot be written whole by the backbone's tokenizer" in found


# Backbone


def backbone(name: str, *without: str) -> Path:
    shutil.copytree(BACKBONE, name)
    for pattern in without:
        for path in Path(name).glob(pattern):
            path.unlink()
    return Path(name)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "empty"])
def test_a_path_without_a_model(refuse: Refuse, path: str) -> None:
    Path("empty").mkdir()
    assert f"backbone.path {path}" in refuse(f"backbone.path={path}")


def test_a_model_that_looks_ahead(refuse: Refuse) -> None:
    folder = backbone("bert")
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(folder)
    assert "'bert' is neither" in refuse("backbone.path=bert")


def test_pickled_weights_are_not_loaded(refuse: Refuse) -> None:
    folder = backbone("pickled", "*.safetensors")
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "pickled weights are not loaded" in refuse("backbone.path=pickled")


def test_a_config_cut_short(refuse: Refuse) -> None:
    path = backbone("cut") / "config.json"
    path.write_text(path.read_text()[:100])
    assert "backbone.path cut" in refuse("backbone.path=cut")


@pytest.mark.parametrize("dry", [False, True])
def test_weight_files_that_are_not_there_whole(refuse: Refuse, dry: bool) -> None:
    weights = backbone("cut") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "model.safetensors is damaged or cut short" in refuse("backbone.path=cut", dry=dry)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "run git lfs pull" in refuse("backbone.path=cut", dry=dry)
    header = int.from_bytes(whole[:8], "little")
    names = json.loads(whole[8 : 8 + header])
    wrapped = json.dumps({f"m.{name}" if name != "__metadata__" else name: value for name, value in names.items()})
    weights.write_bytes(len(wrapped).to_bytes(8, "little") + wrapped.encode() + whole[8 + header :])
    assert "weights would be random" in refuse("backbone.path=cut", dry=dry)


def test_a_backbone_without_its_tokenizer(refuse: Refuse) -> None:
    backbone("mute", "tokenizer*")
    assert "no tokenizer" in refuse("backbone.path=mute")


@pytest.mark.parametrize("section", ["pet", "generator.pet"])
def test_target_modules_that_match_nothing(refuse: Refuse, section: str) -> None:
    message = refuse(f"{section}.target_modules=q_proj")
    assert "q_proj" in message
    assert "wi_0" in message, "the names that are there"


@pytest.mark.parametrize("dry", [True, False])
def test_a_model_that_cannot_carry_the_blocks(refuse: Refuse, dry: bool) -> None:
    folder = backbone("mamba", "*.safetensors", "config.json")
    MambaForCausalLM(MambaConfig(vocab_size=600, hidden_size=8, num_hidden_layers=1, state_size=2)).save_pretrained(
        folder
    )
    message = refuse("backbone.path=mamba", "pet.target_modules=in_proj,dt_proj", dry=dry)
    assert "1 of 2 are never called" in message
    assert "backbone.layers.0.mixer.dt_proj" in message
    assert "mixer.in_proj" in message, "what can be named"


# Blocks and reflection


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("pet.type=prompt", "pet.length=0"), "pet.length: Input should be greater than or equal to 1"),
        (("pet.type=prompt", "pet.r=4"), "pet.r: no such field; known here: type, length"),
        (("pet.type=soft",), "pet: type must be lora, prompt or full"),
        (("method.name=spat",), "method: there is no method 'spat'; did you mean sapt? known: "),
        (("method.name=o_lora", "method.share=0.1"), "method.share: no such field; known here: name, orthogonality"),
        (("method.name=o_lora", "method.orthogonalty=1"), "method.orthogonalty: no such field; did you mean"),
        (("method.name=o_lora", "pet.type=prompt"), "method o_lora works with pet.type lora, not prompt"),
        (("method.name=replay", "method.share=0"), "method.share: Input should be greater than 0"),
        (("method=sapt",), "method: is a section; give its fields, for example in YAML or as method.NAME=VALUE"),
        (("method.name=seekr", "method.layers=9"), "method.layers asks for 9 of 8 attention layers"),
        (("method.name=per_task", "benchmark.unseen=stock"), "leave benchmark.unseen out"),
        (("reflection.source=given",), "source given and data_dir"),
        (("reflection.data_dir=elsewhere",), "source given and data_dir"),
        (("reflection.source=memories",), "reflection.source: Input should be 'generated'"),
        (("reflection.source=memory", "reflection.share=0"), "reflection.share: Input should be greater than 0"),
    ],
)
def test_blocks_and_sources_that_there_are_not(refuse: Refuse, overrides: tuple[str, ...], said: str) -> None:
    assert said in refuse(*overrides)


def test_soft_prompts_longer_than_the_positions(refuse: Refuse) -> None:
    folder = backbone("llama", "*.safetensors", "config.json")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=120,
        )
    ).save_pretrained(folder)  # fmt: skip
    targets = ("generator.pet.target_modules=q_proj", "pet.type=prompt")
    message = refuse("backbone.path=llama", *targets, "pet.length=99")
    assert "120 positions" in message
    assert "pet.length, benchmark.max_source_tokens and max_target_tokens ask for 211" in message


def test_given_samples_that_are_not_there(refuse: Refuse) -> None:
    Path("samples/animal").mkdir(parents=True)
    Path("samples/animal/train.json").write_text('{"Definition": "", "Instances": [{"output": ""}]}')
    message = refuse("benchmark.tasks=animal,basket,ticket", "reflection.source=given", "reflection.data_dir=samples")
    assert "animal/train.json: row 0: input is missing" in message
    assert "basket/train.json: no such file" in message
    assert "ticket" not in message  # nothing comes after it


# Together


@pytest.mark.parametrize("dry", [False, True])
def test_faults_of_data_and_backbone_are_told_together(refuse: Refuse, dry: bool) -> None:
    task("a", train="{")
    task("b")
    message = refuse(*FOLDERS, "backbone.path=./nowhere", dry=dry)
    assert "a/train.json" in message
    assert "backbone.path ./nowhere" in message
