from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sapt_core.backbones import hub, loading


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file, model or hub that this machine knows from elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loading._load_cached.cache_clear()
    hub.fetched.cache_clear()
    yield
    loading._load_cached.cache_clear()
    hub.fetched.cache_clear()
