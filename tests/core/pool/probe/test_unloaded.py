"""What a forward without weights shows of a class, before anything is loaded."""

from __future__ import annotations

import re

import pytest
import torch

from sapt_core.backbones.reference import skeleton
from sapt_core.errors import BackboneError
from sapt_core.pool.blocks.lora import find_sites, is_linear
from sapt_core.pool.probe.unloaded import check_embeddings, check_sites, look
from tests.core.classes import tiny_config, tiny_model
from tests.core.pool.test_classes import TARGETS


def check(kind: str, *targets: str, field: str = "pet") -> None:
    model = skeleton(tiny_config(kind))
    check_sites(model, find_sites(model, targets, field), field)


@pytest.mark.parametrize("kind", TARGETS)
def test_linears_that_learn_are_let_through(kind: str) -> None:
    check(kind, *TARGETS[kind])
    assert look(skeleton(tiny_config(kind))) is not None, "and were looked at"


@pytest.mark.parametrize("kind", ["jamba", "led", "mamba", "mixtral", "opt"])
def test_what_is_seen_without_weights_is_what_a_model_with_them_does(kind: str) -> None:
    seen = look(skeleton(tiny_config(kind)))
    assert seen is not None
    assert not seen.routed
    model = tiny_model(kind)
    called: dict[str, set[tuple[int, ...]]] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            module.register_forward_hook(
                lambda _module, args, _output, name=name: called.setdefault(name, set()).add(tuple(args[0].shape))
            )
    ids = torch.randint(6, 30, (2, 7))
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **decoder, use_cache=False)
    assert {name: set(shapes) for name, shapes in seen.inputs.items()} == called


@pytest.mark.parametrize(
    ("kind", "target", "named"),
    [
        ("mamba", "dt_proj", "backbone.layers.0.mixer.dt_proj"),
        ("jamba", "dt_proj", "model.layers.0.mamba.dt_proj"),
        ("led", "query_global", "encoder.layers.0.self_attn.longformer_self_attn.query_global"),
        ("bart", "q_proj", "model.decoder.layers.0.encoder_attn.q_proj"),
    ],
)
def test_linears_that_are_never_called_are_refused_by_name(kind: str, target: str, named: str) -> None:
    with pytest.raises(BackboneError, match=r"^generator\.pet\.target_modules: .* never called") as caught:
        check(kind, target, field="generator.pet")
    assert named in str(caught.value)
    assert f".{target}" not in str(caught.value).partition("name others")[2] or kind == "bart"


def test_linears_that_cannot_tell_texts_apart_are_refused_by_name() -> None:
    with pytest.raises(BackboneError, match=r"2 of 2 are given rows of several texts without their order") as caught:
        check("led", "longformer_self_attn.query")
    assert "encoder_attn.q_proj" in str(caught.value), "what can be named in their place"


def test_a_router_that_gives_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(BackboneError, match=r"2 of 2 are routers of experts that give no tensor") as caught:
        check("phimoe", "router")
    assert "self_attn.q_proj" in str(caught.value)
    assert "mlp.router" not in str(caught.value).partition("name others")[2]
    check("phimoe", "q_proj", "v_proj")


@pytest.mark.parametrize("kind", ["ctrl"])
def test_a_class_that_does_not_generate_from_embeddings_is_refused(kind: str) -> None:
    with pytest.raises(BackboneError, match=r"CTRLLMHeadModel does not generate from embeddings.*pet\.type=lora"):
        check_embeddings(skeleton(tiny_config(kind)))


@pytest.mark.parametrize("kind", sorted(TARGETS.keys() - {"ctrl"}))
def test_the_others_take_soft_prompts(kind: str) -> None:
    check_embeddings(skeleton(tiny_config(kind)))


def test_experts_in_one_tensor_are_told_for_what_they_are() -> None:
    model = skeleton(tiny_config("mixtral"))
    said = "its experts (down_proj, gate_up_proj) are one tensor a layer and no linears: no block reaches them"
    for targets in (("w1", "q_proj"), ("gate_up_proj",)):
        with pytest.raises(BackboneError, match=re.escape(said)):
            find_sites(model, targets)
    with pytest.raises(BackboneError) as caught:
        find_sites(skeleton(tiny_config("llama")), ("w1",))
    assert "experts" not in str(caught.value)


def test_gpt2s_linears_are_offered_by_name() -> None:
    with pytest.raises(BackboneError, match="its linears are named: c_attn, c_fc, c_proj, lm_head"):
        find_sites(skeleton(tiny_config("gpt2")), ("q_proj",))


def test_a_class_that_does_not_run_without_weights_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    config.rms_norm_eps = 0.25  # another one than is known already
    model = skeleton(config)

    def forward(**_: object) -> None:
        raise AssertionError("numbers are needed")

    monkeypatch.setattr(model, "forward", forward)
    assert look(model) is None
    check_sites(model, ["lm_head"], "pet")
