"""The quickstart's backbone: the script that makes it, and the one that is shipped."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.maintenance.pretraining import SKILLS, build_tokenizer, draw_example, pretrain, skill_scores
from sapt_core.data.lexicon import open_class_words
from sapt_core.data.synthetic import TASKS, is_test_input, synthetic_sequence
from sapt_core.data.templates import TEMPLATES
from sapt_core.settings import BenchmarkConfig

SHIPPED = Path(__file__).parents[3] / "pipelines" / "backbones" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(SHIPPED)


def test_the_shipped_backbone_is_small_and_holds_no_pickle() -> None:
    files = sorted(SHIPPED.iterdir())
    assert [file.name for file in files] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def test_the_shipped_tokenizer_is_the_scripts(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer)


def test_prompts_and_answers_hold_no_unknown_word_and_no_letter_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    for task in synthetic_sequence(BenchmarkConfig(suite="synthetic", train_rows=500, test_rows=200)):
        for row in task.train + task.dev + task.test:
            prompt = "".join(TEMPLATES["superni"].pieces(task.definition, row.input))
            pieces = tokenizer.tokenize(prompt) + tokenizer.tokenize(row.references[0])
            assert tokenizer.unk_token not in pieces
            assert not [piece for piece in pieces if piece.startswith("##")]


def test_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for task in synthetic_sequence(BenchmarkConfig(suite="synthetic")):
        for row in task.train:
            ids = tokenizer(row.input)["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == row.input


def test_words_it_does_not_know_survive_as_letters(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("The Zebra café, 42 foxes!")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the zebra cafe, 42 foxes!"
    assert tokenizer.unk_token_id in tokenizer("fox 狐")["input_ids"]


def test_the_generators_marks_are_single_tokens_that_decoding_keeps(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("__gen__") == ["__gen__"]
    ids = tokenizer("Give its final item.__inp__to buy for ada: tea.")["input_ids"]
    definition, text = tokenizer.decode(ids, skip_special_tokens=True).split("__inp__")
    assert (definition.strip(), text.strip()) == ("give its final item.", "to buy for ada: tea.")


def test_the_shipped_backbone_copies_and_says(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    scores = skill_scores(model, tokenizer, Random(7), rows=20)
    assert min(scores[name] for name in ("repeat", "say")) >= 80, scores


def test_pretraining_shows_no_definition_and_no_test_input_of_a_task() -> None:
    rng, words = Random(3), list(open_class_words())
    definitions = [task.definition.lower() for task in TASKS.values()]
    for source, target in (draw_example(rng, words) for _ in range(3000)):
        text = f"{source} {target}".lower()
        assert not any(definition in text for definition in definitions)
        assert not (source == "__gen__" and is_test_input(target) and "__inp__" not in target)


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.__name__.strip("_"))
def test_skills_answer_with_words_of_their_own_row(skill: object) -> None:
    rng, vocabulary = Random(5), list(open_class_words())
    for _ in range(200):
        definition, text, answer = skill(rng, rng.sample(vocabulary, 6))
        assert answer
        if skill.__name__ != "_fill":
            assert set(answer.split()) <= {word.strip(".,") for word in f"{definition} {text}".split()}


def test_the_script_trains_and_repeats_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain(tmp_path / name, seed=3, copy_steps=2, mix_steps=2)
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (SHIPPED / "tokenizer.json").read_bytes()
