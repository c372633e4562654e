from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sapt_core.data import load_sequence
from sapt_core.data.encoding import PromptEncoder
from sapt_core.data.prepare import SPLITS, PreparedTask, check_fits, prepare_task
from sapt_core.data.task import Example, Task
from sapt_core.data.templates import TEMPLATES, PromptPieces
from sapt_core.errors import BackboneError, DataError
from sapt_core.settings import BenchmarkConfig

SHARED = Path(__file__).resolve().parents[4] / "shared"
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
TEXTS = [
    "Definition: Name the colour.\n\nNow complete the following example -\nInput: the sky is blue\nOutput: ",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa",
]
WORDS = TEXTS[1].split()
LETTERS = sorted({*"".join(TEXTS), "▁", "_"} - {" "})
MERGED = [word[:end] for word in ("▁alpha", "▁Output") for end in range(2, len(word) + 1)]


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: word starts carry a marker, EOS is appended."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [PAD, EOS, UNK]
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token=UNK, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=20
    )


def byte_bpe() -> PreTrainedTokenizerFast:
    """Llama 3's kind: bytes, BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: words and their pieces, no blank is a token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=[PAD, EOS, UNK], show_progress=False)
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNK)


def blank_in_front() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a mark for a blank is put in front of any text, and nothing parts words before merging."""
    vocabulary = {piece: index for index, piece in enumerate([BOS, EOS, UNK, *LETTERS, *MERGED])}
    merges = [(merged[:-1], merged[-1]) for merged in MERGED]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=UNK
    )


