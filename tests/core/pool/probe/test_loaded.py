"""What a few short rows show of a backbone with weights, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.backbones.tokens import answer_settings
from sapt_core.backbones.traits import takes_positions
from sapt_core.errors import BackboneError
from sapt_core.pool.probe.loaded import probe
from sapt_core.pool.probe.verdict import Verdict
from sapt_core.settings import FullConfig, LoRAConfig, PETConfig, PromptConfig
from tests.core.classes import tiny_model
from tests.core.pool.test_classes import TARGETS, WITH_PROMPTS
from tests.core.tiny import same_bits, tiny_backbone, tiny_tokenizer

LLAMA = LoRAConfig(target_modules=("q_proj", "v_proj"))


def asked(model: PreTrainedModel) -> PreTrainedModel:
    """As it is loaded: answers end at the tokenizer's end."""
    model.generation_config = answer_settings(model, tiny_tokenizer())
    return model


def probed(model: PreTrainedModel, pet: PETConfig = LLAMA, *, checkpointing: bool = False) -> Verdict:
    return probe(model, tiny_tokenizer(), pet, checkpointing=checkpointing)


def wrap(model: PreTrainedModel, name: str, change: Callable[..., dict[str, Any]]) -> None:
    """Change what a method of the model is given."""
    inner = getattr(model, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        return inner(*given, **change(**named))

    wrapped.__signature__ = signature(inner)  # type: ignore[attr-defined]
    setattr(model, name, wrapped)


@pytest.mark.parametrize(
    ("kind", "pet"), [*((kind, "lora") for kind in TARGETS), *((kind, "prompt") for kind in WITH_PROMPTS)]
)
def test_what_its_class_says_of_a_backbone_holds(kind: str, pet: str) -> None:
    model = asked(tiny_model(kind))
    blocks: PETConfig = PromptConfig(length=2) if pet == "prompt" else LoRAConfig(target_modules=TARGETS[kind])
    found = probed(model, blocks, checkpointing=kind != "ctrl")
    assert found.otherwise == {}
    assert found.model == type(model).__name__
    assert found.answering == ("any" if kind == "t5" or takes_positions(model) else "alike")
    assert max(found.figures.values()) < 1e-4
    assert ("gradient with checkpointing" in found.figures) is (kind != "ctrl")
    assert ("asked beside a longer row" in found.figures) is (found.answering == "any")


def test_a_whole_set_of_weights_is_probed_too() -> None:
    assert probed(tiny_backbone("qwen2"), FullConfig(), checkpointing=True).otherwise == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_half_formats_round_more_and_are_let_through(kind: str) -> None:
    found = probed(asked(tiny_model(kind)).to(torch.bfloat16), LoRAConfig(target_modules=TARGETS[kind]))
    assert found.otherwise == {}
    assert found.allowed > 2 * max(found.figures.values())


def test_nothing_is_left_on_the_backbone() -> None:
    model = tiny_backbone("t5", dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    probed(model, LoRAConfig(target_modules=("q", "v")), checkpointing=True)
    assert same_bits({k: v.contiguous().clone() for k, v in model.state_dict().items()}, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_positions_that_are_not_heeded_keep_lengths_apart() -> None:
    blind = tiny_model("gpt2")
    wrap(blind, "forward", lambda position_ids=None, **named: named)
    found = probed(asked(blind), LoRAConfig(target_modules=TARGETS["gpt2"]))
    assert found.otherwise == {"answering": "alike"}
    assert found.figures["asked beside a longer row"] > 100 * found.allowed
    assert "asked beside a longer row, its logits move by" in str(found)
    assert str(found).startswith("GPT2LMHeadModel is taught with rows of any length, asked with rows of one length")


def test_rows_that_are_mixed_go_alone() -> None:
    model = tiny_backbone("llama")
    layer: Any = model.get_submodule("model.layers.1")
    layer.register_forward_hook(lambda _module, _given, output: output + output.mean(dim=0, keepdim=True))
    assert probed(model).otherwise == {"training": "alone", "answering": "alone"}


def test_a_batch_that_fails_is_told_and_not_tried_again() -> None:
    model = tiny_backbone("llama")
    layer: Any = model.get_submodule("model.layers.1")

    def one_row(_module: Any, given: tuple[Tensor, ...]) -> None:
        if len(given[0]) > 1:
            raise ValueError("a state of one row")

    layer.register_forward_pre_hook(one_row)
    found = probed(model)
    assert (found.training, found.answering) == ("alone", "alone")
    assert "it fails (a state of one row)" in str(found)


def test_an_encoder_that_sees_padding_is_taught_rows_of_one_length() -> None:
    model = tiny_backbone("t5")
    encoder: Any = model.get_encoder()
    wrap(encoder, "forward", lambda attention_mask=None, **named: named)
    found = probed(model, LoRAConfig(target_modules=("q", "v")))
    assert found.otherwise == {"training": "alike", "answering": "alike"}
    assert found.joined(probed(tiny_backbone("t5"), LoRAConfig(target_modules=("q",)))).otherwise == found.otherwise


def test_a_token_in_the_wrong_place_is_refused_with_its_figure() -> None:
    model = tiny_model("gpt2")

    def late(position_ids: Tensor | None = None, **named: Any) -> dict[str, Any]:
        if position_ids is not None and position_ids.shape[1] == 1:  # a token behind the prompt
            position_ids = position_ids + 1
        return {"position_ids": position_ids, **named}

    wrap(model, "forward", late)
    with pytest.raises(BackboneError, match=r"token by token, a row's logits are not .*\(by [0-9.]+ of their spread"):
        probed(asked(model), LoRAConfig(target_modules=TARGETS["gpt2"]))


def test_answers_that_do_not_end_are_refused() -> None:
    model = tiny_backbone("llama")
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    with pytest.raises(BackboneError, match=r"cannot be asked .*goes on behind the end of an answer"):
        probed(model)


@pytest.mark.parametrize(("kind", "target"), [("mamba", "dt_proj"), ("jamba", "dt_proj"), ("led", "query_global")])
def test_linears_that_are_read_and_never_called_are_refused(kind: str, target: str) -> None:
    with pytest.raises(BackboneError, match=rf"^\w+ cannot be used .*pet\.target_modules: no gradient .*{target}"):
        probed(asked(tiny_model(kind)), LoRAConfig(target_modules=(target,)))


def test_all_that_does_not_hold_is_told_at_once() -> None:
    model = asked(tiny_model("ctrl"))
    with pytest.raises(BackboneError, match=r"gradient_checkpointing: CTRL.*does not support") as caught:
        probed(model, LoRAConfig(target_modules=TARGETS["ctrl"]), checkpointing=True)
    assert "set it to false" in str(caught.value)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    with pytest.raises(BackboneError, match=r"goes on behind the end.*gradient_checkpointing"):
        probed(model, LoRAConfig(target_modules=TARGETS["ctrl"]), checkpointing=True)


def test_a_class_that_does_not_go_on_from_embeddings_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"cannot be asked with pet\.type=prompt"):
        probed(asked(tiny_model("ctrl")), PromptConfig(length=2))
