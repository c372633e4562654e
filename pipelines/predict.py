"""Answer texts with any version of a pool, and say which tasks' blocks each answer was made with.

    python pipelines/predict.py --version latest --task animal --input 'your text' tracking.model=quickstart
    python pipelines/predict.py --snapshot DIGEST --file in.jsonl --output out.jsonl store.uri=runs/store

Without --input and --file it answers the lines of its standard input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.console.places import check_lasting
from sapt_core.errors import DataError, SaptError

if TYPE_CHECKING:
    from sapt_core.data.task import LearntTask
    from sapt_core.versions.manifest import Manifest
    from sapt_core.versions.predictor import Prediction, Predictor

SMALLEST_SHOWN = 0.01


class Request(NamedTuple):
    """One text to answer; ``given`` is the row it came in, which comes back with the answer."""

    given: dict[str, Any]
    text: str
    task: LearntTask | None


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
    from sapt_core.config import load_config, load_places
    from sapt_core.versions.predictor import Predictor, find_task

    if arguments.output is not None and arguments.file is None:
        raise SaptError("--output goes with --file; without it the answers are printed")
    check_lasting({"--output": arguments.output})
    cli.check_output(arguments.output)
    lines = None if arguments.file is None else _read_lines(arguments.file)
    config, overrides = arguments.config, arguments.overrides
    places = load_places(overrides) if config is None else load_config(config, overrides)
    manifest, store = open_version(arguments, places)
    task = None if arguments.task is None else find_task(manifest, arguments.task)
    if arguments.input is not None and (fault := _text_fault(arguments.input)):
        raise DataError("The text cannot be answered:", [f"--input {fault}"])
    requests = None if lines is None else read_requests(lines, str(arguments.file), manifest, task)

    predictor = Predictor.load(manifest.to_bytes(), store)
    if requests is not None:
        answers = predictor.predict([each.text for each in requests], [each.task for each in requests])
        text = "".join(_row(each, answer) for each, answer in zip(requests, answers, strict=True))
        if arguments.output is None:
            sys.stdout.write(text)
        else:
            cli.write_output(arguments.output, text)
    elif arguments.input is not None:
        _show(predictor.predict([arguments.input], [task])[0])
    else:
        _answer_typed(predictor, task)


def read_requests(lines: Iterable[str], name: str, manifest: Manifest, task: LearntTask | None) -> list[Request]:
    """The rows of a JSONL file.

    Args:
        lines: of the file; blank ones are left out.
        name: of the file, for messages.
        manifest: the version that is to answer.
        task: of inputs that name none; None takes them as full prompts.

    Raises:
        DataError: with every fault and its line, or without any row.
    """
    requests: list[Request] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(line, manifest, task))
        except SaptError as error:
            faults.append(f"line {number}: {error}")
    if not requests and not faults:
        faults.append("no rows")
    if faults:
        raise DataError(f"{name} cannot be answered:", faults)
    return requests


def _request(line: str, manifest: Manifest, task: LearntTask | None) -> Request:
    from sapt_core.versions.predictor import find_task

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SaptError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise SaptError('not an object with "prompt" or "input"')
    fields = [field for field in ("prompt", "input") if field in row]
    if len(fields) != 1:
        raise SaptError('give either "prompt", a full prompt, or "input", an input of a task')
    text, named = row[fields[0]], row.get("task")
    if fault := _text_fault(text):
        raise SaptError(f"{fields[0]} {fault}")
    if named is not None and not isinstance(named, str):
        raise SaptError("task is not text")
    if fields == ["prompt"]:
        if named is not None:
            raise SaptError('a "prompt" is answered as it is: leave out "task", or give "input"')
        return Request(row, text, None)
    return Request(row, text, task if named is None else find_task(manifest, named))


def _text_fault(text: Any) -> str | None:
    if not isinstance(text, str):
        return "is not text"
    if not text.strip():
        return "is blank"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds bytes or a lone surrogate that are no characters"
    return None


def _read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also splits where JSON strings may hold a character as it is.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError("The input cannot be read:", [f"{path}: no such file"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("The input cannot be read:", [f"{path}: {error}"]) from error


def _answer_typed(predictor: Predictor, task: LearntTask | None) -> None:
    """Answer every line as it comes."""
    if sys.stdin.isatty():
        what = "prompt" if task is None else f"input of {task.name}"
        print(f"one {what} a line, end with Ctrl-D", file=sys.stderr)
    try:
        for number, line in enumerate(sys.stdin, start=1):
            text = line.rstrip("\n")
            if not text.strip():
                continue
            if fault := _text_fault(text):
                raise DataError("The text cannot be answered:", [f"line {number} {fault}"])
            _show(predictor.predict([text], [task])[0])
    except UnicodeDecodeError as error:
        raise DataError("The standard input cannot be read:", [str(error)]) from error


def _row(request: Request, prediction: Prediction) -> str:
    answered = {**request.given, "prediction": prediction.text, "weights": dict(prediction.weights)}
    return json.dumps(answered, allow_nan=False) + "\n"


def _show(prediction: Prediction) -> None:
    heaviest = sorted(prediction.weights.items(), key=lambda item: -item[1])
    shown = [f"{block}: {weight:.2f}" for block, weight in heaviest if weight >= SMALLEST_SHOWN]
    print(prediction.text)
    print(f"  {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
