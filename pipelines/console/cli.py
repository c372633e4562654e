"""What the entry points share: arguments, result files, and errors that people can read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pipelines.console.commands import started_so
from sapt_core.errors import SaptError, ServiceError
from sapt_core.io.addresses import redacted
from sapt_core.io.files import whole_file
from sapt_core.io.shipped import config_file


def plain_parser(description: str, example: str | None = None, action: str = "") -> argparse.ArgumentParser:
    """A parser whose help is a command's docstring, with commands named the way this one was started."""
    return argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} {action}".rstrip(),
        description=started_so(description),
        epilog=None if example is None else f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(
    description: str,
    example: str,
    *,
    kind: str = ".",
    needs_config: bool = True,
    actions: Sequence[str] = (),
    action: str = "",
    named: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with ``--config`` and dotted ``key=value`` overrides.

    Args:
        description: the command's docstring.
        example: a command line.
        kind: folder of the shipped configs that the command's are in; those of experiments are in none.
        needs_config: whether it must be given.
        actions: what the command can do, of which one must be named.
        action: of the command, that this is the parser of, see ``chosen``.
        named: what else must be named, with its help.
    """
    made = plain_parser(description, example, action)
    if actions:
        made.add_argument("action", choices=actions)
    for name, told in (named or {}).items():
        made.add_argument(name, metavar=name.upper(), help=told)
    made.add_argument(
        "--config",
        type=lambda text: config_file(text, kind),
        required=needs_config,
        metavar="FILE",
        help="YAML file, or the name of one that ships (see pipelines/configs)",
    )
    made.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted field of the config, e.g. seed=3 (see docs/config.md)"
    )
    return made


def chosen(made: argparse.ArgumentParser, modules: Mapping[str, str]) -> ModuleType:
    """The module of the command that the command line begins with; ends with a message, or the help, if it has none.

    Args:
        made: a parser that takes no command yet.
        modules: by the commands' names; each has a ``main``, and its docstring begins with what it is for.
    """
    given = sys.argv[1:] or ["--help"]
    if given[0] in modules:
        return import_module(modules[given[0]])
    width = max(map(len, modules))
    told = {name: (import_module(module).__doc__ or "").splitlines()[0] for name, module in modules.items()}
    made.usage = f"{made.prog} COMMAND [--help] ..."
    made.epilog = "\n".join(["commands:", *(f"  {name:{width}}  {line}" for name, line in told.items())])
    made.add_argument("command", choices=modules, help=argparse.SUPPRESS)
    made.parse_args(given)
    made.exit()


def add_print_config(made: argparse.ArgumentParser, which: str = "the config") -> None:
    """The option that shows what a config comes to; ``parse`` is told how if it is not an experiment's."""
    made.add_argument(
        "--print-config", action="store_true", help=f"print {which} with its overrides and all defaults, and end"
    )


def add_inline(made: argparse.ArgumentParser, told: str = "on this machine alone: no Ray, no MLflow") -> None:
    """The options of those who run without Ray."""
    made.add_argument("--inline", action="store_true", help=told)
    made.add_argument(
        "--processes", type=_at_least_one, metavar="N", help="with --inline: run up to N stages at once (default: 1)"
    )


def add_run(made: argparse.ArgumentParser) -> None:
    """The options of commands that run a sequence."""
    made.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    add_inline(made)
    made.add_argument("--summary", type=Path, metavar="FILE", help="write the figures of the end as JSON")
    made.add_argument(
        "--new-line",
        metavar="NAME",
        help="publish as a line of versions of its own, beside those of the registered model (tracking.line=NAME)",
    )


def add_version(made: argparse.ArgumentParser) -> None:
    """``--version`` and ``--snapshot``, of which one must be given."""
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--version",
        metavar="REF",
        help="of tracking.model in tracking.uri: a number, latest or an alias; give store.uri, too, if its store has "
        "moved since",
    )
    which.add_argument("--snapshot", metavar="DIGEST", help="of a version in store.uri, without MLflow")


def check_pairs(made: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """See that what goes with a ``--task`` is given once a task."""
    tasks = len(arguments.task)
    for option in ("data", "definition"):
        given = getattr(arguments, option, None)
        if len(given or ()) != tasks and (given is not None or option == "data"):
            made.error(f"--{option} is given {len(given or ())} times and --task {tasks}: give it once a task")


def _experiment(arguments: argparse.Namespace) -> str:
    from sapt_core.config.experiment import load_config, written

    return written(load_config(arguments.config, arguments.overrides))


def parse(
    made: argparse.ArgumentParser, config: Callable[[argparse.Namespace], str] = _experiment
) -> argparse.Namespace:
    """The command line; ends with a message if its options do not go together, and after ``--print-config``.

    Args:
        made: the parser.
        config: what ``--print-config`` prints.

    Raises:
        ConfigError: the config that is to be printed is not valid.
    """
    arguments = made.parse_intermixed_args()
    if getattr(arguments, "processes", None) is not None and not arguments.inline:
        made.error("--processes goes with --inline; on Ray, the cluster says how many stages run at once")
    if getattr(arguments, "new_line", None) is not None:
        arguments.overrides.append(f"tracking.line={arguments.new_line}")
    _quieten_transformers()
    if getattr(arguments, "print_config", False):
        sys.stdout.write(config(arguments))
        made.exit()
    return arguments


def _quieten_transformers() -> None:
    """Let it say nothing of its own; called where a command is meant, since its import takes seconds."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _at_least_one(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def check_output(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work that would be lost.

    Raises:
        SaptError: it is a folder, or lies where this user cannot write.
    """
    if path is None:
        return
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SaptError(f"{path} cannot be written: give a file in a folder that this user can write to")


def write_output(path: Path, content: str | bytes) -> None:
    """Write a result file, whole or not at all; its folder is made.

    Raises:
        ServiceError: no space, or the folder has become read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ServiceError(f"{path} cannot be written: {error.strerror}") from error


def first_time() -> Callable[[logging.LogRecord], bool]:
    """A filter for messages that were told before: every row of a comparison looks at the same tasks."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in told
        told.add(message)
        return new

    return is_new


class _Redacted(logging.Formatter):
    """What libraries warn of may show an address as it was given to them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake is one message and an exit code, ours keeps its trace.

    Exit codes: 0 done, 2 bad input, 3 a service cannot be used, 130 interrupted, 1 a defect.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(first_time())
    handler.setFormatter(_Redacted("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        main()
    except SaptError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
