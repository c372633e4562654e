"""``sapt pool export``: a block or a mixture of the tiny sequence as a PEFT folder."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file

from cluster.store import open_store
from pipelines import pool
from sapt_core.settings import StoreConfig
from sapt_core.versions.manifest import Manifest
from tests.pipelines.commands import Finished, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.err


def exporting(finished: Finished, folder: Path, *arguments: str) -> list[str]:
    given = ["export", "--snapshot", finished.snapshot, f"store.uri={finished.store}"]
    return [*given, "--out", str(folder), *arguments]


def test_a_block_is_exported(finished: Finished, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "new/adapter"
    exported = call(pool.main, exporting(finished, folder, "--task", "basket"))
    assert exported.code == 0, exported.err
    assert exported.out.startswith(f"block of basket: {folder}, an adapter of ")
    manifest = Manifest.from_bytes(open_store(StoreConfig(uri=str(finished.store))).get(finished.snapshot))
    written = (folder / "adapter_model.safetensors").read_bytes()
    assert sha256(written).hexdigest() == manifest.blocks[1]
    again = call(pool.main, exporting(finished, folder, "--task", "nosuch"))
    refused(again, "is not an empty folder", "it knows: animal, basket")
    refused(call(pool.main, exporting(finished, tmp_path / "other")), "give --task, one of: animal, basket")
    (tmp_path / "file").write_text("")
    refused(call(pool.main, exporting(finished, tmp_path / "file/x", "--task", "basket")), "cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]


def test_a_mixture_is_exported(finished: Finished, call: Call, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    exported = call(pool.main, exporting(finished, one, "--mixture", "animal=0.75,basket=0.25"))
    assert exported.code == 0, exported.err
    assert exported.out.startswith(f"mixture of animal 0.75, basket 0.25: {one}, an adapter of ")
    assert call(pool.main, exporting(finished, two, "--task", "animal")).code == 0
    mixed, block = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert mixed.keys() == block.keys()
    assert all(value.numel() == 2 * block[name].numel() for name, value in mixed.items())


def test_the_mixture_of_a_prompt_is_exported(finished: Finished, call: Call, tmp_path: Path) -> None:
    exported = call(pool.main, exporting(finished, tmp_path / "adapter", "--prompt", "which animal is it?"))
    assert exported.code == 0, exported.err
    shown = exported.out.partition(":")[0].removeprefix("mixture of ").split(", ")
    assert [part.split()[0] for part in shown] == ["animal", "basket"]
    assert abs(sum(float(part.split()[1]) for part in shown) - 1) < 0.01


def test_what_is_no_mixture_is_refused(finished: Finished, call: Call, tmp_path: Path) -> None:
    for given in ("animal", "animal=x", "animal=1,animal=2", "=1"):
        refused(call(pool.main, exporting(finished, tmp_path / "a", "--mixture", given)), "give NAME=WEIGHT")
    refused(call(pool.main, exporting(finished, tmp_path / "a", "--mixture", "nosuch=1")), "it knows: animal, basket")
    refused(call(pool.main, exporting(finished, tmp_path / "a", "--mixture", "animal=0")), "the bare backbone")
    both = ["--mixture", "animal=1", "--task", "animal"]
    refused(call(pool.main, exporting(finished, tmp_path / "a", *both)), "not allowed with")
    assert list(tmp_path.iterdir()) == []


def test_the_actions_are_told(call: Call) -> None:
    told = call(pool.main, [])
    assert told.code == 0
    assert "  export    Write a block" in told.out
    assert "  import    Make a PEFT LoRA adapter" in told.out
    refused(call(pool.main, ["exprot"]), "'export'")
    assert "usage: script export " in call(pool.main, ["export", "--help"]).out
