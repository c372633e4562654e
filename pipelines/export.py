"""Write the block that a task trained as a plain PEFT adapter folder.

    python pipelines/export.py --version latest --task animal --out adapters/animal tracking.model=quickstart
    python pipelines/export.py --snapshot DIGEST --task animal --out adapters/animal store.uri=runs/store

PEFT applies it with weight 1; the shared attention, which mixes several blocks, is not part of it.
"""

from __future__ import annotations

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
        pasted("export", "--version", "latest", "--task", "animal", "--out", "adapters/animal", "tracking.model=sapt"),
        needs_config=False,
    )
    cli.add_version(parser)
    parser.add_argument("--task", metavar="NAME", help="whose block; may be left out where the version has one alone")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="is made; nothing is written over")
    arguments = cli.parse(parser)

    from pipelines.console.versions import open_version
    from sapt_core.config.experiment import load_config, load_places
    from sapt_core.versions.export import export_block, export_faults

    out, config, overrides = arguments.out, arguments.config, arguments.overrides
    check_lasting({"--out": out})
    cli.check_output(out / "adapter_config.json")
    places = load_places(overrides) if config is None else load_config(config, overrides)
    manifest, store = open_version(arguments, places)
    faults, index = export_faults(manifest, out), 0
    try:
        index = _block(manifest, arguments.task)
    except SaptError as error:
        faults.append(str(error))
    if faults:
        raise FaultsError("The block cannot be exported:", faults)
    try:
        export_block(manifest, index, store, out)
    except OSError as error:
        raise ServiceError(f"{out} cannot be written: {error.strerror}") from error
    print(f"block of {manifest.block_names[index]}: {out}, an adapter of {manifest.backbone.path}")


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


if __name__ == "__main__":
    cli.run(main)
