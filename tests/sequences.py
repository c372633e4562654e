"""Tiny task sequences, run as users run them: by a command, in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
TASKS = ("animal", "ticket")
SETTINGS = (
    f"backbone.path={ROOT}/pipelines/backbones/tiny",
    f"benchmark.tasks={','.join(TASKS)}",
    "benchmark.train_rows=24",
    "benchmark.test_rows=4",
    "train.epochs=10",
    "generator.steps=2",
    "generator.max_tokens=24",
    "train.checkpoint_every_steps=2",
)
_OF_THE_MACHINE = ("RAY_", "MLFLOW_", "AWS_", "GIT_COMMIT")


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def started(self) -> list[str]:
        """Stages that ran, except evaluations, which are not told."""
        return [line.split(" ", 1)[1].removesuffix(" started") for line in self.out.splitlines() if _tells_start(line)]


def _tells_start(line: str) -> bool:
    return line[2:3] == ":" and line.endswith(" started")


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster of two nodes with one logical CPU each.

    Attributes:
        address: of the head's GCS.
        dashboard: http address that takes jobs.
        environment: with the token.
        processes: the ``ray start`` of each node, head first.
    """

    address: str
    dashboard: str
    environment: Mapping[str, str]
    processes: tuple[subprocess.Popen[bytes], ...]

    def workers(self, title: str) -> list[psutil.Process]:
        """The cluster's worker processes that run a task or actor of this name now."""
        found = []
        for node in self.processes:
            for process in psutil.Process(node.pid).children(recursive=True):
                try:
                    if process.cmdline()[:1] == [f"ray::{title}"]:
                        found.append(process)
                except psutil.Error:
                    continue
        return found


def command(store: str, tracking: str, *arguments: str) -> list[str]:
    """What a user types, from ``pipelines/`` on."""
    script = ["pipelines/continual.py", "--config", "pipelines/configs/quickstart.yaml"]
    return [*script, *SETTINGS, f"store.uri={store}", f"tracking.uri={tracking}", *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what the machine says of Ray, MLflow and S3."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_MACHINE)}
    return {**kept, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}


def start(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a pipeline in the background; its output can be read as it comes."""
    return subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests themselves run in a shell's background, Ctrl-C is ignored by all they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def run(arguments: list[str], environment: Mapping[str, str]) -> Outcome:
    """Run a pipeline to its end."""
    process = start(arguments, environment)
    try:
        out, err = process.communicate(timeout=480)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Outcome(process.returncode, out, err)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read the process's output up to the line that contains ``text``."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}:\n{seen}\n{process.stderr.read() if process.stderr else ''}")


def read_summary(path: Path) -> dict[str, Any]:
    """What ``--summary`` wrote, without how long it took."""
    summary: dict[str, Any] = json.loads(path.read_text())
    del summary["seconds"]
    return summary


def records(store: Path) -> dict[str, Path]:
    """Record files of a local store by their stages' names."""
    return {json.loads(path.read_text())["name"]: path for path in (store / "records").iterdir()}
