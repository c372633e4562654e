"""Chats and Jinja text from their files to a published version, and what a report says of the rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.store import open_store
from pipelines import continual, data, extend, report
from sapt_core.data.prepare import read_split
from sapt_core.data.turns import as_input
from sapt_core.settings import StoreConfig
from sapt_core.versions.manifest import Manifest
from sapt_core.versions.predictor import Predictor
from sapt_core.versions.requests import Row
from tests.core.chatty import chat_tokenizer
from tests.pipelines.commands import QUICKSTART, TINY, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
CHAT, JINJA = "chat: Answer in a word.", "{{ definition }}\n{{ input }}\nAnswer: "


def turns(number: int) -> list[dict[str, str]]:
    said = [("user", f"alpha {number}"), ("assistant", "beta"), ("user", "gamma" if number % 2 else "the sky")]
    return [{"role": role, "content": content} for role, content in said]


def answer(number: int) -> str:
    return "positive" if number % 2 else "negative"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder-only backbone whose tokenizer has a chat template, and three tasks."""
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained("backbone")
    tokenizer.save_pretrained("backbone")
    chats = [{"messages": [*turns(i), {"role": "assistant", "content": answer(i)}]} for i in range(20)]
    write(Path("talk.jsonl"), chats)
    write(Path("mail.jsonl"), [{"input": f"alpha {i // 2} beta", "output": answer(i)} for i in range(20)])
    write(Path("more.jsonl"), [{"input": f"gamma {i}", "output": answer(i)} for i in range(20)])
    tasks = [
        {"name": "talk", "path": "talk.jsonl", "template": {"chat": "Answer in a word."}, "definition": "Judge."},
        {"name": "mail", "path": "mail.jsonl", "template": JINJA, "definition": "Judge it."},
    ]
    Path("tasks.yaml").write_text(yaml.safe_dump(tasks))
    return tmp_path


def given(*more: str) -> list[str]:
    small = [each for each in TINY if not each.startswith(("benchmark", "backbone", "train.epochs"))]
    small += ["backbone.path=backbone", "pet.target_modules=q_proj,v_proj", "benchmark.order=null", "train.epochs=1"]
    small += [
        "benchmark.suite=folder",
        "benchmark.tasks_file=tasks.yaml",
        "benchmark.tasks=talk,mail",
        "benchmark.metric=exact_match",
    ]
    small += ["benchmark.max_source_tokens=120", "benchmark.max_target_tokens=12", "benchmark.train_rows=null"]
    return ["--config", QUICKSTART, *small, "benchmark.test_rows=null", *more]


def learnt(call: Call, *more: str) -> str:
    options = ["--inline", "--summary", "summary.json", "evaluation.single_task=false", "reflection.source=memory"]
    ended = call(continual.main, given(*options, "store.uri=store", *more))
    assert ended.code == 0, ended.out + ended.err
    return str(json.loads(Path("summary.json").read_text())["snapshot"])


def records(kind: str) -> list[dict[str, Any]]:
    every = [json.loads(path.read_text()) for path in Path("store/records").glob("*.json")]
    return [record for record in every if record["kind"] == kind]


