"""Half-precision, sharded, tied, resized and pad-less checkpoints are the models that were saved, and learn alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sapt_core.backbones.loading import load_backbone, load_embeddings, store_backbone
from sapt_core.backbones.reference import identify
from sapt_core.config.experiment import ExperimentConfig
from sapt_core.config.preflight import check_backbone, settle_precision
from sapt_core.errors import BackboneError
from sapt_core.judging.decoding import answer
from sapt_core.pool.cost import bare_model
from sapt_core.pool.model import SaptModel
from sapt_core.pool.pool import new_pool
from sapt_core.settings import (
    AttentionConfig,
    EvaluationConfig,
    FullConfig,
    PETConfig,
    PromptConfig,
    ReflectionConfig,
    TrainConfig,
)
from sapt_core.training.objective import Objective
from sapt_core.training.trainer import train
from tests.core.backbones.folders import config, experiment, rewritten, saved
from tests.core.tiny import (
    EOS,
    PAD,
    VOCABULARY,
    DictStore,
    KeptCheckpoints,
    fill,
    lora,
    random_rows,
    same_bits,
    tiny_backbone,
    tiny_tokenizer,
    trainable,
)

ROWS = random_rows(4)
NAMES = ("t5", "t5 untied", "llama", "llama tied", "qwen2")
ROWS_MORE = 25  # of embeddings than the tokenizer has tokens


def model_of(name: str) -> PreTrainedModel:
    model = tiny_backbone(kind_of(name))
    if name == "t5 untied":  # as T5 v1.1: its configuration ties the head whatever it says, and the weights decide
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    if name == "llama tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def kind_of(name: str) -> str:
    return name.partition(" ")[0]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Its parameters alone: rotary positions are computed anew in float32 where a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def as_it_is(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return model


def in_bfloat16(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    cast(model, torch.bfloat16).save_pretrained(folder)
    return model


def in_float16(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    cast(model, torch.float16).save_pretrained(folder)
    return cast(model, torch.float32)  # what is loaded, as steps in float16 vanish


def in_shards(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


def in_half_shards(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return in_shards(cast(model, torch.bfloat16), folder)


def with_more_rows(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + ROWS_MORE, mean_resizing=False)
    model.save_pretrained(folder)
    return model.eval()


WAYS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    function.__name__: function
    for function in (as_it_is, in_bfloat16, in_float16, in_shards, in_half_shards, with_more_rows)
}


def stored(name: str, way: str, folder: Path) -> PreTrainedModel:
    """A folder with the model, which is given back in the format that it is to be loaded in."""
    model = WAYS[way](model_of(name), folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    given, store = config(folder), DictStore()
    ref = identify(given)
    store_backbone(given, ref, store)
    embeddings, _ = load_embeddings(ref, store)
    model, tokenizer = load_backbone(ref, store)
    matrices = [each.get_input_embeddings().weight for each in (embeddings, model)]
    assert torch.equal(*matrices)
    return model, tokenizer


def asked(folder: Path, name: str) -> ExperimentConfig:
    """Without a generator: Qwen2's tokenizer cannot write its marker in a vocabulary of words."""
    given = experiment(folder, kind_of(name))
    return given.model_copy(update={"reflection": ReflectionConfig(source="none")})


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor([[7, 8, 9, 10, EOS]])
    given = {"decoder_input_ids": torch.tensor([[PAD, 8, 9]])} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def one_step(
    backbone: PreTrainedModel, name: str, pad: int, pet: PETConfig | None = None, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is trained, and the loss, after one step."""
    torch.manual_seed(2)
    pet = pet or lora(kind_of(name))
    shared = None if isinstance(pet, FullConfig) else AttentionConfig(bottleneck=5, temperature=0.2)
    pool = new_pool(backbone, pet, shared)
    if shared is None:
        pool.add()
    model = SaptModel(backbone, pool if shared is None else fill(pool, 2))
    precision = "bfloat16" if backbone.dtype == torch.bfloat16 else "float32"
    values = {"learning_rate": 0.02, "batch_size": 4, "epochs": 1, "precision": precision, **changes}
    (entry,) = train(
        model,
        ROWS,
        model.collator(pad),
        TrainConfig(**values),
        seed=3,
        objective=Objective(),
        checkpoints=KeptCheckpoints(),
    )
    return trainable(model), entry


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_model_that_was_saved_and_learns_as_it_does(name: str, way: str, tmp_path: Path) -> None:
    wanted = stored(name, way, tmp_path / "model")
    given = asked(tmp_path / "model", name)
    check_backbone(given, [])
    settled = settle_precision(given, identify(given.backbone)).train.precision
    assert settled == "bfloat16" or wanted.dtype == torch.float32
    model, tokenizer = loaded(tmp_path / "model")
    assert model.dtype == wanted.dtype
    assert is_tied(model) == is_tied(wanted)
    assert len(tokenizer) == VOCABULARY
    assert torch.equal(logits(model), logits(wanted))
    found, entry = one_step(model, name, tokenizer.pad_token_id)
    expected, other = one_step(wanted, name, PAD)
    assert entry == other
    assert same_bits(found, expected)
    untouched, _ = one_step(wanted, name, PAD, learning_rate=1e-9)
    assert max(float((untouched[key] - value).abs().max()) for key, value in found.items()) > 0.01


@pytest.mark.parametrize("name", ["t5", "llama tied", "llama"])
@pytest.mark.parametrize("way", ["in_bfloat16", "in_shards", "with_more_rows"])
def test_whole_models_and_soft_prompts_learn_as_well(name: str, way: str, tmp_path: Path) -> None:
    wanted = stored(name, way, tmp_path / "model")
    model, tokenizer = loaded(tmp_path / "model")
    for pet in (FullConfig(), PromptConfig(length=2)):
        found, entry = one_step(model, name, tokenizer.pad_token_id, pet)
        expected, other = one_step(wanted, name, PAD, pet)
        assert entry == other
        assert same_bits(found, expected)
    # Tied weights are one: they are learnt once, from both ends.
    assert is_tied(model) == (name != "llama")
    assert torch.equal(logits(model), logits(wanted))  # its own weights are back


@pytest.mark.parametrize("name", ["t5", "llama", "qwen2"])
def test_without_padding_the_end_of_text_pads_and_is_learnt_all_the_same(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", name)
    wanted, own = loaded(folder)
    wanted_state, wanted_entry = one_step(wanted, name, PAD)
    rows = [{"prompt_ids": [7, 8, 9, 10, 11, 12]}, {"prompt_ids": [8]}, {"prompt_ids": [9, 20, 21]}]
    settings: dict[str, Any] = {"max_new_tokens": 8, "precision": "float32"}
    texts, _ = answer(bare_model(wanted), own, rows, EvaluationConfig(), **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = tiny_backbone(name)
    if name != "t5":  # the decoder of a T5 starts with it
        model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    check_backbone(asked(folder, name), [])
    model, tokenizer = loaded(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    state, entry = one_step(model, name, tokenizer.pad_token_id)
    assert entry == pytest.approx(wanted_entry, rel=1e-6)
    for key, value in state.items():
        torch.testing.assert_close(value, wanted_state[key], msg=key)
    assert answer(bare_model(model), tokenizer, rows, EvaluationConfig(), **settings)[0] == texts
    alone = [answer(bare_model(model), tokenizer, [row], EvaluationConfig(), **settings)[0][0] for row in rows]
    assert alone == texts


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_rows_that_stand_for_no_token_are_answered_as_nothing(name: str, tmp_path: Path) -> None:
    stored(name, "with_more_rows", tmp_path)
    model, tokenizer = loaded(tmp_path)
    bias = torch.zeros(VOCABULARY + ROWS_MORE)
    bias[VOCABULARY + 3] = 1e6
    model.get_output_embeddings().register_forward_hook(lambda *call: call[2] + bias)
    texts, _ = answer(
        bare_model(model), tokenizer, [{"prompt_ids": [7]}], EvaluationConfig(), max_new_tokens=3, precision="float32"
    )
    assert texts == [""]


@pytest.mark.parametrize("name", ["t5", "llama", "llama tied"])
def test_a_tokenizer_that_is_longer_than_the_embeddings_is_refused_with_figures(name: str, tmp_path: Path) -> None:
    stored(name, "with_more_rows", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"new{number}" for number in range(ROWS_MORE + 2)])
    tokenizer.save_pretrained(tmp_path)
    message = rf"2 tokens .* behind the model's {VOCABULARY + ROWS_MORE} embeddings: 'new25' has {VOCABULARY + 25}"
    with pytest.raises(BackboneError, match=message):
        check_backbone(asked(tmp_path, name), [])


def test_a_head_that_lies_beside_the_embeddings_it_is_tied_to(tmp_path: Path) -> None:
    wanted = stored("llama tied", "as_it_is", tmp_path)
    key = "model.embed_tokens.weight"
    rewritten(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors[key].clone()})
    model, _ = loaded(tmp_path)
    assert torch.equal(logits(model), logits(wanted))
    assert is_tied(model)


def test_a_head_of_its_own_is_kept_where_the_configuration_ties_it(tmp_path: Path) -> None:
    stored("llama tied", "as_it_is", tmp_path)
    head = torch.randn(VOCABULARY, 16)
    rewritten(tmp_path, lambda tensors: {**tensors, "lm_head.weight": head})
    model, _ = loaded(tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    assert not is_tied(model)
