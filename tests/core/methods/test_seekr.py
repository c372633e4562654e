"""SEEKR: which heads are kept, and what a step adds, against naive formulas and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from transformers import LlamaConfig, T5Config
from transformers.models.t5 import modeling_t5

from sapt_core.data.collate import Collator
from sapt_core.errors import BackboneError
from sapt_core.methods.seekr import (
    Distillation,
    Seekr,
    _Taught,
    attention_layers,
    choose_heads,
    forgettability,
    head_sensitivity,
    within_layers,
)
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import FullConfig
from sapt_core.training.rehearsal import unpack
from sapt_core.versions.loading import load_pool
from tests.core.lessons import learn, lesson, sequence
from tests.core.tiny import PAD, DictStore, fill, lora, random_rows, tiny_backbone, tiny_task

SEEKR: dict[str, Any] = {"name": "seekr", "share": 0.3, "layers": 2, "heads": 3, "queries": 4}


def test_heads_are_chosen_within_the_most_important_layers() -> None:
    importance = torch.tensor([[9.0, 0.0, 0.0], [4.0, 5.0, 1.0], [3.0, 3.0, 2.0], [0.5, 8.0, 0.1]])
    # Layer sums 9, 10, 8, 8.6: layers 0 and 1; then the best three of their heads, not layer 3's 8.
    assert choose_heads(importance, 2, 3).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert choose_heads(importance, 4, 2).tolist() == [[0, 0], [3, 1]]
    assert choose_heads(importance, 4, 12).shape == (12, 2)


def test_measures_of_a_head_by_hand() -> None:
    before = [torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])]
    after = [torch.tensor([[[0.8, 0.2]], [[1.0, 0.0]]])]
    assert forgettability(before, after)[0].tolist() == pytest.approx([math.sqrt(0.18), 0.0])
    assert within_layers(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist() == [[0.25, 0.75], [0.0, 0.0]]


def test_sensitivity_is_the_slope_of_the_loss_in_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences: one entry of one map is nudged where the layer uses it."""
    taught = lesson(None, 0, DictStore())
    model, row = taught.model.eval(), taught.rows[0]
    model.backbone.set_attn_implementation("eager")
    found = head_sensitivity(taught, row)
    assert found.shape == (6, 2)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    batch = Collator(PAD, is_encoder_decoder=True)([row])
    assert batch.labels is not None
    with torch.no_grad():
        _, maps = model.attend(batch)
    head, step = 1, 1e-2
    layer = model.backbone.decoder.block[1].layer[0].SelfAttention  # map 3
    usual = modeling_t5.eager_attention_forward

    def loss(query: int, key: int, change: float) -> float:
        def nudged(module: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
            output, weights = usual(module, q, k, v, *rest, **named)
            if module is layer:
                weights = weights.clone()
                weights[0, head, query, key] += change
                output = torch.matmul(weights, v).transpose(1, 2).contiguous()
            return output, weights

        monkeypatch.setattr(modeling_t5, "eager_attention_forward", nudged)
        with torch.no_grad():
            logits, _ = model.attend(batch)
        assert batch.labels is not None
        return model.token_loss(logits, batch.labels).item() / len(row["answer_ids"])

    length, keys = maps[3].shape[2:]
    slopes = torch.tensor(
        [[(loss(q, k, step) - loss(q, k, -step)) / (2 * step) for k in range(keys)] for q in range(length)]
    )
    assert slopes.norm() > 0
    assert found[3, head].item() == pytest.approx(slopes.norm().item(), rel=2e-2)


def taught_row(model: SaptModel, row: dict[str, Any], heads: dict[int, list[int]], seed: int) -> _Taught:
    generator = torch.Generator().manual_seed(seed)
    collator = Collator(PAD, model.is_encoder_decoder)
    with torch.no_grad():
        logits, maps = model.attend(collator([row]))
    kept = {}
    for layer, chosen in heads.items():
        at = torch.randperm(maps[layer].shape[2], generator=generator)[:2].sort().values
        shape = (len(chosen), len(at), maps[layer].shape[3])
        kept[layer] = (chosen, at, torch.rand(shape, generator=generator).softmax(-1))
    teacher = torch.randn(len(row["answer_ids"]), logits.shape[-1], generator=generator)
    return _Taught(row, teacher, kept)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_steps_terms_are_those_of_its_rows_one_by_one(name: str) -> None:
    backbone = tiny_backbone(name)
    backbone.set_attn_implementation("eager")
    model = SaptModel(backbone, fill(new_pool(backbone, lora(name), None), 1)).eval()
    rows = random_rows(3, seed=4)
    layers = {0: [1], 1: [0, 1]} if name == "llama" else {1: [0], 3: [0, 1], 5: [1]}
    taught = [taught_row(model, row, layers, seed) for seed, row in enumerate(rows)]
    collator = Collator(PAD, model.is_encoder_decoder)
    term = Distillation(tuple(taught), collator, rows=1.5, batch_size=6, length=2.5, replay=0.3, attention=7.0)
    found = term.value(model, [2, 0]).item()
    tokens = cross = soft = held = 0.0
    for each in (taught[2], taught[0]):
        batch = collator([each.row])
        with torch.no_grad():
            logits, maps = model.attend(batch)
        for place, token in enumerate(each.row["answer_ids"]):
            own = logits[0, place].log_softmax(-1)
            teacher = each.logits[place].softmax(-1)
            tokens += 1
            cross -= own[token].item()
            soft += (teacher * (teacher.log() - own)).sum().item()
        for layer, (heads, at, kept) in each.maps.items():
            of_layer = []
            for h, head in enumerate(heads):
                for q, query in enumerate(at.tolist()):
                    now = maps[layer][0, head, query]
                    terms = [
                        kept[h, q, k] * math.log(kept[h, q, k] / max(now[k], torch.finfo(torch.float32).tiny))
                        for k in range(len(now))
                    ]
                    of_layer.append(float(sum(terms)))
            held += sum(of_layer) / len(of_layer) / len(layers) / 2
    expected = (0.3 * cross + 0.7 * soft) / (6 * 2.5) + 7.0 * held * 2 / 6
    assert found == pytest.approx(expected, rel=1e-4)


def test_kept_answers_weigh_by_their_tokens_what_they_would_in_a_batch() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method=SEEKR)
    second = lesson(first, 1, store)
    plan = Seekr.model_validate(SEEKR).begin(second)
    (term,) = plan.objective.terms
    assert isinstance(term, Distillation)
    tokens = [len(row["answer_ids"]) for row in second.rows]
    assert term.length == pytest.approx(sum(tokens) / len(tokens))
    assert plan.rows == second.rows  # memory is no part of the epoch


