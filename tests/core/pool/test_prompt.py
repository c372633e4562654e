"""SAPT-Prompt: ``P = Σ_i a_i P_i`` in front of unpatched models, against bare models fed row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from sapt_core.backbones.reference import BackboneRef
from sapt_core.data.collate import Collator
from sapt_core.errors import SnapshotError
from sapt_core.judging.decoding import answer
from sapt_core.pool.blocks.prompt import PromptBlocks
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.settings import EvaluationConfig, PromptConfig
from sapt_core.versions.export import export_block
from sapt_core.versions.loading import load_pool
from tests.core.lessons import learn, sequence
from tests.core.pool.test_model import naive_weights, tokens
from tests.core.tiny import (
    BACKBONES,
    PAD,
    DictStore,
    labels_of_every_position,
    random_rows,
    sapt_model,
    tiny_backbone,
    tiny_tokenizer,
)

LENGTH = 3
PROMPT = PromptConfig(length=LENGTH)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(params=BACKBONES)
def model(request: pytest.FixtureRequest) -> Iterator[SaptModel]:
    with torch.no_grad():
        yield sapt_model(request.param, pet=PROMPT)


def collator(model: SaptModel) -> Collator:
    return model.collator(PAD)


def naive_input(model: SaptModel, prompt: list[int]) -> Tensor:
    """Mixed prompt and embedded input (1, l + S, D) of one row, block by block."""
    blocks = model.pool.blocks
    assert isinstance(blocks, PromptBlocks)
    weights = naive_weights(model, prompt)
    every = [*blocks.frozen, *([] if blocks.prompt is None else [blocks.prompt])]
    mixed = torch.zeros_like(every[0])
    for weight, block in zip(weights, every, strict=True):
        mixed = mixed + weight * block
    embedded = model.backbone.get_input_embeddings().weight[torch.tensor(prompt)]
    return torch.cat([mixed, embedded]).unsqueeze(0)


@pytest.mark.parametrize("blocks", [1, 3, 15])
def test_the_mixture_and_its_gradients_are_those_of_the_sum(blocks: int) -> None:
    model = sapt_model("t5", blocks, pet=PROMPT)
    prompts = model.pool.blocks
    assert isinstance(prompts, PromptBlocks)
    assert prompts.prompt is not None
    weights = torch.rand(4, blocks, requires_grad=True)
    mixed = prompts.prompts(Call(weights, torch.arange(blocks)), torch.empty(4, 16))
    every = torch.cat([prompts.frozen, prompts.prompt.detach().unsqueeze(0)])
    for row in range(4):
        wanted = sum(float(weights[row, i].detach()) * every[i] for i in range(blocks))
        torch.testing.assert_close(mixed[row].detach(), wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(mixed)
    mixed.backward(upstream)
    torch.testing.assert_close(prompts.prompt.grad, sum(weights[r, -1].detach() * upstream[r] for r in range(4)))
    for row in range(4):
        for i in range(blocks):
            assert float(weights.grad[row, i]) == pytest.approx(float((upstream[row] * every[i]).sum()), rel=1e-4)


def test_logits_of_a_batch_equal_bare_models_row_by_row(model: SaptModel) -> None:
    rows = random_rows(4)
    logits = model(collator(model)(rows))
    first = min(len(row["prompt_ids"]) for row in rows) - 1
    bare = model.backbone
    for index, row in enumerate(rows):
        embedded = naive_input(model, row["prompt_ids"])
        answer_ids = torch.tensor([row["answer_ids"]])
        if model.is_encoder_decoder:
            wanted = bare(inputs_embeds=embedded, labels=answer_ids).logits[0]
        else:
            answered = bare.get_input_embeddings()(answer_ids)
            wanted = bare(inputs_embeds=torch.cat([embedded, answered], dim=1)).logits[0, LENGTH + first :]
        torch.testing.assert_close(logits[index, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    batch = collator(model)(rows)
    assert logits.shape[1] == batch.labels.shape[1]


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_equal_those_of_bare_models_row_by_row(model: SaptModel, beams: int) -> None:
    rows = random_rows(24, seed=3)
    given, _ = model.generate(collator(model).prompts(rows), **{**GREEDY, "num_beams": beams})
    bare = model.backbone
    for index, row in enumerate(rows):
        embedded = naive_input(model, row["prompt_ids"])
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        wanted = bare.generate(inputs_embeds=embedded, attention_mask=mask, **{**GREEDY, "num_beams": beams})
        assert tokens(given[index]) == tokens(wanted[0, 1:] if model.is_encoder_decoder else wanted[0])


def test_several_sequences_are_sampled_of_one_input(model: SaptModel) -> None:
    batch = collator(model).prompts(random_rows(1))
    torch.manual_seed(0)
    sampled, _ = model.generate(batch, **{**GREEDY, "do_sample": True, "top_k": 20, "num_return_sequences": 5})
    assert sampled.shape[0] == 5
    assert len({tuple(row) for row in sampled.tolist()}) > 1


def test_a_label_never_reaches_the_query(model: SaptModel) -> None:
    rows = random_rows(3)
    others = [{**row, "answer_ids": [7, 9, 11, 13, 1]} for row in rows]
    first, second = (model.run(collator(model)(each))[1].weights for each in (rows, others))
    assert torch.equal(first, second)
    assert torch.equal(first, model.generate(collator(model).prompts(rows), **GREEDY)[1])


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_reaches_prompt_t_key_t_and_the_projection_alone(name: str) -> None:
    model = sapt_model(name, blocks=3, pet=PROMPT)
    batch = collator(model)(random_rows(4))
    model.token_loss(model(batch), batch.labels).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        "pool.key",
        "pool.blocks.prompt",
        *(f"pool.attention.{part}.weight" for part in ("down", "up", "norm")),
        "pool.attention.norm.bias",
    }


def test_a_prompt_starts_at_rows_of_the_vocabulary_and_is_its_own() -> None:
    backbone = tiny_backbone("t5")
    before = backbone.get_input_embeddings().weight.clone()
    blocks = PromptBlocks(lambda: backbone.get_input_embeddings().weight, PROMPT)
    blocks.add()
    assert blocks.prompt is not None
    assert all(bool((before == row).all(dim=1).any()) for row in blocks.prompt)
    with torch.no_grad():
        blocks.prompt += 1
    assert torch.equal(backbone.get_input_embeddings().weight, before)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_sequence_of_prompts_adds_one_a_task_and_touches_nothing_before(name: str) -> None:
    store = DictStore()
    first, second, third = sequence(store, name=name, pet=PROMPT)
    assert third.blocks[:2] == second.blocks
    assert second.blocks[:1] == first.blocks
    assert len(set(third.blocks)) == 3
    assert third.pet == PROMPT
    assert load_tensors(store.get(third.blocks[0]))["prompt_embeddings"].shape == (LENGTH, 16)
    backbone = tiny_backbone(name)
    model = SaptModel(backbone, load_pool(third, store, backbone))
    texts, weights = answer(
        model, tiny_tokenizer(), random_rows(3), EvaluationConfig(), max_new_tokens=4, precision="float32"
    )
    assert (len(texts), weights.shape) == (3, (3, 3))


def test_one_prompt_goes_on_from_task_to_task() -> None:
    versions = sequence(DictStore(), method="sequential", pet=PROMPT)
    assert [len(version.blocks) for version in versions] == [1, 1, 1]
    assert len({version.blocks for version in versions}) == 3


def test_going_on_with_another_kind_of_block_is_refused() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None)
    with pytest.raises(SnapshotError, match=r"pet.type prompt \(was lora\)"):
        learn(store, 1, first, pet=PROMPT)
    prompts, _ = learn(store, 0, None, pet=PROMPT)
    with pytest.raises(SnapshotError, match=r"pet.length 4 \(was 3\)"):
        learn(store, 1, prompts, pet=PromptConfig(length=4))
    longer = prompts.model_copy(update={"pet": PromptConfig(length=4)})
    with pytest.raises(SnapshotError, match="does not fit"):
        load_pool(longer, store, tiny_backbone("t5"))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_exported_prompt_gives_peft_the_same_logits(name: str, tmp_path: Path) -> None:
    from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM

    store, backbone = DictStore(), tiny_backbone(name)
    backbone.save_pretrained(tmp_path / "backbone")
    files = {path.name: store.put_file(path) for path in (tmp_path / "backbone").iterdir()}
    manifest, _ = learn(store, 0, None, name=name, pet=PROMPT, ref=BackboneRef(path="tiny", files=files))
    export_block(manifest, 0, store, tmp_path / "adapter")
    kind: Any = PeftModelForSeq2SeqLM if name == "t5" else PeftModelForCausalLM
    peft = kind.from_pretrained(tiny_backbone(name), str(tmp_path / "adapter")).eval()
    model = SaptModel(backbone, load_pool(manifest, store, backbone)).eval()
    batch = collator(model)(random_rows(3))
    with torch.no_grad():
        wanted = model(batch)
        labels = labels_of_every_position(batch, model)
        given = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).logits
    torch.testing.assert_close(given[:, -wanted.shape[1] :], wanted, rtol=1e-4, atol=1e-5)
