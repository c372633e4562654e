"""The commands by name, and command lines for people to paste, written the way this one was started."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

SCRIPTS = {
    "data": "data",
    "learn": "continual",
    "extend": "extend",
    "compare": "compare",
    "sweep": "sweep",
    "report": "report",
    "evaluate": "evaluate",
    "predict": "predict",
    "pool": "pool",
    "store": "store",
    "pretrain": "pretrain_tiny",
    "fetch-smollm2": "fetch_smollm2",
    "fields": "fields",
}
"""The file in ``pipelines`` that each command of ``sapt`` is, in the order people need them."""


def invocation(command: str) -> list[str]:
    """How to start a command: by its file where that is how this process was started, else as ``sapt COMMAND``."""
    started = Path(sys.argv[0])
    if started.suffix == ".py":
        return ["python", str(started.with_name(f"{SCRIPTS[command]}.py"))]
    return ["sapt", command]


def pasted(command: str, *words: object) -> str:
    """A command line, quoted for a shell."""
    return shlex.join([*invocation(command), *map(str, words)])


def started_so(text: str) -> str:
    """Text that names commands by their files, with those names as ``invocation`` has them."""
    for command, script in SCRIPTS.items():
        text = text.replace(f"python pipelines/{script}.py", shlex.join(invocation(command)))
    return text