def across_words() -> PreTrainedTokenizerFast:
    """A vocabulary with tokens of more than a word: here one over the border of prompt and answer."""
    vocabulary = {piece: index for index, piece in enumerate([EOS, UNK, *LETTERS, " ", ": ", ": a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "a")], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, unk_token=UNK)


class LetterTokenizer(PreTrainedTokenizer):
    """A tokenizer without character offsets: one letter, one token."""

    @property
    def vocab_size(self) -> int:
        return 200

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(200)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return 199 if token == EOS else ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return EOS if index == 199 else chr(index)


def task(name: str = "greek", definition: str = "Name the colour.", words: int = 3) -> Task:
    rows = tuple(Example(" ".join(WORDS[i : i + words]), (WORDS[i], "blue")) for i in range(5))
    return Task(name, definition, rows[:3], rows[3:4], rows[4:], "superni", "rouge_l")


@pytest.fixture(scope="module")
def t5() -> PreTrainedTokenizerFast:
    return unigram()


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerFast:
    return byte_bpe()


@pytest.fixture(scope="module")
def tokenizers(t5: PreTrainedTokenizerFast, llama: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    return {"unigram": t5, "byte_bpe": llama}


def whole_text(of: Task, row: Example) -> str:
    return "".join(TEMPLATES[of.template].pieces(of.definition, row.input))


def test_encoder_decoder_rows_that_fit_are_what_the_tokenizer_gives(t5: PreTrainedTokenizerFast) -> None:
    one = task()
    prepared = prepare_task(one, t5, max_source_tokens=400, max_target_tokens=30, is_encoder_decoder=True)
    for split in SPLITS:
        for given_row, row in zip(getattr(one, split), getattr(prepared, split), strict=True):
            assert row["prompt_ids"] == t5(whole_text(one, given_row))["input_ids"]
            assert row["answer_ids"] == t5(given_row.references[0])["input_ids"]
            assert row["answer_ids"][-1] == t5.eos_token_id
            assert (row["input"], row["references"]) == (given_row.input, list(given_row.references))
    assert prepared.facts is not None
    assert all((each.prompts_cut, each.answers_cut) == (0, 0) for each in prepared.facts.splits.values())


def test_decoder_only_prompts_begin_with_bos_and_do_not_end(
    llama: PreTrainedTokenizerFast, t5: PreTrainedTokenizerFast
) -> None:
    one = task()
    text = whole_text(one, one.train[0]).removesuffix(" ")
    with_bos = prepare_task(one, llama, max_source_tokens=400, max_target_tokens=30, is_encoder_decoder=False).train[0]
    assert with_bos["prompt_ids"] == llama(text)["input_ids"]
    assert with_bos["prompt_ids"][0] == llama.bos_token_id
    assert with_bos["answer_ids"] == [*llama(" alpha", add_special_tokens=False)["input_ids"], llama.eos_token_id]
    without = prepare_task(one, t5, max_source_tokens=400, max_target_tokens=30, is_encoder_decoder=False).train[0]
    assert without["prompt_ids"] == t5(text)["input_ids"][:-1]
    assert without["answer_ids"] == t5("alpha")["input_ids"]


KINDS = {
    "byte_bpe": byte_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "blank_in_front": blank_in_front,
    "llama-mini": lambda: AutoTokenizer.from_pretrained(SHARED / "models" / "llama-mini"),
}
VOCABULARIES = [
    pytest.param(kind, marks=pytest.mark.skipif(not (SHARED / "models" / kind).is_dir(), reason=f"{kind} is not there"))
    if kind == "llama-mini"
    else kind
    for kind in KINDS
]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With what stands in front of a text, and nothing behind it."""
    front = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    return [*front, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("template", ["superni", "long_sequence"])
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_prompt_and_answer_of_a_decoder_only_row_are_one_text(kind: str, template: str) -> None:
    tokenizer = KINDS[kind]()
    one = replace(task(), template=template)
    prepared = prepare_task(one, tokenizer, max_source_tokens=400, max_target_tokens=60, is_encoder_decoder=False)
    encoder = PromptEncoder(tokenizer, max_source_tokens=400, is_encoder_decoder=False)
    for given_row, row in zip(one.train, prepared.train, strict=True):
        text = whole_text(one, given_row) + given_row.references[0]
        assert [*row["prompt_ids"], *row["answer_ids"]] == [*ids_of(tokenizer, text), tokenizer.eos_token_id]
        (asked,) = encoder.prompts(template, one.definition, [given_row.input])
        assert (asked.prompt_ids, asked.query_start) == (row["prompt_ids"], row["query_start"])
        # A whole prompt that somebody typed, with the blank at its end or without.
        for typed in (whole_text(one, given_row), whole_text(one, given_row).rstrip()):
            (bare,) = encoder.prompts("none", "", [typed])
            assert bare.prompt_ids == row["prompt_ids"]


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_decoder_only_row_that_is_cut_keeps_its_answer(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoder = PromptEncoder(tokenizer, max_source_tokens=10_000, is_encoder_decoder=False)
    room = encoder.template_tokens("superni", "Name the colour.") + 60
    tight = PromptEncoder(tokenizer, max_source_tokens=room, is_encoder_decoder=False)
    pair = (" ".join(["kappa", *["gamma"] * 120, "theta"]), "alpha")
    ((whole,), (cut,)) = (each.rows("superni", "Name the colour.", [pair], 60) for each in (encoder, tight))
    assert cut.prompt.truncated
    assert len(cut.prompt.prompt_ids) == room
    assert cut.answer_ids == whole.answer_ids
    assert cut.prompt == tight.prompts("superni", "Name the colour.", [pair[0]])[0]


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_what_a_decoder_only_model_writes_goes_on_behind_what_asks_for_it(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoder = PromptEncoder(tokenizer, max_source_tokens=64, is_encoder_decoder=False)
    pieces = PromptPieces("alpha", "__inp__", "kappa", "")
    (written,) = encoder.targets("__gen__", [pieces], 60)
    joined = [*ids_of(tokenizer, "__gen__ alpha__inp__kappa"), tokenizer.eos_token_id]
    assert [*encoder.text("__gen__"), *written] == joined
    (cut,) = encoder.targets("__gen__", [pieces._replace(input="kappa " + "gamma " * 90 + "theta")], 60)
    assert len(cut) == 60
    assert cut[:3] == written[:3]


def test_an_answer_across_whose_border_a_token_lies_is_tokenised_apart() -> None:
    tokenizer = across_words()
    text = whole_text(task(), task().train[0])
    assert tokenizer(text + "alpha")["input_ids"][:-5] != tokenizer(text[:-1])["input_ids"]
    encoder = PromptEncoder(tokenizer, max_source_tokens=400, is_encoder_decoder=False)
    (row,) = encoder.rows("superni", "Name the colour.", [(task().train[0].input, "alpha")], 60)
    assert [*row.prompt.prompt_ids, *row.answer_ids] == [
        *tokenizer(text[:-1])["input_ids"], *tokenizer(" alpha")["input_ids"], tokenizer.eos_token_id,
    ]  # fmt: skip
    assert tokenizer.decode([*row.prompt.prompt_ids, *row.answer_ids], skip_special_tokens=True) == text + "alpha"
    (written,) = encoder.targets("gen:", [PromptPieces("alpha", "__inp__", "beta", "")], 60)
    assert tokenizer.decode(written, skip_special_tokens=True) == " alpha__inp__beta"


@pytest.mark.parametrize("kind", ["unigram", "byte_bpe"])
def test_what_is_not_joined_has_the_ids_of_its_parts(tokenizers: dict[str, PreTrainedTokenizerFast], kind: str) -> None:
    """As versions of earlier releases were taught, which have to be asked the same way."""
    tokenizer, one = tokenizers[kind], task()
    options = {"max_source_tokens": 400, "max_target_tokens": 60, "is_encoder_decoder": False}
    prepared = prepare_task(one, tokenizer, **options, joined=False)
    for given_row, row in zip(one.train, prepared.train, strict=True):
        assert row["prompt_ids"] == ids_of(tokenizer, whole_text(one, given_row))
        answer = tokenizer(given_row.references[0], add_special_tokens=False)["input_ids"]
        assert row["answer_ids"] == [*answer, tokenizer.eos_token_id]


def test_a_prompt_of_blanks_alone_stays() -> None:
    encoder = PromptEncoder(byte_bpe(), max_source_tokens=40, is_encoder_decoder=False)
    (prompt,) = encoder.prompts("none", "", ["  "])
    assert prompt.prompt_ids == encoder.text("  ")


@pytest.mark.parametrize("kind", ["unigram", "byte_bpe"])
def test_query_starts_behind_the_definition(tokenizers: dict[str, PreTrainedTokenizerFast], kind: str) -> None:
    tokenizer = tokenizers[kind]
    encoder = PromptEncoder(tokenizer, max_source_tokens=400, is_encoder_decoder=False)
    (prompt,) = encoder.prompts("superni", "Name the colour.", ["alpha"])
    definition = tokenizer.decode(prompt.prompt_ids[: prompt.query_start], skip_special_tokens=True)
    rest = tokenizer.decode(prompt.prompt_ids[prompt.query_start :])
    assert definition.strip() == "Definition: Name the colour."
    assert rest.strip().startswith("Now complete")
    (bare,) = encoder.prompts("long_sequence", "", ["alpha"])
    assert bare.query_start == (1 if kind == "byte_bpe" else 0)


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "byte_bpe"])
def test_long_rows_lose_the_middle_of_their_input(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, is_encoder_decoder: bool
) -> None:
    tokenizer = tokenizers[kind]
    free = PromptEncoder(tokenizer, max_source_tokens=10_000, is_encoder_decoder=is_encoder_decoder)
    room = free.template_tokens("superni", "Name the colour.") + 60
    encoder = PromptEncoder(tokenizer, max_source_tokens=room, is_encoder_decoder=is_encoder_decoder)
    text = " ".join(["kappa", *["gamma"] * 120, "theta"])
    (cut,) = encoder.prompts("superni", "Name the colour.", [text])
    (whole,) = free.prompts("superni", "Name the colour.", [text])
    assert cut.truncated
    assert len(cut.prompt_ids) == room < len(whole.prompt_ids)
    assert cut.query_start == whole.query_start
    # What is left is a head and a tail of the whole, and both reach into the input.
    agree = next(i for i, (a, b) in enumerate(zip(cut.prompt_ids, whole.prompt_ids, strict=False)) if a != b)
    assert cut.prompt_ids[agree:] == whole.prompt_ids[len(whole.prompt_ids) - (room - agree) :]
    decoded = " ".join(tokenizer.decode(cut.prompt_ids, skip_special_tokens=True).split())
    assert decoded.startswith("Definition: Name the colour. Now complete the following example - Input: kappa gamma")
    assert decoded.endswith("gamma theta Output:")


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "byte_bpe"])
@settings(deadline=None, max_examples=30)
@given(
    text=st.lists(st.sampled_from([*WORDS, "x", "  ", "\n", "é", "猫", EOS]), min_size=1, max_size=60).map(" ".join),
    room=st.integers(6, 60),
)
def test_prompts_never_exceed_their_length(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, is_encoder_decoder: bool, text: str, room: int
) -> None:
    tokenizer = tokenizers[kind]
    free = PromptEncoder(tokenizer, max_source_tokens=10_000, is_encoder_decoder=is_encoder_decoder)
    limit = free.template_tokens("superni", "Name it.") + room
    (whole,) = free.prompts("superni", "Name it.", [text])
    (prompt,) = PromptEncoder(tokenizer, max_source_tokens=limit, is_encoder_decoder=is_encoder_decoder).prompts(
        "superni", "Name it.", [text]
    )
    assert len(prompt.prompt_ids) == min(limit, len(whole.prompt_ids))
    assert prompt.truncated == (len(whole.prompt_ids) > limit)
    # The template stays: the last tokens before any special one, and everything up to the input.
    assert prompt.prompt_ids[-3:] == whole.prompt_ids[-3:]
    if room >= limit // 4:
        assert prompt.prompt_ids[: prompt.query_start] == whole.prompt_ids[: whole.query_start]


def test_a_tokenizer_without_offsets_is_cut_piece_by_piece() -> None:
    tokenizer = LetterTokenizer(eos_token=EOS, pad_token=EOS)
    assert not tokenizer.is_fast
    text = "Definition: Name it.\n\nNow complete the following example -\nInput: "
    limit = len(text) + 29 + len("\nOutput:")
    encoder = PromptEncoder(tokenizer, max_source_tokens=limit, is_encoder_decoder=False)
    fits, cut = encoder.prompts("superni", "Name it.", ["alpha", "abcdefghijklmnopqrstuvwxyz" * 2])
    assert "".join(map(chr, fits.prompt_ids)) == f"{text}alpha\nOutput:"
    assert "".join(map(chr, cut.prompt_ids)) == f"{text}abcdefghijklmnomnopqrstuvwxyz\nOutput:"
    assert (fits.truncated, cut.truncated) == (False, True)
    assert fits.query_start == cut.query_start == len("Definition: Name it.")


def test_answers_are_cut_but_keep_their_end(t5: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(t5, max_source_tokens=100, is_encoder_decoder=True)
    whole = t5("alpha beta gamma")["input_ids"]
    (ids, cut), (same, uncut) = (
        (row.answer_ids, row.answer_cut)
        for size in (len(whole) - 1, len(whole))
        for row in encoder.rows("superni", "", [("alpha", "alpha beta gamma")], size)
    )
    assert (ids, cut) == ([*whole[: len(whole) - 2], t5.eos_token_id], True)
    assert (same, uncut) == (whole, False)
    prepared = prepare_task(task(), t5, max_source_tokens=400, max_target_tokens=2, is_encoder_decoder=True)
    assert prepared.facts is not None
    assert prepared.facts.splits["train"].answers_cut == sum(
        len(t5(row.references[0])["input_ids"]) > 2 for row in task().train
    )


def test_long_definitions_lose_their_middle_when_the_input_is_down_to_a_quarter(
    t5: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = "Name the " + "blue " * 100 + "colour."
    limit = 120
    check_fits([task("fine", "Name it."), task("long", long)], t5, max_source_tokens=limit, is_encoder_decoder=True)
    assert [record.args[0] for record in caplog.records if record.args] == ["long"]
    encoder = PromptEncoder(t5, max_source_tokens=limit, is_encoder_decoder=True)
    short, over = encoder.prompts("superni", long, ["kappa", " ".join(["kappa", *["gamma"] * 100, "theta"])])
    for prompt, ends in ((short, "Input: kappa Output:"), (over, "theta Output:")):
        assert len(prompt.prompt_ids) == limit
        decoded = " ".join(t5.decode(prompt.prompt_ids, skip_special_tokens=True).split())
        assert decoded.startswith("Definition: Name the blue")
        assert "colour. Now complete the following example - Input: kappa" in decoded
        assert decoded.endswith(ends)
        rest = " ".join(t5.decode(prompt.prompt_ids[prompt.query_start :], skip_special_tokens=True).split())
        assert rest.startswith("Now complete")


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_what_a_generator_writes_keeps_its_marker_however_long_the_definition(is_encoder_decoder: bool) -> None:
    tokenizer = byte_bpe()
    encoder = PromptEncoder(tokenizer, max_source_tokens=10, is_encoder_decoder=is_encoder_decoder)
    long = "alpha " + "beta " * 200 + "gamma"
    short, cut = (encoder.targets("", [PromptPieces(text, "__inp__", "kappa", "")], 60)[0] for text in ("alpha", long))
    assert len(short) < len(cut) == 60
    assert short[-1] == cut[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short, skip_special_tokens=True).lstrip() == "alpha__inp__kappa"
    written = tokenizer.decode(cut, skip_special_tokens=True).lstrip()
    assert written.startswith("alpha beta")
    assert written.endswith("beta gamma__inp__kappa")


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize(("before", "answer"), [(0, 4), (0, 400), (20, 400)])
def test_an_answer_to_write_that_fits_beside_no_input_loses_its_end(
    before: int, answer: int, is_encoder_decoder: bool
) -> None:
    tokenizer = byte_bpe()
    encoder = PromptEncoder(tokenizer, max_source_tokens=10, is_encoder_decoder=is_encoder_decoder)
    pieces = PromptPieces("alpha " * before, "__inp__", "kappa", "__ans__" + "b" * answer)
    (ids,) = encoder.targets("", [pieces], 60)
    whole = len(encoder.targets("", [pieces], 1000)[0])
    assert len(ids) == min(60, whole)
    assert ids[-1] == tokenizer.eos_token_id
    text, _, written = tokenizer.decode(ids, skip_special_tokens=True).partition("__ans__")
    assert text.endswith("__inp__kappa")
    assert written
    assert set(written) == {"b"}


def test_templates_that_leave_no_room_are_refused_together(t5: PreTrainedTokenizerFast) -> None:
    tasks = [task("one"), task("two")]
    with pytest.raises(DataError) as caught:
        check_fits(tasks, t5, max_source_tokens=10, is_encoder_decoder=True)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["one", "two"]
    assert "benchmark.max_source_tokens is 10" in caught.value.faults[0]
    with pytest.raises(DataError, match="one: the template and a quarter"):
        prepare_task(tasks[0], t5, max_source_tokens=10, max_target_tokens=9, is_encoder_decoder=True)


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_a_split_may_be_empty(t5: PreTrainedTokenizerFast, is_encoder_decoder: bool) -> None:
    task = Task("one", "alpha", (Example("beta", ("gamma",)),), (), (), "superni", "exact_match")
    prepared = prepare_task(task, t5, max_source_tokens=90, max_target_tokens=5, is_encoder_decoder=is_encoder_decoder)
    assert [len(getattr(prepared, split)) for split in SPLITS] == [1, 0, 0]


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(BackboneError, match="no EOS token"):
        PromptEncoder(tokenizer, max_source_tokens=100, is_encoder_decoder=False)


def test_blobs_round_trip_and_repeat(t5: PreTrainedTokenizerFast) -> None:
    options = {"max_source_tokens": 80, "max_target_tokens": 5}
    prepared = prepare_task(task(words=5), t5, **options, is_encoder_decoder=True)
    blobs = prepared.to_blobs()
    assert sorted(blobs) == ["dev.arrow", "meta.json", "test.arrow", "train.arrow"]
    assert prepare_task(task(words=5), t5, **options, is_encoder_decoder=True).to_blobs() == blobs
    back = PreparedTask.from_blobs(blobs)
    assert back.to_blobs() == blobs
    assert (back.name, back.definition, back.template, back.metric) == (
        "greek", "Name the colour.", "superni", "rouge_l",
    )  # fmt: skip
    for split in SPLITS:
        assert getattr(back, split).to_list() == getattr(prepared, split).to_list()


def test_rows_of_one_split_change_no_blob_but_its_own(t5: PreTrainedTokenizerFast) -> None:
    def blobs(changed: Task) -> dict[str, bytes]:
        return prepare_task(changed, t5, max_source_tokens=80, max_target_tokens=5, is_encoder_decoder=True).to_blobs()

    before = blobs(task())
    long = Example("one row more " * 80, ("of more tokens than there is room for",))
    for split in SPLITS:
        after = blobs(replace(task(), **{split: (*getattr(task(), split), long)}))
        assert {name for name in before if after[name] != before[name]} == {f"{split}.arrow"}


def test_blobs_of_earlier_releases_are_read(t5: PreTrainedTokenizerFast) -> None:
    blobs = prepare_task(task(), t5, max_source_tokens=80, max_target_tokens=5, is_encoder_decoder=True).to_blobs()
    counts = {"rows": {"train": 3}, "truncated": {"train": {"prompts": 1, "answers": 0}}}
    written = json.dumps(json.loads(blobs["meta.json"]) | counts).encode()
    assert PreparedTask.from_blobs({**blobs, "meta.json": written}).to_blobs() == blobs


def test_a_task_without_test_rows(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for kind, tokenizer in tokenizers.items():
        untested = replace(task(), test=())
        prepared = prepare_task(
            untested, tokenizer, max_source_tokens=64, max_target_tokens=8, is_encoder_decoder=kind == "t5"
        )
        assert (len(prepared.train), len(prepared.test)) == (len(untested.train), 0)


def test_a_selection_of_rows_is_what_gets_written(t5: PreTrainedTokenizerFast) -> None:
    prepared = prepare_task(task(), t5, max_source_tokens=80, max_target_tokens=5, is_encoder_decoder=True)
    fewer = PreparedTask(**{**vars(prepared), "train": prepared.train.select([2, 0]), "dev": prepared.dev.select([])})
    back = PreparedTask.from_blobs(fewer.to_blobs())
    assert back.train["input"][:] == [prepared.train[2]["input"], prepared.train[0]["input"]]
    assert len(back.dev) == 0


@pytest.fixture(scope="module")
def mini() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "t5-mini")


@pytest.mark.skipif(not (SHARED / "models" / "t5-mini").is_dir(), reason=f"the real data are not at {SHARED}")
@pytest.mark.parametrize("suite", ["superni", "long_sequence"])
def test_real_tasks_tokenise(suite: str, mini: PreTrainedTokenizerBase) -> None:
    data_dir = SHARED / "data" / "CL_Benchmark" / ("SuperNI" if suite == "superni" else "Long_Sequence")
    names = tuple(sorted(folder.name for folder in data_dir.iterdir() if folder.is_dir()))
    config = BenchmarkConfig(suite=suite, data_dir=data_dir, tasks=names, train_rows=40, test_rows=15)
    tasks = load_sequence(config)
    assert len(tasks) == (15 if suite == "superni" else 10)
    check_fits(tasks, mini, max_source_tokens=512, is_encoder_decoder=True)
    for one in tasks:
        prepared = prepare_task(one, mini, max_source_tokens=512, max_target_tokens=50, is_encoder_decoder=True)
        assert (len(prepared.train), len(prepared.dev), len(prepared.test)) == (36, 4, 15)
        for given_row, row in zip(one.train, prepared.train, strict=True):
            whole = mini(whole_text(one, given_row), verbose=False)["input_ids"]
            assert len(row["prompt_ids"]) == min(512, len(whole))
            if len(whole) <= 512:
                assert row["prompt_ids"] == whole
            assert mini.decode(row["prompt_ids"], skip_special_tokens=True).rstrip().endswith("Output:")
            assert 0 < row["query_start"] < len(row["prompt_ids"])
            assert row["answer_ids"][-1] == mini.eos_token_id
            assert 2 <= len(row["answer_ids"]) <= 50
