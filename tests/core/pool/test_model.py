"""A pool on unpatched Hugging Face models, against copies with ``W + Σ a_i s B_i A_i`` merged in, row by row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_core.data.collate import Batch, Collator
from sapt_core.judging.decoding import answer, pooled_embeddings
from sapt_core.pool.attention import max_pool
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, EvaluationConfig
from tests.core.tiny import (
    BACKBONES,
    EOS,
    PAD,
    VOCABULARY,
    fill,
    labels_of_every_position,
    lora,
    random_rows,
    sapt_model,
    tiny_backbone,
    tiny_tokenizer,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}


def collator(model: SaptModel) -> Collator:
    return Collator(PAD, model.is_encoder_decoder)


def run(model: SaptModel, batch: Batch) -> Tensor:
    return model(batch)


def generate(model: SaptModel, batch: Batch, **options: Any) -> Tensor:
    return model.generate(batch, **{**GREEDY, **options})[0]


def merged(model: SaptModel, weights: Tensor) -> PreTrainedModel:
    """A bare copy of the backbone for one row of weights (T,)."""
    bare = copy.deepcopy(model.backbone)
    for name, site in zip(model.pool.blocks.names, model.pool.blocks.sites, strict=True):
        A = [*site.frozen_A.split(site.r), *([] if site.lora_A is None else [site.lora_A])]
        B = [*site.frozen_B.split(site.r, dim=1), *([] if site.lora_B is None else [site.lora_B])]
        linear = bare.get_submodule(name)
        with torch.no_grad():
            for weight, down, up in zip(weights, A, B, strict=True):
                linear.weight += weight * site.scaling * (up @ down)
    return bare


def naive_weights(model: SaptModel, prompt: list[int]) -> Tensor:
    """Mixture (T,) of one prompt, without any batch."""
    embedded = model.backbone.get_input_embeddings().weight[torch.tensor(prompt)]
    return model.pool.attend(embedded.amax(dim=0, keepdim=True))[0]


@pytest.fixture(params=BACKBONES)
def model(request: pytest.FixtureRequest) -> Iterator[SaptModel]:
    with torch.no_grad():
        yield sapt_model(request.param)


def test_the_widths_that_break_naive_code_are_covered() -> None:
    widths = {name: {site[:2] for site in ((m.in_features, m.out_features) for m in sites(name))} for name in BACKBONES}
    assert widths["t5_narrow"] == {(16, 12)}
    assert widths["llama"] == {(16, 16), (16, 8)}
    assert tiny_backbone("t5_gated").config.is_gated_act
    assert tiny_backbone("qwen2").get_submodule("model.layers.0.self_attn.q_proj").bias is not None


def sites(name: str) -> list[Any]:
    backbone = tiny_backbone(name)
    return [backbone.get_submodule(site) for site in new_pool(backbone, lora(name), None).blocks.names]


def test_logits_of_a_batch_equal_merged_models_row_by_row(model: SaptModel) -> None:
    rows = random_rows(4)
    logits, call = model.run(collator(model)(rows))
    assert call.weights.shape == (4, 3)
    assert float(call.weights.std(dim=0).max()) > 0.05  # rows do mix their blocks differently
    for index, row in enumerate(rows):
        weights = naive_weights(model, row["prompt_ids"])
        torch.testing.assert_close(call.weights[index], weights, rtol=1e-5, atol=1e-6)
        bare = merged(model, weights)
        if model.is_encoder_decoder:
            answer_ids = torch.tensor([row["answer_ids"]])
            wanted = bare(input_ids=torch.tensor([row["prompt_ids"]]), labels=answer_ids).logits[0]
            given = logits[index, : answer_ids.shape[1]]
        else:
            ids = torch.tensor([[*row["prompt_ids"], *row["answer_ids"]]])
            first = min(len(each["prompt_ids"]) for each in rows) - 1  # what it says is an answer's first token
            wanted = bare(input_ids=ids).logits[0, first:]
            given = logits[index, : len(wanted)]
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_equals_that_of_the_model_class(model: SaptModel) -> None:
    row = random_rows(1)[0]
    batch = collator(model)([row])
    logits, call = model.run(batch)
    loss = model.token_loss(logits, batch.labels)
    bare = merged(model, call.weights[0])
    mean = bare(input_ids=batch.input_ids, labels=labels_of_every_position(batch, model)).loss
    assert loss.item() == pytest.approx(mean.item() * len(row["answer_ids"]), rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_equal_those_of_merged_models_row_by_row(model: SaptModel, beams: int) -> None:
    rows = random_rows(4, seed=3)
    given = generate(model, collator(model).prompts(rows), num_beams=beams)
    assert len({tuple(row) for row in given.tolist()}) > 1
    for index, row in enumerate(rows):
        bare = merged(model, naive_weights(model, row["prompt_ids"]))
        prompt = torch.tensor([row["prompt_ids"]])
        options = {**GREEDY, "num_beams": beams}
        wanted = bare.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        wanted = wanted[:, 1:] if model.is_encoder_decoder else wanted[:, prompt.shape[1] :]
        assert tokens(given[index]) == tokens(wanted[0])


def tokens(ids: Tensor) -> list[int]:
    """Up to the end token: what follows is padding."""
    values = ids.tolist()
    return values[: values.index(EOS) + 1] if EOS in values else values


def test_a_batch_of_one_and_several_returned_sequences(model: SaptModel) -> None:
    batch = collator(model).prompts(random_rows(1))
    torch.manual_seed(0)
    sampled = generate(model, batch, do_sample=True, top_k=20, num_return_sequences=5)
    assert sampled.shape[0] == 5
    assert int(sampled.max()) < VOCABULARY
    assert len({tuple(row) for row in sampled.tolist()}) > 1
    torch.manual_seed(0)
    assert torch.equal(sampled, generate(model, batch, do_sample=True, top_k=20, num_return_sequences=5))
    best = generate(model, batch, num_beams=3, num_return_sequences=3)
    assert tokens(best[0]) == tokens(generate(model, batch, num_beams=3)[0])


def test_padding_on_either_side_or_none_gives_the_same_weights(model: SaptModel) -> None:
    rows = random_rows(5, seed=5)
    weights = []
    for left in (False, True):
        for extra in (0, 4):
            width = max(len(row["prompt_ids"]) for row in rows) + extra
            ids, mask = torch.full((5, width), PAD), torch.zeros(5, width, dtype=torch.bool)
            for index, row in enumerate(rows):
                length = len(row["prompt_ids"])
                where = slice(width - length, width) if left else slice(0, length)
                ids[index, where] = torch.tensor(row["prompt_ids"])
                mask[index, where] = True
            weights.append(model.pool.mixture(model.pooled(Batch(ids, mask.long(), mask, None, left_padded=left))))
    alone = torch.stack([naive_weights(model, row["prompt_ids"]) for row in rows])
    for given in weights:
        torch.testing.assert_close(given, alone, rtol=1e-5, atol=1e-6)
    for first, second in pairwise(weights):
        assert torch.equal(first, second)


def test_a_label_never_reaches_the_query(model: SaptModel) -> None:
    rows = random_rows(3)
    others = [{**row, "answer_ids": [7, 9, 11, 13, 1]} for row in rows]
    first, second = (model.run(collator(model)(each))[1].weights for each in (rows, others))
    assert torch.equal(first, second)
    assert torch.equal(first, model.generate(collator(model).prompts(rows), **GREEDY)[1])


def test_a_new_block_changes_nothing_until_it_is_trained(model: SaptModel) -> None:
    backbone, rows = model.backbone, random_rows(3)
    batch = collator(model)(rows)
    fresh = new_pool(backbone, lora("t5" if model.is_encoder_decoder else "llama"), AttentionConfig(bottleneck=5))
    fresh.add()
    logits = run(SaptModel(backbone, fresh), batch)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.is_encoder_decoder:
        inputs["decoder_input_ids"] = backbone.prepare_decoder_input_ids_from_labels(batch.labels)
    else:
        inputs["logits_to_keep"] = batch.labels.shape[1]
    assert torch.equal(logits, backbone(**inputs).logits)


def test_the_backbone_is_bare_after_every_call(model: SaptModel) -> None:
    backbone = model.backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    ids = torch.tensor([random_rows(1)[0]["prompt_ids"]])
    bare = backbone.generate(input_ids=ids, **GREEDY)
    mixed = generate(model, collator(model).prompts(random_rows(1)))
    assert list(backbone.state_dict()) == list(before)
    assert not [module for module in backbone.modules() if module._forward_hooks]
    again = backbone.generate(input_ids=ids, **GREEDY)
    assert torch.equal(bare, again)
    assert tokens(mixed[0]) != tokens(bare[0, 1:] if model.is_encoder_decoder else bare[0, ids.shape[1] :])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_two_versions_take_turns_on_one_backbone() -> None:
    backbone, rows = tiny_backbone("t5"), random_rows(3)
    pools = [fill(new_pool(backbone, lora("t5"), AttentionConfig(bottleneck=5)), 2, seed=seed) for seed in (1, 2)]
    batch = Collator(PAD, True)(rows)
    alone = []
    for pool in pools:
        alone.append(run(SaptModel(copy.deepcopy(backbone), pool), batch))
    first, second = (SaptModel(backbone, pool) for pool in pools)
    for _ in range(2):
        assert torch.equal(run(first, batch), alone[0])
        assert torch.equal(run(second, batch), alone[1])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_a_backbone_with_a_pool_on_it_does_not_run_on_its_own() -> None:
    model = sapt_model("t5")
    with model.pool.blocks.on(model.backbone), pytest.raises(RuntimeError, match="through SaptModel"):
        model.backbone(input_ids=torch.tensor([[7]]), decoder_input_ids=torch.tensor([[0]]))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_bfloat16_backbone_keeps_float32_weights(name: str) -> None:
    model = sapt_model(name)
    wanted, before = model.run(collator(model)(random_rows(3)))
    wanted = wanted.detach()
    model.backbone.bfloat16()
    given, after = model.run(collator(model)(random_rows(3)))
    assert given.dtype == torch.bfloat16
    assert after.weights.dtype == torch.float32
    torch.testing.assert_close(after.weights, before.weights, rtol=0, atol=0.1)
    assert float((given.detach() - wanted).abs().mean()) < 0.1 * float(wanted.abs().mean())
    given.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.pool.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_reaches_block_t_key_t_and_the_projection_alone(name: str) -> None:
    model = sapt_model(name, blocks=3)
    batch = collator(model)(random_rows(4))
    model.token_loss(run(model, batch), batch.labels).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    every_site = range(len(model.pool.blocks.names))
    assert with_gradient == {
        "pool.key",
        *(f"pool.attention.{part}.weight" for part in ("down", "up", "norm")),
        "pool.attention.norm.bias",
        *(f"pool.blocks.sites.{i}.lora_{matrix}" for i in every_site for matrix in "AB"),
    }
    assert not [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    assert not [n for n, b in model.named_buffers() if b.requires_grad]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_gradient_is_that_of_the_merged_weights(name: str) -> None:
    """With G = dL/dW of the merged model: dA = a s Bᵀ G, dB = a s G Aᵀ, da_i = s ⟨G, B_i A_i⟩, and da reaches the key.

    Old blocks' Jacobians are part of G: a forward that ran them without gradient would fail here.
    """
    model = sapt_model(name, blocks=3)
    row = random_rows(1, seed=4)[0]
    batch = collator(model)([row])
    model.token_loss(run(model, batch), batch.labels).backward()
    weights = naive_weights(model, row["prompt_ids"])
    bare = merged(model, weights.detach()).requires_grad_(True)
    (
        bare(input_ids=batch.input_ids, labels=labels_of_every_position(batch, model)).loss * len(row["answer_ids"])
    ).backward()
    da = torch.zeros(3)
    for site_name, site in zip(model.pool.blocks.names, model.pool.blocks.sites, strict=True):
        G = bare.get_submodule(site_name).weight.grad
        A = [*site.frozen_A.split(site.r), site.lora_A.detach()]
        B = [*site.frozen_B.split(site.r, dim=1), site.lora_B.detach()]
        share = weights[-1].detach() * site.scaling
        for gradient, wanted in ((site.lora_A.grad, share * B[-1].T @ G), (site.lora_B.grad, share * G @ A[-1].T)):
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        da += torch.stack([site.scaling * (G * (up @ down)).sum() for up, down in zip(B, A, strict=True)])
    given = model.pool.key.grad.clone()
    model.pool.zero_grad()
    weights.backward(da)
    wanted = model.pool.key.grad
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_come_in_order_and_do_not_depend_on_the_batch(name: str, beams: int) -> None:
    model, rows, tokenizer = sapt_model(name), random_rows(7, seed=2), tiny_tokenizer()

    def answers(given: list[Mapping[str, Any]], batch_size: int) -> tuple[list[str], Tensor]:
        config = EvaluationConfig(batch_size=batch_size, num_beams=beams)
        return answer(model, tokenizer, given, config, max_new_tokens=5, precision="float32")

    texts, weights = answers(rows, 3)
    assert weights.shape == (7, 3)
    for index, row in enumerate(rows):
        (text,), weight = answers([row], 1)
        assert texts[index] == text
        torch.testing.assert_close(weights[index], weight[0], rtol=1e-5, atol=1e-6)
    assert len(set(texts)) > 1
    assert all(text == text.strip() and "<pad>" not in text and "</s>" not in text for text in texts)


def test_pooled_embeddings_are_those_of_the_prompts() -> None:
    model, rows = sapt_model("llama"), random_rows(7)
    embedded = model.backbone.get_input_embeddings().weight
    wanted = [
        max_pool(embedded[torch.tensor([row["prompt_ids"]])], torch.ones(1, len(row["prompt_ids"]))) for row in rows
    ]
    assert torch.equal(pooled_embeddings(model, tiny_tokenizer(), rows, batch_size=3), torch.cat(wanted))
    assert pooled_embeddings(model, tiny_tokenizer(), []).shape == (0, 16)
