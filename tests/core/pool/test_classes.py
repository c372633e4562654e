"""Classes of models with habits of their own: what a row's logits are must not depend on the rows beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapt_core.data.collate import Batch, Sharing
from sapt_core.errors import BackboneError
from sapt_core.judging.decoding import answer
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import AttentionConfig, EvaluationConfig, LoRAConfig, PETConfig, PromptConfig
from tests.core.classes import tiny_model
from tests.core.tiny import PAD, fill, random_rows, tiny_tokenizer

TARGETS = {
    "bart": ("self_attn.q_proj", "fc1"),
    "bert": ("query", "value"),
    "ctrl": ("Wq", "Wv"),
    "gpt2": ("c_attn", "c_fc", "lm_head"),
    "gpt_bigcode": ("c_attn", "c_proj"),
    "gpt_neo": ("q_proj", "v_proj"),
    "jamba": ("q_proj", "in_proj", "x_proj"),
    "llama": ("q_proj", "v_proj"),
    "mamba": ("in_proj", "x_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "fc1", "fc2"),
    "qwen2_moe": ("q_proj", "shared_expert.up_proj", "shared_expert_gate"),
    "roberta": ("query", "value"),
    "t5": ("q", "v"),
    "xglm": ("q_proj", "fc1"),
}
WITH_PROMPTS = sorted(TARGETS.keys() - {"ctrl"})
UNTOLD = {"bart", "mamba"}  # of their places


def pooled_model(kind: str, pet: str = "lora") -> SaptModel:
    """Two blocks whose weights each input chooses."""
    blocks: PETConfig = PromptConfig(length=3) if pet == "prompt" else LoRAConfig(r=2, target_modules=TARGETS[kind])
    backbone = tiny_model(kind)
    return SaptModel(
        backbone, fill(new_pool(backbone, blocks, AttentionConfig(bottleneck=5, temperature=0.2)), 2)
    ).eval()


def close(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def rows_of(model: SaptModel, rows: list[dict[str, list[int]]]) -> list[Tensor]:
    """Logits of each row's answer, in one training batch."""
    batch = model.collator(PAD)(rows)
    assert batch.labels is not None
    return [model.answer_logits(*pair) for pair in zip(model(batch), batch.labels, strict=True)]


