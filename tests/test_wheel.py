"""The wheel: what it installs under which names, and that it runs from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

from sapt_core import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sapt_core", "cluster", "pipelines")


def sources() -> list[Path]:
    """What git knows or would add, relative to the checkout."""
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing stays in the checkout and nothing of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in sources():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(folder), str(folder / "copy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    return found


def info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (found,) = [each for each in archive.namelist() if each.endswith(f".dist-info/{name}")]
        return archive.read(found).decode()


def test_it_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} - {f"sapt_on_ray-{__version__}.dist-info"} == set(PACKAGES)
    wanted = {name.as_posix() for name in sources() if name.parts[0] in PACKAGES}
    assert wanted == {name for name in names if name.partition("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= wanted


def test_it_says_what_it_is(wheel: Path) -> None:
    told = Parser().parsestr(info(wheel, "METADATA"))
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("sapt-on-ray", __version__, "Apache-2.0")
    assert info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    scripts = ConfigParser()
    scripts.read_string(info(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"sapt": "pipelines.sapt:main"}


def test_it_runs_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    planned = subprocess.run(
        [sys.executable, "-m", "pipelines.sapt", "learn", "--config", "quickstart", "--dry-run"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert "stages, experiment" in planned.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []
