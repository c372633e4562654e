"""ProgPrompt, L2P and LFPT5: what stands in front of an input, what is picked, and what a block replays."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load as load_tensors

from sapt_core.data.collate import Collator
from sapt_core.methods import l2p, lfpt5
from sapt_core.methods.base import find_method
from sapt_core.methods.l2p import KeyedPrompts
from sapt_core.pool.attention import vocabulary_moments
from sapt_core.pool.calls import Call
from sapt_core.pool.model import SaptModel
from sapt_core.settings import PromptConfig
from sapt_core.versions.loading import load_pool
from tests.core.lessons import learn, lesson, sequence
from tests.core.tiny import (
    PAD,
    DictStore,
    tiny_backbone,
)


def test_prog_prompt_puts_the_newest_prompt_first() -> None:
    store = DictStore()
    pet = PromptConfig(length=3)
    last = sequence(store, method="prog_prompt", pet=pet)[-1]
    backbone = tiny_backbone("t5")
    parts = [load_tensors(store.get(digest))["prompt_embeddings"] for digest in last.blocks]
    for task in range(3):
        blocks = load_pool(last, store, backbone, f"task{task}").blocks
        expected = torch.cat(parts[: task + 1][::-1])
        assert torch.equal(blocks.prompts(torch.ones(2, task + 1), torch.empty(2, 16))[1], expected)  # type: ignore[index]
    untold = sequence(store, method={"name": "prog_prompt", "told": False}, pet=pet)[-1]
    assert load_pool(untold, store, backbone).blocks.prompts(torch.ones(2, 3), torch.empty(2, 16)).shape == (2, 9, 16)  # type: ignore[union-attr]
    assert find_method("prog_prompt").model_validate({}).soft_tokens(3, 15) == 45


def test_l2p_picks_the_prompts_of_the_nearest_keys() -> None:
    backbone = tiny_backbone("t5")
    method = find_method("l2p").model_validate({"pool_size": 4, "top_n": 2})
    blocks = method.blocks(backbone, PromptConfig(length=3))
    assert isinstance(blocks, KeyedPrompts)
    torch.manual_seed(1)
    blocks.add()
    pooled = torch.randn(5, 16)
    call = Call(torch.ones(5, 1), torch.arange(1))
    found = blocks.prompts(call, pooled)
    state = blocks.current_state()
    for row in range(5):
        query = (pooled[row] - blocks.centre).tolist()
        cosines = []
        for key in state["prompt_keys"].tolist():
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            cosines.append(dot / math.sqrt(sum(a * a for a in query) * sum(b * b for b in key)))
        best = sorted(range(4), key=lambda index: -cosines[index])[:2]
        assert torch.equal(found[row], torch.cat([state["prompt_embeddings"][index] for index in best]))
        assert call.noted[blocks][row].item() == pytest.approx(1 - sum(cosines[i] for i in best) / 2, abs=1e-5)
    with pytest.raises(ValueError, match=r"top_n=5 prompts cannot be picked from pool_size=4"):
        find_method("l2p").model_validate({"pool_size": 4})


def test_l2p_looks_at_the_vocabulary_once_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many versions are loaded on it; another backbone has a centre of its own."""
    looked: list[torch.Tensor] = []

    def moments(embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        looked.append(embedding)
        return vocabulary_moments(embedding)

    monkeypatch.setattr(l2p, "vocabulary_moments", moments)
    method = find_method("l2p").model_validate({"pool_size": 4, "top_n": 2})
    backbone, other = tiny_backbone("t5"), tiny_backbone("t5", seed=1)
    first, second, third = (method.blocks(each, PromptConfig(length=3)) for each in (backbone, backbone, other))
    assert len(looked) == 2
    assert isinstance(first, KeyedPrompts)
    assert isinstance(second, KeyedPrompts)
    assert isinstance(third, KeyedPrompts)
    assert torch.equal(first.centre, vocabulary_moments(backbone.get_input_embeddings().weight.detach())[0])
    first.centre.zero_()
    assert second.centre.any()
    assert not torch.equal(second.centre, third.centre)


def test_l2p_trains_keys_and_picked_prompts_alone() -> None:
    store = DictStore()
    method = {"name": "l2p", "pool_size": 4, "top_n": 1, "pull": 5.0}
    first, curve = learn(store, 0, None, method=method, pet=PromptConfig(length=2), train={"epochs": 6})
    assert curve[-1]["pull"] < curve[0]["pull"]
    second, _ = learn(store, 1, first, method=method, pet=PromptConfig(length=2))
    before, after = (load_tensors(store.get(each.blocks[0]))["prompt_embeddings"] for each in (first, second))
    moved = [(before[index] != after[index]).any().item() for index in range(4)]
    assert any(moved)
    assert not all(moved)


def test_lfpt5_replays_what_its_block_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot write; what is done with clean samples is looked at with given ones."""
    asked: list[list[int]] = []

    def given(model: SaptModel, tokenizer: object, source: list[int], **rest: object) -> tuple[dict[str, str], object]:
        asked.append(list(source))
        return {"w1 w2": "w1", "w3": "w3"}, {}

    monkeypatch.setattr(lfpt5, "sample", given)
    store = DictStore()
    first, _ = learn(store, 0, None, method="lfpt5")
    taught = lesson(first, 1, store)
    method = find_method("lfpt5").model_validate({"share": 0.2})
    plan = method.begin(taught)
    assert [list(row["answer_ids"]) for row in plan.rows[10:]] == [
        taught.tokenizer(text)["input_ids"] for text in ("w1", "w3")
    ]
    prompt = taught.tokenizer.decode(plan.rows[10]["prompt_ids"])
    assert "w30" in prompt  # the earlier task's definition
    assert "w1 w2" in prompt
    assert len(asked) == 1
    writing, consistency = plan.objective.terms
    assert isinstance(writing, lfpt5.WritingTerm)
    assert isinstance(consistency, lfpt5.ConsistencyTerm)
    assert len(writing.rows) == 12
    assert writing.rows[-1]["prompt_ids"] == asked[0]
    drawn = consistency.draw(torch.Generator())
    assert {each.row for each in drawn} == {0, 1}
    assert consistency.value(taught.model.eval(), drawn).item() == pytest.approx(0, abs=1e-5)
    pool = taught.model.pool
    pool.blocks.load_current({name: value + 0.1 for name, value in pool.blocks.current_state().items()})
    expected, tokens = 0.0, 0
    with torch.no_grad():
        for row, before in zip(consistency.rows, consistency.before, strict=True):
            now = taught.model(Collator(PAD, is_encoder_decoder=True)([row]))[0]
            for place in range(len(row["answer_ids"])):
                p, q = before[place].softmax(-1), now[place].softmax(-1)
                expected += float(
                    sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))
                )
                tokens += 1
    assert consistency.value(taught.model, drawn).item() == pytest.approx(expected / tokens, rel=1e-3)


def test_lfpt5_goes_on_after_a_sample_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfpt5, "sample", lambda *given, **rest: ({"w1": "w3 " * 200}, {}))
    store = DictStore()
    first, _ = learn(store, 0, None, method="lfpt5")
    taught = lesson(first, 1, store)
    plan = find_method("lfpt5").model_validate({"max_tokens": 24}).begin(taught)
    assert len(plan.rows[-1]["answer_ids"]) == taught.learnt.max_target_tokens
    (writing,) = (term for term in plan.objective.terms if isinstance(term, lfpt5.WritingTerm))
    written = writing.rows[-1]["answer_ids"]
    assert len(written) == 24
    assert written[-1] == taught.tokenizer.eos_token_id
