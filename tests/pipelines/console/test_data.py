"""What `sapt data` shows, and every block of the page on data."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines import continual, data, extend
from tests.pipelines.commands import QUICKSTART, ROOT, TINY, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
BLOCKS = re.findall(r"(?:^    .*\n)+", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE)
MAINS = {"data": data.main, "learn": continual.main, "extend": extend.main}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the page, and data as it names them."""
    described, _ = BLOCKS
    (tmp_path / "tasks.yaml").write_text(re.sub("^    ", "", described, flags=re.MULTILINE))
    (tmp_path / "data/queues").mkdir(parents=True)
    rows = [
        f'"the food was {"good" if label else "bad"}, visit {number}",{label}'
        for number in range(20)
        for label in (0, 1)
    ]
    (tmp_path / "data/reviews.csv").write_text("\n".join(["text,label", *rows]))
    for name, count in (("mails-1", 6), ("mails-2", 6), ("held_out", 4)):
        lines = [json.dumps({"input": f"my bill {name} {i}", "output": ["billing", "money"]}) for i in range(count)]
        (tmp_path / "data/queues" / f"{name}.jsonl").write_text("\n".join(lines))
    turns = [[{"role": "user", "content": f"help {i}"}, {"role": "assistant", "content": "soon"}] for i in range(9)]
    (tmp_path / "data/chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in BLOCKS[1].splitlines()]


def test_the_page_has_a_file_and_three_commands() -> None:
    assert len(BLOCKS) == 2
    assert [words[:2] for words in commands()] == [["sapt", name] for name in MAINS]
    assert [task["name"] for task in yaml.safe_load(BLOCKS[0])["tasks"]] == ["reviews", "queues", "helpdesk"]


@pytest.mark.parametrize("words", [words for words in commands() if words[1] != "extend"], ids=lambda words: words[1])
def test_the_tasks_of_the_page_are_shown_and_planned(
    words: list[str], page: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    ended = call(MAINS[words[1]], [*words[2:], TINY[0], "pet.target_modules=q,v"])
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in ("reviews", "queues", "helpdesk")) or "stages, experiment" in ended.out
    assert (
        "reviews: 8 test rows and 3 dev rows were split off train, by benchmark.split_seed=0, of every" in caplog.text
    )


def test_tasks_of_the_page_come_to_a_version(page: Path, call: Call) -> None:
    (words,) = (words for words in commands() if words[1] == "extend")
    places = [f"store.uri={page}/store", "evaluation.single_task=false"]
    summary = page / "summary.json"
    first = [*TINY, "benchmark.tasks=animal", "reflection.source=statistics", "train.epochs=1", *places]
    learnt = call(continual.main, ["--config", QUICKSTART, "--inline", "--summary", str(summary), *first])
    assert learnt.code == 0, learnt.err
    version = json.loads(summary.read_text())["snapshot"]
    given = ["--snapshot", version, *words[4:], f"store.uri={page}/store"]
    planned = call(extend.main, given)
    assert planned.code == 0, planned.err
    ended = call(extend.main, [*(word for word in given if word != "--dry-run"), "--inline", "--summary", str(summary)])
    assert ended.code == 0, ended.out + ended.err
    assert "after helpdesk: AP" in ended.out
    again = call(extend.main, [*given, "--task", "x"])
    assert again.code == 2
    assert "by --task and --data, or by --tasks" in again.err


def show(call: Call, *arguments: str) -> str:
    ended = call(data.main, ["show", "--config", QUICKSTART, *arguments])
    assert ended.code == 0, ended.err
    return ended.out


def test_rows_are_shown_as_the_model_has_them(call: Call) -> None:
    shown = show(call, *TINY, "--task", "animal", "--rows", "1", "attention.query=input")
    (reads,) = (line for line in shown.splitlines() if line.startswith("  reads"))
    assert reads.startswith(
        "  reads 37 tokens: definition : a walker wrote down what passed by . which animal was it ? ⟦"
    )
    assert reads.endswith("output : </s>⟧")
    assert re.search(r"^  writes 2 tokens: \w+ </s>$", shown, flags=re.MULTILINE)
    assert "basket" not in shown
    assert "⟦" not in show(call, *TINY, "method.name=sequential")


def test_what_is_lost_repeated_and_unknown_is_counted(page: Path, call: Call) -> None:
    rows = [
        {"input": "long " * 300 if i == 0 else f"x {i // 2}", "output": "да" if i % 4 else "no " * 40}
        for i in range(16)
    ]
    for split in ("train", "test"):
        (page / "data/queues" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = "benchmark.tasks=[{name: odd, path: data/queues}]"
    shown = show(call, *TINY, task, "benchmark.suite=folder", "benchmark.template=superni", "benchmark.order=null")
    (line,) = (line for line in shown.splitlines() if line.endswith("│ test  │"))
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[0] == "odd"
    _, count, prompt, cut, answer, ends, unknown, repeated, _ = cells
    assert (count, cut, ends, repeated) == ("12", "1", "3", "5")
    assert int(prompt.split(" / ")[1]) > 300
    assert int(answer.split(" / ")[1]) > 40
    assert not unknown.startswith("0 of")
    assert "inputs of test are in train or dev as well" in shown
    assert "answers (train/dev/test): 'да'" in shown


def test_faults_of_data_and_backbone_come_together(page: Path, call: Call) -> None:
    (page / "data/reviews.csv").write_text("txt,label\n")
    given = ["benchmark.suite=folder", "benchmark.tasks_file=tasks.yaml", "backbone.path=data"]
    for main, options in ((data.main, ["show"]), (continual.main, ["--dry-run"])):
        ended = call(main, [*options, "--config", "superni_mini", *given])
        assert ended.code == 2
        assert "reviews.csv: no column text (columns.input); there are: txt, label" in ended.err
        assert "data" in ended.err.replace("The task data", "")
    unknown = call(data.main, ["show", "--config", QUICKSTART, *TINY, "--task", "animl"])
    assert unknown.code == 2
    assert "--task animl: give one of animal, basket" in unknown.err