def test_a_version_asks_as_its_tasks_were_taught(folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = learnt(call)
    store = open_store(StoreConfig(uri="store"))
    manifest = Manifest.from_bytes(store.get(digest))
    assert [task.template for task in manifest.tasks] == [CHAT, JINJA]
    predictor = Predictor.load(store.get(digest), store)
    tokenizer = predictor._tokenizer
    assert manifest.carried is not None
    # What a request reads, token by token, is what the stored test rows are.
    seen: list[list[int]] = []
    generate, ends = LlamaForCausalLM.generate, []

    def spied(self: LlamaForCausalLM, **inputs: Any) -> Any:
        masked = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        seen.extend([index for index, there in zip(ids, mask, strict=True) if there] for ids, mask in masked)
        ends.append(inputs.get("eos_token_id"))
        return generate(self, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", spied)
    for task, carried in zip(manifest.tasks, manifest.carried, strict=True):
        rows = list(read_split(store.get(carried.tokens["test.arrow"])))
        seen.clear()
        predictor.answer([Row(input=row["input"], task=task.name) for row in rows], batch_size=1)
        assert sorted(seen) == sorted(row["prompt_ids"] for row in rows)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends == [*[[tokenizer.eos_token_id, turn_end]] * 4, *[None] * 4]
    # A full prompt is of no task: it may be a chat.
    predictor.answer([Row(prompt="alpha")])
    assert ends[-1] == [tokenizer.eos_token_id, turn_end]
    # The turns of the rows are there as chats, and what is kept to reflect on too.
    talk = list(read_split(store.get(manifest.carried[0].tokens["test.arrow"])))
    assert {row["input"] for row in talk} <= {as_input(turns(i)) for i in range(20)}
    assert {row["answer_ids"][-1] for row in talk} == {turn_end}
    kept = json.loads(store.get(manifest.carried[0].reflection["samples"]))
    assert set(kept) <= {as_input(turns(i)) for i in range(20)}
    # A task that comes later has the template of the newest, or its own.
    addition = ["--task", "more", "--data", "more.jsonl", "--definition", "Judge.", "store.uri=store"]
    for own in ([], ["--template", "chat"]):
        ended = call(extend.main, ["--snapshot", digest, *addition, *own, "--inline", "--summary", "summary.json"])
        assert ended.code == 0, ended.out + ended.err
        later = Manifest.from_bytes(store.get(json.loads(Path("summary.json").read_text())["snapshot"]))
        assert [task.template for task in later.tasks] == [CHAT, JINJA, own[1] if own else JINJA]


def test_a_report_says_what_was_counted_when_the_data_is_gone(folder: Path, call: Call) -> None:
    learnt(call)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    ended = call(report.main, given("evaluation.single_task=false", "reflection.source=memory", "store.uri=store",
                                    "--inline", "--out", "out"))  # fmt: skip
    assert ended.code == 0, ended.err
    page = Path("out/index.html").read_text()
    section = page[page.index('id="data"') : page.index('id="answers"')]
    text = " ".join(re.sub(r"<[^>]+>", " ", section).split())
    assert "max_source_tokens=120 and max_target_tokens=12" in text
    assert re.search(r"talk 14 \d+ / \d+ 0 \d+ / \d+ 0 0 of \d+ 7? ?\d* ?train", text)
    cut = "test and dev rows were split off train, by benchmark.split_seed=0, of every answer alike"
    assert text.count(cut) == 2
    assert text.count("answers (train/dev/test): ") == 2
    assert re.search(r"&#39;(positive|negative)&#39; \d/\d/\d", text)
    assert "inputs of test are in train or dev as well" in text
    # What data show says of the same rows is the same.
    figures = [record["metrics"]["facts"] for record in records("prepare")]
    assert {each["splits"]["test"]["rows"] for each in figures} == {4}


def test_labels_go_with_the_rows_and_figures_stay(folder: Path, call: Call) -> None:
    learnt(call, "retention.train_rows=share", "retention.share=0.2")
    assert all("labels.json" in record["erased"] for record in records("prepare"))
    page = next(Path("runs/report").glob("*/index.html")).read_text()
    section = page[page.index('id="data"') : page.index('id="answers"')]
    assert "talk" in section
    assert "(train/dev/test)" not in section


def test_rows_are_shown_with_the_query_s_part_and_the_answer(folder: Path, call: Call) -> None:
    shown = call(data.main, ["show", *given("attention.query=input"), "--rows", "1"])
    assert shown.code == 0, shown.err
    assert "talk: template chat: Answer in a word., metric exact_match" in shown.out
    assert "mail: template Jinja '{{ definition }} {{ input }} Answer:', metric exact_match" in shown.out
    talk, mail = (line.partition(": ")[2] for line in shown.out.splitlines() if line.startswith("  reads"))
    assert re.match(r"<\|im_start\|> .* <\|im_end\|> Ċ <\|im_start\|> .* Ċ Ċ ⟦", talk)
    assert talk.replace(" ", "").endswith("Ġsky<|im_end|>Ċ<|im_start|>assistantĊ⟧")
    assert talk.count("<|im_start|>") == 5
    before, _, query = mail.partition("⟦")
    assert before.replace(" ", "").endswith("it.Ċ")
    assert query.replace(" ", "").startswith("alpha")
    written = [line.rpartition(": ")[2] for line in shown.out.splitlines() if line.startswith("  writes")]
    assert [line.rpartition(" ")[2] for line in written] == ["<|im_end|>", "<|endoftext|>"]


def test_faults_of_templates_come_before_any_work(folder: Path, call: Call) -> None:
    Path("backbone/chat_template.jinja").unlink()
    tasks = yaml.safe_load(Path("tasks.yaml").read_text())
    tasks[1]["template"] = "{{ input.split('9')[1] }}"
    Path("tasks.yaml").write_text(yaml.safe_dump(tasks))
    for main, options in ((data.main, ["show"]), (continual.main, ["--dry-run"])):
        ended = call(main, [*options, *given("store.uri=store")])
        assert ended.code == 2
        assert "talk: template chat: the tokenizer of " in ended.err
        assert "has no chat template: take an instruct model" in ended.err
        assert "mail: train row 0: UndefinedError: list object has no element 1 (template Jinja" in ended.err
        assert "which may read definition, input, messages)" in ended.err
        assert "more rows" in ended.err
    tasks[1]["template"], tasks[0]["template"] = "{{ colour }}{{ input }}", "{{ input"
    Path("tasks.yaml").write_text(yaml.safe_dump(tasks))
    write(Path("talk.jsonl"), [{"messages": turns(0)[:1]}])
    ended = call(continual.main, ["--dry-run", *given()])
    assert ended.code == 2
    assert "benchmark.tasks.0.template: the Jinja text cannot be read: line 1: unexpected end of template" in ended.err
    assert (
        "benchmark.tasks.1.template: the Jinja text reads colour, which no row has; there are definition" in ended.err
    )
    tasks[1]["template"], tasks[0]["template"] = "superni", "superni"
    Path("tasks.yaml").write_text(yaml.safe_dump(tasks))
    ended = call(continual.main, ["--dry-run", *given()])
    assert ended.code == 2
    assert "talk.jsonl: row 0: messages has no turn of role assistant" in ended.err
    assert not Path("store").exists()
