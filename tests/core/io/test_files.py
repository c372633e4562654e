"""Files that appear whole or not at all, for whom the umask lets in."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from sapt_core.io.files import poured, whole_file


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_it_has_the_mode_of_any_other_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"


def test_poured() -> None:
    file = io.BytesIO()
    assert poured([b"a", b"", b"bc"], file) == hashlib.sha256(b"abc").hexdigest()
    assert file.getvalue() == b"abc"