def generated(model: SaptModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """New tokens (B, L) and the logits (B, L, V) that they were chosen by."""
    backbone: Any = model.backbone
    inner, found = backbone.generate, []

    def generate(**options: Any) -> Tensor:
        found.append(inner(**options, output_logits=True, return_dict_in_generate=True))
        return found[0].sequences

    backbone.generate = generate
    try:
        tokens, _ = model.generate(batch, max_new_tokens=3, do_sample=False, pad_token_id=PAD)
    finally:
        del backbone.generate
    return tokens, torch.stack(found[0].logits, dim=1)


def turned(batch: Batch) -> Batch:
    """A training batch with its padding in front."""
    order = batch.attention_mask.argsort(dim=1, stable=True)
    parts = (batch.input_ids, batch.attention_mask, batch.query_mask)
    return Batch(*(part.gather(1, order) for part in parts), batch.labels, left_padded=True)


@pytest.mark.parametrize(
    ("kind", "pet"), [*((kind, "lora") for kind in TARGETS), *((kind, "prompt") for kind in WITH_PROMPTS)]
)
@torch.no_grad()
def test_a_row_is_answered_as_if_alone_and_as_it_was_taught(kind: str, pet: str) -> None:
    model = pooled_model(kind, pet)
    rows = random_rows(3, seed=2)
    for row, beside in zip(rows, rows_of(model, rows), strict=True):
        close(beside, rows_of(model, [row])[0])
    together = [rows] if model.pads else [[row] for row in rows]
    for group in together:
        tokens, logits = generated(model, model.collator(PAD).prompts(group))
        taught = [{**row, "answer_ids": ids} for row, ids in zip(group, tokens.tolist(), strict=True)]
        for row, given in zip(taught, logits, strict=True):
            close(given, rows_of(model, [row])[0])


@pytest.mark.parametrize("kind", sorted(TARGETS.keys() - {"t5"}))
@torch.no_grad()
def test_padding_in_front_of_a_forward_moves_no_token(kind: str) -> None:
    model = pooled_model(kind)
    rows = random_rows(3, seed=2)
    batch = turned(model.collator(PAD)(rows))
    if kind in UNTOLD:
        with pytest.raises(ValueError, match="takes no positions"):
            model(batch)
        return
    logits = model(batch)
    for row, given in zip(rows, logits, strict=True):
        close(given[-len(row["answer_ids"]) - 1 : -1], rows_of(model, [row])[0])


def test_prompts_go_alone_where_others_change_their_answers() -> None:
    model = pooled_model("llama")
    model.sharing = Sharing(answering="alone")
    rows, sizes, inner = random_rows(5, seed=4), [], model.generate

    def watched(batch: Batch, **options: Any) -> Any:
        sizes.append(len(batch.input_ids))
        return inner(batch, **options)

    model.generate = watched  # type: ignore[method-assign]
    config = {"max_new_tokens": 3, "precision": "float32"}
    alone, _ = answer(model, tiny_tokenizer(), rows, EvaluationConfig(batch_size=16), **config)
    assert sizes == [1] * 5
    with pytest.raises(BackboneError, match=r"evaluation\.num_beams=2: .* set it to 1"):
        answer(model, tiny_tokenizer(), rows, EvaluationConfig(num_beams=2), **config)
    together, _ = answer(pooled_model("llama"), tiny_tokenizer(), rows, EvaluationConfig(batch_size=16), **config)
    assert alone == together


@pytest.mark.parametrize("kind", sorted(UNTOLD | {"llama"}))
def test_texts_share_a_batch_only_where_padding_changes_no_answer(kind: str) -> None:
    model = pooled_model(kind)
    rows = [*random_rows(8, seed=4), *random_rows(8, seed=4)]
    lengths: list[int] = []
    inner = model.generate

    def watched(batch: Batch, **options: Any) -> Any:
        lengths.append(len(batch.input_ids))
        return inner(batch, **options)

    model.generate = watched  # type: ignore[method-assign]
    config = {"max_new_tokens": 3, "precision": "float32"}
    many, weights = answer(model, tiny_tokenizer(), rows, EvaluationConfig(batch_size=16), **config)
    assert (lengths == [16]) is (kind == "llama")
    assert max(lengths) > 1
    alone, alone_weights = answer(model, tiny_tokenizer(), rows, EvaluationConfig(batch_size=1), **config)
    assert many == alone
    close(weights, alone_weights)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_site_learns(kind: str) -> None:
    model = pooled_model(kind)
    batch = model.collator(PAD)(random_rows(3, seed=2))
    assert batch.labels is not None
    model.token_loss(model(batch), batch.labels).backward()
    for name, site in model.pool.blocks.named_sites():
        for part in site.current.values():
            assert part.grad is not None, name
            assert part.grad.abs().max() > 0, name


@torch.no_grad()
def test_the_update_of_a_transposed_linear_is_that_of_its_weight() -> None:
    model = pooled_model("gpt2")
    (row,) = random_rows(1)
    weights = model.run(model.collator(PAD)([row]))[1].weights[0]
    bare: Any = tiny_model("gpt2")
    bare.lm_head.weight = nn.Parameter(bare.lm_head.weight.clone())  # tied to the embeddings, which have no update
    for name, site in model.pool.blocks.named_sites():
        down, up = [*site.frozen_A.split(2), site.lora_A], [*site.frozen_B.split(2, dim=1), site.lora_B]
        update = sum(w * site.scaling * (b @ a) for w, a, b in zip(weights, down, up, strict=True))
        bare.get_submodule(name).weight += update if name == "lm_head" else update.T
    ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
    close(rows_of(model, [row])[0], bare(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1])
