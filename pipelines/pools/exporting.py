"""Write a block, or a mixture of blocks, as a plain PEFT adapter folder.

    python pipelines/pool.py export --version latest --task animal --out adapters/animal tracking.model=quickstart
    python pipelines/pool.py export --version latest --mixture animal=0.7,basket=0.3 --out adapters/both
    python pipelines/pool.py export --snapshot DIGEST --prompt 'Definition: ...' --out adapters/asked

PEFT applies a block with weight 1. The shared attention, which gives every input a mixture of its own, is no part of an
adapter: a mixture is what the pool computes for inputs with these weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.console import cli
from pipelines.console.commands import pasted
from pipelines.console.places import check_lasting
from sapt_core.errors import FaultsError, SaptError, ServiceError

if TYPE_CHECKING:
    from sapt_core.versions.manifest import Manifest


def main() -> None:
    """Parse the command line and write the folder."""
    parser = cli.parser(
        __doc__ or "",
        pasted("pool", "export", "--version", "latest", "--task", "animal", "--out", "adapters/animal"),
        needs_config=False,
        action="export",
    )
    cli.add_version(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", metavar="NAME", help="whose block; may be left out where the version has one alone")
    what.add_argument(
        "--mixture", type=_weights, metavar="NAME=WEIGHT,...", help="weights of blocks; others have no weight"
    )
    what.add_argument("--prompt", metavar="TEXT", help="full prompt: the mixture that it is answered with")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="is made; nothing is written over")
    arguments = cli.parse(parser)

    from pipelines.console.versions import open_version
    from sapt_core.config.experiment import load_config, load_places
    from sapt_core.versions.export import export_block, export_faults, export_mixture, mixture_faults, mixture_of

    out, config, overrides = arguments.out, arguments.config, arguments.overrides
    check_lasting({"--out": out})
    cli.check_output(out / "adapter_config.json")
    places = load_places(overrides) if config is None else load_config(config, overrides)
    manifest, store = open_version(arguments, places)
    faults, index, weights = export_faults(manifest, out), 0, arguments.mixture
    try:
        if arguments.prompt is not None:
            weights = mixture_of(manifest, arguments.prompt, store)
        elif weights is not None:
            weights = {_full_name(manifest, name): weight for name, weight in weights.items()}
            faults += mixture_faults(manifest, weights)
        else:
            index = _block(manifest, arguments.task)
    except SaptError as error:
        faults.append(str(error))
    if faults:
        raise FaultsError("Nothing can be exported:", faults)
    try:
        if weights is None:
            export_block(manifest, index, store, out)
        else:
            export_mixture(manifest, weights, store, out)
    except OSError as error:
        raise ServiceError(f"{out} cannot be written: {error.strerror}") from error
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in (weights or {}).items())
    told = f"mixture of {shown}" if weights else f"block of {manifest.block_names[index]}"
    print(f"{told}: {out}, an adapter of {manifest.backbone.path}")


def _weights(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = None
        if not name.strip() or number is None or name.strip() in found:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r}: give NAME=WEIGHT, each task once")
        found[name.strip()] = number
    return found


def _full_name(manifest: Manifest, name: str) -> str:
    """The name of the block that a task trained; errors as of ``find_task``."""
    return name if name in manifest.block_names else manifest.block_names[_block(manifest, name)]


def _block(manifest: Manifest, task: str | None) -> int:
    """The index of the block that a task trained.

    Raises:
        SaptError: the version has not learnt the task, or has several blocks and none is named.
    """
    from sapt_core.versions.requests import find_task

    names = manifest.block_names
    if task is None and len(names) > 1:
        raise SaptError(f"give --task, one of: {', '.join(names)}")
    place = 0 if task is None else manifest.tasks.index(find_task(manifest, task))
    return min(place, len(names) - 1)  # tasks that share a block have the first
