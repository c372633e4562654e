"""Answer texts with any version of a pool, and say which tasks' blocks each answer was made with.

    python pipelines/predict.py --version latest --task animal --input 'your text' tracking.model=quickstart
    python pipelines/predict.py --snapshot DIGEST --file in.jsonl --output out.jsonl store.uri=runs/store

Without --input and --file it answers the lines of its standard input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.console.places import check_lasting
from sapt_core.errors import DataError, RequestError, SaptError

if TYPE_CHECKING:
    from sapt_core.versions.manifest import Manifest
    from sapt_core.versions.predictor import Prediction
    from sapt_core.versions.requests import Row

SMALLEST_SHOWN = 0.01


class Given(NamedTuple):
    """One row of a file: its line's number, what the line holds, which comes back with the answer, and what it asks."""

    number: int
    content: dict[str, Any]
    row: Row


def main() -> None:
    """Parse the command line and answer."""
    parser = cli.parser(
        __doc__ or "",
        pasted("predict", "--version", "latest", "--input", "your text", "tracking.model=quickstart"),
        needs_config=False,
    )
    cli.add_version(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="TEXT", help="one text")
    source.add_argument(
        "--file",
        type=Path,
        metavar="JSONL",
        help='rows {"prompt": …} or {"input": …, "task": … if another than --task}',
    )
    parser.add_argument(
        "--output", type=Path, metavar="JSONL", help="with --file: where the answers go (default: stdout)"
    )
    parser.add_argument("--task", metavar="NAME", help="put this learnt task's definition and template around inputs")
    arguments = cli.parse(parser)

    from pipelines.console.versions import open_version
    from sapt_core.config.experiment import load_config, load_places
    from sapt_core.versions.predictor import Predictor
    from sapt_core.versions.requests import Row, find_task, read_rows, refuse

    if arguments.output is not None and arguments.file is None:
        raise SaptError("--output goes with --file; without it the answers are printed")
    check_lasting({"--output": arguments.output})
    cli.check_output(arguments.output)
    lines = None if arguments.file is None else _read_lines(arguments.file)
    config, overrides = arguments.config, arguments.overrides
    places = load_places(overrides) if config is None else load_config(config, overrides)
    manifest, store = open_version(arguments, places)
    task = None if arguments.task is None else find_task(manifest, arguments.task).name

    def ask(text: str) -> Row:
        return Row(prompt=text) if task is None else Row(input=text, task=task)

    # What is wrong whatever the backbone is told before seconds or minutes are spent on loading it.
    if arguments.input is not None:
        refuse(read_rows(manifest, [ask(arguments.input)])[1], ["--input"])
    given = None if lines is None else read_file(lines, str(arguments.file), manifest, task)

    predictor = Predictor.load(manifest.to_bytes(), store)
    if given is not None:
        answers = predictor.answer([each.row for each in given], names=[f"line {each.number}" for each in given])
        text = "".join(_line(each, answer) for each, answer in zip(given, answers, strict=True))
        if arguments.output is None:
            sys.stdout.write(text)
        else:
            cli.write_output(arguments.output, text)
    elif arguments.input is not None:
        _show(predictor.answer([ask(arguments.input)], names=["--input"])[0])
    else:
        if sys.stdin.isatty():
            what = "prompt" if task is None else f"input of {task}"
            print(f"one {what} a line, end with Ctrl-D", file=sys.stderr)
        _answer_typed(lambda text, name: predictor.answer([ask(text)], names=[name])[0])


def read_file(lines: Iterable[str], file: str, manifest: Manifest, task: str | None) -> list[Given]:
    """The rows of a JSONL file.

    Args:
        lines: of the file; blank ones are left out.
        file: its name, for messages.
        manifest: the version that is to answer.
        task: of inputs that name none.

    Raises:
        RequestError: with every fault and its line, or without any row.
    """
    from sapt_core.versions.requests import read_rows

    given: list[Given] = []
    faults: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given.append(_given(number, line, task))
        except SaptError as error:
            faults[number] = str(error)
    found = read_rows(manifest, [each.row for each in given])[1]
    faults |= {given[place].number: fault for place, fault in found.items()}
    told = [f"line {number}: {faults[number]}" for number in sorted(faults)]
    if told or not given:
        raise RequestError(f"{file} cannot be answered:", told or ["no rows"])
    return given


def _given(number: int, line: str, task: str | None) -> Given:
    from sapt_core.versions.requests import Row

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SaptError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise SaptError('not an object with "prompt" or "input"')
    asked = Row(*(row.get(field) for field in Row._fields))
    if asked.input is not None and asked.task is None:
        asked = asked._replace(task=task)
    return Given(number, row, asked)


def _read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also splits where JSON strings may hold a character as it is.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError("The input cannot be read:", [f"{path}: no such file"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("The input cannot be read:", [f"{path}: {error}"]) from error


def _answer_typed(answer: Callable[[str, str], Prediction]) -> None:
    """Answer every line as it comes."""
    try:
        for number, line in enumerate(sys.stdin, start=1):
            text = line.rstrip("\n")
            if text.strip():
                _show(answer(text, f"line {number}"))
    except UnicodeDecodeError as error:
        raise DataError("The standard input cannot be read:", [str(error)]) from error


def _line(given: Given, prediction: Prediction) -> str:
    answered = {**given.content, "prediction": prediction.text, "weights": dict(prediction.weights)}
    return json.dumps(answered, allow_nan=False) + "\n"


def _show(prediction: Prediction) -> None:
    heaviest = sorted(prediction.weights.items(), key=lambda item: -item[1])
    shown = [f"{block}: {weight:.2f}" for block, weight in heaviest if weight >= SMALLEST_SHOWN]
    print(prediction.text)
    print(f"  {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
