"""The rules of the house that no linter knows: pins, what CI runs, what is tracked and what travels with a job."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray._private.ray_constants import RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("sapt_core", "cluster", "pipelines")
MAX_TRACKED_BYTES = 8_000_000
MAX_JOB_BYTES = 64_000_000


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    pinned = pins()
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    direct = [Requirement(item) for group in groups for item in group]
    unpinned = [str(item) for item in direct if canonicalize_name(item.name) not in pinned]
    assert not unpinned
    outside = [str(item) for item in direct if pinned[canonicalize_name(item.name)] not in item.specifier]
    assert not outside


def test_torch_is_pinned_without_a_local_label() -> None:
    # "2.13.0" matches both the CPU and the CUDA build of a release, "2.13.0+cpu" only one of them.
    assert pins()["torch"].local is None


def test_import_contracts_hold() -> None:
    # Beside the interpreter, so that the environment under test is the one that is checked.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_ci_is_executable_installs_debian_packages_and_calls_make_alone() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    installs = [line for line in lines if line.startswith(("apt-get ", "DEBIAN_FRONTEND=noninteractive apt-get "))]
    rest = [line for line in lines if line not in installs]
    assert rest == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make lint", "make test"]


def test_tracked_text_names_no_machine_and_no_registry() -> None:
    # Put together here, so that this file does not find itself.
    folders = "|".join(("work", "tmp", "root", "opt", "mnt", "Users"))
    hosts = "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch"))
    forbidden = re.compile(rf"(?<![\w.~$}}-])/(?:{folders})/|{hosts}|--(?:extra-)?index" + "-url")
    faults = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        faults += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(lines, 1)
            if forbidden.search(line)
        ]
    assert not faults


def test_links_between_documents_lead_somewhere() -> None:
    faults = []
    for page in (path for path in tracked_files() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            if "://" not in target and not (there.exists() and (not anchor or anchor in anchors(there))):
                faults.append(f"{page.relative_to(ROOT)}: {target}")
    assert not faults


def anchors(page: Path) -> set[str]:
    """The names that a document's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_table_stands_once_in_the_page_that_its_command_names() -> None:
    command = re.compile(r"python pipelines/(compare|sweep)\.py --config ([\w./]+)\.yaml .*--markdown (docs/\S+)")
    written = [path for path in tracked_files() if path.suffix in {".md", ".yaml"}]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in written}
    named = {
        (f"{program}:{Path(config).name.removeprefix(f'{program}_')}", page)
        for text in texts.values()
        for program, config, page in command.findall(text)
    }
    places = [
        (table, page)
        for page, text in texts.items()
        for table in re.findall(r"^<!-- (\w+:\w+) begin -->$", text, flags=re.MULTILINE)
    ]
    assert sorted(named) == sorted(places)


def test_no_tracked_file_is_large() -> None:
    assert not [path for path in tracked_files() if path.stat().st_size >= MAX_TRACKED_BYTES]


def test_a_job_takes_the_packages_along_and_little_else(tmp_path: Path) -> None:
    archive = tmp_path / "job.zip"
    excludes = RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(",")
    create_package(str(ROOT), archive, include_gitignore=True, excludes=excludes, logger=logging.getLogger("job"))
    travels = set(zipfile.ZipFile(archive).namelist())
    code = {str(path.relative_to(ROOT)) for path in tracked_files() if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert "sapt_core/data/__init__.py" in code
    assert not code - travels
    assert not [
        name for name in travels if name.startswith(("tests/", "docs/", "benchmarks/", ".git/", ".venv/", "runs/"))
    ]
    assert archive.stat().st_size < MAX_JOB_BYTES
