"""Look at the tasks of a config: what the model will read and write, token by token, and what of it is lost.

    python pipelines/data.py show --config quickstart
    python pipelines/data.py show --config quickstart --task animal --rows 1 --split test

Nothing is trained and no weights are loaded; of the backbone the tokenizer is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.console import cli, taskrows
from pipelines.console.commands import pasted
from sapt_core.errors import ConfigError, FaultsError, SaptError

if TYPE_CHECKING:
    from sapt_core.config.experiment import ExperimentConfig
    from sapt_core.data.encoding import EncodedRow, PromptEncoder
    from sapt_core.data.task import Task

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
    from sapt_core.data.encoding import PromptEncoder
    from sapt_core.data.prepare import check_templates

    faults: list[SaptError] = []
    tasks, encoder = None, None
    try:
        tasks = load_sequence(config.benchmark)
    except SaptError as error:
        faults.append(error)
    try:
        folder, path = location(config.backbone), config.backbone.path
        tokenizer, both = load_tokenizer(folder, path), bool(load_model_config(folder, path).is_encoder_decoder)
        encoder = PromptEncoder(
            tokenizer, max_source_tokens=config.benchmark.max_source_tokens, is_encoder_decoder=both
        )
        check_templates(tasks or (), tokenizer, is_encoder_decoder=both)
    except SaptError as error:
        faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if tasks is None or encoder is None:
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
    from sapt_core.data.facts import encoded, facts_of
    from sapt_core.template_settings import told

    console = wide_console()
    longest = config.benchmark.max_target_tokens
    title = (
        "Tokens of prompts and answers: median / longest, and rows that lose some to benchmark.max_source_tokens="
        f"{encoder.max_source_tokens} and max_target_tokens={longest}"
    )
    made = {
        task.name: {split: encoded(task, getattr(task, split), encoder, longest) for split in SPLITS} for task in tasks
    }
    facts = {task.name: facts_of(task, made[task.name], encoder.tokenizer) for task in tasks}
    rows = [row for name, each in facts.items() for row in taskrows.cells(name, each)]
    console.print(text_table(title, taskrows.HEAD, rows))
    for task in tasks:
        head = f"\n{task.name}: template {told(task.template)}, metric {task.metric}"
        shown = _rows(task, made[task.name][arguments.split], encoder, config, arguments)
        console.print("\n".join([head, *taskrows.lines(facts[task.name], task.cut), *shown]), soft_wrap=True)
    if config.method.shared_attention:
        console.print("\n⟦ ⟧ holds what the query is made of, which chooses the blocks.")


def _rows(
    task: Task,
    every: Sequence[EncodedRow],
    encoder: PromptEncoder,
    config: ExperimentConfig,
    arguments: argparse.Namespace,
) -> list[str]:
    """The first rows of a split, token by token: the prompt that is read, and the answer that is written."""
    lines = []
    rows = zip(getattr(task, arguments.split)[: arguments.rows], every, strict=False)
    for place, (row, made) in enumerate(rows):
        prompt = _tokens(encoder, made.prompt.prompt_ids)
        if config.method.shared_attention:
            start = 0 if config.attention.query == "prompt" else made.prompt.query_start
            prompt = [*prompt[:start], f"⟦{' '.join(prompt[start:])}⟧"]
        cut = f" of {made.prompt.tokens}, its middle taken out" if made.prompt.truncated else ""
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
