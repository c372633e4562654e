"""Look at the tasks of a config: what the model will read and write, token by token, and what of it is lost.

    python pipelines/data.py show --config quickstart
    python pipelines/data.py show --config quickstart --task animal --rows 1 --split test

Nothing is trained and no weights are loaded; of the backbone the tokenizer is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted
from sapt_core.errors import ConfigError, FaultsError, SaptError

if TYPE_CHECKING:
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.data.facts import TaskFacts
    from sapt_core.data.prepare import PromptEncoder
    from sapt_core.data.task import Task

LABELS_SHOWN = 20
SPLITS = ("train", "dev", "test")


def main() -> None:
    """Parse the command line and do what is asked."""
    parser = cli.parser(__doc__ or "", pasted("data", "show", "--config", "quickstart"), actions=["show"])
    parser.add_argument("--task", action="append", metavar="NAME", help="this task alone; may be given several times")
    parser.add_argument("--rows", type=_count, default=3, metavar="N", help="rows to show of each task (default: 3)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="they are of this split (default: train)")
    arguments = cli.parse(parser)

    from sapt_core.config.experiment import load_config

    config = load_config(arguments.config, arguments.overrides)
    tasks, encoder = _opened(config)
    _show(_chosen(tasks, arguments.task), encoder, config, arguments)


def _opened(config: ExperimentConfig) -> tuple[tuple[Task, ...], PromptEncoder]:
    """The tasks, and what makes tokens of them.

    Raises:
        SaptError: with all faults of the data and of the tokenizer.
    """
    from sapt_core.backbones.reference import load_model_config, location
    from sapt_core.backbones.tokens import load_tokenizer
    from sapt_core.data import load_sequence
    from sapt_core.data.prepare import PromptEncoder

    faults: list[SaptError] = []
    tasks, encoder = None, None
    try:
        tasks = load_sequence(config.benchmark)
    except SaptError as error:
        faults.append(error)
    try:
        folder, path = location(config.backbone), config.backbone.path
        encoder = PromptEncoder(
            load_tokenizer(folder, path),
            max_source_tokens=config.benchmark.max_source_tokens,
            is_encoder_decoder=bool(load_model_config(folder, path).is_encoder_decoder),
        )
    except SaptError as error:
        faults.append(error)
    if tasks is None or encoder is None:
        if len(faults) == 1:
            raise faults[0]
        raise FaultsError("The tasks cannot be shown:", [str(fault).replace("\n", "\n  ") for fault in faults])
    return tasks, encoder


def _chosen(tasks: Sequence[Task], names: Sequence[str] | None) -> list[Task]:
    known = [task.name for task in tasks]
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(
            "There is no such task:", [f"--task {name}: give one of {', '.join(known)}" for name in unknown]
        )
    return [task for task in tasks if names is None or task.name in names]


def _show(
    tasks: Sequence[Task], encoder: PromptEncoder, config: ExperimentConfig, arguments: argparse.Namespace
) -> None:
    from pipelines.console.tables import text_table, wide_console
    from sapt_core.data.facts import facts_of

    console = wide_console()
    longest = config.benchmark.max_target_tokens
    facts = {task.name: facts_of(task, encoder, longest) for task in tasks}
    title = (
        "Tokens of prompts and answers: median / longest, and rows that lose some to benchmark.max_source_tokens="
        f"{encoder.max_source_tokens} and max_target_tokens={longest}"
    )
    header = ["task", "rows", "prompt", "cut", "answer", "cut", "unknown", "repeated", "split"]
    rows = [
        [
            name,
            str(of.rows),
            f"{of.prompt_tokens[0]} / {of.prompt_tokens[1]}",
            str(of.prompts_cut),
            f"{of.answer_tokens[0]} / {of.answer_tokens[1]}",
            str(of.answers_cut),
            f"{of.unknown} of {of.written}",
            str(of.repeated),
            split,
        ]
        for name, each in facts.items()
        for split, of in each.splits.items()
    ]
    console.print(text_table(title, header, rows))
    for task in tasks:
        told = [f"\n{task.name}: template {task.template}, metric {task.metric}", *_told(facts[task.name])]
        console.print("\n".join([*told, *_rows(task, encoder, config, arguments)]), soft_wrap=True)
    if config.method.shared_attention:
        console.print("\n⟦ ⟧ holds what the query is made of, which chooses the blocks.")


def _told(facts: TaskFacts) -> list[str]:
    """What a table has no place for."""
    told = []
    if facts.labels:
        shown = [f"{label!r} {'/'.join(map(str, counts))}" for label, counts in facts.labels.items()]
        more = [f"and {len(shown) - LABELS_SHOWN} more"] if len(shown) > LABELS_SHOWN else []
        told.append(f"answers (train/dev/test): {', '.join([*shown[:LABELS_SHOWN], *more])}")
    if facts.shared:
        told.append(f"{facts.shared} inputs of test are in train or dev as well: scores are too high")
    return told


def _rows(task: Task, encoder: PromptEncoder, config: ExperimentConfig, arguments: argparse.Namespace) -> list[str]:
    """The first rows of a split, token by token."""
    from sapt_core.data.facts import encoded

    rows = getattr(task, arguments.split)[: arguments.rows]
    lines = []
    for place, (row, made) in enumerate(
        zip(rows, encoded(task, rows, encoder, config.benchmark.max_target_tokens), strict=True)
    ):
        prompt = _tokens(encoder, made.prompt.prompt_ids)
        if config.method.shared_attention:
            start = 0 if config.attention.query == "prompt" else made.prompt.query_start
            prompt = [*prompt[:start], f"⟦{' '.join(prompt[start:])}⟧"]
        cut = ", its middle taken out" if made.prompt.truncated else ""
        lines += [
            f"{arguments.split} row {place}",
            f"  reads {len(made.prompt.prompt_ids)} tokens{cut}: {' '.join(prompt)}",
            f"  writes {len(made.answer_ids)} tokens{', its end cut off' if made.answer_cut else ''}: "
            + " ".join(_tokens(encoder, made.answer_ids)),
        ]
        if len(row.references) > 1:
            lines.append(f"  right as well: {', '.join(map(repr, row.references[1:]))}")
    return lines


def _tokens(encoder: PromptEncoder, ids: list[int]) -> list[str]:
    return [token.replace("\n", "\\n") for token in encoder.tokenizer.convert_ids_to_tokens(ids)]


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
