"""What cannot work, told before anything is trained: right answers that could never score, models that do not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sapt_core.config.experiment import ExperimentConfig
from sapt_core.config.preflight import check_answers, check_backbone
from sapt_core.data.task import Example, Task
from sapt_core.errors import BackboneError, DataError
from tests.core.backbones.folders import experiment, saved
from tests.core.classes import tiny_model
from tests.core.data.test_prepare import EOS, byte_bpe
from tests.core.tiny import tiny_tokenizer


def task(metric: str, *answers: str | Sequence[str], dev: str = "w1") -> Task:
    rows = tuple(
        Example(f"w{i}", (answer,) if isinstance(answer, str) else tuple(answer)) for i, answer in enumerate(answers)
    )
    return Task("one", "w30", (Example("w1", ("w2",)),), (Example("w3", (dev,)),), rows, "superni", metric)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Knows w0 to w32 alone."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def all_bytes() -> PreTrainedTokenizerFast:
    return byte_bpe()


def fault(*arguments: object) -> str:
    with pytest.raises(DataError, match="Right answers would score 0") as caught:
        check_answers(*arguments)  # type: ignore[arg-type]
    (found,) = caught.value.faults
    return found


@pytest.mark.parametrize("answer", ["很好", "да", "हाँ", "نعم", "네", "はい"])
def test_answers_that_the_metric_cannot_see_are_refused(all_bytes: PreTrainedTokenizerFast, answer: str) -> None:
    check_answers([task(name, answer) for name in ("rouge_l_unicode", "exact_match")], all_bytes)
    assert fault([task("rouge_l", answer, answer)], all_bytes) == (
        "one: of 2 test answers 2 hold nothing that metric rouge_l sees, and 0 cannot be written whole by the "
        "backbone's tokenizer: benchmark.metric=rouge_l_unicode sees words of any script"
    )


@pytest.mark.parametrize("metric", ["rouge_l_unicode", "exact_match"])
def test_answers_that_the_tokenizer_cannot_write_are_refused(words: PreTrainedTokenizerFast, metric: str) -> None:
    assert "0 hold nothing that metric" in (found := fault([task(metric, "很好", "да")], words))
    assert "2 cannot be written whole by the backbone's tokenizer: choose a backbone" in found


def test_some_answers_are_warned_of_and_counted(
    words: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_answers([task("rouge_l", "w1", "很好", "很好", "unknown", "w1 unknown", ["unknown", "w2"])], words)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("one: of 6 test answers 2 hold nothing that metric rouge_l sees, and 2 cannot be written")


def test_what_the_metric_leaves_out_need_not_be_written(
    words: PreTrainedTokenizerFast, all_bytes: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    check_answers([task("exact_match", "w1 ."), task("rouge_l", "w1  w2\n是")], words)
    assert not caplog.records
    check_answers([task("exact_match", f"a{EOS}b", "fine")], all_bytes)  # a special token in an answer is not read back
    assert "1 cannot be written" in caplog.text


def test_the_rows_that_are_scored_count(words: PreTrainedTokenizerFast) -> None:
    check_answers([task("rouge_l", "w1", dev="是")], words)
    with pytest.raises(DataError):
        check_answers([task("rouge_l", "w1", dev="是")], words, "dev")


def test_what_a_class_cannot_is_told_from_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def check(kind: str, pet: dict[str, Any], **benchmark: int) -> None:
        if not (tmp_path / kind).is_dir():
            tiny_model(kind).save_pretrained(tmp_path / kind)
            tiny_tokenizer().save_pretrained(tmp_path / kind)
        sizes = {"max_source_tokens": 40, "max_target_tokens": 10, **benchmark}
        method = {"name": "sequential"}
        check_backbone(
            ExperimentConfig.model_validate(
                {
                    "backbone": {"path": str(tmp_path / kind)},
                    "benchmark": {"suite": "synthetic", **sizes},
                    "pet": pet,
                    "method": method,
                }
            ),
            [],
        )

    with pytest.raises(BackboneError, match="CTRLLMHeadModel does not generate from embeddings"):
        check("ctrl", {"type": "prompt"})
    with pytest.raises(BackboneError, match=r"^pet\.target_modules: .* never called"):
        check("mamba", {"target_modules": ["dt_proj"]})
    check("roberta", {"target_modules": ["query"]}, max_source_tokens=55)
    with pytest.raises(BackboneError, match=r"has 65 positions, but .* ask for 66"):  # one of 66 rows is the padding's
        check("roberta", {"target_modules": ["query"]}, max_source_tokens=56)
    assert "experts" not in caplog.text
    check("qwen2_moe", {"target_modules": ["q_proj", "down_proj"]})
    assert "pet.target_modules: down_proj name experts of Qwen2MoeForCausalLM as well" in caplog.text


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_kind(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": kind}}))
    with pytest.raises(BackboneError, match=rf"is quantised \({kind}\).*give the model that it was made from"):
        check_backbone(experiment(folder), [])
