"""Where a relative path leads: one rule for configs, a comparison's base and the backbone.

It counts from the working folder, wherever it is written. What does not lie there and ships with the project
(``pipelines/configs``, ``pipelines/backbones``) is found beside the installed packages, so that commands work from any
folder.
"""

from __future__ import annotations

import os
from pathlib import Path

INSTALLED = Path(__file__).resolve().parents[2]
CONFIGS = INSTALLED / "pipelines" / "configs"


def located(path: Path | str) -> Path:
    """The path as it is; of what ships and does not lie there, the installed one."""
    path = Path(path).expanduser()
    installed = INSTALLED / path
    ships = path.parts[:1] == ("pipelines",) and ".." not in path.parts and os.path.exists(installed)
    return installed if ships and not os.path.exists(path) else path


def config_file(name: Path | str, kind: str = ".") -> Path:
    """A config by its path, or one that ships by its name (``quickstart``, ``comparisons/quickstart``).

    Args:
        name: path or name; the ending .yaml may be left out of a name.
        kind: folder of the shipped configs that is looked into first.

    Returns:
        What was found; ``name`` itself if nothing was.
    """
    path = located(name)
    if os.path.isfile(path):  # of a path that is too long, pathlib raises
        return path
    names = [str(name), f"{name}.yaml"]
    found = [CONFIGS / folder / each for folder in (kind, ".") for each in names if each in _shipped(folder)]
    return found[0] if found else path


def shipped_configs() -> list[str]:
    """Names of all configs that ship."""
    return sorted(name.removesuffix(".yaml") for name in _shipped("."))


def _shipped(folder: str) -> list[str]:
    base = CONFIGS / folder
    return [path.relative_to(base).as_posix() for path in base.rglob("*.yaml")]
