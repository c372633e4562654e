"""Hub models: fetched once, named by content, and told in a line where there is none."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from sapt_core.backbones import hub, loading
from sapt_core.backbones.loading import load_backbone, store_backbone
from sapt_core.backbones.reference import BackboneRef, identify, stored_model_config
from sapt_core.errors import BackboneError
from tests.core.backbones.folders import config, saved
from tests.core.backbones.ggufs import llama, write_gguf
from tests.core.tiny import DictStore

COMMIT = "c0ffee" + "0" * 34
MODEL = "owner/tiny"


class Hub:
    """One model as the hub serves it, and the requests it got."""

    def __init__(self, folder: Path, *, status: int = 200, code: str = "") -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.status, self.code = status, code
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path = path.partition("?")[0]
        if self.status != 200:
            return self.status, {"X-Error-Code": self.code}, b"{}"
        if path in {
            f"/api/models/{MODEL}",
            f"/api/models/{MODEL}/revision/main",
            f"/api/models/{MODEL}/revision/{COMMIT}",
        }:
            return 200, {}, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": []}).encode()
        if path == f"/api/models/{MODEL}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        data = self.files.get(path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/"))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data  # noqa: S324


@contextmanager
def serving(model: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, headers, data = model.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    Handler.do_GET = Handler.do_HEAD = Handler.answer  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def published(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "published")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same in another format")
    return folder


def test_a_hub_model_is_fetched_once_and_travels_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store, given = Hub(published(tmp_path)), DictStore(), config(MODEL)
    with serving(model, monkeypatch):
        ref = identify(given)
        store_backbone(given, ref, store)
    fetched = {path.rpartition("/")[2] for path in model.asked if "/resolve/" in path}
    assert ref.files is not None
    assert fetched == set(ref.files)
    assert not fetched & {"pytorch_model.bin", "modeling.py", "consolidated.safetensors"}
    assert (ref.path, ref.revision) == (MODEL, COMMIT)
    # A worker without token, hub and network has the store alone.
    hub.fetched.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other node"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    backbone, tokenizer = load_backbone(ref, store)
    assert backbone.config.model_type == "t5"
    assert tokenizer("w3")["input_ids"]
    assert stored_model_config(ref, store).model_type == "t5"


def test_of_a_hub_models_gguf_files_the_one_that_is_named_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = published(tmp_path), llama()
    write_gguf(folder / "mine.gguf", wanted)
    (folder / "larger.gguf").write_bytes(b"GGUF")
    model, given, store = Hub(folder), config(MODEL, gguf_file="mine.gguf"), DictStore()
    with serving(model, monkeypatch):
        ref = identify(given)
        store_backbone(given, ref, store)
        with pytest.raises(BackboneError, match=r"no file other\.gguf there"):
            identify(config(MODEL, gguf_file="other.gguf"))
    assert {path.rpartition("/")[2] for path in model.asked if "/resolve/" in path} == {"mine.gguf"}
    assert (ref.path, ref.revision, ref.gguf_file) == (MODEL, COMMIT, "mine.gguf")
    backbone, _ = load_backbone(ref, store)
    assert torch.equal(backbone.model.embed_tokens.weight, wanted.model.embed_tokens.weight)


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_what_was_fetched_does_where_the_hub_cannot_be_reached(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(MODEL) if revision is None else config(MODEL, revision=revision)
    with serving(Hub(published(tmp_path)), monkeypatch):
        ref = identify(given)
    hub.fetched.cache_clear()
    point_at("http://127.0.0.1:9", monkeypatch)
    assert identify(given) == ref


def test_a_version_that_names_a_commit_alone_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = BackboneRef(path=MODEL, revision=COMMIT)
    with serving(Hub(published(tmp_path)), monkeypatch):
        model, _ = load_backbone(earlier, DictStore())
        assert model.config.model_type == "t5"
        assert stored_model_config(earlier, DictStore()).model_type == "t5"
        assert identify(config(MODEL)).is_of(earlier)
    assert not identify(config(saved(tmp_path / "folder"))).is_of(earlier)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "none on the hub that this machine may read"),
        (404, "RepoNotFound", "none on the hub that this machine may read"),
        (404, "RevisionNotFound", "backbone.revision v9: the hub's owner/tiny has none of this name"),
        (403, "GatedRepo", "is gated; accept its terms .* HF_TOKEN"),
    ],
)
def test_why_a_hub_model_cannot_be_had(
    status: int, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "published").mkdir()
    with (
        serving(Hub(tmp_path / "published", status=status, code=code), monkeypatch),
        pytest.raises(BackboneError, match=message) as error,
    ):
        identify(config(MODEL, revision="v9"))
    assert "\n" not in str(error.value)


def test_pickled_weights_on_the_hub_are_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "published")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with (
        serving(Hub(folder), monkeypatch),
        pytest.raises(BackboneError, match=r"owner/tiny: no \*\.safetensors there"),
    ):
        identify(config(MODEL))


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_hub_that_cannot_be_reached_takes_seconds_and_a_line(
    revision: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    began = time.monotonic()
    with pytest.raises(BackboneError, match="the hub cannot be reached") as error:
        identify(config(MODEL, revision=revision))
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    loading._load_cached.cache_clear()