def test_teachers_stay_on_the_cpu_in_half_precision_until_they_are_drawn() -> None:
    store = DictStore()
    first, _ = learn(store, 0, None, method=SEEKR)
    (term,) = Seekr.model_validate(SEEKR).begin(lesson(first, 1, store)).objective.terms
    kept = term.to(torch.device("meta"))  # a device that would hold no number
    assert isinstance(kept, Distillation)
    saved = load_tensors(store.get(first.state["teacher 00"]))
    for index, each in enumerate(kept.taught):
        assert torch.equal(each.logits, saved[f"{index}/logits"])
        assert {each.logits.dtype, *(maps.dtype for _, _, maps in each.maps.values())} == {torch.float16}
        drawn = each.to(torch.device("cpu"))
        assert drawn.logits.dtype == torch.float32
        assert torch.equal(drawn.logits.half(), each.logits)


def test_rows_are_drawn_in_proportion() -> None:
    backbone = tiny_backbone("t5")
    backbone.set_attn_implementation("eager")
    model = SaptModel(backbone, fill(new_pool(backbone, lora("t5"), None), 1)).eval()
    taught = [taught_row(model, row, {0: [0]}, 0) for row in random_rows(4)]
    settings: dict[str, Any] = {"batch_size": 8, "length": 3, "replay": 0.5, "attention": 1.0}
    term = Distillation(tuple(taught), Collator(PAD, True), rows=1.25, **settings)
    draws = [term.draw(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert {len(drawn) for drawn in draws} == {1, 2}
    assert sum(map(len, draws)) / 400 == pytest.approx(1.25, abs=0.1)
    assert all(len(set(drawn)) == len(drawn) for drawn in draws)
    few = Distillation(tuple(taught), Collator(PAD, True), rows=0.1, **settings)
    assert {len(few.draw(torch.Generator().manual_seed(seed))) for seed in range(99)} == {0, 1}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_only_chosen_heads_of_chosen_rows_are_kept(name: str, full: bool) -> None:
    store = DictStore()
    pet = FullConfig() if full else lora(name)
    last = sequence(store, method=SEEKR, name=name, pet=pet)[-1]
    assert sorted(last.state) == ["importance", *(f"{kind} 0{i}" for kind in ("memory", "teacher") for i in range(3))]
    for index in range(3):
        rows = unpack(store.get(last.state[f"memory 0{index}"]))
        teacher = load_tensors(store.get(last.state[f"teacher 0{index}"]))
        assert len(rows) == 3
        assert teacher["heads"].shape == (3, 2)
        layers = set(teacher["heads"][:, 0].tolist())
        assert len(layers) <= 2
        for number, row in enumerate(rows):
            assert teacher[f"{number}/logits"].shape[0] == len(row["answer_ids"])
            kept = {name.split()[1] for name in teacher if name.startswith(f"{number}/map")}
            assert kept == {str(layer) for layer in layers}
            for layer in layers:
                assert len(teacher[f"{number}/queries {layer}"]) <= 4
        assert not any(value.dtype == torch.float32 for value in teacher.values())


def test_distillation_holds_the_answers_to_earlier_rows() -> None:
    train = {"epochs": 6}

    def moved(**options: float) -> float:
        """Mean change of the logits of the first task's rows while the second is learnt."""
        store, method = DictStore(), {**SEEKR, **options}
        first, _ = learn(store, 0, None, method=method, train=train)
        second, curve = learn(store, 1, first, method=method, train=train)
        assert all("seekr" in entry for entry in curve)
        batch = Collator(PAD, is_encoder_decoder=True)(list(tiny_task(0).train))
        found = []
        for version in (first, second):
            backbone = tiny_backbone("t5")
            with torch.no_grad():
                found.append(SaptModel(backbone, load_pool(version, store, backbone)).eval()(batch))
        return (found[0] - found[1]).abs().mean().item()

    assert moved(share=1.0, replay=0.0, attention=100.0) < 0.8 * moved(share=0.01, replay=1.0, attention=0.0)


def test_budgets_beyond_the_model_are_refused() -> None:
    assert attention_layers(T5Config(num_layers=6, num_decoder_layers=4, num_heads=8)) == (14, 8)
    assert attention_layers(LlamaConfig(num_hidden_layers=3, num_attention_heads=5, hidden_size=20)) == (3, 5)
    small = LlamaConfig(num_hidden_layers=3, num_attention_heads=5, hidden_size=20)
    Seekr(layers=3, heads=15).check_backbone(small)
    with pytest.raises(BackboneError, match=r"method.layers asks for 4 of 3 attention layers"):
        Seekr(layers=4, heads=2).check_backbone(small)
    with pytest.raises(BackboneError, match=r"method.heads asks for 11 of the 10 heads in method.layers=2"):
        Seekr(layers=2, heads=11).check_backbone(small)
    with pytest.raises(ValueError, match="greater than 0"):
        Seekr(share=0)
