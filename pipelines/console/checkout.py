"""The code that runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CODE = tuple(f":/{name}/**.py" for name in ("pipelines", "cluster", "sapt_core"))


def git_commit() -> str:
    """The commit of the code that runs: GIT_COMMIT, else the checkout's, else ``unknown``; -dirty if changed.

    A submitted job runs in a copy without its history, so its runtime environment has to say.
    """
    if stated := os.environ.get("GIT_COMMIT"):
        return stated
    try:
        commit, changes = (
            subprocess.run(  # noqa: S603  both lists of arguments stand below
                ["git", *arguments],  # noqa: S607
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *CODE])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit
