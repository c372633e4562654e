"""Large files are read once a machine and not copied where they lie already."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from sapt_core.backbones import files, loading
from sapt_core.backbones.files import copy_of, file_digest, remember
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import identify
from sapt_core.errors import BackboneError, ServiceError
from tests.core.backbones.folders import config, saved
from tests.core.tiny import DictStore


def settle(folder: Path) -> Path:
    """As if the files had been written a minute ago."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60, time.time() - 60))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = hashlib.file_digest

    def counted(file: object, kind: str) -> object:
        names.append(Path(file.name).name)  # type: ignore[attr-defined]
        return real(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_file_is_hashed_once_a_machine(tmp_path: Path, hashed: list[str]) -> None:
    folder, store = settle(saved(tmp_path / "model")), DictStore()
    given = config(folder)
    ref = identify(given)
    assert ref.files is not None
    assert sorted(hashed) == sorted(ref.files)
    hashed.clear()
    assert identify(given) == ref
    store_backbone(given, ref, store)
    for _ in range(2):
        load_backbone(ref, store)
        loading._load_cached.cache_clear()  # as in another process
    assert hashed == []


def test_what_came_from_the_store_is_not_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    folder, store = saved(tmp_path / "model"), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    shutil.rmtree(folder)
    hashed.clear()
    load_backbone(ref, store)
    loading._load_cached.cache_clear()
    load_backbone(ref, store)
    assert hashed == []


def test_a_folder_on_this_machine_is_not_copied(tmp_path: Path) -> None:
    folder = settle(saved(tmp_path / "model"))
    ref = identify(config(folder))
    model, _ = load_backbone(ref, DictStore())  # the store is not even asked
    (cached,) = (tmp_path / "cache" / "sapt" / "backbones").iterdir()
    assert {path.resolve().parent for path in cached.iterdir()} == {folder}
    assert model.dtype is not None


def test_a_folder_that_changes_or_goes_is_fetched_from_the_store(tmp_path: Path) -> None:
    folder, store = settle(saved(tmp_path / "model")), DictStore()
    ref = identify(config(folder))
    store_backbone(config(folder), ref, store)
    load_backbone(ref, store)
    for spoil in (lambda: (folder / "model.safetensors").write_bytes(b"other"), lambda: shutil.rmtree(folder)):
        spoil()
        loading._load_cached.cache_clear()
        load_backbone(ref, store)
        weights = tmp_path / "cache" / "sapt" / "backbones" / ref.digest / "model.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == (ref.files or {})["model.safetensors"]
    assert not weights.is_symlink()


def test_a_file_that_changes_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two", b"longer"):
        path.write_bytes(content)
        assert file_digest(path) == hashlib.sha256(content).hexdigest()
    settled = path.stat().st_mtime - 60
    os.utime(path, (settled, settled))
    before = file_digest(path)
    assert copy_of(before) == path
    replaced = tmp_path / "replaced"
    replaced.write_bytes(b"LONGER")
    os.utime(replaced, (settled, settled))
    replaced.replace(path)  # the same size and time, another inode
    assert copy_of(before) is None
    assert file_digest(path) == hashlib.sha256(b"LONGER").hexdigest()


def test_what_was_written_just_now_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert copy_of(file_digest(path)) is None


def test_a_spoilt_note_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    remember(path, digest)
    assert copy_of(digest) == path
    for note in (files.cache_folder() / "files").rglob("*"):
        if note.is_file():
            note.write_bytes(b"\xff[")
    assert copy_of(digest) is None
    assert file_digest(path) == digest


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = settle(saved(tmp_path / "model"))
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    ref = identify(config(folder))
    with pytest.raises(ServiceError, match="set XDG_CACHE_HOME"):
        load_backbone(ref, DictStore())


def test_a_file_that_changes_while_it_is_put_into_the_store_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    ref = identify(config(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"config\.json has changed meanwhile"):
        store_backbone(config(folder), ref, DictStore())
