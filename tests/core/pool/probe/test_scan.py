"""Some classes of docs/backbones.md, one for each kind of verdict, tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.backbones import Found, apart, attempt, table
from benchmarks.tiny_configs import classes


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("key", "word", "told"),
    [
        ("causal/llama", "works", ""),
        ("encoder-decoder/m2m_100", "works", ""),
        ("causal/mamba", "equal lengths", "dt_proj"),
        ("causal/recurrent_gemma", "equal lengths", "asked beside a longer row"),
        ("causal/rwkv", "one by one", "asked beside a row of its length"),
        ("causal/ctrl", "LoRA only", "CTRLLMHeadModel does not generate from embeddings"),
        ("causal/xlnet", "refused", "a row's logits are not those that it is taught with"),
        ("causal/xlm", "refused", "neither an encoder-decoder nor a causal language model"),
    ],
)
def test_a_class_for_each_verdict(key: str, word: str, told: str, tmp_path: Path) -> None:
    found = attempt(key, tmp_path)
    assert found.word == word, found
    row = table({key: vars(found)}).splitlines()[-1]
    assert row.startswith(f"| {classes()[key]} | {key.partition('/')[2]} | {word} |")
    assert told in row
    assert found.checkpointing is (key != "causal/ctrl")
    if word == "works":
        assert found.prompts
        assert found.notes == []
        assert 0 < max(found.figures.values()) < 1e-4


def test_what_reads_pictures_is_left_out_and_what_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert apart("causal/whisper").word == "not text"
    monkeypatch.setattr("benchmarks.backbones.SECONDS", 0)
    ended = apart("causal/llama")
    assert (ended.word, ended.notes) == ("not tried", ["no end after 0 s"])
    monkeypatch.setattr("benchmarks.backbones.attempt", lambda *_: torch.empty(2**40))
    monkeypatch.setattr("benchmarks.backbones.SECONDS", 60)
    assert apart("causal/llama") == Found(
        "LlamaForCausalLM", "not tried", ["its process ended"], seconds=pytest.approx(0, abs=60)
    )
