"""Kill a sweep's driver at random moments, and hold what it ends with against a sweep that nothing happened to.

    python benchmarks/sweep_kills.py --kills 10

Twelve points drawn at random, two trials at once on a local Ray, no early stopping, two of the quickstart's tasks with
60 rows each: some minutes on two cores.
Ends with 1 if a record of an ended trial was lost or changed, or if the two tables differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EARLIEST, LATEST = 0.05, 0.3  # after its start, as shares of the seconds that an undisturbed sweep takes

SWEEP = """
base: {root}/pipelines/configs/quickstart.yaml
overrides:
  - benchmark.tasks=animal,basket
  - benchmark.train_rows=60
  - generator.steps=20
  - store.uri={folder}/store
  - tracking.uri=sqlite:///{folder}/mlflow.db
space:
  reflection.weight: {{low: 0.05, high: 5.0, log: true}}
  attention.temperature: {{low: 0.03, high: 3.0, log: true}}
search: random
trials: 12
stop: none
concurrent: 2
results: {folder}/results
"""


def main() -> None:
    """Run both sweeps and write down what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/sweep_kills.json")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as calm, tempfile.TemporaryDirectory() as disturbed:
        began = time.monotonic()
        finish(Path(calm))
        undisturbed_seconds = time.monotonic() - began
        print(f"undisturbed: {undisturbed_seconds:.0f} s", flush=True)
        kills: list[dict[str, Any]] = []
        began = time.monotonic()
        while len(kills) < arguments.kills:
            after = moments.uniform(EARLIEST, LATEST) * undisturbed_seconds
            before = records(Path(disturbed))
            if not killed(Path(disturbed), after):
                break
            there = records(Path(disturbed))
            kept = all(there.get(name) == data for name, data in before.items())
            kills.append({"after_seconds": round(after, 1), "ended": len(there), "kept": kept})
            print(f"kill {len(kills)} after {after:.0f} s: {len(there)} trials have ended", flush=True)
        finish(Path(disturbed))
        seconds = time.monotonic() - began
        same = table(Path(calm)) == table(Path(disturbed))
        trials = len(records(Path(disturbed)))
    shown = Table("kill", "seconds after its start", "trials ended by then", "records of before kept")
    for number, each in enumerate(kills, start=1):
        shown.add_row(str(number), f"{each['after_seconds']:.1f}", str(each["ended"]), "yes" if each["kept"] else "NO")
    console = Console()
    console.print(shown)
    console.print(
        f"{len(kills)} kills; {trials} trials; the table is {'the same' if same else 'NOT the same'}; "
        f"{seconds:.0f} s in all, {undisturbed_seconds:.0f} s undisturbed"
    )
    result = {
        "kills": kills,
        "trials": trials,
        "same_table": same,
        "seconds": round(seconds),
        "undisturbed_seconds": round(undisturbed_seconds),
        "seed": arguments.seed,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if not (same and all(each["kept"] for each in kills) and len(kills) == arguments.kills):
        sys.exit(1)


@contextmanager
def driver(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The sweep in ``folder``, started and, if it still runs at the end, killed with its process group."""
    path = folder / "sweep_kills.yaml"
    path.write_text(SWEEP.format(root=ROOT, folder=folder))
    command = [sys.executable, "pipelines/sweep.py", "--config", str(path)]
    process = subprocess.Popen(  # noqa: S603
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(folder: Path) -> None:
    """Run the sweep to its end."""
    with driver(folder) as process:
        code = process.wait()
    if code:
        sys.exit(f"The sweep in {folder} ended with {code}: run it by hand to see why")


def killed(folder: Path, after: float) -> bool:
    """Start the sweep and kill it after so many seconds; False if it had ended by then."""
    with driver(folder) as process, suppress(subprocess.TimeoutExpired):
        process.wait(after)
        return False
    return True


def records(folder: Path) -> dict[str, bytes]:
    """Files of the trials that have ended."""
    return {path.name: path.read_bytes() for path in (folder / "results").glob("trial_*.json")}


def table(folder: Path) -> dict[str, Any]:
    """What trials came to, without who ran which stage and when."""
    names = ("point", "state", "ap", "f_ra")
    return {
        file: {name: read[name] for name in names}
        for file, read in ((file, json.loads(data)) for file, data in records(folder).items())
    }


if __name__ == "__main__":
    main()
